// What a walk is called with, checked: the part that all extension modules have in common.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>

#include "driver.h"

namespace tiedkl {

using OptionalTensor = std::optional<at::Tensor>;

inline Problem checked_problem(const at::Tensor& h, const at::Tensor& w, const at::Tensor& y, const OptionalTensor& b, const OptionalTensor& t,
                               const OptionalTensor& g, const LossParams& params, std::tuple<bool, bool, bool, bool> needs) {
  const auto [need_h, need_w, need_b, need_t] = needs;
  TORCH_CHECK_VALUE(h.dim() == 2 && w.dim() == 2 && h.size(1) == w.size(1), "h (N, D) and w (V, D) do not match");
  TORCH_CHECK_VALUE(y.dim() == 1 && y.size(0) == h.size(0) && y.scalar_type() == at::kLong && y.is_contiguous(), "y must be (N,) int64");
  TORCH_CHECK_VALUE(!b || (b->dim() == 1 && b->size(0) == w.size(0)), "b must be (V,)");
  TORCH_CHECK_VALUE(!t || (t->dim() == 2 && t->size(0) == w.size(0)), "t must be (V, D')");
  TORCH_CHECK_VALUE(!g || (g->dim() == 1 && g->size(0) == h.size(0) && g->is_contiguous() &&
                           g->scalar_type() == (h.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)),
                    "g must be (N,) in the accumulation dtype");
  TORCH_CHECK_VALUE(g || !(need_h || need_w || need_b || need_t), "gradients need g");
  return {h, w, y, b, t, g, params, need_h, need_w, need_b, need_t};
}

inline BlockSizes checked_blocks(std::tuple<int64_t, int64_t, int64_t, int64_t> blocks) {
  const auto [tokens, targets, vocab, panel] = blocks;
  TORCH_CHECK_VALUE(tokens > 0 && targets > 0 && vocab > 0 && panel > 0, "block sizes must be positive");
  return {tokens, targets, vocab, panel};
}

}  // namespace tiedkl
