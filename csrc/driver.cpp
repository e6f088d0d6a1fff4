#include "driver.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/gemm_bf16.h"
#include "cpu/gemm_f32.h"
#include "cpu/row_kernels.h"
#include "strategies.h"
#include "target_logits.h"
#include "token_blocks.h"

namespace tiedkl {
namespace {

using at::Tensor;

constexpr int64_t kFewTargets = 8;

// Uninitialised, on huge pages where the system offers them: blocks live for one call, so that page faults are a measurable part
// of it, and their rows are a vocabulary apart, so that small pages thrash the TLB.
Tensor large(at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor out = at::empty(shape, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(out.data_ptr());
  const uintptr_t begin = (data + kHuge - 1) / kHuge * kHuge, end = (data + out.nbytes()) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

// Rows [begin, end) of a weight in the dtype that products read. A weight of that dtype is used in place.
class Panels {
 public:
  Panels(const Tensor& weight, at::ScalarType dtype, int64_t panel) : weight_(weight), dtype_(dtype), panel_(std::min(panel, weight.size(0))) {}
  Tensor rows(int64_t begin, int64_t end) {
    const Tensor view = weight_.slice(0, begin, end);
    if (weight_.scalar_type() == dtype_) return view;
    if (!buffer_.defined()) buffer_ = at::empty({panel_, weight_.size(1)}, weight_.options().dtype(dtype_));
    const Tensor rows = buffer_.slice(0, 0, end - begin);
    if (begin != begin_ || end != end_) rows.copy_(view);
    begin_ = begin, end_ = end;
    return rows;
  }

 private:
  const Tensor weight_;
  const at::ScalarType dtype_;
  const int64_t panel_;
  Tensor buffer_;
  int64_t begin_ = -1, end_ = -1;
};

// Whether products read bfloat16 operands as they are, with float32 results.
bool multiplies_bf16(const Problem& p) {
  const auto readable = [](const Tensor& x) { return x.numel() > 0 && (x.stride(0) == 1 || x.stride(1) == 1); };
  return p.h.scalar_type() == at::kBFloat16 && cpu::bf16_gemm_available() && readable(p.w) && (!p.t || readable(*p.t));
}

template <typename T>
class Walk {
 public:
  Walk(const Problem& p, const BlockSizes& sizes)
      : p_(p),
        sizes_(sizes),
        params_(p.params),
        acc_(p.h.options().dtype(c10::CppTypeToScalarType<T>::value)),
        bf16_(multiplies_bf16(p)),
        f32_(std::is_same_v<T, float> && !bf16_ && cpu::f32_gemm_available()),
        operand_(bf16_ ? p.h.options() : acc_),
        n_(p.h.size(0)),
        v_(p.w.size(0)),
        kl_(p.params.alpha != 0.0),
        max_rows_(kl_ ? sizes.tokens + sizes.targets : sizes.tokens),
        grad_(p.g.has_value()),
        teacher_grad_(kl_ && p.params.target_grad && grad_ && (p.t ? p.need_t : p.need_w)),
        w_(p.w, operand_.dtype().toScalarType(), sizes.panel),
        t_(p.t ? *p.t : p.w, operand_.dtype().toScalarType(), sizes.panel) {
    params_.target_grad = teacher_grad_;  // nothing behind the similarity target may want a gradient
    params_.temperature = 1.0 / double(T(1.0 / params_.temperature));  // the 1/tau the row kernels multiply by
    if (bf16_ || (f32_ && p.h.scalar_type() == at::kFloat)) sizes_.panel = sizes_.vocab;  // nothing to convert; the product blocks by itself
  }

  Result run() {
    allocate();
    const std::vector<int64_t> order = group_by_target(p_.y.const_data_ptr<int64_t>(), n_);
    for (const Block& block : make_blocks(order, p_.y.const_data_ptr<int64_t>(), max_rows_, kl_)) {
      load(block, order);
      block_ = &block;
      walk_block(*this, {v_, sizes_.vocab, kl_, grad_, teacher_grad_});
      save(block, order);
      first_ = false;
    }
    if (first_) {  // no valid token
      for (const Tensor* d : {&out_.d_w, &out_.d_b, &out_.d_t}) {
        if (d->defined()) d->zero_();
      }
    }
    return out_;
  }

 private:
  friend void walk_block<Walk>(Walk&, const Strategy&);

  void allocate() {
    const int64_t width = std::min(sizes_.vocab, v_), rows = std::min(max_rows_, n_), d = p_.h.size(1);
    const Tensor& t = p_.t ? *p_.t : p_.w;
    const int64_t targets = kl_ ? std::min(max_rows_ / 2, rows) : 0, threads = at::get_num_threads();
    const int64_t both = std::min(max_rows_, rows + targets);
    out_.terms = at::zeros({5, n_}, acc_);
    if (p_.need_h) out_.d_h = at::zeros({n_, d}, acc_);
    if (p_.need_w) out_.d_w = large({v_, d}, acc_);
    if (p_.need_b) out_.d_b = at::empty({v_}, acc_);
    if (p_.need_t && p_.t) out_.d_t = teacher_grad_ ? at::empty({v_, t.size(1)}, acc_) : at::zeros({v_, t.size(1)}, acc_);
    logits_ = large({both, width}, acc_);
    operands_ = at::empty({p_.t ? rows : both, d}, operand_);
    if (p_.need_h) d_h_ = at::empty({rows, d}, acc_);
    if (p_.b) bias_ = p_.b->to(acc_.dtype()).contiguous();
    if (kl_) {
      if (p_.t) u_buffer_ = at::empty({targets, t.size(1)}, operand_);
      q_ = at::empty({threads, width}, acc_);
    }
    if (teacher_grad_) {
      a_ = at::empty({threads, 2, width}, acc_);
      d_u_ = at::empty({targets, t.size(1)}, acc_);
    }
    outputs_ = at::empty({3, rows}, acc_);
    // Not part of the plan's scratch, as the buffers of a BLAS are not.
    if (bf16_) packed_ = at::empty({cpu::kBf16GemmScratch}, acc_);
    if (f32_) packed_ = at::empty({threads * cpu::kF32GemmScratch}, acc_);
  }

  static Tensor index(const int64_t* ids, int64_t n) {
    return at::from_blob(const_cast<int64_t*>(ids), {n}, at::TensorOptions().dtype(at::kLong));
  }

  static void gather(Tensor& out, const Tensor& x, const Tensor& rows) {
    if (out.scalar_type() == x.scalar_type()) {
      at::index_select_out(out, x, 0, rows);
    } else {
      out.copy_(x.index_select(0, rows));
    }
  }

  // Gather the block's hidden states, weights and teacher vectors.
  void load(const Block& block, const std::vector<int64_t>& order) {
    const int64_t rows = block.end - block.begin, targets = kl_ ? block.targets.size() : 0;
    z_ = logits_.slice(0, 0, rows), s_ = logits_.slice(0, rows, rows + targets);
    h_ = operands_.slice(0, 0, rows);
    gather(h_, p_.h, index(order.data() + block.begin, rows));
    if (kl_) {
      u_ = p_.t ? u_buffer_.slice(0, 0, targets) : operands_.slice(0, rows, rows + targets);
      gather(u_, p_.t ? *p_.t : p_.w, index(block.targets.data(), targets));
    }
    y_.resize(rows), g_.assign(rows, 0.0);
    const int64_t* y = p_.y.const_data_ptr<int64_t>();
    const T* g = grad_ ? p_.g->const_data_ptr<T>() : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      y_[i] = y[order[block.begin + i]];
      if (grad_) g_[i] = g[order[block.begin + i]];
    }
    token_.assign(rows, TokenState{});
    teacher_.assign(targets, TeacherState{});
    if (kl_) target_logits(block, order.data(), p_.h, p_.w, p_.b, p_.t ? *p_.t : p_.w, params_.softcap, token_.data(), teacher_.data());
  }

  void save(const Block& block, const std::vector<int64_t>& order) {
    const int64_t rows = block.end - block.begin;
    T* terms = out_.terms.template mutable_data_ptr<T>();
    const T* o = outputs_.template const_data_ptr<T>();
    const int64_t stride = outputs_.size(1);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = order[block.begin + i];
      const double values[5] = {o[i], token_[i].kl, token_[i].lse, o[stride + i], o[2 * stride + i]};
      for (int k = 0; k < 5; ++k) terms[k * n_ + n] = T(values[k]);
    }
    if (p_.need_h) out_.d_h.index_copy_(0, index(order.data() + block.begin, rows), d_h_.slice(0, 0, rows));
  }

  // Logits and similarities of vocabulary rows [v0, v1) into the block. They are one product where both are taken with w.
  void products(int64_t v0, int64_t v1) {
    const int64_t rows = z_.size(0) + (p_.t ? 0 : s_.size(0));
    for (int64_t a = v0; a < v1; a += sizes_.panel) {
      const int64_t b = std::min(a + sizes_.panel, v1);
      Tensor z = logits_.slice(0, 0, rows).slice(1, a - v0, b - v0);
      multiply(z, operands_.slice(0, 0, rows), w_.rows(a, b).t(), true);
      if (!kl_ || !p_.t) continue;
      Tensor s = s_.slice(1, a - v0, b - v0);
      multiply(s, u_, t_.rows(a, b).t(), true);
    }
  }

  void rows(int64_t v0, int64_t v1, unsigned stages) {
    const Block& block = *block_;
    T* o = outputs_.template mutable_data_ptr<T>();
    const int64_t stride = outputs_.size(1);
    const auto data = [](Tensor& x) { return x.defined() ? x.template mutable_data_ptr<T>() : nullptr; };
    const cpu::Tile<T> tile{data(z_),
                            z_.size(1),
                            z_.size(0),
                            v1 - v0,
                            v0,
                            v_,
                            data(s_),
                            z_.size(1),
                            int64_t(block.targets.size()),
                            block.group.data(),
                            y_.data(),
                            bias_.defined() ? bias_.template const_data_ptr<T>() + v0 : nullptr,
                            g_.data(),
                            token_.data(),
                            teacher_.data(),
                            o,
                            o + stride,
                            o + 2 * stride,
                            data(q_),
                            data(a_)};
    const cpu::RowKernels<T>& kernels = cpu::row_kernels<T>();
    if (kl_ && (stages & kStats)) kernels.teacher_stats(tile, params_);
    kernels.token_rows(tile, params_, stages);
  }

  // d_h += G w, d_w = G^T h, d_b = sum G, and the target gradient's two products, for vocabulary rows [v0, v1).
  void gradients(int64_t v0, int64_t v1) {
    const bool first_columns = v0 == 0;
    Tensor d_h = d_h_.defined() ? d_h_.slice(0, 0, z_.size(0)) : d_h_;
    Tensor d_u = d_u_.defined() ? d_u_.slice(0, 0, s_.size(0)) : d_u_;
    for (int64_t a = v0; a < v1; a += sizes_.panel) {
      const int64_t b = std::min(a + sizes_.panel, v1);
      const Tensor grad = z_.slice(1, a - v0, b - v0);
      if (p_.need_h) multiply(d_h, grad, w_.rows(a, b), first_columns && a == v0);
      if (p_.need_w) {
        Tensor d_w = out_.d_w.slice(0, a, b);
        multiply(d_w, grad.t(), h_, first_);
      }
      if (p_.need_b) {
        Tensor d_b = out_.d_b.slice(0, a, b);
        if (first_) {
          at::sum_out(d_b, grad, 0);  // cascaded, unlike a product with ones
        } else {
          d_b.add_(grad.sum(0));
        }
      }
      if (!teacher_grad_) continue;
      const Tensor d_s = s_.slice(1, a - v0, b - v0);
      Tensor d_t = (p_.t ? out_.d_t : out_.d_w).slice(0, a, b);
      multiply(d_t, d_s.t(), u_, p_.t ? first_ : false);
      if (s_.size(0) < kFewTargets) {
        multiply_in_double(d_u, d_s, t_.rows(a, b), first_columns && a == v0);
      } else {
        multiply(d_u, d_s, t_.rows(a, b), first_columns && a == v0);
      }
    }
  }

  // out = x y, added to what is there unless this is the first contribution
  void multiply(Tensor& out, const Tensor& x, const Tensor& y, bool first) const {
    const int64_t m = out.size(0), n = out.size(1), k = x.size(1);
    if (bf16_) {
      const auto operand = [](const Tensor& a) {
        return cpu::Bf16Operand{a.const_data_ptr(), a.scalar_type() == at::kFloat, a.stride(0), a.stride(1)};
      };
      cpu::bf16_gemm(m, n, k, operand(x), operand(y), out.mutable_data_ptr<float>(), out.stride(0), !first,
                     static_cast<uint32_t*>(packed_.mutable_data_ptr()));
      return;
    }
    if constexpr (std::is_same_v<T, float>) {
      const auto operand = [](const Tensor& a) { return cpu::F32Operand{a.const_data_ptr<float>(), a.stride(0), a.stride(1)}; };
      if (f32_ && cpu::f32_gemm_prefers(m, n, k, operand(x), operand(y))) {
        cpu::f32_gemm(m, n, k, operand(x), operand(y), out.mutable_data_ptr<float>(), out.stride(0), !first, packed_.mutable_data_ptr<float>());
        return;
      }
    }
    at::addmm_out(out, out, x, y, first ? 0 : 1);
  }

  // The same for few rows, added up in double: eager has a sum over the vocabulary for every token, and the mean of their roundings;
  // a target that many tokens share has one sum.
  static void multiply_in_double(Tensor& out, const Tensor& x, const Tensor& y, bool first) {
    Tensor sum = first ? at::zeros(out.sizes(), out.options().dtype(at::kDouble)) : out.to(at::kDouble);
    const int64_t step = 1 + (int64_t(1) << 16) / (1 + y.size(1));  // of the copies
    for (int64_t k = 0; k < y.size(0); k += step) {
      const int64_t end = std::min(k + step, y.size(0));
      sum.addmm_(x.slice(1, k, end).to(at::kDouble), y.slice(0, k, end).to(at::kDouble));
    }
    out.copy_(sum);
  }

  // After every column of d_w (or d_t) holds this block's share: the rows of the targets themselves.
  void add_target_rows() {
    const Block& block = *block_;
    const int64_t targets = block.targets.size();
    Tensor& d_t = p_.t ? out_.d_t : out_.d_w;
    d_t.index_add_(0, index(block.targets.data(), targets), d_u_.slice(0, 0, targets));
  }

  const Problem& p_;
  BlockSizes sizes_;
  LossParams params_;
  const at::TensorOptions acc_;
  const bool bf16_, f32_;  // whose products are not ATen's
  const at::TensorOptions operand_;  // of what is multiplied: h, w, t
  const int64_t n_, v_;
  const bool kl_;
  const int64_t max_rows_;
  const bool grad_, teacher_grad_;
  bool first_ = true;  // no block has been added to d_w, d_b, d_t yet
  Panels w_, t_;
  Result out_;
  // Whole scratch, logits above similarities, h above u; then the current block's part of it.
  Tensor logits_, operands_, u_buffer_, q_, a_, d_h_, d_u_, bias_, outputs_, packed_;
  const Block* block_ = nullptr;
  Tensor z_, s_, h_, u_;
  std::vector<int64_t> y_;
  std::vector<double> g_;
  std::vector<TokenState> token_;
  std::vector<TeacherState> teacher_;
};

}  // namespace

Result walk(const Problem& problem, const BlockSizes& blocks) {
  at::NoGradGuard no_grad;
  return problem.h.scalar_type() == at::kDouble ? Walk<double>(problem, blocks).run() : Walk<float>(problem, blocks).run();
}

}  // namespace tiedkl
