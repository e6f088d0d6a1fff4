// The row kernels of a GPU: everything that happens to one block of logits between its matrix products.
//
// Raw device pointers and a stream, no torch and no CUDA headers: the walk (walk.cpp) compiles without CUDA, and the kernels
// compile without torch. A launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

#include "../row_math.h"

namespace tiedkl::cuda {

enum class Dtype { kFloat, kBFloat16, kHalf };

// (rows, columns) in a dtype, its strides in elements.
struct Matrix {
  const void* data;
  int64_t stride_row, stride_column, columns;
  Dtype dtype;
};

// What the gradient needs of a token, written by finish_tokens. Roundings common to a row add up in the products with w, so
// that the two that matter have a low part.
struct Row {
  float g;                     // upstream weight
  float top;                   // max z
  float coef_p, coef_p_low;    // g (1 + 2 lam l1) / sum e^(z - top)
  float constant;              // g eps / V
  float at_target;             // G at the target's column
  float coef_r;                // g alpha / tau
  float tops;                  // max z - max s
  float offset, offset_low;    // log sum_s - log sum_t
  float inv_sum_t, inv_sum_s;  // of e^((z - top)/tau), e^((s - top_s)/tau)
  float top_s;                 // max s
  float center;                // log q - log r at the maximum of s (target_grad only)
  float delta_y;               // log q - log r - center at the target's column (target_grad only)
};

// One block of logits (rows tokens x cols vocabulary entries starting at v0) and the similarity rows that go with it.
// Rows of z and s start at multiples of 16 bytes and are readable to the next multiple of four floats.
struct Block {
  float* z;  // (rows, ldz) products h w^T; the gradient block G out, see write_gradient
  int64_t ldz;
  int64_t rows, cols, v0, n_vocab;
  float* s;  // (targets, lds) products t[u] t^T
  int64_t lds;
  int64_t targets;       // capacity: how many there are is known on the device only
  const int64_t* count;  // (1) distinct targets
  const int64_t* ids;    // (targets) the first `count` of which are meant
  const int64_t* which;  // (rows) place of each token's target among them
  const int64_t* y;      // (rows) target ids, negative: skipped
  const float* bias;     // (V,) or null
  const float* g;        // (rows) upstream weights, or null when no gradient is wanted
  TokenState* token;     // (rows)
  TeacherState* teacher;  // (targets)
  Row* row;               // (rows)
  float* terms;           // (5, terms_stride) CE, KL, lse, entropy, correct of the block's first token; zero beforehand
  int64_t terms_stride;
};

// Empty sums, and z_y and t[u].t[u] in double as csrc/target_logits.h has them. h (rows, D), w (V, D), t (V, D').
void begin_tokens(const Block& b, const LossParams& p, const Matrix& h, const Matrix& w, void* stream);
void begin_targets(const Block& b, const Matrix& t, void* stream);

// s of the block's columns, of the first `count` targets and of no others. t (V, D') in half precision, its columns side by side.
void similarities(const Block& b, const Matrix& t, void* stream);

// Add the block's columns to TeacherState, to TokenState.
void teacher_stats(const Block& b, const LossParams& p, void* stream);
void token_stats(const Block& b, const LossParams& p, void* stream);

// Close the statistics: all terms but KL's other columns, and `row`.
void finish_tokens(const Block& b, const LossParams& p, void* stream);

// Add the block's share of KL to the terms, and of sum q (delta - center) to TokenState::spread.
void divergence(const Block& b, const LossParams& p, void* stream);

// Write G in `out` over z, rows 4 ldz bytes apart; with `add_kl` add the block's share of KL to the terms on the way.
void write_gradient(const Block& b, const LossParams& p, Dtype out, bool add_kl, void* stream);

// T_u = (alpha/tau) q_u (a - sum q_u a), a = sum_n g_n (delta_n - center_n), of every distinct target into `out` (targets, ld)
// of `dtype`, zeros for the places beyond the count. z as the products left it. order (rows) sorts tokens by target, start
// (targets + 1) cuts it.
void write_target_gradient(const Block& b, const LossParams& p, const int64_t* order, const int64_t* start, void* out, int64_t ld,
                           Dtype dtype, void* stream);

}  // namespace tiedkl::cuda
