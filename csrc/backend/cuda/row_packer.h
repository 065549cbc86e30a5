// Rows of a tensor as the CUDA kernels want them: the packed formats of kernels/launchers.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda {

// What a matrix of a dtype is packed to; unquantised ones in panels or `plain`.
WeightFormat packed_format(DType dtype, bool plain);

// Bytes from a row of a panel's first chunk to the next: four lanes (of the first plane), or all
// of a plain row.
int64_t packed_row_stride(const WeightView& view);

// Where one row goes: `lane` to its first byte of the panel's first chunk, `scales` to its scales
// there. What it does not write is 0 already.
struct PackedRow {
  std::byte* lane;
  std::byte* scales;
};

// What a thread packs with, from row to row.
struct RowScratch {
  std::vector<float> floats;
  std::vector<uint32_t> pairs;
  std::vector<int8_t> codes;
  std::vector<float> scales, minimums;
};

// Several threads may pack rows at once.
class RowPacker {
 public:
  virtual ~RowPacker() = default;
  // `from`: the row's bytes. Throws WeightError where a number is beyond the range of what it
  // becomes.
  virtual void pack(int64_t row, const std::byte* from, const PackedRow& to,
                    RowScratch& scratch) const = 0;
};

// For rows of `source`, which it refers to.
std::unique_ptr<RowPacker> make_row_packer(const WeightSource& source, HalfType half,
                                           WeightFormat format);

}  // namespace rapshee::cuda
