// Vector exponentials accurate to about one ulp, on at::vec registers of whatever width this file is compiled for.
//
// exp(x) = 2^n e^r with n = round(x / ln 2), |r| <= ln2/2 and e^r = 1 + r + r^2 Q(r). Keeping r and r^2 Q apart gives expm1(x)
// and expm1(x) - x without cancellation at no extra cost. Q was fitted by weighted least squares (Lawson): see each bound.
#pragma once

#include <cstring>

#include "vec_loop.h"

namespace tiedkl::cpu::CPU_CAPABILITY {

// Integer lanes as wide as a vector of T.
template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef int32_t type __attribute__((vector_size(sizeof(Vec<float>))));
};

// From x + 1.5 * 2^23, whose low mantissa bits hold the integer n: the float 2^n, for -126 <= n <= 127.
inline Vec<float> pow2(const Vec<float>& magic) {
  Lanes<float>::type bits;
  std::memcpy(&bits, static_cast<const void*>(&magic), sizeof bits);
  bits = (bits << 23) + 0x3f800000;
  Vec<float> out;
  std::memcpy(static_cast<void*>(&out), &bits, sizeof bits);
  return out;
}

struct Reduced {
  Vec<float> r, scale;
};

inline Reduced reduce(const Vec<float>& x) {
  const Vec<float> magic(12582912.0f);
  const Vec<float> t = at::vec::fmadd(x, Vec<float>(1.44269504088896341f), magic);
  const Vec<float> n = t - magic;
  Vec<float> r = at::vec::fmadd(n, Vec<float>(-0.693359375f), x);  // exact: few bits
  r = at::vec::fmadd(n, Vec<float>(2.12194440e-4f), r);
  return {r, pow2(t)};
}

// e^x for x in [-87, 88]; relative error of the polynomial 4e-9.
inline Vec<float> exp_bounded(const Vec<float>& x) {
  const Reduced a = reduce(x);
  Vec<float> q = at::vec::fmadd(a.r, Vec<float>(0x1.6a2434p-10f), Vec<float>(0x1.1239e2p-7f));
  q = at::vec::fmadd(q, a.r, Vec<float>(0x1.5558f2p-5f));
  q = at::vec::fmadd(q, a.r, Vec<float>(0x1.555492p-3f));
  q = at::vec::fmadd(q, a.r, Vec<float>(0x1.fffffcp-2f));
  const Vec<float> e = at::vec::fmadd(q * a.r, a.r, a.r);
  return at::vec::fmadd(a.scale, e, a.scale);
}

template <typename T>
struct Expm1 {
  Vec<T> value;   // e^x - 1
  Vec<T> excess;  // e^x - 1 - x, to full relative precision for small x
};

// For |x| <= 80; relative error of the polynomial in `excess` 1e-8.
inline Expm1<float> expm1_bounded(const Vec<float>& x) {
  const Reduced a = reduce(x);
  Vec<float> q = at::vec::fmadd(a.r, Vec<float>(0x1.a072c4p-13f), Vec<float>(0x1.6d42dap-10f));
  q = at::vec::fmadd(q, a.r, Vec<float>(0x1.11114cp-7f));
  q = at::vec::fmadd(q, a.r, Vec<float>(0x1.5554eap-5f));
  q = at::vec::fmadd(q, a.r, Vec<float>(0x1.555556p-3f));
  q = at::vec::fmadd(q, a.r, Vec<float>(0.5f));
  const Vec<float> tail = q * a.r * a.r * a.scale;  // 2^n (e^r - 1 - r)
  const Vec<float> offset = a.scale - Vec<float>(1.0f);
  // With n = 0: r = x, offset = 0, and both sums are exact to rounding.
  return {tail + at::vec::fmadd(a.scale, a.r, offset), tail + (at::vec::fmadd(a.scale, a.r, offset) - x)};
}

// float64 is for verification: the library's own functions, and no claim to speed.
inline Vec<double> exp_bounded(const Vec<double>& x) { return x.exp(); }

inline Expm1<double> expm1_bounded(const Vec<double>& x) {
  const Vec<double> e = x.expm1();
  return {e, e - x};
}

}  // namespace tiedkl::cpu::CPU_CAPABILITY
