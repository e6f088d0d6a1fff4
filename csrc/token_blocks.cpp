#include "token_blocks.h"

#include <algorithm>
#include <utility>

namespace tiedkl {

std::vector<int64_t> group_by_target(const int64_t* y, int64_t n) {
  std::vector<std::pair<uint64_t, int64_t>> keyed;
  keyed.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    if (y[i] >= 0) keyed.emplace_back(uint64_t(y[i]) * 0x9E3779B97F4A7C15ull, i);  // odd multiplier: one key per id
  }
  std::sort(keyed.begin(), keyed.end());
  std::vector<int64_t> order(keyed.size());
  for (size_t i = 0; i < keyed.size(); ++i) order[i] = keyed[i].second;
  return order;
}

std::vector<Block> make_blocks(const std::vector<int64_t>& order, const int64_t* y, int64_t max_tokens, int64_t max_targets) {
  std::vector<Block> blocks;
  const int64_t n = order.size();
  for (int64_t i = 0; i < n;) {
    Block block{i, i, {}, {}};
    for (; i < n && i - block.begin < max_tokens; ++i) {
      if (block.targets.empty() || y[order[i]] != block.targets.back()) {
        if (int64_t(block.targets.size()) == max_targets) break;
        block.targets.push_back(y[order[i]]);
        block.group.push_back(i - block.begin);
      }
    }
    block.end = i;
    block.group.push_back(i - block.begin);
    blocks.push_back(std::move(block));
  }
  return blocks;
}

}  // namespace tiedkl
