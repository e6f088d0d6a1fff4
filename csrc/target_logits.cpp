#include "target_logits.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <cmath>

namespace tiedkl {
namespace {

// x . y in double; four sums, so that additions need not wait for one another.
template <typename T>
double dot(const T* x, int64_t step_x, const T* y, int64_t step_y, int64_t n) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int64_t j = 0; j < 4; ++j) sums[j] += double(x[(i + j) * step_x]) * double(y[(i + j) * step_y]);
  }
  for (; i < n; ++i) sums[0] += double(x[i * step_x]) * double(y[i * step_y]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace

void target_logits(const Block& block, const int64_t* order, const at::Tensor& h, const at::Tensor& w, const std::optional<at::Tensor>& b,
                   const at::Tensor& t, double softcap, TokenState* tokens, TeacherState* targets) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, h.scalar_type(), "target_logits", [&] {
    const scalar_t *ph = h.const_data_ptr<scalar_t>(), *pw = w.const_data_ptr<scalar_t>(), *pt = t.const_data_ptr<scalar_t>();
    const scalar_t* pb = b ? b->const_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, block.targets.size(), 1 + 8192 / (1 + h.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t id = block.targets[u];
        const scalar_t *w_row = pw + id * w.stride(0), *t_row = pt + id * t.stride(0);
        targets[u].self = dot(t_row, t.stride(1), t_row, t.stride(1), t.size(1));
        const double bias = pb ? double(pb[id * b->stride(0)]) : 0.0;
        for (int64_t n = block.group[u]; n < block.group[u + 1]; ++n) {
          double z = dot(ph + order[block.begin + n] * h.stride(0), h.stride(1), w_row, w.stride(1), h.size(1)) + bias;
          if (softcap != 0.0) z = softcap * std::tanh(z / softcap);
          tokens[n].zy_exact = z;
        }
      }
    });
  });
}

}  // namespace tiedkl
