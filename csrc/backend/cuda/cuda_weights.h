// Weights as the CUDA kernels want them (kernels/launchers.h), and their way to the device.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <span>

#include "backend/backend.h"
#include "backend/cuda/cuda_api.h"
#include "backend/cuda/kernels/launchers.h"
#include "core/thread_pool.h"

namespace rapshee::cuda {

// A matrix in device memory of its own.
class CudaWeight final : public Weight {
 public:
  // Allocates; the contents are undefined.
  CudaWeight(WeightFormat format, int64_t rows, int64_t cols);

  int64_t rows() const override { return view_.rows; }
  int64_t cols() const override { return view_.cols; }
  size_t bytes() const override { return codes_.size() + scales_.size(); }

  const WeightView& view() const { return view_; }
  std::byte* codes() { return codes_.data(); }
  std::byte* scales() { return scales_.data(); }

 private:
  WeightView view_;
  DeviceMemory codes_, scales_;
};

// Norms and biases: floats [cols].
class CudaVector final : public Weight {
 public:
  explicit CudaVector(int64_t cols)
      : cols_(cols), values_(static_cast<size_t>(cols) * sizeof(float)) {}

  int64_t rows() const override { return 1; }
  int64_t cols() const override { return cols_; }
  size_t bytes() const override { return values_.size(); }

  const float* data() const { return values_.data<float>(); }
  float* data() { return values_.data<float>(); }

 private:
  int64_t cols_;
  DeviceMemory values_;
};

// Carries what the host makes to the device, in slices of page-locked memory: while one is copied,
// the next is made. For one thread, on the current device.
class WeightUploader {
 public:
  static constexpr size_t kSliceBytes = size_t{16} << 20;  // each copy takes a millisecond or less

  // Slices are made on up to `threads` threads of the pool.
  WeightUploader(std::shared_ptr<ThreadPool> pool, int threads, size_t slice_bytes = kSliceBytes);
  ~WeightUploader();
  WeightUploader(const WeightUploader&) = delete;
  WeightUploader& operator=(const WeightUploader&) = delete;

  size_t slice_bytes() const { return slice_bytes_; }
  Stream stream() const { return stream_.get(); }
  // What was sent has arrived, and the work of the stream is done.
  void wait() const { api::synchronize(stream_.get()); }

  struct Part {
    std::byte* to = nullptr;  // device memory
    size_t bytes = 0;
  };
  // Calls make(slice) with room for all parts, one after the other, and starts their copies. A
  // larger slice than slice_bytes() makes its memory grow.
  void send(std::span<const Part> parts, const std::function<void(std::byte* slice)>& make);

  // Calls task(0) to task(count - 1) on the threads.
  void run(int count, const std::function<void(int)>& task);

 private:
  struct Slice {
    PinnedMemory memory;
    EventOwner copied;
  };

  std::shared_ptr<ThreadPool> pool_;
  int threads_;
  size_t slice_bytes_;
  std::array<Slice, 2> slices_;
  size_t next_ = 0;
  StreamOwner stream_;
};

// Repacks a matrix; it is on the device when they return. F32, F16 and BF16 become `half`, in
// panels or `plain`; low-bit blocks keep their codes bit by bit, and their scales where these are
// fp16; the scales of groups in blocks of 256 are rounded to fp16. WeightError where the kernels
// cannot serve the shape, or a value is beyond the range of `half`, a scale beyond that of fp16.
std::unique_ptr<CudaWeight> load_matrix(const WeightSource& source, HalfType half,
                                        WeightUploader& uploader, bool plain = false);
std::unique_ptr<CudaVector> load_vector(const WeightSource& source, WeightUploader& uploader);

}  // namespace rapshee::cuda
