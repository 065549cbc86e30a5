// Weights as the CPU kernels want them: panels of 16 output features.
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernel_table.h"
#include "core/memory.h"
#include "core/thread_pool.h"

namespace rapshee::cpu {

class PanelWeight final : public Weight {
 public:
  PanelWeight(PanelLayout layout, AlignedBuffer data)
      : layout_(layout), data_(std::move(data)) {}

  int64_t rows() const override { return layout_.rows; }
  int64_t cols() const override { return layout_.cols; }
  size_t bytes() const override { return data_.size(); }

  const PanelLayout& layout() const { return layout_; }
  const std::byte* panel(int64_t p) const {
    return data_.data() + static_cast<size_t>(p) * layout_.panel_bytes;
  }

  // Row `row` (an output feature) as floats [cols]: what an embedding gather reads.
  void copy_row(int64_t row, float* out) const;

 private:
  PanelLayout layout_;
  AlignedBuffer data_;
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

// Repacks a matrix on `threads` workers of the pool.
std::unique_ptr<PanelWeight> pack_matrix(const WeightSource& source, ComputeType compute,
                                         ThreadPool& pool, int threads);
std::unique_ptr<VectorWeight> read_vector(const WeightSource& source);

}  // namespace rapshee::cpu
