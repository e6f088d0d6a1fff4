// Chooses the row kernels at run time from what the processor can do.
#include <cstdlib>
#include <cstring>

#if defined(TIEDKL_X86)
#include <cpuid.h>
#endif

#include "gemm_bf16.h"
#include "gemm_f32.h"
#include "row_kernels.h"

namespace tiedkl::cpu {
namespace {

enum class Capability { kDefault, kAvx2, kAvx512 };

Capability detect() {
#if defined(TIEDKL_X86)
  const char* wish = std::getenv("TIEDKL_CPU_CAPABILITY");
  const bool allow_avx512 = !wish || std::strcmp(wish, "avx512") == 0;
  const bool allow_avx2 = allow_avx512 || std::strcmp(wish, "avx2") == 0;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx512 && allow_avx512) return Capability::kAvx512;
  if (avx2 && allow_avx2) return Capability::kAvx2;
#endif
  return Capability::kDefault;
}

Capability capability() {
  static const Capability c = detect();
  return c;
}

#if defined(TIEDKL_X86)
// AMD processors from Zen 5 on (family 1Ah) multiply 512 bits at once, but those of laptops; Zen 4 takes two steps of 256, as MKL does.
// Leaf 8000001Ah would say so too, but virtual machines hide it.
bool multiplies_512_bits() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff), models = eax >> 16 & 0xf;  // models in groups of sixteen
  return family >= 0x1a && !(family == 0x1a && (models == 2 || models == 6));
}
#endif

}  // namespace

const char* row_kernel_capability() {
  switch (capability()) {
    case Capability::kAvx512: return "AVX512";
    case Capability::kAvx2: return "AVX2";
    default: return "DEFAULT";
  }
}

bool bf16_gemm_available() {
#if defined(TIEDKL_X86)
  return capability() == Capability::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool f32_gemm_available() {
#if defined(TIEDKL_X86)
  static const bool available = capability() == Capability::kAvx512 && !__builtin_cpu_is("intel") && AVX512::brgemm_works();
  return available;
#else
  return false;
#endif
}

int64_t f32_gemm_columns() {
#if defined(TIEDKL_X86)
  static const int64_t columns = multiplies_512_bits() ? 32 : 256;
  return columns;
#else
  return 256;
#endif
}

template <typename T>
const RowKernels<T>& row_kernels() {
#if defined(TIEDKL_X86)
  if (capability() == Capability::kAvx512) return AVX512::table<T>();
  if (capability() == Capability::kAvx2) return AVX2::table<T>();
#endif
  return DEFAULT::table<T>();
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();

}  // namespace tiedkl::cpu
