// Selection without sorting, by a block that has a row to itself: the key at which a descending
// walk over entries has gathered a given mass. With mass 1 each it finds the k-th largest, with
// probabilities the edge of top-p.
//
// Radix selection by 8 bits at a time, whose first digit starts at the highest bit in which the
// bounds of the keys differ: keys of one power of two spread over the buckets all the same, so that
// few atomics meet. Sums are of integers.
#pragma once

#include "backend/cuda/kernels/sampling_row.cuh"

namespace rapshee::cuda::sampling {

constexpr int kRadixBits = 8;
constexpr int kBuckets = 1 << kRadixBits;
constexpr int kBucketsOfLane = kBuckets / 32;
// Candidates that shared memory holds, 16 KB; of more, the chunks are read again. Several times
// what an LLM's nucleus or a usual top-k leaves.
constexpr int kListCapacity = 2048;

// Single numbers that the threads of a block share.
enum Cell : uint8_t {
  kAbove,   // mass of the buckets above the digit
  kInside,  // of the digit's
  kSum,
  kNumCells
};
enum SmallCell : uint8_t {
  kDigit,
  kCount,  // of what was written to a list
  kNumSmallCells
};
// Shared memory: candidates, the two halves of the histogram's masses, the cells.
constexpr size_t kHistogramAt = size_t{kListCapacity} * sizeof(uint64_t);
constexpr size_t kCellsAt = kHistogramAt + 2 * kBuckets * sizeof(uint32_t);
constexpr size_t kSmallCellsAt = kCellsAt + kNumCells * sizeof(uint64_t);
constexpr size_t kSelectBytes = kSmallCellsAt + kNumSmallCells * sizeof(uint32_t);
static_assert(kSelectBytes % sizeof(uint64_t) == 0);

RAPSHEE_DEVICE dev::SharedPtr<uint64_t> shared_cell(Cell cell) {
  return dev::shared<uint64_t>(kCellsAt) + static_cast<int>(cell);
}
RAPSHEE_DEVICE dev::SharedPtr<uint32_t> shared_cell(SmallCell cell) {
  return dev::shared<uint32_t>(kSmallCellsAt) + static_cast<int>(cell);
}
RAPSHEE_DEVICE dev::SharedPtr<uint32_t> histogram(int half) {
  return dev::shared<uint32_t>(kHistogramAt) + half * kBuckets;
}

// Before anything else of this file, by all threads.
RAPSHEE_DEVICE void clear_histogram() {
  for (int i = dev::thread(); i < 2 * kBuckets; i += dev::num_threads()) histogram(0)[i] = 0;
  dev::sync();
}

// Shared memory adds 64-bit numbers in a loop, but 32-bit ones at once.
RAPSHEE_DEVICE void add_to_bucket(uint32_t bucket, uint64_t mass) {
  const auto low = static_cast<uint32_t>(mass);
  const uint32_t before = dev::atomic_add(histogram(0) + bucket, low);
  const uint32_t carry = before + low < before ? 1 : 0;
  const uint32_t high = static_cast<uint32_t>(mass >> 32) + carry;
  if (high != 0) dev::atomic_add(histogram(1) + bucket, high);
}

// The sum over all threads, for all.
RAPSHEE_DEVICE uint64_t block_sum(uint64_t mine) {
  const auto sum = shared_cell(kSum);
  dev::sync();
  if (dev::thread() == 0) *sum = 0;
  dev::sync();
  mine = warp_sum(mine);
  if (dev::lane() == 0) dev::atomic_add(sum, mine);
  dev::sync();
  return *sum;
}

// By one warp: finds the bucket at which a descending walk reaches `target`, 0 if none does, and
// clears the histogram.
RAPSHEE_DEVICE void walk_histogram(uint64_t target) {
  const int top = kBuckets - 1 - dev::lane() * kBucketsOfLane;  // a lane's, and those below
  uint64_t masses[kBucketsOfLane];
  uint64_t mine = 0;
  RAPSHEE_UNROLL
  for (int i = 0; i < kBucketsOfLane; ++i) {
    masses[i] = static_cast<uint64_t>(histogram(1)[top - i]) << 32 | histogram(0)[top - i];
    mine += masses[i];
    histogram(0)[top - i] = 0;
    histogram(1)[top - i] = 0;
  }
  const uint64_t reached = warp_scan(mine);
  uint64_t above = reached - mine;
  const bool never = dev::shfl(reached, 31) < target;
  if (never ? dev::lane() != 31 : reached < target || above >= target) return;
  int i = 0;
  RAPSHEE_UNROLL
  for (int j = 0; j < kBucketsOfLane - 1; ++j) {
    if (i < j || above + masses[j] >= target) continue;
    above += masses[j];
    i = j + 1;
  }
  uint64_t inside = 0;
  RAPSHEE_UNROLL
  for (int j = 0; j < kBucketsOfLane; ++j) inside = i == j ? masses[j] : inside;
  *shared_cell(kAbove) = above;
  *shared_cell(kInside) = inside;
  *shared_cell(kDigit) = static_cast<uint32_t>(top - i);
}

struct Selection {
  uint32_t key;
  uint64_t wanted;  // mass that is still to come from the lowest of the entries
  uint64_t inside;  // that those have; if it is more, they are all of this key
};

// A key from `low` to `high`: of those for which the mass of the entries from it up to `high`
// reaches `target` > 0 the largest, or one below it with no entry in between; `low` if there are
// none. `each(add)` has to call add(key, mass) once for each entry from `low` on, from any thread.
template <class Each>
RAPSHEE_DEVICE Selection select(uint32_t low, uint32_t high, uint64_t target, const Each& each) {
  for (;;) {
    const int bits = 32 - dev::count_leading_zeros(high - low);
    const int shift = bits > kRadixBits ? bits - kRadixBits : 0;
    each([&](uint32_t key, uint64_t mass) {
      if (key >= low && key <= high) add_to_bucket((key - low) >> shift, mass);
    });
    dev::sync();
    if (dev::warp() == 0) walk_histogram(target);
    dev::sync();
    low += *shared_cell(kDigit) << shift;
    const uint64_t above = *shared_cell(kAbove);
    target = target > above ? target - above : 0;
    const uint64_t inside = *shared_cell(kInside);
    if (shift == 0 || target == inside) return {low, target, inside};
    const uint32_t end = low + ((1u << shift) - 1);
    high = end < high ? end : high;
  }
}

// Calls visit(chunk) for the row's chunks whose largest key reaches `bound`, each by one warp.
template <class Visit>
RAPSHEE_DEVICE void visit_chunks(const ChunkedRow& row, uint32_t bound, const Visit& visit) {
  const int warps = dev::num_threads() / 32;
  for (int base = dev::warp(); base < row.num_chunks; base += 32 * warps) {
    const int mine = base + dev::lane() * warps;
    const bool reaches = mine < row.num_chunks && key_of_entry(row.best[mine]) >= bound;
    for (uint32_t left = dev::ballot(reaches); left != 0; left &= left - 1) {
      visit(base + lowest_bit(left) * warps);
    }
  }
}

// Entries of a row whose keys reach a bound.
class Candidates {
 public:
  RAPSHEE_DEVICE explicit Candidates(const ChunkedRow& row) : row_(row) {}

  RAPSHEE_DEVICE void collect(uint32_t bound) {
    const auto count = shared_cell(kCount);
    const auto list = dev::shared<uint64_t>();
    bound_ = bound;
    dev::sync();
    if (dev::thread() == 0) *count = 0;
    dev::sync();
    visit_chunks(row_, bound, [&](int chunk) {
      const Tile tile = row_.load(chunk);
      uint32_t mine = 0;
      visit_tile(tile, chunk, [&](uint64_t) { ++mine; });
      const uint32_t end = warp_scan(mine);
      uint32_t at = 0;
      if (dev::lane() == 31) at = dev::atomic_add(count, end);
      at = dev::shfl(at, 31) + end - mine;
      visit_tile(tile, chunk, [&](uint64_t entry) {
        if (at < kListCapacity) list[at] = entry;
        ++at;
      });
    });
    dev::sync();
    count_ = *count;
  }

  RAPSHEE_DEVICE int64_t count() const { return count_; }
  RAPSHEE_DEVICE uint32_t bound() const { return bound_; }

  // Calls visit(entry) for each, from any thread.
  template <class Visit>
  RAPSHEE_DEVICE void each(const Visit& visit) const {
    if (count_ <= kListCapacity) {
      const auto list = dev::shared<const uint64_t>();
      for (auto i = static_cast<uint32_t>(dev::thread()); i < count_;
           i += static_cast<uint32_t>(dev::num_threads())) {
        visit(list[i]);
      }
      return;
    }
    visit_chunks(row_, bound_, [&](int chunk) { visit_tile(row_.load(chunk), chunk, visit); });
  }

 private:
  template <class Visit>
  RAPSHEE_DEVICE void visit_tile(const Tile& tile, int chunk, const Visit& visit) const {
    RAPSHEE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      RAPSHEE_UNROLL
      for (int c = 0; c < kVector; ++c) {
        if (key_of(tile.x[i][c]) < bound_) continue;
        visit(entry_of(tile.x[i][c], chunk * kChunk + offset_of(i) + c));
      }
    }
  }

  ChunkedRow row_;
  uint32_t bound_ = 0;
  uint32_t count_ = 0;
};

// A key that at least the k largest logits reach: the k-th largest of the chunks' maxima, where
// there are as many.
RAPSHEE_DEVICE uint32_t bound_of_largest(const ChunkedRow& row, int64_t k) {
  if (k > row.num_chunks) return kLowestKey;
  const auto add_all = [&](const auto& add) {
    for (int c = dev::thread(); c < row.num_chunks; c += dev::num_threads()) {
      add(key_of_entry(row.best[c]), uint64_t{1});
    }
  };
  return select(kLowestKey, kHighestKey, static_cast<uint64_t>(k), add_all).key;
}

// A key that the k largest of the candidates reach, and their equals; there are k at least.
RAPSHEE_DEVICE Selection select_largest(const Candidates& candidates, uint32_t high, int64_t k) {
  return select(candidates.bound(), high, static_cast<uint64_t>(k), [&](const auto& add) {
    candidates.each([&](uint64_t entry) { add(key_of_entry(entry), uint64_t{1}); });
  });
}

}  // namespace rapshee::cuda::sampling
