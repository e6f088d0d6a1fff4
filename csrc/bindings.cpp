// The pybind11 module, nothing else.
#include <torch/extension.h>

#include "cpu/gemm_bf16.h"
#include "cpu/gemm_f32.h"
#include "cpu/row_kernels.h"
#include "driver.h"

namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::vector<at::Tensor> walk(const at::Tensor& h, const at::Tensor& w, const at::Tensor& y, const OptionalTensor& b,
                             const OptionalTensor& t, const OptionalTensor& g, double temperature, double alpha,
                             double label_smoothing, double z_loss, double softcap, bool target_grad,
                             std::tuple<bool, bool, bool, bool> needs, std::tuple<int64_t, int64_t, int64_t, int64_t> blocks) {
  const auto [need_h, need_w, need_b, need_t] = needs;
  const auto [tokens, targets, vocab, panel] = blocks;
  TORCH_CHECK_VALUE(h.dim() == 2 && w.dim() == 2 && h.size(1) == w.size(1), "h (N, D) and w (V, D) do not match");
  TORCH_CHECK_VALUE(y.dim() == 1 && y.size(0) == h.size(0) && y.scalar_type() == at::kLong && y.is_contiguous(), "y must be (N,) int64");
  TORCH_CHECK_VALUE(y.numel() == 0 || y.max().item<int64_t>() < w.size(0), "a target is outside [0, V)");
  TORCH_CHECK_VALUE(!b || (b->dim() == 1 && b->size(0) == w.size(0)), "b must be (V,)");
  TORCH_CHECK_VALUE(!t || (t->dim() == 2 && t->size(0) == w.size(0)), "t must be (V, D')");
  TORCH_CHECK_VALUE(!g || (g->dim() == 1 && g->size(0) == h.size(0) && g->is_contiguous() &&
                           g->scalar_type() == (h.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)),
                    "g must be (N,) in the accumulation dtype");
  TORCH_CHECK_VALUE(g || !(need_h || need_w || need_b || need_t), "gradients need g");
  TORCH_CHECK_VALUE(tokens > 0 && targets > 0 && vocab > 0 && panel > 0, "block sizes must be positive");
  const tiedkl::LossParams params{temperature, alpha, label_smoothing, z_loss, softcap, target_grad};
  tiedkl::Result r;
  {
    pybind11::gil_scoped_release release;
    r = tiedkl::walk({h, w, y, b, t, g, params, need_h, need_w, need_b, need_t}, {tokens, targets, vocab, panel});
  }
  return {r.terms, r.d_h, r.d_w, r.d_b, r.d_t};
}

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(TIEDKL_TORCH_VERSION)
  info["torch"] = TIEDKL_TORCH_VERSION;
#endif
  info["compiler"] = __VERSION__;
  info["capability"] = tiedkl::cpu::row_kernel_capability();
  info["bf16_products"] = tiedkl::cpu::bf16_gemm_available();
  info["f32_products"] = tiedkl::cpu::f32_gemm_available();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native walk of the tied-embedding CE + KL loss; see csrc/driver.h";
  m.def("walk", &walk, "Per-token terms and gradients of one problem", pybind11::arg("h"), pybind11::arg("w"), pybind11::arg("y"),
        pybind11::arg("b"), pybind11::arg("t"), pybind11::arg("g"), pybind11::arg("temperature"), pybind11::arg("alpha"),
        pybind11::arg("label_smoothing"), pybind11::arg("z_loss"), pybind11::arg("softcap"), pybind11::arg("target_grad"),
        pybind11::arg("needs"), pybind11::arg("blocks"));
  m.def("build_info", &build_info, "Compiler, torch version at build time, instruction set in use, whether bfloat16 is multiplied as it is and float32 past the BLAS");
}
