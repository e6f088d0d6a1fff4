// Compiled with AVX-512; called only where dispatch.cpp finds it.
//
// The micro-kernel multiplies blocks whose columns lie side by side. The operand that lies transposed (w in h w^T, G in G^T h) is
// copied to scratch one panel at a time, by the thread that then multiplies it with every block of the other operand.
#include "gemm_f32.h"

#if defined(TIEDKL_X86)

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>

namespace tiedkl::cpu {

#if defined(CPUBLAS_BRGEMM_F32F32F32)

namespace {

// Of k in one call of the micro-kernel, which sums it in one chain; shorter chains round less and read c more often.
constexpr int64_t kLogitDepth = 256;   // w is packed: z sums over the width
constexpr int64_t kTokenDepth = 128;   // G is packed: d_w sums over tokens, of which one carries most of a word's gradient
constexpr int64_t kVocabDepth = 128;   // nothing is packed: d_h sums over the vocabulary
constexpr int64_t kRows = 128, kCols = 128;            // of a block of c
constexpr int64_t kFewRows = 32, kLanes = 16;          // a block is not divided further than this, and by whole vectors
constexpr int64_t kPackedRows = 32, kPackedCols = 64;  // of a panel of the transposed operand
constexpr int64_t kFew = 8;                            // rows of c up to which a BLAS is as fast, and adds up in better order
static_assert(kLogitDepth * kPackedCols <= kF32GemmScratch && kTokenDepth * kPackedRows <= kF32GemmScratch);

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// The size of equal blocks of x, of at most `most` each.
int64_t even(int64_t x, int64_t most) { return ceil_div(x, ceil_div(x, most)); }

}  // namespace

bool AVX512::brgemm_works() {
  const float one = 1.0f;
  float product = 0.0f;
  try {
    at::native::cpublas::brgemm(1, 1, 1, 1, 1, 1, false, &one, &one, &product, false);
    at::native::cpublas::brgemm_release(false);
  } catch (const std::exception&) {  // a torch without oneDNN
    return false;
  }
  return product == 1.0f;
}

bool f32_gemm_prefers(int64_t m, int64_t n, int64_t k, const F32Operand& a, const F32Operand& b) {
  if (m < kFew) return false;
  const bool a_lies = a.col_stride == 1 && a.row_stride >= k, b_lies = b.col_stride == 1 && b.row_stride >= n;
  if (b_lies) return n >= f32_gemm_columns() && (a_lies || a.row_stride == 1);
  return a_lies && b.row_stride == 1;
}

void f32_gemm(int64_t m, int64_t n, int64_t k, const F32Operand& a, const F32Operand& b, float* c, int64_t ldc, bool add, float* scratch) {
  const bool pack_b = b.col_stride != 1 || b.row_stride < n, pack_a = !pack_b && (a.col_stride != 1 || a.row_stride < k);
  int64_t rows = kPackedRows, cols = 2 * kCols;
  if (pack_b) {
    rows = even(m, kRows);
    cols = kPackedCols;
  } else if (!pack_a) {
    cols = ceil_div(even(n, kCols), kLanes) * kLanes;
    // a narrow c has few blocks: smaller ones where a thread had none
    const int64_t wanted = ceil_div(at::get_num_threads(), ceil_div(n, cols));
    rows = even(m, std::clamp(ceil_div(m, wanted), kFewRows, kRows));
  }
  const int64_t row_blocks = ceil_div(m, rows), col_blocks = ceil_div(n, cols);
  const int64_t step = pack_a ? kTokenDepth : pack_b ? kLogitDepth : kVocabDepth;
  const auto multiply = [&](int64_t i, int64_t j, int64_t k0, const float* left, int64_t lda, const float* right, int64_t ldb) {
    at::native::cpublas::brgemm(std::min(rows, m - i), std::min(cols, n - j), std::min(step, k - k0), lda, ldb, ldc, add || k0 > 0, left,
                                right, c + i * ldc + j, false);
  };
  // Work is split along the packed operand, so that each panel is packed once.
  const int64_t items = pack_a ? row_blocks : pack_b ? col_blocks : row_blocks * col_blocks;
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    float* panel = scratch + at::get_thread_num() * kF32GemmScratch;
    for (int64_t x = begin; x < end; ++x) {
      for (int64_t k0 = 0; k0 < k; k0 += step) {
        const int64_t depth = std::min(step, k - k0);
        if (pack_a) {
          const int64_t i = x * rows;
          at::vec::transpose_mxn<float>(a.data + i + k0 * a.col_stride, a.col_stride, panel, kTokenDepth, depth, std::min(rows, m - i));
          for (int64_t j = 0; j < n; j += cols) multiply(i, j, k0, panel, kTokenDepth, b.data + k0 * b.row_stride + j, b.row_stride);
        } else if (pack_b) {
          const int64_t j = x * cols;
          at::vec::transpose_mxn<float>(b.data + j * b.col_stride + k0, b.col_stride, panel, cols, std::min(cols, n - j), depth);
          for (int64_t i = 0; i < m; i += rows) multiply(i, j, k0, a.data + i * a.row_stride + k0, a.row_stride, panel, cols);
        } else {
          const int64_t i = x % row_blocks * rows, j = x / row_blocks * cols;
          multiply(i, j, k0, a.data + i * a.row_stride + k0, a.row_stride, b.data + k0 * b.row_stride + j, b.row_stride);
        }
      }
    }
    at::native::cpublas::brgemm_release(false);
  });
}

#else  // torch is older than the micro-kernel

bool AVX512::brgemm_works() { return false; }
bool f32_gemm_prefers(int64_t, int64_t, int64_t, const F32Operand&, const F32Operand&) { return false; }
void f32_gemm(int64_t, int64_t, int64_t, const F32Operand&, const F32Operand&, float*, int64_t, bool, float*) {}

#endif

}  // namespace tiedkl::cpu

#endif
