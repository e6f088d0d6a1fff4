// A token's logit at its target, and the target's similarity to itself, in double.
//
// Both are large where the prediction is good, and KL depends on their small difference: taken from two float32 products it would be
// off by the roundings of both (docs/design.md, "Numerics").
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "row_math.h"
#include "token_blocks.h"

namespace tiedkl {

// Sets TokenState::zy_exact and TeacherState::self of one block. h (N, D), w (V, D), b (V,), t (V, D') of one dtype, any strides; `order` holds the
// tokens' positions in h.
void target_logits(const Block& block, const int64_t* order, const at::Tensor& h, const at::Tensor& w, const std::optional<at::Tensor>& b,
                   const at::Tensor& t, double softcap, TokenState* tokens, TeacherState* targets);

}  // namespace tiedkl
