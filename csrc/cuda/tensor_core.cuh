// The PTX of a product on tensor cores (sm_80 and newer): copies into shared memory that a thread does not wait for, fragments out
// of it, and their product. A function for each instruction; tests/cuda/cuda_on_host.h has the same functions for the host.
#pragma once

#include "device.cuh"

namespace tiedkl::cuda {

struct alignas(16) Chunk {
  uint16_t v[8];
};

#if defined(__CUDACC__)

__device__ inline unsigned shared_address(const void* x) { return unsigned(__cvta_generic_to_shared(x)); }

// Start to copy `bytes` of 16 from global to shared memory; zeros in place of the others, which are not read.
__device__ inline void copy_async(Chunk* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}

// The copies since the last commit are a group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait for the thread's own groups but the latest `kLeft`.
template <int kLeft>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8 x 8 matrices of two-byte elements: lane l names row l % 8 of matrix l / 8, and gets elements 2 (l % 4) and the next one of
// row l / 4 of each.
__device__ inline void load_matrices(unsigned (&out)[4], const Chunk* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8) of a warp. Of c, lane l has columns 2 (l % 4) and the next one of row l / 4, then of row
// l / 4 + 8; of a, the same two rows, in columns below 8 and then beyond; of b, rows 2 (l % 4) and the next one, then those 8 below,
// of column l / 4.
template <typename T>
__device__ inline void multiply_accumulate(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
__device__ inline void multiply_accumulate<__nv_bfloat16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply_accumulate<__half>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

using cuda_on_host::commit_copies;
using cuda_on_host::copy_async;
using cuda_on_host::load_matrices;
using cuda_on_host::multiply_accumulate;
using cuda_on_host::wait_for_copies;

#endif

}  // namespace tiedkl::cuda
