// The two strategies over one block of tokens, the same for every device.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tiedkl {

// What to do with each row of a block of logits; a whole-vocabulary block does all of it at once.
constexpr unsigned kPrepare = 1;     // add the bias, apply the softcap
constexpr unsigned kStats = 2;       // add the row to its TokenState
constexpr unsigned kFinish = 4;      // close the statistics, write CE, entropy, correct
constexpr unsigned kDivergence = 8;  // add the row's share of KL to TokenState::kl
constexpr unsigned kGradient = 16;   // write G over z (and the target gradient)

struct Strategy {
  int64_t n_vocab, vocab_block;  // V, B
  bool kl, grad, target_grad;
};

// A walk has the steps of one block:
//   products(v0, v1)      logits and similarities of vocabulary rows [v0, v1)
//   rows(v0, v1, stages)  the row kernels over them
//   gradients(v0, v1)     the products of the gradient block with w and h
//   add_target_rows()     after every column of d_w (or d_t) holds this block's share: the rows of the targets themselves
template <typename Walk>
void walk_block(Walk& walk, const Strategy& s) {
  const int64_t v = s.n_vocab;
  if (s.vocab_block >= v) {  // token_blocks: logits are computed once and become their own gradient
    walk.products(0, v);
    walk.rows(0, v, kPrepare | kStats | kFinish | kDivergence | (s.grad ? kGradient : 0));
    if (!s.grad) return;
    walk.gradients(0, v);
    if (s.target_grad) walk.add_target_rows();
    return;
  }
  const auto for_tiles = [&](const auto& body) {
    for (int64_t v0 = 0; v0 < v; v0 += s.vocab_block) body(v0, std::min(v0 + s.vocab_block, v));
  };
  // vocab_blocks: one pass for the statistics, one that computes the logits again for the gradient.
  for_tiles([&](int64_t v0, int64_t v1) {
    walk.products(v0, v1);
    walk.rows(v0, v1, kPrepare | kStats | (v1 == v ? kFinish : 0));
  });
  const bool divergence_first = s.kl && (!s.grad || s.target_grad);  // the target gradient needs each token's KL
  if (divergence_first) {
    for_tiles([&](int64_t v0, int64_t v1) {
      walk.products(v0, v1);
      walk.rows(v0, v1, kPrepare | kDivergence);
    });
  }
  if (!s.grad) return;
  for_tiles([&](int64_t v0, int64_t v1) {
    walk.products(v0, v1);
    walk.rows(v0, v1, kPrepare | kGradient | (divergence_first ? 0 : kDivergence));
    walk.gradients(v0, v1);
  });
  if (s.target_grad) walk.add_target_rows();
}

}  // namespace tiedkl
