// exp and expm1 in float32 to about one ulp, for a host compiler and nvcc alike.
//
// The arithmetic and the polynomials are those of cpu/vec_math.h, one number at a time: exp(x) = 2^n e^r with n = round(x / ln 2) and
// e^r = 1 + r + r^2 Q(r), so that expm1(x) and expm1(x) - x come without cancellation. The CUDA library's expf is as accurate,
// but has no expm1(x) - x.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "row_math.h"

namespace tiedkl {

constexpr float kExpFloor = -87.0f;  // smallest exponent that exp_bounded takes; below it a probability counts as e^-87
constexpr float kLowestX = -80.0f;   // expm1 is -1 to rounding below

// The larger one; a NaN on the left stays, unlike with fmaxf.
TIEDKL_HD float at_least(float x, float low) { return x < low ? low : x; }

struct Reduced {
  float r, scale;
};

// r and 2^n
TIEDKL_HD Reduced reduce_exponent(float x) {
  const float t = std::fma(x, 1.44269504088896341f, 12582912.0f);  // 1.5 * 2^23: the low mantissa bits hold n
  const float n = t - 12582912.0f;
  float r = std::fma(n, -0.693359375f, x);  // exact: few bits
  r = std::fma(n, 2.12194440e-4f, r);
#if defined(__CUDA_ARCH__)
  return {r, __uint_as_float((__float_as_uint(t) << 23) + 0x3f800000u)};
#else
  uint32_t bits;
  std::memcpy(&bits, &t, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return {r, scale};
#endif
}

// e^x for x in [-87, 88]; relative error of the polynomial 4e-9.
TIEDKL_HD float exp_bounded(float x) {
  const Reduced a = reduce_exponent(x);
  float q = std::fma(a.r, 0x1.6a2434p-10f, 0x1.1239e2p-7f);
  q = std::fma(q, a.r, 0x1.5558f2p-5f);
  q = std::fma(q, a.r, 0x1.555492p-3f);
  q = std::fma(q, a.r, 0x1.fffffcp-2f);
  return std::fma(a.scale, std::fma(q * a.r, a.r, a.r), a.scale);
}

struct Expm1 {
  float value;   // e^x - 1
  float excess;  // e^x - 1 - x, to full relative precision for small x
};

// For |x| <= 80; relative error of the polynomial in `excess` 1e-8.
TIEDKL_HD Expm1 expm1_bounded(float x) {
  const Reduced a = reduce_exponent(x);
  float q = std::fma(a.r, 0x1.a072c4p-13f, 0x1.6d42dap-10f);
  q = std::fma(q, a.r, 0x1.11114cp-7f);
  q = std::fma(q, a.r, 0x1.5554eap-5f);
  q = std::fma(q, a.r, 0x1.555556p-3f);
  q = std::fma(q, a.r, 0.5f);
  const float tail = q * a.r * a.r * a.scale;  // 2^n (e^r - 1 - r)
  const float head = std::fma(a.scale, a.r, a.scale - 1.0f);
  return {tail + head, tail + (head - x)};
}

}  // namespace tiedkl
