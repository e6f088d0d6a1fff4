// Compiled with AVX512-BF16; called only where dispatch.cpp finds it.
//
// Panels of both operands are copied to scratch as pairs of bfloat16 along k, one 32-bit lane a pair, so that one
// vdpbf16ps per register multiplies two steps of k: a panel of A as [k/2][kRows], of B as [k/2][kCols]. Blocks are sized so
// that a panel of B stays in the L1 cache and a block of A in the L2 cache while a tile of C sits in 24 registers.
#include "gemm_bf16.h"

#if defined(TIEDKL_X86)

#include <ATen/Parallel.h>
#include <immintrin.h>

#include <algorithm>
#include <utility>

namespace tiedkl::cpu {
namespace {

constexpr int kRows = 12, kCols = 32;                                   // of a tile of C
constexpr int64_t kBlockRows = 516, kBlockCols = 1024, kBlockK = 512;  // 256 pairs
static_assert(kBlockRows % kRows == 0 && kBlockCols % kCols == 0 && kBlockK % 2 == 0);
static_assert((kBlockRows + kBlockCols) * kBlockK / 2 == kBf16GemmScratch);

using bf16 = uint16_t;

inline __mmask16 lanes(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << std::max<int64_t>(n, 0)) - 1); }

// Up to 16 pairs from `n` consecutive elements, zeros beyond.
inline __m512i load_pairs(const bf16* p, int64_t n) { return _mm512_maskz_loadu_epi16(n >= 32 ? 0xffffffffu : (1u << n) - 1, p); }

inline __m512i load_pairs(const float* p, int64_t n) {
  const __m512 low = _mm512_maskz_loadu_ps(lanes(n), p);
  const __m512 high = n > 16 ? _mm512_maskz_loadu_ps(lanes(n - 16), p + 16) : _mm512_setzero_ps();
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// 16 elements in the low halves of 32-bit lanes.
inline __m512i load_low(const bf16* p, __mmask16 mask) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)); }
inline __m512i load_low(const float* p, __mmask16 mask) {
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, p)));
}

inline void transpose_16x16(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// out[k/2][kWidth] from element (i, j) = p[i * across + j * along], i < width (zeros up to kWidth), j < k.
template <int kWidth, typename T>
void pack(const T* p, int64_t across, int64_t along, int64_t width, int64_t k, uint32_t* out) {
  const int64_t pairs = (k + 1) / 2;
  for (int64_t first = 0; first < kWidth; first += 16) {
    const __mmask16 stored = lanes(kWidth - first), given = lanes(std::min<int64_t>(width, kWidth) - first);
    if (along == 1) {
      for (int64_t q = 0; q < pairs; q += 16) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) {
          r[i] = given >> i & 1 ? load_pairs(p + (first + i) * across + 2 * q, k - 2 * q) : _mm512_setzero_si512();
        }
        transpose_16x16(r);
        for (int i = 0; i < std::min<int64_t>(16, pairs - q); ++i) _mm512_mask_storeu_epi32(out + (q + i) * kWidth + first, stored, r[i]);
      }
    } else {
      for (int64_t q = 0; q < pairs; ++q) {
        const T* even = p + first + 2 * q * along;
        __m512i r = load_low(even, given);
        if (2 * q + 1 < k) r = _mm512_or_si512(r, _mm512_slli_epi32(load_low(even + along, given), 16));
        _mm512_mask_storeu_epi32(out + q * kWidth + first, stored, r);
      }
    }
  }
}

// `row` and `k` of the matrix x is read as: rows are packed side by side, k runs along a panel.
template <int kWidth>
void pack(const Bf16Operand& x, int64_t across, int64_t along, int64_t row, int64_t k0, int64_t width, int64_t k, uint32_t* out) {
  const int64_t offset = row * across + k0 * along;
  if (x.is_float) {
    pack<kWidth>(static_cast<const float*>(x.data) + offset, across, along, width, k, out);
  } else {
    pack<kWidth>(static_cast<const bf16*>(x.data) + offset, across, along, width, k, out);
  }
}

// c (kRows x kCols) = panel of A x panel of B
void tile(int64_t pairs, const uint32_t* a, const uint32_t* b, float* c, int64_t ldc, bool add) {
  __m512 sum[kRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    __builtin_prefetch(c + i * ldc, 1);  // the tile is written when the sums are done
    __builtin_prefetch(c + i * ldc + 16, 1);
  }
  for (int64_t q = 0; q < pairs; ++q, a += kRows, b += kCols) {
    const __m512bh left = (__m512bh)_mm512_load_si512(b), right = (__m512bh)_mm512_load_si512(b + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, left);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, right);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    float* row = c + i * ldc;
    if (add) {
      sum[i][0] = _mm512_add_ps(sum[i][0], _mm512_loadu_ps(row));
      sum[i][1] = _mm512_add_ps(sum[i][1], _mm512_loadu_ps(row + 16));
    }
    _mm512_storeu_ps(row, sum[i][0]);
    _mm512_storeu_ps(row + 16, sum[i][1]);
  }
}

// The tile at the edge of C, of which only rows x cols exist.
void edge_tile(int64_t pairs, const uint32_t* a, const uint32_t* b, float* c, int64_t ldc, bool add, int64_t rows, int64_t cols) {
  alignas(64) float whole[kRows * kCols];
  tile(pairs, a, b, whole, kCols, false);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) c[i * ldc + j] = add ? c[i * ldc + j] + whole[i * kCols + j] : whole[i * kCols + j];
  }
}

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

}  // namespace

void bf16_gemm(int64_t m, int64_t n, int64_t k, const Bf16Operand& a, const Bf16Operand& b, float* c, int64_t ldc, bool add,
               uint32_t* scratch) {
  uint32_t *const a_panels = scratch, *const b_panels = scratch + kBlockRows * kBlockK / 2;
  for (int64_t k0 = 0; k0 < k; k0 += kBlockK, add = true) {
    const int64_t depth = std::min(kBlockK, k - k0), pairs = ceil_div(depth, 2);
    for (int64_t n0 = 0; n0 < n; n0 += kBlockCols) {
      const int64_t cols = std::min(kBlockCols, n - n0), b_count = ceil_div(cols, kCols);
      for (int64_t m0 = 0; m0 < m; m0 += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, m - m0), a_count = ceil_div(rows, kRows);
        const int64_t new_b = m0 == 0 ? b_count : 0, new_a = n0 == 0 || m > kBlockRows ? a_count : 0;  // not in scratch yet
        at::parallel_for(0, new_b + new_a, 1, [&](int64_t begin, int64_t end) {
          for (int64_t x = begin; x < end; ++x) {
            const int64_t j = x * kCols, i = (x - new_b) * kRows;
            if (x < new_b) {
              pack<kCols>(b, b.col_stride, b.row_stride, n0 + j, k0, cols - j, depth, b_panels + j * pairs);
            } else {
              pack<kRows>(a, a.row_stride, a.col_stride, m0 + i, k0, rows - i, depth, a_panels + i * pairs);
            }
          }
        });
        at::parallel_for(0, a_count * b_count, 1, [&](int64_t begin, int64_t end) {
          for (int64_t x = begin; x < end; ++x) {
            const int64_t i = x % a_count * kRows, j = x / a_count * kCols;
            const uint32_t *left = a_panels + i * pairs, *right = b_panels + j * pairs;
            float* out = c + (m0 + i) * ldc + n0 + j;
            if (i + kRows <= rows && j + kCols <= cols) {
              tile(pairs, left, right, out, ldc, add);
            } else {
              edge_tile(pairs, left, right, out, ldc, add, std::min<int64_t>(kRows, rows - i), std::min<int64_t>(kCols, cols - j));
            }
          }
        });
      }
    }
  }
}

}  // namespace tiedkl::cpu

#endif
