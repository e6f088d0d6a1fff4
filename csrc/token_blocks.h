// Which tokens go into which block: plain C++ on host memory.
#pragma once

#include <cstdint>
#include <vector>

namespace tiedkl {

// Valid tokens grouped by target, the groups in an order unrelated to frequency, so that every block holds about the same
// number of distinct targets (vocabularies are often sorted by frequency).
// `y` holds n ids, negative ones are skipped; the result holds positions in y.
std::vector<int64_t> group_by_target(const int64_t* y, int64_t n);

// Tokens order[begin, end) with their distinct targets.
struct Block {
  int64_t begin, end;
  std::vector<int64_t> targets;  // ids
  std::vector<int64_t> group;    // offsets from begin, one more than targets
};

// As few blocks as hold at most max_rows rows each, of about equal size. A row is a token or, if `with_targets`, a distinct target;
// max_rows >= 2.
std::vector<Block> make_blocks(const std::vector<int64_t>& order, const int64_t* y, int64_t max_rows, bool with_targets);

}  // namespace tiedkl
