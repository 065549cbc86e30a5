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

// First scale of the slot's row in its chunk: halves, with minimums two for each 32 columns.
RAPSHEE_DEVICE dev::Ptr<const dev::F16> scales_at(const WeightView& w, int64_t row, int64_t chunk) {
  const int64_t bytes = (row / kPanelRows * w.num_chunks() + chunk) * chunk_scale_bytes(w.format) +
                        row % kPanelRows * (chunk_scale_bytes(w.format) / kPanelRows);
  return dev::cast<const dev::F16>(dev::Ptr<const std::byte>(w.scales) + bytes);
}

}  // namespace rapshee::cuda::packed
