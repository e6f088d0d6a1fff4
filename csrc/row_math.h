// Row formulas that every native backend shares: what turns the sums of one row into losses and gradient coefficients.
//
// Plain scalar arithmetic in double, no torch and no vector headers, so that a host compiler, nvcc and a unit test can all
// include it. The formulas are those of tiedkl/reference.py; comments here only say where the arithmetic differs.
//
// The target column y is kept out of the sums: with "others" = {v != y},
//   1 - p_y = sum_others / (sum_others + e^(z_y - m))     is exact to rounding even when p_y is within an ulp of one, and
//   l1 - z_y = log1p(sum_others)                          when z_y is the row maximum.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define TIEDKL_HD __host__ __device__ __forceinline__
#else
#define TIEDKL_HD inline
#endif

namespace tiedkl {

struct LossParams {
  double temperature;
  double alpha;  // 0: plain cross-entropy, no similarity target
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: none
  bool target_grad;
};

// Running sums over the other columns of one token's row, relative to the running maximum m.
struct TokenState {
  double m = -FLT_MAX;    // max over v != y
  double sum = 0;         // sum e^(z - m)
  double sum_t = 0;       // sum e^((z - m)/tau)
  double weighted = 0;    // sum e^(z - m) (z - m)
  double total = 0;       // sum z, over all columns (label smoothing only)
  double zy = 0;
  double zy_exact = 0;  // to more digits than the block holds (target_logits.h), for the comparison with the similarities
  // Set by finish_token.
  double max_all = 0;     // max over all columns
  double inv_sum = 0;     // 1 / sum over all columns of e^(z - max_all)
  double inv_sum_t = 0;   // the same for e^((z - max_all)/tau)
  double not_target = 0;  // 1 - p_y
  double lse = 0;         // l1
  double log_sum_t = 0;   // lt - max_all/tau
  double kl = 0;
  double z_peak = 0;  // logit at the similarity row's maximum (target_grad only)
  double spread = 0;  // sum q (delta - delta at that column)
};

// Bring the sums to a new, larger maximum.
TIEDKL_HD void rebase(TokenState& s, double m, double inv_t) {
  const double shift = s.m - m, scale = std::exp(shift);
  s.weighted = scale == 0.0 ? 0.0 : scale * (s.weighted + shift * s.sum);
  s.sum *= scale;
  s.sum_t *= std::exp(shift * inv_t);
  s.m = m;
}

// Take in the sums over other columns of the same row.
TIEDKL_HD void merge(TokenState& s, TokenState other, double inv_t) {
  if (other.m > s.m) {
    rebase(s, other.m, inv_t);
  } else {
    rebase(other, s.m, inv_t);
  }
  s.sum += other.sum;
  s.sum_t += other.sum_t;
  s.weighted += other.weighted;
  s.total += other.total;
}

// Running sums of one row of similarities t[u] . t[v] (not yet divided by tau) over v != u, relative to the running maximum.
struct TeacherState {
  double m = -FLT_MAX;  // over the columns so far, that of u included
  double sum = 0;     // sum e^((s - m)/tau)
  double self = 0;    // t[u] . t[u] to more digits than the block holds (target_logits.h)
  int64_t peak = -1;  // column of the maximum (target_grad only)
};

// The sum over all columns.
TIEDKL_HD double total(const TeacherState& s, double inv_t) { return s.sum + std::exp((s.self - s.m) * inv_t); }

TIEDKL_HD void rebase(TeacherState& s, double m, double inv_t) {
  s.sum *= std::exp((s.m - m) * inv_t);
  s.m = m;
}

// Take in the sums over later columns of the same row: of equal maxima the first one's column stays.
TIEDKL_HD void merge(TeacherState& s, TeacherState other, double inv_t) {
  if (other.m > s.m) {
    rebase(s, other.m, inv_t);
    s.peak = other.peak;
  } else {
    rebase(other, s.m, inv_t);
  }
  s.sum += other.sum;
}

struct TokenTerms {
  double ce, entropy, correct;
};

// Close the sums over one row of n_vocab columns. The sums are merged with the target column here; the maxima stay numbers that the
// block holds, so that they cancel in it.
TIEDKL_HD TokenTerms finish_token(TokenState& s, const LossParams& p, double n_vocab) {
  const bool correct = s.zy >= s.m;
  const double inv_t = 1.0 / p.temperature;
  const double max_all = correct ? s.zy : s.m;
  if (max_all != s.m) rebase(s, max_all, inv_t);
  const double at_y = std::exp(s.zy - max_all);
  const double sum = s.sum + at_y;
  const double log_sum = correct ? std::log1p(s.sum) : std::log(sum);
  s.max_all = max_all;
  s.inv_sum = 1.0 / sum;
  s.not_target = s.sum / sum;
  s.lse = max_all + log_sum;
  const double sum_t = s.sum_t + std::exp((s.zy_exact - max_all) * inv_t);
  s.inv_sum_t = 1.0 / sum_t;
  s.log_sum_t = std::log(sum_t);
  const double eps = p.label_smoothing;
  double ce = (1.0 - eps) * ((max_all - s.zy) + log_sum) + p.z_loss * s.lse * s.lse;
  if (eps != 0.0) ce += eps * (s.lse - s.total / n_vocab);
  const double expected = at_y == 0.0 ? s.weighted : s.weighted + at_y * (s.zy - max_all);
  return {ce, log_sum - expected / sum, correct ? 1.0 : 0.0};
}

// The cross-entropy part of G at the target column, without the cancellation in p_y - 1.
TIEDKL_HD double target_gradient(const TokenState& s, const LossParams& p, double n_vocab) {
  const double p_y = 1.0 - s.not_target, eps = p.label_smoothing;
  return (eps - s.not_target) + 2.0 * p.z_loss * s.lse * p_y - eps / n_vocab;
}

struct Divergence {
  double excess;     // q (expm1(x) - x), >= 0
  double r_minus_q;  // q expm1(x)
};

// One column's, from x = log r - log q of any size. q expm1(x) does not cancel where r is close to q; where r is the larger it would
// carry the rounding of x, and overflow, so r itself is better.
TIEDKL_HD Divergence divergence(double q, double x, double log_r) {
  const double r_minus_q = x < 1.0 ? q * std::expm1(x) : std::exp(log_r) - q;
  return {q == 0.0 ? r_minus_q : r_minus_q - q * x, r_minus_q};
}

}  // namespace tiedkl
