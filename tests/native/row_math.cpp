// csrc/row_math.h and csrc/float_math.h behind a C interface, for tests/native/test_row_math.py.
#include "float_math.h"
#include "row_math.h"

using namespace tiedkl;

extern "C" {

// exp, expm1, expm1(x) - x of n numbers
void exponentials(const float* x, int n, float* exp, float* value, float* excess) {
  for (int i = 0; i < n; ++i) {
    const float low = x[i] < kExpFloor ? kExpFloor : x[i];
    const Expm1 e = expm1_bounded(x[i]);
    exp[i] = exp_bounded(low), value[i] = e.value, excess[i] = e.excess;
  }
}

static TokenState sums(const double* z, int begin, int end, int y, double inv_t) {
  TokenState s;
  for (int v = begin; v < end; ++v) {
    s.total += z[v];
    if (v == y) continue;
    if (z[v] > s.m) rebase(s, z[v], inv_t);
    const double d = z[v] - s.m;
    s.sum += std::exp(d), s.sum_t += std::exp(d * inv_t), s.weighted += std::exp(d) * d;
  }
  return s;
}

static TeacherState similarity_sums(const double* s, int begin, int end, int y, double inv_t) {
  TeacherState state;
  for (int v = begin; v < end; ++v) {
    if (s[v] > state.m) rebase(state, s[v], inv_t), state.peak = v;
    if (v != y) state.sum += std::exp((s[v] - state.m) * inv_t);
  }
  return state;
}

// One row of n logits and similarities with target y, in parts of `part` columns that are merged.
// out: ce, entropy, correct, lse, log_sum_t + max/tau, 1 - p_y, the target's column of G, log-sum-exp of s, its peak
void row(const double* z, const double* s, int n, int y, int part, double temperature, double smoothing, double z_loss, double* out) {
  const LossParams p{temperature, 1.0, smoothing, z_loss, 0.0, false};
  const double inv_t = 1.0 / temperature;
  TokenState token;
  TeacherState teacher;
  for (int v = 0; v < n; v += part) {
    const int end = v + part < n ? v + part : n;
    merge(token, sums(z, v, end, y, inv_t), inv_t);
    merge(teacher, similarity_sums(s, v, end, y, inv_t), inv_t);
  }
  token.zy = token.zy_exact = z[y];
  teacher.self = s[y];
  const TokenTerms terms = finish_token(token, p, n);
  out[0] = terms.ce, out[1] = terms.entropy, out[2] = terms.correct, out[3] = token.lse;
  out[4] = token.log_sum_t + token.max_all * inv_t, out[5] = token.not_target;
  out[6] = target_gradient(token, p, n);
  out[7] = teacher.m * inv_t + std::log(total(teacher, inv_t)), out[8] = double(teacher.peak);
}

// q (expm1(x) - x) and q expm1(x), log_r = log q + x
void diverge(double q, double x, double log_r, double* out) {
  const Divergence d = divergence(q, x, log_r);
  out[0] = d.excess, out[1] = d.r_minus_q;
}
}
