// The row kernels of the CPU: everything that happens to one block of logits between its matrix products.
#pragma once

#include <cstdint>

#include "../row_math.h"
#include "../strategies.h"

namespace tiedkl::cpu {

// One block of logits (rows tokens x cols vocabulary entries starting at v0) and the similarity rows that go with it.
// T is float or double, the accumulation dtype.
template <typename T>
struct Tile {
  T* z;               // (rows, ldz) raw logits in; gradient block G out when kGradient
  int64_t ldz;
  int64_t rows, cols, v0, n_vocab;
  T* s;               // (targets, lds) raw similarities t[u] . t[v]; target-gradient block out when LossParams::target_grad
  int64_t lds;
  int64_t targets;
  const int64_t* group;   // (targets + 1) rows of each distinct target: tokens of one target are adjacent
  const int64_t* y;       // (rows) target ids
  const T* bias;          // (cols) or null
  const double* g;        // (rows) upstream weights, or null when no gradient is wanted
  TokenState* token;      // (rows)
  TeacherState* teacher;  // (targets)
  T* ce;                  // (rows) outputs, set by kFinish; entropy and correct likewise
  T* entropy;
  T* correct;
  T* q;  // scratch (threads, cols): one row of the similarity target
  T* a;  // scratch (threads, 2, cols): sum of g (delta - center) over one target's tokens, high and low parts (target_grad only)
};

template <typename T>
struct RowKernels {
  void (*teacher_stats)(const Tile<T>&, const LossParams&);
  void (*token_rows)(const Tile<T>&, const LossParams&, unsigned stages);
};

// The best kernels this processor can run; TIEDKL_CPU_CAPABILITY=default|avx2|avx512 lowers the choice.
template <typename T>
const RowKernels<T>& row_kernels();
const char* row_kernel_capability();

// One per translation unit, each compiled for its own instruction set.
namespace DEFAULT {
template <typename T>
const RowKernels<T>& table();
}
#if defined(TIEDKL_X86)
namespace AVX2 {
template <typename T>
const RowKernels<T>& table();
}
namespace AVX512 {
template <typename T>
const RowKernels<T>& table();
}
#endif

}  // namespace tiedkl::cpu
