// The pybind11 module, nothing else.
#include "arguments.h"
#include "cpu/gemm_bf16.h"
#include "cpu/gemm_f32.h"
#include "cpu/row_kernels.h"
#include "driver.h"

namespace {

using tiedkl::OptionalTensor;

std::vector<at::Tensor> walk(const at::Tensor& h, const at::Tensor& w, const at::Tensor& y, const OptionalTensor& b,
                             const OptionalTensor& t, const OptionalTensor& g, double temperature, double alpha,
                             double label_smoothing, double z_loss, double softcap, bool target_grad,
                             std::tuple<bool, bool, bool, bool> needs, std::tuple<int64_t, int64_t, int64_t, int64_t> blocks) {
  const tiedkl::LossParams params{temperature, alpha, label_smoothing, z_loss, softcap, target_grad};
  const tiedkl::Problem problem = tiedkl::checked_problem(h, w, y, b, t, g, params, needs);
  const tiedkl::BlockSizes sizes = tiedkl::checked_blocks(blocks);
  TORCH_CHECK_VALUE(y.numel() == 0 || y.max().item<int64_t>() < w.size(0), "a target is outside [0, V)");
  tiedkl::Result r;
  {
    pybind11::gil_scoped_release release;
    r = tiedkl::walk(problem, sizes);
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
  info["f32_columns"] = tiedkl::cpu::f32_gemm_columns();
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
