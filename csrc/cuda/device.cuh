// What the CUDA kernels have in common: launching, wide loads, one column's arithmetic, and sums over a thread block in a fixed order
// (warp shuffles, then one number a warp in shared memory; no atomics).
//
// Compiled by nvcc, or by a host compiler under tests/cuda/cuda_on_host.h, which runs the threads of a block one by one.
#pragma once

#include "../float_math.h"
#include "row_kernels.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
#endif

namespace tiedkl::cuda {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kLane = 4;  // consecutive elements a thread loads at once
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, void* stream, const A&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
#if defined(__CUDACC__)
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("tiedkl: a CUDA kernel was not launched: ") + cudaGetErrorString(error));
#else
  static_cast<void>(stream);
  cuda_on_host::run(grid, kThreads, [&] { kernel(arguments...); });
#endif
}

// body(T{}) with the type a Dtype stands for
template <typename Body>
void dispatch(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat:
      return body(float{});
    case Dtype::kBFloat16:
      return body(__nv_bfloat16{});
    case Dtype::kHalf:
      return body(__half{});
  }
}

template <typename T>
struct alignas(kLane * sizeof(T)) Pack {
  T v[kLane];
};

__device__ inline Pack<float> load(const float* x) { return *reinterpret_cast<const Pack<float>*>(x); }

// z <- softcap(z + bias) of column i of the block
__device__ inline float logit(float z, const Block& b, float softcap, int64_t i) {
  if (b.bias) z += b.bias[b.v0 + i];
  return softcap != 0.0f ? softcap * tanhf(z / softcap) : z;
}

// x = log r - log q of one column: the small difference first, so that the roundings of the dominant column cancel.
__device__ inline float log_ratio(float z, float s, const Row& r, float inv_t) {
  return std::fma((z - s) - r.tops, inv_t, r.offset) + r.offset_low;
}

__device__ inline float similarity_target(float s, const Row& r, float inv_t) {
  return exp_bounded(at_least((s - r.top_s) * inv_t, kExpFloor)) * r.inv_sum_s;
}

// The sum over a warp, in every lane.
__device__ inline double warp_sum(double x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// The maximum of x over the block, in every thread. To be called once in a kernel, as block_sum.
__device__ inline float block_max(float x) {
  __shared__ float partial[kWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, x, offset);
    x = other > x ? other : x;
  }
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) x = partial[i] > x ? partial[i] : x;
  return x;
}

// The smallest x of the block, in every thread.
__device__ inline int64_t block_min(int64_t x) {
  __shared__ int64_t partial[kWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int64_t other = __shfl_xor_sync(kAllLanes, x, offset);
    x = other < x ? other : x;
  }
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) x = partial[i] < x ? partial[i] : x;
  return x;
}

// Each of K numbers summed over the block, in thread 0. What any thread wrote before is visible to thread 0 after.
template <int K>
__device__ void block_sum(double (&x)[K]) {
  __shared__ double partial[K][kWarps];
  for (int k = 0; k < K; ++k) {
    x[k] = warp_sum(x[k]);
    if (threadIdx.x % kWarp == 0) partial[k][threadIdx.x / kWarp] = x[k];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int k = 0; k < K; ++k) {
    for (int i = 1; i < kWarps; ++i) x[k] += partial[k][i];
  }
}

}  // namespace tiedkl::cuda
