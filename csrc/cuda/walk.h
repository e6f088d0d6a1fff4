// The blocked walk on a GPU: ATen's matrix products and the row kernels of row_kernels.h, in the strategies of ../strategies.h.
//
// Nothing waits for the device: tokens keep their order, and how many distinct targets there are stays there. No CUDA headers:
// the walk compiles, and is tested, with a torch for CPUs.
#pragma once

#include "../driver.h"

namespace tiedkl::cuda {

// float32, bfloat16 or float16 tensors on one device, the current one; `stream` is its current stream's handle. Targets must be
// below V; results are those of tiedkl::walk in float32.
Result walk(const Problem& problem, const BlockSizes& blocks, void* stream);

}  // namespace tiedkl::cuda
