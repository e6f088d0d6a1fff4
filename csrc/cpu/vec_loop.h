// Loops over a row in at::vec registers: whole ones and one partial one at the end.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace tiedkl::cpu::CPU_CAPABILITY {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
double lane_sum(const Vec<T>& v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  double total = 0;
  for (T x : lanes) total += x;
  return total;
}

template <typename T>
T lane_max(const Vec<T>& v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  return *std::max_element(lanes, lanes + Vec<T>::size());
}

// Calls body(offset, lanes) over [0, n) in whole vectors and one partial one. (if-constexpr on a full vector stays cheap.)
template <typename T, typename Body>
inline void for_vectors(int64_t n, const Body& body) {
  constexpr int64_t W = Vec<T>::size();
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, std::integral_constant<int, 0>{});
  if (i < n) body(i, static_cast<int>(n - i));
}

// A running sum whose lanes add up few terms before those are added to the others. Equal terms, as equal rows of w give them, are
// rounded the same way every time, and that adds up too.
template <typename T>
struct PieceSum {
  Vec<T> piece{T(0)}, whole{T(0)};
  void add(const Vec<T>& x) { piece = piece + x; }
  void add_product(const Vec<T>& x, const Vec<T>& y) { piece = at::vec::fmadd(x, y, piece); }
  void flush() {
    whole = whole + piece;
    piece = Vec<T>(T(0));
  }
  double lane_sum() const { return CPU_CAPABILITY::lane_sum(whole); }
};

// for_vectors in pieces of sixteen vectors, after each of which the sums are flushed.
template <typename T, typename Body, typename... Sums>
inline void for_pieces(int64_t n, const Body& body, Sums&... sums) {
  constexpr int64_t kPiece = 16 * Vec<T>::size();
  for (int64_t c = 0; c < n; c += kPiece) {
    for_vectors<T>(std::min(kPiece, n - c), [&](int64_t i, auto lanes) { body(c + i, lanes); });
    (sums.flush(), ...);
  }
}

// A lane count that is zero at compile time means a whole vector.
template <typename T>
inline Vec<T> load(const T* p, std::integral_constant<int, 0>) {
  return Vec<T>::loadu(p);
}
template <typename T>
inline Vec<T> load(const T* p, int lanes) {
  return Vec<T>::loadu(p, lanes);
}
template <typename T>
inline void store(const Vec<T>& v, T* p, std::integral_constant<int, 0>) {
  v.store(p);
}
template <typename T>
inline void store(const Vec<T>& v, T* p, int lanes) {
  v.store(p, lanes);
}
// Lanes past the end replaced by `fill`.
template <typename T>
inline Vec<T> keep(const Vec<T>& v, T, std::integral_constant<int, 0>) {
  return v;
}
template <typename T>
inline Vec<T> keep(const Vec<T>& v, T fill, int lanes) {
  return Vec<T>::set(Vec<T>(fill), v, lanes);
}

}  // namespace tiedkl::cpu::CPU_CAPABILITY
