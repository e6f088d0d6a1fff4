// What the tests call beside the module: the order in which the threads of a block take turns, and the similarity kernel alone.
#include "cuda_on_host.h"
#include "../../csrc/cuda/row_kernels.h"

extern "C" void set_order(int order) { cuda_on_host::order = static_cast<cuda_on_host::Order>(order); }

// s (targets, lds) of t (., width), rows `stride` elements apart, bfloat16 or float16
extern "C" void similarities(const void* t, int64_t stride, int64_t width, int bfloat16, const int64_t* ids, const int64_t* count,
                             int64_t targets, int64_t v0, int64_t cols, float* s, int64_t lds) {
  using namespace tiedkl::cuda;
  Block b{};
  b.s = s, b.lds = lds, b.targets = targets, b.count = count, b.ids = ids, b.v0 = v0, b.cols = cols;
  similarities(b, {t, stride, 1, width, bfloat16 ? Dtype::kBFloat16 : Dtype::kHalf}, nullptr);
}
