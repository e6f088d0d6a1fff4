// Matrix products of bfloat16 operands with a float32 result, which neither ATen nor the BLAS behind it offers on a CPU: their
// bfloat16 product is rounded to bfloat16, and logits rounded to 8 bits lose the gradient.
#pragma once

#include <cstdint>

namespace tiedkl::cpu {

// A strided matrix whose elements are bfloat16, or float32 rounded to bfloat16 (to nearest even) as they are read.
struct Bf16Operand {
  const void* data;
  bool is_float;
  int64_t row_stride, col_stride;  // in elements; one of them is 1
};

// Whether this processor multiplies bfloat16 pairs (AVX512-BF16); TIEDKL_CPU_CAPABILITY below avx512 says no.
bool bf16_gemm_available();

constexpr int64_t kBf16GemmScratch = (516 + 1024) * 256;  // uint32s; see gemm_bf16.cpp

// c (m x n, rows ldc apart) = a (m x k) b (k x n), added to c when `add`. Sums are float32, in an order that depends on k alone.
// `scratch` holds kBf16GemmScratch elements, 64-byte aligned. Denormal operands count as zero.
void bf16_gemm(int64_t m, int64_t n, int64_t k, const Bf16Operand& a, const Bf16Operand& b, float* c, int64_t ldc, bool add,
               uint32_t* scratch);

}  // namespace tiedkl::cpu
