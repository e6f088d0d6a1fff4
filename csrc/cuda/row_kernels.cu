// Row kernels: softmax statistics of a block of logits, its divergence from the similarity rows, and its gradient in place.
//
// Reference: tiedkl/reference.py; the arithmetic is that of csrc/cpu/row_kernels.cpp, elements in float32 and sums in double. One
// thread block works on one row, 16 bytes a load and several loads in flight; a thread's columns are added up in their order and
// the threads' sums in a fixed one, without atomics: reruns give the same bits.
//
//   statistics   read z:                m, sum e^(z-m), sum e^((z-m)/tau), sum e^(z-m)(z-m)        2 exponentials
//   gradient     read z, s, write G:    p = e^(z-max)/sum,  q = e^((s-max)/tau)/sum_s              3 exponentials
//                x = log r - log q,  KL += q (expm1(x) - x)
//                G = g (p (1 + 2 lam l1) - eps/V + (alpha/tau) q expm1(x))
//
// A bias and a softcap are applied as logits are read, in each pass anew: that costs arithmetic, storing them a write of the block.
#include "device.cuh"

namespace tiedkl::cuda {
namespace {

constexpr int kLoads = 4, kGradientLoads = 2;  // loads in flight: what registers allow
constexpr int64_t kNever = INT64_MAX;

// Sums over a thread's share of a row, relative to their maximum.
struct Running {
  float m = -FLT_MAX;
  double sum = 0, sum_t = 0, weighted = 0, total = 0;
  __device__ void rebase(float top, float inv_t) {
    const float shift = at_least(m - top, kExpFloor);
    const double scale = exp_bounded(shift);
    weighted = scale * (weighted + double(shift) * sum);
    sum *= scale;
    sum_t *= double(exp_bounded(at_least((m - top) * inv_t, kExpFloor)));
    m = top;
  }
};

template <bool kKL>
__global__ void __launch_bounds__(kThreads) token_stats_kernel(Block b, LossParams p) {
  const int64_t n = blockIdx.x, skip = b.y[n] - b.v0;
  if (b.y[n] < 0) return;
  const float* z = b.z + n * b.ldz;
  const float inv_t = float(1.0 / p.temperature), cap = float(p.softcap);
  Running r;
  for (int64_t c = threadIdx.x * kLane; c < b.cols; c += kThreads * kLane * kLoads) {
    float x[kLoads * kLane];
    float top = r.m;
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64_t i = c + int64_t(u) * kThreads * kLane;
      Pack<float> pack{};
      if (i < b.cols) pack = load(z + i);
      for (int j = 0; j < kLane; ++j) x[u * kLane + j] = pack.v[j];
    }
    float total = 0;
    unsigned others = 0;  // a bit for each of x that is a column other than the target's
#pragma unroll
    for (int k = 0; k < kLoads * kLane; ++k) {
      const int64_t i = c + int64_t(k / kLane) * kThreads * kLane + k % kLane;
      if (i >= b.cols) continue;
      x[k] = logit(x[k], b, cap, i);
      total += x[k];
      if (i == skip) continue;
      others |= 1u << k;
      top = x[k] > top ? x[k] : top;
    }
    if (top > r.m) r.rebase(top, inv_t);
    float sum = 0, sum_t = 0, weighted = 0;
#pragma unroll
    for (int k = 0; k < kLoads * kLane; ++k) {
      const float d = at_least(x[k] - top, kExpFloor), e = exp_bounded(d);
      if (!(others >> k & 1u)) continue;
      sum += e;
      weighted = std::fma(e, d, weighted);
      if constexpr (kKL) sum_t += exp_bounded(at_least((x[k] - top) * inv_t, kExpFloor));
    }
    r.sum += sum, r.sum_t += sum_t, r.weighted += weighted, r.total += total;
  }
  const float top = block_max(r.m);
  r.rebase(top, inv_t);
  double sums[] = {r.sum, r.sum_t, r.weighted, r.total};
  block_sum(sums);
  if (threadIdx.x != 0) return;
  TokenState& state = b.token[n];
  TokenState here;
  here.m = top, here.sum = sums[0], here.sum_t = sums[1], here.weighted = sums[2], here.total = sums[3];
  merge(state, here, inv_t);
  if (skip >= 0 && skip < b.cols) state.zy = logit(z[skip], b, cap, skip);
  if (!kKL || !p.target_grad) return;
  const int64_t peak = b.teacher[b.which[n]].peak - b.v0;
  if (peak >= 0 && peak < b.cols) state.z_peak = logit(z[peak], b, cap, peak);
}

__global__ void __launch_bounds__(kThreads) teacher_stats_kernel(Block b, LossParams p) {
  const int64_t u = blockIdx.x;
  if (u >= *b.count) return;
  const float* s = b.s + u * b.lds;
  const int64_t self = b.ids[u] - b.v0;
  const float inv_t = float(1.0 / p.temperature);
  Running r;
  int64_t peak = kNever;
  for (int64_t c = threadIdx.x * kLane; c < b.cols; c += kThreads * kLane * kLoads) {
    Pack<float> x[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int64_t i = c + int64_t(l) * kThreads * kLane;
      if (i < b.cols) x[l] = load(s + i);
    }
    float top = r.m;
#pragma unroll
    for (int k = 0; k < kLoads * kLane; ++k) {
      const int64_t i = c + int64_t(k / kLane) * kThreads * kLane + k % kLane;
      const float v = x[k / kLane].v[k % kLane];
      if (i < b.cols && v > top) top = v, peak = i;
    }
    if (top > r.m) r.rebase(top, inv_t);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kLoads * kLane; ++k) {
      const int64_t i = c + int64_t(k / kLane) * kThreads * kLane + k % kLane;
      if (i < b.cols && i != self) sum += exp_bounded(at_least((x[k / kLane].v[k % kLane] - top) * inv_t, kExpFloor));
    }
    r.sum_t += sum;
  }
  const float top = block_max(r.m);
  peak = block_min(r.m == top ? peak : kNever);
  r.rebase(top, inv_t);
  double sums[] = {r.sum_t};
  block_sum(sums);
  if (threadIdx.x != 0) return;
  TeacherState here;
  here.m = top, here.sum = sums[0], here.peak = peak == kNever ? -1 : b.v0 + peak;
  merge(b.teacher[u], here, inv_t);
}

__global__ void finish_tokens_kernel(Block b, LossParams p) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= b.rows || b.y[n] < 0) return;
  TokenState s = b.token[n];
  const TokenTerms terms = finish_token(s, p, double(b.n_vocab));
  const double inv_t = 1.0 / p.temperature, g = b.g ? double(b.g[n]) : 0.0;
  const double coef_p = g * s.inv_sum * (1.0 + 2.0 * p.z_loss * s.lse), coef_r = g * p.alpha * inv_t;
  double at_target = g * target_gradient(s, p, double(b.n_vocab));
  Row r{};
  r.g = float(g), r.top = float(s.max_all), r.coef_p = float(coef_p), r.coef_p_low = float(coef_p - double(r.coef_p));
  r.constant = float(g * p.label_smoothing / double(b.n_vocab));
  if (p.alpha != 0.0) {
    const TeacherState t = b.teacher[b.which[n]];
    const double sum_s = total(t, inv_t), tops = s.max_all - t.m, offset = std::log(sum_s) - s.log_sum_t;
    r.coef_r = float(coef_r), r.tops = float(tops), r.offset = float(offset), r.offset_low = float(offset - double(r.offset));
    r.inv_sum_t = float(s.inv_sum_t), r.inv_sum_s = float(1.0 / sum_s), r.top_s = float(t.m);
    // The target's own column, compared in double.
    const double q = std::exp((t.self - t.m) * inv_t) / sum_s, x = ((s.zy_exact - t.self) - tops) * inv_t + offset;
    const Divergence d = tiedkl::divergence(q, x, (s.zy_exact - s.max_all) * inv_t - s.log_sum_t);
    s.kl = d.excess;
    at_target += d.r_minus_q * coef_r;
    if (p.target_grad) {
      r.center = float(-(((s.z_peak - t.m) - tops) * inv_t + offset));
      r.delta_y = float(-(x + double(r.center)));
      s.spread = q * double(r.delta_y);
    }
  }
  const double u = p.softcap != 0.0 ? s.zy / p.softcap : 0.0;
  r.at_target = float(at_target * (1.0 - u * u));
  b.token[n] = s;
  b.row[n] = r;
  const double values[5] = {terms.ce, s.kl, s.lse, terms.entropy, terms.correct};
  for (int k = 0; k < 5; ++k) b.terms[k * b.terms_stride + n] = float(values[k]);
}

struct Compared {
  float r_minus_q, excess;
};

__device__ inline Compared compare(float z, float q, float x, const Row& r, float inv_t) {
  const float bounded = x < kLowestX ? kLowestX : x;
  if (x >= 1.0f) {  // q expm1(x) would give r the rounding of x where r exceeds q, and overflow beyond: take r itself there
    const float direct = exp_bounded(at_least((z - r.top) * inv_t, kExpFloor)) * r.inv_sum_t - q;
    return {direct, q > 0.0f ? direct - q * x : direct};
  }
  const Expm1 e = expm1_bounded(bounded);
  return {q * e.value, q * (e.excess + (bounded - x))};
}

// Columns of one row in one thread block; a thread's are read before any thread of the block overwrites them, since G may be
// narrower than z and then lies over other columns of the same row, those of this step and earlier ones.
template <typename Out, bool kKL, bool kWrite>
__global__ void __launch_bounds__(kThreads) gradient_kernel(Block b, LossParams p, bool add_kl) {
  const int64_t n = blockIdx.x, skip = b.y[n] - b.v0;
  const float* z = b.z + n * b.ldz;
  Out* out = reinterpret_cast<Out*>(b.z + n * b.ldz);
  if (b.y[n] < 0) {
    for (int64_t i = threadIdx.x * kLane; kWrite && i < b.cols; i += kThreads * kLane) *reinterpret_cast<Pack<Out>*>(out + i) = Pack<Out>{};
    return;
  }
  const float* s = kKL ? b.s + b.which[n] * b.lds : z;
  const Row r = b.row[n];
  const float inv_t = float(1.0 / p.temperature), cap = float(p.softcap);
  double sums[2] = {0, 0};  // KL, spread
  for (int64_t c = 0; c < b.cols; c += kThreads * kLane * kGradientLoads) {
    Pack<float> zs[kGradientLoads], ss[kGradientLoads];
#pragma unroll
    for (int l = 0; l < kGradientLoads; ++l) {
      const int64_t i = c + (int64_t(l) * kThreads + threadIdx.x) * kLane;
      if (i < b.cols) zs[l] = load(z + i);
      if (kKL && i < b.cols) ss[l] = load(s + i);
    }
    if constexpr (kWrite) __syncthreads();
    float kl = 0, spread = 0;
#pragma unroll
    for (int l = 0; l < kGradientLoads; ++l) {
      const int64_t i = c + (int64_t(l) * kThreads + threadIdx.x) * kLane;
      if (i >= b.cols) continue;
      Pack<Out> grad{};
#pragma unroll
      for (int j = 0; j < kLane; ++j) {
        if (i + j >= b.cols || i + j == skip) continue;
        const float zi = logit(zs[l].v[j], b, cap, i + j);
        float r_minus_q = 0;
        if constexpr (kKL) {
          const float x = log_ratio(zi, ss[l].v[j], r, inv_t), q = similarity_target(ss[l].v[j], r, inv_t);
          const Compared d = compare(zi, q, x, r, inv_t);
          r_minus_q = d.r_minus_q;
          kl += d.excess;
          if constexpr (!kWrite) spread = std::fma(q, -(x + r.center), spread);
        }
        if constexpr (kWrite) {
          const float prob = exp_bounded(at_least(zi - r.top, kExpFloor));
          float value = std::fma(prob, r.coef_p, std::fma(prob, r.coef_p_low, std::fma(r_minus_q, r.coef_r, -r.constant)));
          if (cap != 0.0f) {
            const float u = zi / cap;  // exactly 1 where tanh saturates, so that the gradient is exactly 0
            value *= 1.0f - u * u;
          }
          grad.v[j] = Out(value);
        }
      }
      if constexpr (kWrite) *reinterpret_cast<Pack<Out>*>(out + i) = grad;
    }
    sums[0] += kl, sums[1] += spread;
  }
  block_sum(sums);
  if (threadIdx.x != 0) return;
  if (kWrite && skip >= 0 && skip < b.cols) out[skip] = Out(r.at_target);
  if (!kKL || !add_kl) return;
  TokenState& state = b.token[n];
  state.kl += sums[0], state.spread += sums[1];
  b.terms[b.terms_stride + n] = float(state.kl);
}

template <typename Out>
void write_gradient(const Block& b, const LossParams& p, bool add_kl, void* stream) {
  launch(p.alpha != 0.0 ? gradient_kernel<Out, true, true> : gradient_kernel<Out, false, true>, unsigned(b.rows), stream, b, p, add_kl);
}

unsigned blocks(int64_t items) { return unsigned((items + kThreads - 1) / kThreads); }

}  // namespace

void teacher_stats(const Block& b, const LossParams& p, void* stream) { launch(teacher_stats_kernel, unsigned(b.targets), stream, b, p); }

void token_stats(const Block& b, const LossParams& p, void* stream) {
  launch(p.alpha != 0.0 ? token_stats_kernel<true> : token_stats_kernel<false>, unsigned(b.rows), stream, b, p);
}

void finish_tokens(const Block& b, const LossParams& p, void* stream) { launch(finish_tokens_kernel, blocks(b.rows), stream, b, p); }

void divergence(const Block& b, const LossParams& p, void* stream) {
  launch(gradient_kernel<float, true, false>, unsigned(b.rows), stream, b, p, true);
}

void write_gradient(const Block& b, const LossParams& p, Dtype out, bool add_kl, void* stream) {
  dispatch(out, [&](auto value) { write_gradient<decltype(value)>(b, p, add_kl, stream); });
}

}  // namespace tiedkl::cuda
