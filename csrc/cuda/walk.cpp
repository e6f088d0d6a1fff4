#include "walk.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../strategies.h"
#include "row_kernels.h"

namespace tiedkl::cuda {
namespace {

using at::Tensor;

constexpr int64_t kAligned = 32;  // floats between rows of a block are a multiple: 128 bytes, for wide loads and for cuBLAS

Dtype dtype_of(const Tensor& x) {
  return x.scalar_type() == at::kFloat ? Dtype::kFloat : x.scalar_type() == at::kBFloat16 ? Dtype::kBFloat16 : Dtype::kHalf;
}

Matrix matrix(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.size(1), dtype_of(x)}; }

// x with the elements of a row side by side, as products want it.
Tensor in_rows(const Tensor& x) { return x.stride(1) == 1 ? x : x.contiguous(); }

// out = x y in float32 from operands of any dtype, added to what is there unless this is the first contribution.
void multiply(Tensor out, const Tensor& x, const Tensor& y, bool first) {
  if (x.scalar_type() == at::kFloat) {
    at::addmm_out(out, out, x, y, first ? 0 : 1);
  } else if (x.is_cuda()) {
    at::addmm_out(out, out, x, y, at::kFloat, first ? 0 : 1);
  } else {  // tests: kernels on the host
    at::addmm_out(out, out, x.to(at::kFloat), y.to(at::kFloat), first ? 0 : 1);
  }
}

template <typename T>
T* data(const Tensor& x) {
  return x.defined() ? static_cast<T*>(x.data_ptr()) : nullptr;
}

class Walk {
 public:
  Walk(const Problem& p, const BlockSizes& sizes, void* stream)
      : stream_(stream),
        p_(p),
        sizes_(sizes),
        params_(p.params),
        float_(p.h.options().dtype(at::kFloat)),
        ids_(p.y.options()),
        n_(p.h.size(0)),
        v_(p.w.size(0)),
        kl_(p.params.alpha != 0.0),
        grad_(p.g.has_value()),
        target_grad_(kl_ && p.params.target_grad && grad_ && (p.t ? p.need_t : p.need_w)),
        h_(in_rows(p.h)),
        w_(in_rows(p.w)),
        t_(p.t ? in_rows(*p.t) : w_),
        count_aware_(p.h.scalar_type() != at::kFloat) {
    params_.target_grad = target_grad_;  // nothing behind the similarity target may want a gradient
    params_.temperature = 1.0 / double(float(1.0 / params_.temperature));  // the 1/tau the row kernels multiply by
    sizes_.tokens = std::min(sizes.tokens, std::max<int64_t>(n_, 1));
  }

  Result run() {
    allocate();
    for (begin_ = 0; begin_ < n_; begin_ += sizes_.tokens) {
      load();
      walk_block(*this, {v_, sizes_.vocab, kl_, grad_, target_grad_});
    }
    if (scale_.defined()) {
      for (Tensor* d : {&out_.d_h, &out_.d_w, &out_.d_b, &out_.d_t}) {
        if (d->defined()) d->mul_(scale_);
      }
    }
    return out_;
  }

 private:
  friend void walk_block<Walk>(Walk&, const Strategy&);

  void allocate() {
    const int64_t width = std::min(sizes_.vocab, v_), stride = (width + kAligned - 1) / kAligned * kAligned;
    const int64_t rows = std::min(sizes_.tokens, n_), capacity = std::min(rows, v_);
    const auto result = [&](bool needed, at::IntArrayRef shape, bool zero) {
      return !needed ? Tensor() : zero ? at::zeros(shape, float_) : at::empty(shape, float_);
    };
    const bool none = n_ == 0;  // otherwise the first block of tokens writes all of d_w
    out_.terms = at::zeros({5, n_}, float_);
    out_.d_h = result(p_.need_h, h_.sizes(), none);
    out_.d_w = result(p_.need_w, w_.sizes(), none);
    out_.d_b = result(p_.need_b, {v_}, none);
    out_.d_t = result(p_.need_t && p_.t, t_.sizes(), none || !target_grad_);
    logits_ = at::empty({rows, stride}, float_);
    if (kl_) similarities_ = at::empty({capacity, stride}, float_);
    if (target_grad_) {
      through_ = at::empty({capacity, stride}, t_.options());
      d_u_ = at::empty({capacity, t_.size(1)}, float_);
    }
    tokens_ = at::empty({rows, int64_t(sizeof(TokenState))}, float_.dtype(at::kByte));
    rows_ = at::empty({rows, int64_t(sizeof(Row))}, float_.dtype(at::kByte));
    if (kl_) teachers_ = at::empty({capacity, int64_t(sizeof(TeacherState))}, float_.dtype(at::kByte));
    if (p_.b) bias_ = p_.b->to(at::kFloat).contiguous();
    if (!grad_) return;
    g_ = *p_.g;
    if (h_.scalar_type() == at::kHalf && n_ > 0) {  // G in float16 must not underflow
      const Tensor largest = g_.abs().amax();
      scale_ = at::where(largest.gt(0), largest, at::ones_like(largest));
      g_ = g_.div(scale_);
    }
  }

  // The distinct targets of a block of tokens, in increasing order; how many there are stays on the device.
  void group(const Tensor& y) {
    const int64_t capacity = std::min(y.size(0), v_);
    const Tensor valid = y.ge(0), slot = y.masked_fill(valid.logical_not(), v_);
    const Tensor rank = at::zeros({v_ + 1}, ids_.dtype(at::kInt)).index_fill_(0, slot, 1).cumsum(0);
    which_ = rank.index_select(0, slot).sub_(1).clamp_min_(0);
    count_ = rank.select(0, v_ - 1).clone();
    const Tensor place = which_.masked_fill(valid.logical_not(), capacity);
    id_ = at::zeros({capacity + 1}, ids_).scatter_(0, place, y).slice(0, 0, capacity);  // equal targets write equal values
    if (!target_grad_) return;
    const auto [key, order] = at::sort(place, /*stable=*/true, 0, false);
    order_ = order;
    start_ = at::searchsorted(key, at::arange(capacity + 1, ids_));
  }

  void load() {
    const int64_t end = std::min(begin_ + sizes_.tokens, n_), rows = end - begin_;
    const Tensor y = p_.y.slice(0, begin_, end);
    h_rows_ = h_.slice(0, begin_, end);
    z_ = logits_.slice(0, 0, rows);
    b_ = Block{};
    if (kl_) {
      group(y);
      u_.reset();  // the last block's, before this one's are there too
      if (!count_aware_ || target_grad_) u_ = t_.index_select(0, id_);
      s_ = similarities_.slice(0, 0, id_.size(0));
      b_.s = data<float>(s_), b_.lds = s_.stride(0), b_.targets = s_.size(0);
      b_.count = data<int64_t>(count_), b_.ids = data<int64_t>(id_), b_.which = data<int64_t>(which_);
      b_.teacher = data<TeacherState>(teachers_);
    }
    b_.z = data<float>(z_), b_.ldz = z_.stride(0);
    b_.rows = rows, b_.n_vocab = v_;
    b_.y = data<int64_t>(y);
    b_.bias = data<float>(bias_);
    b_.g = grad_ ? data<float>(g_) + begin_ : nullptr;
    b_.token = data<TokenState>(tokens_), b_.row = data<Row>(rows_);
    b_.terms = data<float>(out_.terms) + begin_, b_.terms_stride = n_;
    begin_tokens(b_, params_, matrix(h_rows_), matrix(w_), stream_);
    if (kl_) begin_targets(b_, matrix(t_), stream_);
  }

  // Similarities in half precision are a kernel's, of the distinct targets; other products are cuBLAS's, which takes as many rows as
  // there may be.
  void products(int64_t v0, int64_t v1) {
    b_.v0 = v0, b_.cols = v1 - v0;
    multiply(z_.slice(1, 0, v1 - v0), h_rows_, w_.slice(0, v0, v1).t(), true);
    if (!kl_) return;
    if (count_aware_) {
      similarities(b_, matrix(t_), stream_);
    } else {
      multiply(s_.slice(1, 0, v1 - v0), u_, t_.slice(0, v0, v1).t(), true);
    }
  }

  void rows(int64_t, int64_t, unsigned stages) {
    if (stages & kStats) {
      if (kl_) teacher_stats(b_, params_, stream_);
      token_stats(b_, params_, stream_);
    }
    if (stages & kFinish) finish_tokens(b_, params_, stream_);
    const bool write = stages & kGradient;
    bool divergence_wanted = kl_ && (stages & kDivergence);
    if (divergence_wanted && (!write || target_grad_)) {
      divergence(b_, params_, stream_);
      divergence_wanted = false;
    }
    if (!write) return;
    if (target_grad_) {  // before G takes the place of the logits
      write_target_gradient(b_, params_, data<int64_t>(order_), data<int64_t>(start_), through_.data_ptr(), through_.stride(0),
                            dtype_of(through_), stream_);
    }
    write_gradient(b_, params_, dtype_of(h_), divergence_wanted, stream_);
  }

  // d_h += G w, d_w += G^T h, d_b += sum G, and the target gradient's two products, for vocabulary rows [v0, v1).
  void gradients(int64_t v0, int64_t v1) {
    const bool first_rows = begin_ == 0, first_columns = v0 == 0;
    const Tensor grad = z_.view(h_.scalar_type()).slice(1, 0, v1 - v0);
    if (p_.need_h) multiply(out_.d_h.slice(0, begin_, begin_ + grad.size(0)), grad, w_.slice(0, v0, v1), first_columns);
    if (p_.need_w) multiply(out_.d_w.slice(0, v0, v1), grad.t(), h_rows_, first_rows);
    if (p_.need_b) {
      Tensor d_b = out_.d_b.slice(0, v0, v1);
      if (first_rows) {
        at::sum_out(d_b, grad, 0, false, at::kFloat);
      } else {
        d_b.add_(grad.sum(0, false, at::kFloat));
      }
    }
    if (!target_grad_) return;
    const Tensor d_s = through_.slice(0, 0, s_.size(0)).slice(1, 0, v1 - v0);
    multiply((p_.t ? out_.d_t : out_.d_w).slice(0, v0, v1), d_s.t(), u_, p_.t ? first_rows : false);
    multiply(d_u_.slice(0, 0, s_.size(0)), d_s, t_.slice(0, v0, v1), first_columns);
  }

  // Places beyond the count are zero rows with id 0.
  void add_target_rows() { (p_.t ? out_.d_t : out_.d_w).index_add_(0, id_, d_u_.slice(0, 0, s_.size(0))); }

  void* const stream_;
  const Problem& p_;
  BlockSizes sizes_;
  LossParams params_;
  const at::TensorOptions float_, ids_;
  const int64_t n_, v_;
  const bool kl_, grad_, target_grad_;
  const Tensor h_, w_, t_;
  const bool count_aware_;  // similarities are taken of the distinct targets alone
  Result out_;
  Tensor g_, scale_, bias_;
  // Scratch of the largest block, the similarity block's gradient and d_u among it; what is known of a token or a target.
  Tensor logits_, similarities_, through_, d_u_, tokens_, teachers_, rows_;
  // The current block of tokens.
  int64_t begin_ = 0;
  Block b_;
  Tensor h_rows_, z_, s_, u_, which_, count_, id_, order_, start_;
};

}  // namespace

Result walk(const Problem& problem, const BlockSizes& blocks, void* stream) {
  at::NoGradGuard no_grad;
  return Walk(problem, blocks, stream).run();
}

}  // namespace tiedkl::cuda
