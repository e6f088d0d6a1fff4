// Row kernels: softmax statistics of a block of logits, its divergence from the similarity rows, and its gradient in place.
//
// Reference: tiedkl/reference.py. Compiled once per instruction set with CPU_CAPABILITY set; dispatch.cpp picks one. A row is
// walked in chunks that stay in the L1 cache; lanes are summed in float within a chunk, by pieces, and in double across chunks, in
// a fixed order, so results do not depend on the thread count and are the same in every run.
//
//   statistics   read z:                  m, sum e^(z-m), sum e^((z-m)/tau), sum e^(z-m)(z-m)     2 exponentials
//   gradient     read z, s, q, write G:   p = e^(z-max)/sum,  x = log r - log q,                  2 exponentials
//                KL += q (expm1(x) - x),  G = g (p (1 + 2 lam l1) - eps/V + (alpha/tau) q expm1(x))
#include "row_kernels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

#include "vec_loop.h"
#include "vec_math.h"

namespace tiedkl::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kChunk = 2048;  // columns
constexpr double kLowest = -80.0;  // expm1 is -1 to rounding below
constexpr double kFloor = -87.0;  // smallest exponent that float's 2^n can hold; below it a probability counts as e^-87

template <typename T>
T row_max(const T* x, int64_t n) {
  Vec<T> m{std::numeric_limits<T>::lowest()};
  for_vectors<T>(n, [&](int64_t i, auto lanes) {
    // the running maximum second: a NaN on the left is dropped here and shows in the sums instead
    m = at::vec::clamp_min(keep(load(x + i, lanes), std::numeric_limits<T>::lowest(), lanes), m);
  });
  return lane_max(m);
}

// z <- softcap(z + bias)
template <typename T>
void prepare(T* z, const T* bias, int64_t n, double softcap) {
  for_vectors<T>(n, [&](int64_t i, auto lanes) {
    Vec<T> v = load(z + i, lanes);
    if (bias) v = v + load(bias + i, lanes);
    if (softcap != 0.0) v = Vec<T>(T(softcap)) * (v / Vec<T>(T(softcap))).tanh();
    store(v, z + i, lanes);
  });
}

template <typename T>
void teacher_row(T* s, int64_t n, int64_t v0, int64_t self, const LossParams& p, TeacherState& state) {
  const T inv_t = T(1.0 / p.temperature);
  const bool inside = self >= 0 && self < n;
  for (int64_t c = 0; c < n; c += kChunk) {
    const int64_t len = std::min(kChunk, n - c);
    const double top = row_max(s + c, len);
    if (top > state.m) {
      rebase(state, top, inv_t);
      if (p.target_grad) state.peak = v0 + c + (std::find(s + c, s + c + len, T(top)) - (s + c));
    }
    const Vec<T> m{T(state.m)}, it{inv_t}, floor{T(kFloor)};
    PieceSum<T> sum;
    const bool apart = inside && self >= c && self < c + len;
    const T saved = apart ? s[self] : T(0);
    if (apart) s[self] = std::numeric_limits<T>::lowest();
    const auto body = [&](int64_t i, auto lanes) {
      const Vec<T> d = at::vec::clamp_min((load(s + c + i, lanes) - m) * it, floor);
      sum.add(keep(exp_bounded(d), T(0), lanes));
    };
    for_pieces<T>(len, body, sum);
    if (apart) s[self] = saved;
    state.sum += sum.lane_sum();
  }
}

// The similarity target of one row: q = e^((s - m)/tau) / sum.
template <typename T>
void teacher_probabilities(const T* s, int64_t n, int64_t self, T inv_t, const TeacherState& state, T* q) {
  const double sum = total(state, inv_t);
  const Vec<T> m{T(state.m)}, it{inv_t}, inv{T(1.0 / sum)}, floor{T(kFloor)};
  for_vectors<T>(n, [&](int64_t i, auto lanes) {
    const Vec<T> d = at::vec::clamp_min((load(s + i, lanes) - m) * it, floor);
    store(exp_bounded(d) * inv, q + i, lanes);
  });
  if (self >= 0 && self < n) q[self] = T(std::exp((state.self - state.m) * inv_t) / sum);
}

// Add columns [0, n) of one row to its state; `skip` (the target's column) is left out when it lies inside.
template <typename T, bool kKL>
void token_stats(T* z, int64_t n, int64_t skip, const LossParams& p, TokenState& state) {
  const T inv_t = T(1.0 / p.temperature);
  if (p.label_smoothing != 0.0) {
    for (int64_t c = 0; c < n; c += kChunk) {
      PieceSum<T> total;
      const auto body = [&](int64_t i, auto lanes) { total.add(keep(load(z + c + i, lanes), T(0), lanes)); };
      for_pieces<T>(std::min(kChunk, n - c), body, total);
      state.total += total.lane_sum();
    }
  }
  const bool inside = skip >= 0 && skip < n;
  const T saved = inside ? z[skip] : T(0);
  if (inside) {
    state.zy = saved;
    z[skip] = std::numeric_limits<T>::lowest();
  }
  for (int64_t c = 0; c < n; c += kChunk) {
    const int64_t len = std::min(kChunk, n - c);
    const double top = row_max(z + c, len);
    if (top > state.m) rebase(state, top, inv_t);
    const Vec<T> m{T(state.m)}, it{inv_t}, floor{T(kFloor)};
    PieceSum<T> sum, sum_t, weighted;
    const auto body = [&](int64_t i, auto lanes) {
      const Vec<T> d = at::vec::clamp_min(load(z + c + i, lanes) - m, floor);
      const Vec<T> e = keep(exp_bounded(d), T(0), lanes);
      sum.add(e);
      weighted.add_product(e, d);
      if constexpr (kKL) sum_t.add(keep(exp_bounded(at::vec::clamp_min((load(z + c + i, lanes) - m) * it, floor)), T(0), lanes));
    };
    for_pieces<T>(len, body, sum, sum_t, weighted);
    state.sum += sum.lane_sum();
    state.weighted += weighted.lane_sum();
    if constexpr (kKL) state.sum_t += sum_t.lane_sum();
  }
  if (inside) z[skip] = saved;
}

template <typename T>
struct GradientRow {
  T* z;            // (n) logits in, G out
  const T* s;      // (n) similarities; s and q are unused without KL
  T* q;            // (n) as it was on return
  T* a;            // (n) sum over one target's tokens of g (delta - center)
  T* a_low;        // (n) what a's roundings lost
  int64_t n, skip;  // skip: the target's column, or outside [0, n)
  double g, n_vocab;
};

// KL and/or G of one row whose statistics are complete.
template <typename T, bool kKL, bool kWrite, bool kCap, bool kTarget>
void gradient_row(const GradientRow<T>& row, const LossParams& p, const TeacherState* teacher, TokenState& token) {
  const double inv_t = 1.0 / p.temperature;
  const double coef_r = row.g * p.alpha * inv_t;                                       // (alpha/tau)(r - q)
  const double coef_p = row.g * token.inv_sum * (1.0 + 2.0 * p.z_loss * token.lse);  // p
  const double constant = row.g * p.label_smoothing / row.n_vocab;
  // x = log r - log q = ((z - s) - (max z - max s))/tau + (log sum_s - log sum_t): in this order the roundings of the dominant
  // column cancel, however large it is.
  const double tops = kKL ? token.max_all - teacher->m : 0.0;
  const double offset = kKL ? std::log(total(*teacher, inv_t)) - token.log_sum_t : 0.0;
  const Vec<T> m{T(token.max_all)}, it{T(inv_t)}, cp{T(coef_p)}, cp_low{T(coef_p - double(T(coef_p)))}, cr{T(coef_r)}, eps{T(-constant)}, top{T(tops)}, off{T(offset)},
      off_low{T(offset - double(T(offset)))};  // roundings common to a row add up in the products with w
  const Vec<T> middle{T(0.5 * (1.0 + kLowest))}, reach{T(0.5 * (1.0 - kLowest))}, lowest_x{T(kLowest)};
  const Vec<T> floor{T(kFloor)}, inv_t_sum{T(token.inv_sum_t)}, cap{T(p.softcap)}, g{T(row.g)}, one{T(1)};
  // Near the peak of q, where the target gradient q (delta - KL) is large, delta is close to KL: sums of delta over a row or over
  // tokens are taken from its value there, so that they stay small.
  const double center = kTarget ? -(((token.z_peak - teacher->m) - tops) * inv_t + offset) : 0.0;
  const Vec<T> shift{T(center)};
  const bool inside = row.skip >= 0 && row.skip < row.n;
  double zy_share = 0.0;  // (alpha/tau)(r - q) at the target
  const T zy = inside ? row.z[row.skip] : T(0);
  const T qy = kKL && inside ? row.q[row.skip] : T(0), ay = kTarget && kWrite && inside ? row.a[row.skip] : T(0);
  const T ay_low = kTarget && kWrite && inside ? row.a_low[row.skip] : T(0);
  if (kKL && inside) {  // The target's column is compared apart, in double; here q = 0 and log r - log q is next to nothing.
    row.q[row.skip] = T(0);
    row.z[row.skip] = T(row.s[row.skip] + tops - offset * p.temperature);
  }
  double kl = 0;
  for (int64_t c = 0; c < row.n; c += kChunk) {
    const int64_t len = std::min(kChunk, row.n - c);
    T *z = row.z + c, *a = row.a + c, *a_low = row.a_low + c;
    const T *s = row.s + c, *q = row.q + c;
    PieceSum<T> kl_sum, spread;
    const auto body = [&](int64_t i, auto lanes) {
      const Vec<T> zi = load(z + i, lanes);
      Vec<T> r_minus_q{T(0)};
      if constexpr (kKL) {
        const Vec<T> x = keep(at::vec::fmadd((zi - load(s + i, lanes)) - top, it, off) + off_low, T(0), lanes);
        const Vec<T> qi = keep(load(q + i, lanes), T(0), lanes);
        Vec<T> excess;
        if (((x - middle).abs() < reach).zero_mask() == 0) {
          const Expm1<T> e = expm1_bounded(x);
          r_minus_q = qi * e.value;
          excess = qi * e.excess;
        } else {
          // q expm1(x) would give r the rounding of x where r exceeds q, and overflow beyond: take r itself there.
          const Vec<T> xb = at::vec::clamp(x, lowest_x, one);
          const Expm1<T> e = expm1_bounded(xb);
          const Vec<T> r = exp_bounded(at::vec::clamp_min((zi - m) * it, floor)) * inv_t_sum;
          const Vec<T> near = x < one, direct = r - qi;
          r_minus_q = keep(Vec<T>::blendv(direct, qi * e.value, near), T(0), lanes);
          excess = keep(Vec<T>::blendv(direct - qi * x, qi * (e.excess + (xb - x)), near), T(0), lanes);
        }
        if constexpr (kTarget) {
          const Vec<T> d = x + shift;
          if constexpr (kWrite) {  // Kahan's sum: a frequent word has hundreds of tokens
            const Vec<T> old = load(a + i, lanes), term = at::vec::fmadd(g.neg(), d, load(a_low + i, lanes)), sum = old + term;
            store(term - (sum - old), a_low + i, lanes);
            store(sum, a + i, lanes);
          } else {
            spread.add_product(qi.neg(), d);
          }
        }
        kl_sum.add(excess);
      }
      if constexpr (kWrite) {
        const Vec<T> prob = exp_bounded(at::vec::clamp_min(zi - m, floor));
        Vec<T> grad = at::vec::fmadd(prob, cp, at::vec::fmadd(prob, cp_low, at::vec::fmadd(r_minus_q, cr, eps)));
        if constexpr (kCap) {
          const Vec<T> u = zi / cap;  // exactly 1 where tanh saturates, so that the gradient is exactly 0
          grad = grad * (one - u * u);
        }
        store(grad, z + i, lanes);
      }
    };
    for_pieces<T>(len, body, kl_sum, spread);
    if constexpr (kKL) kl += kl_sum.lane_sum();
    if constexpr (kTarget && !kWrite) token.spread += spread.lane_sum();
  }
  if constexpr (kKL) {
    if (inside) {
      const double x = ((token.zy_exact - teacher->self) - tops) * inv_t + offset;
      const Divergence d = divergence(qy, x, (token.zy_exact - token.max_all) * inv_t - token.log_sum_t);
      zy_share = d.r_minus_q * coef_r;
      kl += d.excess;
      row.q[row.skip] = qy;
      if constexpr (kTarget && kWrite) {
        const double sum = (double(ay) + double(ay_low)) - row.g * (x + T(center));
        row.a[row.skip] = T(sum), row.a_low[row.skip] = T(sum - double(T(sum)));
      }
      if constexpr (kTarget && !kWrite) token.spread -= qy * (x + T(center));
    }
    token.kl += kl;
  }
  if (!kWrite && kKL && inside) row.z[row.skip] = zy;
  if (kWrite && inside) {
    const double u = kCap ? zy / p.softcap : 0.0;
    row.z[row.skip] = T((row.g * target_gradient(token, p, row.n_vocab) + zy_share) * (1.0 - u * u));
  }
}

template <typename T>
using GradientFn = void (*)(const GradientRow<T>&, const LossParams&, const TeacherState*, TokenState&);

template <typename T>
GradientFn<T> select_gradient(const LossParams& p, bool write) {
  const bool kl = p.alpha != 0.0, cap = p.softcap != 0.0, target = kl && p.target_grad;
  if (!kl) return cap ? gradient_row<T, false, true, true, false> : gradient_row<T, false, true, false, false>;
  if (!write) return target ? gradient_row<T, true, false, false, true> : gradient_row<T, true, false, false, false>;
  if (target) return cap ? gradient_row<T, true, true, true, true> : gradient_row<T, true, true, false, true>;
  return cap ? gradient_row<T, true, true, true, false> : gradient_row<T, true, true, false, false>;
}

template <typename T>
void teacher_stats(const Tile<T>& t, const LossParams& p) {
  at::parallel_for(0, t.targets, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) teacher_row(t.s + u * t.lds, t.cols, t.v0, t.y[t.group[u]] - t.v0, p, t.teacher[u]);
  });
}

// In double: an error of the mean shifts a whole row of the target gradient one way.
template <typename T>
double dot(const T* x, const T* y, int64_t n) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += double(x[i + j]) * double(y[i + j]);
  }
  for (; i < n; ++i) sums[0] += double(x[i]) * double(y[i]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// T_u over s: (alpha/tau) q_u (a - sum q_u a), a = sum_n g_n (delta_n - center_n). The sum is taken over the very deltas that were
// added up (here, or in the divergence pass), so that T_u sums to zero whatever their rounding.
template <typename T>
void write_target_gradient(T* s, const T* q, const T* a, int64_t n, const LossParams& p, double mean) {
  const Vec<T> k{T(mean)}, k_low{T(mean - double(T(mean)))}, coef{T(p.alpha / p.temperature)};
  for_vectors<T>(n, [&](int64_t i, auto lanes) { store(coef * load(q + i, lanes) * ((load(a + i, lanes) - k) - k_low), s + i, lanes); });
}

template <typename T>
void token_row(const Tile<T>& t, const LossParams& p, unsigned stages, GradientFn<T> gradient, int64_t n, int64_t u, T* q, T* a) {
  T* z = t.z + n * t.ldz;
  TokenState& token = t.token[n];
  const int64_t skip = t.y[n] - t.v0;
  const bool kl = p.alpha != 0.0;
  if ((stages & kPrepare) && (t.bias || p.softcap != 0.0)) prepare(z, t.bias, t.cols, p.softcap);
  if ((stages & kStats) && kl && p.target_grad) {
    const int64_t peak = t.teacher[u].peak - t.v0;
    if (peak >= 0 && peak < t.cols) token.z_peak = z[peak];
  }
  if (stages & kStats) kl ? token_stats<T, true>(z, t.cols, skip, p, token) : token_stats<T, false>(z, t.cols, skip, p, token);
  if (stages & kFinish) {
    const TokenTerms terms = finish_token(token, p, double(t.n_vocab));
    t.ce[n] = T(terms.ce), t.entropy[n] = T(terms.entropy), t.correct[n] = T(terms.correct);
  }
  const bool write = stages & kGradient;
  if (write || (kl && (stages & kDivergence))) {
    const double known = token.kl;
    const T* s = kl ? t.s + u * t.lds : z;
    gradient({z, s, q ? q : z, a ? a : z, a ? a + t.cols : z, t.cols, skip, write ? t.g[n] : 0.0, double(t.n_vocab)}, p, kl ? t.teacher + u : nullptr, token);
    if (!(stages & kDivergence)) token.kl = known;
  }
}

template <typename T>
void token_rows(const Tile<T>& t, const LossParams& p, unsigned stages) {
  const bool kl = p.alpha != 0.0, write = stages & kGradient, compare = kl && (write || (stages & kDivergence));
  const bool target = compare && write && p.target_grad;
  const GradientFn<T> gradient = select_gradient<T>(p, write);
  // Rows of one target stay together where they add up to a target gradient; otherwise rows are split evenly.
  const int64_t items = target ? t.targets : t.rows;
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    T* q = compare ? t.q + at::get_thread_num() * t.cols : nullptr;
    T* a = target ? t.a + 2 * at::get_thread_num() * t.cols : nullptr;
    const int64_t first = target ? t.group[begin] : begin, last = target ? t.group[end] : end;
    int64_t u = kl ? std::upper_bound(t.group, t.group + t.targets + 1, first) - t.group - 1 : 0;
    const bool whole = t.cols == t.n_vocab;
    bool fresh = true;
    double mean = 0;  // sum q a of the current target
    for (int64_t n = first; n < last; ++n) {
      if (kl && n >= t.group[u + 1]) ++u, fresh = true;
      if (compare && fresh) teacher_probabilities(t.s + u * t.lds, t.cols, t.y[n] - t.v0, T(1.0 / p.temperature), t.teacher[u], q);
      if (target && fresh) std::fill_n(a, 2 * t.cols, T(0)), mean = 0;
      fresh = false;
      token_row(t, p, stages, gradient, n, u, q, a);
      if (!target) continue;
      mean += t.g[n] * t.token[n].spread;
      if (n + 1 != t.group[u + 1]) continue;
      write_target_gradient(t.s + u * t.lds, q, a, t.cols, p, whole ? dot(q, a, t.cols) : mean);
    }
  });
}

}  // namespace

template <typename T>
const RowKernels<T>& table() {
  static const RowKernels<T> kernels{teacher_stats<T>, token_rows<T>};
  return kernels;
}

template const RowKernels<float>& table<float>();
template const RowKernels<double>& table<double>();

}  // namespace tiedkl::cpu::CPU_CAPABILITY
