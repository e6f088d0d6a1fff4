// Kernels of what depends on a token's target: its logit and similarity in double, and the gradient through the similarity rows.
//
// Reference: tiedkl/reference.py; csrc/target_logits.h and write_target_gradient in csrc/cpu/row_kernels.cpp are their like on a CPU.
#include "device.cuh"

namespace tiedkl::cuda {
namespace {

// Row `row` of x with row `other` of y, in double, in every lane of a warp.
template <typename T>
__device__ double dot(const Matrix& x, int64_t row, const Matrix& y, int64_t other) {
  const T *a = static_cast<const T*>(x.data) + row * x.stride_row, *b = static_cast<const T*>(y.data) + other * y.stride_row;
  double sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < x.columns; i += kWarp) {
    sum += double(float(a[i * x.stride_column])) * double(float(b[i * y.stride_column]));
  }
  return warp_sum(sum);
}

// A warp for each row.
__device__ inline int64_t warp_row() { return int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

template <typename T>
__global__ void begin_tokens_kernel(Block b, LossParams p, Matrix h, Matrix w) {
  const int64_t n = warp_row();
  if (n >= b.rows) return;
  TokenState state;
  const int64_t y = b.y[n];
  if (y >= 0 && p.alpha != 0.0) {
    double z = dot<T>(h, n, w, y) + (b.bias ? double(b.bias[y]) : 0.0);
    if (p.softcap != 0.0) z = p.softcap * std::tanh(z / p.softcap);
    state.zy_exact = z;
  }
  if (threadIdx.x % kWarp == 0) b.token[n] = state;
}

template <typename T>
__global__ void begin_targets_kernel(Block b, Matrix t) {
  const int64_t u = warp_row();
  if (u >= b.targets || u >= *b.count) return;
  TeacherState state;
  state.self = dot<T>(t, b.ids[u], t, b.ids[u]);
  if (threadIdx.x % kWarp == 0) b.teacher[u] = state;
}

// A thread block for some columns of one target's row; the tokens of the target are added up in their order.
template <typename Out>
__global__ void __launch_bounds__(kThreads) target_gradient_kernel(Block b, LossParams p, const int64_t* order, const int64_t* start,
                                                                   Out* out, int64_t ld) {
  const int64_t u = blockIdx.x, i = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kLane;
  if (i >= b.cols) return;
  Pack<Out> result{};
  if (u < *b.count) {
    const Pack<float> s = load(b.s + u * b.lds + i);
    const int64_t self = b.ids[u] - b.v0;
    const float inv_t = float(1.0 / p.temperature), cap = float(p.softcap);
    double a[kLane] = {}, mean = 0;
    Row r{};
    for (int64_t k = start[u]; k < start[u + 1]; ++k) {
      const int64_t n = order[k];
      r = b.row[n];
      const Pack<float> z = load(b.z + n * b.ldz + i);
      mean += double(r.g) * b.token[n].spread;
      for (int j = 0; j < kLane && i + j < b.cols; ++j) {
        const float delta = i + j == self ? r.delta_y : -(log_ratio(logit(z.v[j], b, cap, i + j), s.v[j], r, inv_t) + r.center);
        a[j] += double(r.g) * double(delta);
      }
    }
    const TeacherState t = b.teacher[u];
    const float coef = float(p.alpha / p.temperature), q_self = float(std::exp((t.self - t.m) * (1.0 / p.temperature)) * double(r.inv_sum_s));
    for (int j = 0; j < kLane && i + j < b.cols; ++j) {
      const float q = i + j == self ? q_self : similarity_target(s.v[j], r, inv_t);
      result.v[j] = Out(coef * q * float(a[j] - mean));
    }
  }
  *reinterpret_cast<Pack<Out>*>(out + u * ld + i) = result;
}

unsigned warps(int64_t rows) { return unsigned((rows + kWarps - 1) / kWarps); }

}  // namespace

void begin_tokens(const Block& b, const LossParams& p, const Matrix& h, const Matrix& w, void* stream) {
  dispatch(h.dtype, [&](auto value) { launch(begin_tokens_kernel<decltype(value)>, warps(b.rows), stream, b, p, h, w); });
}

void begin_targets(const Block& b, const Matrix& t, void* stream) {
  dispatch(t.dtype, [&](auto value) { launch(begin_targets_kernel<decltype(value)>, warps(b.targets), stream, b, t); });
}

void write_target_gradient(const Block& b, const LossParams& p, const int64_t* order, const int64_t* start, void* out, int64_t ld,
                           Dtype dtype, void* stream) {
  const dim3 grid(unsigned(b.targets), unsigned((b.cols + kThreads * kLane - 1) / (kThreads * kLane)));
  dispatch(dtype, [&](auto value) {
    using Out = decltype(value);
    launch(target_gradient_kernel<Out>, grid, stream, b, p, order, start, static_cast<Out*>(out), ld);
  });
}

}  // namespace tiedkl::cuda
