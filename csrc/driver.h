// The blocked walk over the (tokens x vocabulary) rectangle: sort, block, matrix product, row kernel, matrix products.
// Independent of the device but for the row kernels it calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "row_math.h"

namespace tiedkl {

// Block sizes, chosen by tiedkl/plan.py.
struct BlockSizes {
  int64_t tokens;   // C, and
  int64_t targets;  // Cw: a block holds up to C + Cw rows, its tokens and its distinct targets together (C without KL)
  int64_t vocab;    // B, columns of one logits block; B >= V keeps the block and computes it once
  int64_t panel;    // columns per matrix product, and per conversion of half-precision weights
};

struct Problem {
  at::Tensor h;                 // (N, D)
  at::Tensor w;                 // (V, D)
  at::Tensor y;                 // (N,) int64; negative: skipped
  std::optional<at::Tensor> b;  // (V,)
  std::optional<at::Tensor> t;  // (V, D') similarity source; none: w
  std::optional<at::Tensor> g;  // (N,) accumulation dtype; none: no gradient
  LossParams params;
  bool need_h, need_w, need_b, need_t;
};

// terms (5, N): CE, KL, lse, entropy, correct; then d_h, d_w, d_b, d_t in the accumulation dtype (undefined when not needed).
struct Result {
  at::Tensor terms, d_h, d_w, d_b, d_t;
};

Result walk(const Problem& problem, const BlockSizes& blocks);

}  // namespace tiedkl
