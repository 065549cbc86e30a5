// The work lists of attention, made on the host from the arrays of a step (see launchers.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda {

// Splits that a query sees whose sequence has seq_len tokens, its own the last.
struct SplitRange {
  int first = 0, count = 0;
};
inline SplitRange visible_splits(int seq_len, int window) {
  if (seq_len <= 0) return {};
  const int first_key = window > 0 ? std::max(0, seq_len - window) : 0;
  const int first = first_key / kAttentionSplit;
  return {first, (seq_len - 1) / kAttentionSplit + 1 - first};
}

// Leading sequences of at most one query token: decode takes these.
inline int num_decode_seqs(std::span<const int32_t> query_start_loc) {
  size_t s = 0;
  while (s + 1 < query_start_loc.size() && query_start_loc[s + 1] - query_start_loc[s] <= 1) ++s;
  return static_cast<int>(s);
}

struct DecodePlan {
  std::vector<int32_t> items;       // [.][2] sequence, split
  std::vector<int32_t> first_item;  // [S]
  std::vector<int32_t> num_splits;  // [S]

  int num_items() const { return static_cast<int>(items.size() / 2); }
};

// Items of sequences with one query token each, seq_len 0 for padding. `plan` is replaced, its
// memory reused.
inline void plan_decode(std::span<const int32_t> seq_lens, int window, DecodePlan& plan) {
  plan.items.clear();
  plan.first_item.clear();
  plan.num_splits.clear();
  for (size_t s = 0; s < seq_lens.size(); ++s) {
    const SplitRange splits = visible_splits(seq_lens[s], window);
    plan.first_item.push_back(plan.num_items());
    plan.num_splits.push_back(splits.count);
    for (int i = 0; i < splits.count; ++i) {
      plan.items.push_back(static_cast<int32_t>(s));
      plan.items.push_back(splits.first + i);
    }
  }
}

// Tiles of the sequences from first_seq on, [.][2] sequence, first row: those with the most keys
// first, as blocks start in this order and the short ones then fill the end.
inline void plan_prefill(std::span<const int32_t> query_start_loc,
                         std::span<const int32_t> positions, int first_seq, int tile_tokens,
                         std::vector<int32_t>& tiles) {
  struct Tile {
    int32_t seq, row, last_position;
  };
  std::vector<Tile> found;
  for (size_t s = static_cast<size_t>(first_seq); s + 1 < query_start_loc.size(); ++s) {
    const int32_t end = query_start_loc[s + 1];
    for (int32_t row = query_start_loc[s]; row < end; row += tile_tokens) {
      const int32_t last = std::min(row + tile_tokens, end) - 1;
      found.push_back({static_cast<int32_t>(s), row, positions[static_cast<size_t>(last)]});
    }
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const Tile& a, const Tile& b) { return a.last_position > b.last_position; });
  tiles.clear();
  for (const Tile& tile : found) tiles.insert(tiles.end(), {tile.seq, tile.row});
}

}  // namespace rapshee::cuda
