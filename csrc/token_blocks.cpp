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

namespace {

std::vector<Block> cut(const std::vector<int64_t>& order, const int64_t* y, int64_t max_rows, bool with_targets) {
  std::vector<Block> blocks;
  const int64_t n = order.size();
  for (int64_t i = 0; i < n;) {
    Block block{i, i, {}, {}};
    for (int64_t rows = 0; i < n; ++i) {
      const bool fresh = block.targets.empty() || y[order[i]] != block.targets.back();
      rows += fresh && with_targets ? 2 : 1;
      if (rows > max_rows) break;
      if (fresh) {
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

}  // namespace

std::vector<Block> make_blocks(const std::vector<int64_t>& order, const int64_t* y, int64_t max_rows, bool with_targets) {
  std::vector<Block> blocks = cut(order, y, max_rows, with_targets);
  const int64_t n = blocks.size();
  int64_t rows = 0;
  for (const Block& block : blocks) rows += block.end - block.begin + (with_targets ? block.targets.size() : 0);
  // The same number of equal blocks: a small last one would read all of w for little work. A cut target counts twice, so the
  // mean may be a little too small.
  for (int64_t size = n ? (rows + n - 1) / n : max_rows; size < max_rows; size += 1 + size / 64) {
    std::vector<Block> even = cut(order, y, size, with_targets);
    if (int64_t(even.size()) <= n) return even;
  }
  return blocks;
}

}  // namespace tiedkl
