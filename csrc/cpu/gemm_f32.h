// Matrix products in float32 from the brgemm micro-kernel of oneDNN, which comes with ATen, where MKL does not use the processor's
// 512-bit path: at the sizes of a logits block 200-210 GFLOP/s against 120-175 on Zen 4 (docs/design.md, "What was measured").
#pragma once

#include <cstdint>

namespace tiedkl::cpu {

// A strided matrix; strides in elements.
struct F32Operand {
  const float* data;
  int64_t row_stride, col_stride;
};

// Whether f32_gemm can run here and MKL would be slower: AVX-512, a torch with this micro-kernel, a processor that is not Intel's.
// TIEDKL_CPU_CAPABILITY below avx512 says no.
bool f32_gemm_available();

// Columns of c from which f32_gemm is faster where nothing but G^T lies transposed: measured on Zen 4 and Zen 5.
int64_t f32_gemm_columns();

// Whether f32_gemm takes these operands and beats MKL with them: one of them may lie transposed.
bool f32_gemm_prefers(int64_t m, int64_t n, int64_t k, const F32Operand& a, const F32Operand& b);

// A panel of the transposed operand, one per thread.
constexpr int64_t kF32GemmScratch = 256 * 64;

// c (m x n, rows ldc apart) = a (m x k) b (k x n), added to c when `add`. The order of the sums depends on k alone.
// `scratch` holds kF32GemmScratch floats for each of at::get_num_threads() threads.
void f32_gemm(int64_t m, int64_t n, int64_t k, const F32Operand& a, const F32Operand& b, float* c, int64_t ldc, bool add, float* scratch);

namespace AVX512 {
bool brgemm_works();  // with this build of torch
}

}  // namespace tiedkl::cpu
