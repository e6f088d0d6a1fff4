// The pybind11 module tiedkl._C_cuda, nothing else.
#include "../arguments.h"
#include "walk.h"

namespace {

using tiedkl::OptionalTensor;

// `stream`: the handle of the current stream of the tensors' device, which is the current device.
std::vector<at::Tensor> walk(const at::Tensor& h, const at::Tensor& w, const at::Tensor& y, const OptionalTensor& b,
                             const OptionalTensor& t, const OptionalTensor& g, double temperature, double alpha,
                             double label_smoothing, double z_loss, double softcap, bool target_grad,
                             std::tuple<bool, bool, bool, bool> needs, std::tuple<int64_t, int64_t, int64_t, int64_t> blocks, uintptr_t stream) {
  const tiedkl::LossParams params{temperature, alpha, label_smoothing, z_loss, softcap, target_grad};
  const tiedkl::Problem problem = tiedkl::checked_problem(h, w, y, b, t, g, params, needs);
  const tiedkl::BlockSizes sizes = tiedkl::checked_blocks(blocks);
  for (const at::Tensor& x : {w, y, b.value_or(h), t.value_or(h), g.value_or(h)}) {
    TORCH_CHECK_VALUE(x.device() == h.device(), "all tensors must be on one device");
  }
  for (const at::Tensor& x : {w, b.value_or(h), t.value_or(h)}) {
    TORCH_CHECK_VALUE(x.scalar_type() == h.scalar_type(), "h, w, b and t must have one dtype");
  }
  tiedkl::Result r;
  {
    pybind11::gil_scoped_release release;
    r = tiedkl::cuda::walk(problem, sizes, reinterpret_cast<void*>(stream));
  }
  return {r.terms, r.d_h, r.d_w, r.d_b, r.d_t};
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TIEDKL_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["nvcc"] = TIEDKL_NVCC_VERSION;
  info["architectures"] = TIEDKL_ARCHITECTURES;  // "sm_80 sm_90 compute_90", or "host"
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Walk of the tied-embedding CE + KL loss on a GPU; see csrc/cuda/walk.h";
  m.def("walk", &walk, "Per-token terms and gradients of one problem", pybind11::arg("h"), pybind11::arg("w"), pybind11::arg("y"),
        pybind11::arg("b"), pybind11::arg("t"), pybind11::arg("g"), pybind11::arg("temperature"), pybind11::arg("alpha"),
        pybind11::arg("label_smoothing"), pybind11::arg("z_loss"), pybind11::arg("softcap"), pybind11::arg("target_grad"),
        pybind11::arg("needs"), pybind11::arg("blocks"), pybind11::arg("stream"));
  m.def("build_info", &build_info, "torch version at build time, compilers, and the architectures the kernels were compiled for");
}
