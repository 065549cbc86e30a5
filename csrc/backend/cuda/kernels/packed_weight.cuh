// Single elements of a packed weight (launchers.h), for kernels that read or make rows of it.
#pragma once

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda::packed {

// Where a lane's 16 bytes of a chunk lie in the matrix: row 8 * panel + lane / 4, and of each 16
// columns of the chunk the pairs that begin at 2 t and 2 t + 8, t = lane % 4.
struct Slot {
  int64_t row;
  int64_t first_col;  // of the chunk
  int t;

  // First column of pair `pair` of the lane.
  RAPSHEE_DEVICE int64_t column(int pair) const {
    return first_col + pair / 2 * 16 + pair % 2 * 8 + 2 * t;
  }
};

RAPSHEE_DEVICE Slot slot_at(const WeightView& w, int64_t index) {
  const int64_t lane = index % 32, chunk = index / 32 % w.num_chunks();
  const int64_t panel = index / 32 / w.num_chunks();
  return {panel * kPanelRows + lane / 4, chunk * chunk_cols(w.format), static_cast<int>(lane % 4)};
}

// The same of plain weights: row-major, so that a slot's pairs are neighbours.
struct PlainSlot {
  int64_t row, first_col;

  RAPSHEE_DEVICE int64_t column(int pair) const { return first_col + 2 * pair; }
};
constexpr int kPlainSlotCols = 8;  // 16 bytes

RAPSHEE_DEVICE PlainSlot plain_slot_at(const WeightView& w, int64_t index) {
  const int64_t slots = w.cols / kPlainSlotCols;  // of a row
  return {index / slots, index % slots * kPlainSlotCols};
}

// Slot or PlainSlot.
template <bool kPlain>
RAPSHEE_DEVICE auto slot_of(const WeightView& w, int64_t index) {
  if constexpr (kPlain) {
    return plain_slot_at(w, index);
  } else {
    return slot_at(w, index);
  }
}

// Index of the lane of row `row` in chunk `chunk` with the pairs of `t`.
RAPSHEE_DEVICE int64_t slot_index(const WeightView& w, int64_t row, int64_t chunk, int t) {
  return (row / kPanelRows * w.num_chunks() + chunk) * 32 + row % kPanelRows * 4 + t;
}

// First scale of the slot's row in its chunk: halves, with minimums two for each group of columns.
RAPSHEE_DEVICE dev::Ptr<const dev::F16> scales_at(const WeightView& w, int64_t row, int64_t chunk) {
  const int64_t row_bytes = chunk_scale_bytes(w.format) / kPanelRows;
  const int64_t bytes =
      ((row / kPanelRows * w.num_chunks() + chunk) * kPanelRows + row % kPanelRows) * row_bytes;
  return dev::cast<const dev::F16>(dev::Ptr<const std::byte>(w.scales) + bytes);
}

// Codes in planes: the lane of row `row` in a chunk with the pairs of `t`.
class PlaneLane {
 public:
  RAPSHEE_DEVICE PlaneLane(const WeightView& w, const FormatInfo& info, int64_t row, int64_t chunk,
                           int t)
      : words_(dev::cast<const uint32_t>(dev::Ptr<const std::byte>(w.codes) +
                                         (row / kPanelRows * w.num_chunks() + chunk) *
                                             info.chunk_bytes)),
        info_(info),
        lane_(static_cast<int>(row % kPanelRows) * 4 + t) {}

  // First (0) or second (1) code of a pair.
  RAPSHEE_DEVICE int code(int pair, int which) const {
    const int low = bits(0, info_.low_bits, pair, which);
    if (info_.high_bits == 0) return low;
    return low | bits(info_.low_bits, info_.high_bits, pair, which) << info_.low_bits;
  }

 private:
  // Of a plane of `count` bits whose first word is `first`.
  RAPSHEE_DEVICE int bits(int first, int count, int pair, int which) const {
    const int pairs = 16 / count;  // of a word
    const uint32_t word = words_[(first + pair / pairs) * 32 + lane_];
    return static_cast<int>(word >> (count * (pair % pairs) + 16 * which) & ((1u << count) - 1));
  }

  dev::Ptr<const uint32_t> words_;
  const FormatInfo& info_;
  int lane_;
};

}  // namespace rapshee::cuda::packed
