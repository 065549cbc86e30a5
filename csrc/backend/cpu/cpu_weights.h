// Weights as the CPU kernels want them: panels of 16 output features.
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernel_table.h"
#include "core/memory.h"
#include "core/thread_pool.h"

namespace rapshee::cpu {

// Memory of all matrices of a model, zero-initialised: slabs large enough for huge pages, since a
// step walks through all of them and would otherwise miss the TLB at every 4 KB.
class WeightArena {
 public:
  // 64-byte aligned; lives as long as the arena.
  std::byte* allocate(size_t bytes);

 private:
  static constexpr size_t kSlabBytes = size_t{64} << 20;
  std::vector<AlignedBuffer> slabs_;
  size_t used_ = 0;  // of the last slab
};

class PanelWeight final : public Weight {
 public:
  // `panels`: layout.bytes() of them, kept by somebody else.
  PanelWeight(PanelLayout layout, const std::byte* panels) : layout_(layout), panels_(panels) {}

  int64_t rows() const override { return layout_.rows; }
  int64_t cols() const override { return layout_.cols; }
  size_t bytes() const override { return layout_.bytes(); }

  const PanelLayout& layout() const { return layout_; }
  const std::byte* panel(int64_t p) const {
    return panels_ + static_cast<size_t>(p) * layout_.panel_bytes;
  }

  // Row `row` (an output feature) as floats [cols]: what an embedding gather reads.
  void copy_row(int64_t row, float* out) const;

 private:
  void copy_low_bit_row(const std::byte* panel, int column, float* out) const;

  PanelLayout layout_;
  const std::byte* panels_;
};

class VectorWeight final : public Weight {
 public:
  explicit VectorWeight(std::vector<float> values) : values_(std::move(values)) {}
  int64_t rows() const override { return 1; }
  int64_t cols() const override { return static_cast<int64_t>(values_.size()); }
  size_t bytes() const override { return values_.size() * sizeof(float); }
  const float* data() const { return values_.data(); }

 private:
  std::vector<float> values_;
};

// Layout of a matrix of `dtype` under `compute`.
PanelLayout panel_layout(DType dtype, ComputeType compute, int64_t rows, int64_t cols);

// Repacks a matrix into memory of the arena, on `threads` workers of the pool.
std::unique_ptr<PanelWeight> pack_matrix(const WeightSource& source, ComputeType compute,
                                         WeightArena& arena, ThreadPool& pool, int threads);
std::unique_ptr<VectorWeight> read_vector(const WeightSource& source);

}  // namespace rapshee::cpu
