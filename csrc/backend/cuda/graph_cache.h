// Recorded steps, by their form.
#pragma once

#include <map>
#include <utility>

#include "backend/backend.h"
#include "backend/cuda/cuda_api.h"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda {

// Rows to which a decode step is padded, so that few recordings serve all: at most 8 rows beside
// the real ones, which a layer bound by its weights does not feel. 0: the step is not recorded.
constexpr int padded_rows(int rows) {
  constexpr int kMost = 512;
  if (rows <= 2) return rows;
  if (rows <= 4) return 4;
  if (rows <= 256) return (rows + 7) / 8 * 8;
  return rows <= kMost ? (rows + 31) / 32 * 32 : 0;
}

// Columns of the listed log-probabilities, in as few widths as requests commonly ask for.
// -1: no recording.
constexpr int padded_width(int width) {
  for (const int padded : {0, 1, 5, 20}) {
    if (width <= padded) return padded;
  }
  return -1;
}

// Everything that the launches of a part of a step depend on, except for what lies in memory at
// addresses that do not change.
struct GraphKey {
  StepPart part = StepPart::kForward;
  bool masked = false;  // the sampling comes in a part of its own
  int rows = 0;         // padded: tokens, sequences and sampled rows
  bool process = false, draw = false, filter = false, rank = false;
  int top_width = 0;

  auto operator<=>(const GraphKey&) const = default;
};

// What is still to be added to the residual stream.
struct PendingSum {
  const float* partials = nullptr;
  int splits = 0;
  int64_t split_stride = 0;
  const float* post_weight = nullptr;  // of the norm of the sum, or null
};

// A form is recorded when it comes the second time: start-up stays short, and what its launches
// allocate at their first use is there by then.
class GraphCache {
 public:
  struct Entry {
    GraphOwner graph;
    PendingSum pending;  // that the recorded launches leave
  };

  // Null where the form has not been seen; it is known from now on.
  Entry* find(const GraphKey& key) {
    if (entries_.size() >= kMost && !entries_.contains(key)) entries_.clear();
    const auto [found, is_new] = entries_.try_emplace(key);
    return is_new ? nullptr : &found->second;
  }

  // Memory has moved: what was recorded is void.
  void clear() { entries_.clear(); }

 private:
  static constexpr size_t kMost = 256;  // of some hundred kilobytes each
  std::map<GraphKey, Entry> entries_;
};

}  // namespace rapshee::cuda
