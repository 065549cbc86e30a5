// Device memory that a step's arrays travel to, with page-locked memory that they leave from.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "backend/cuda/cuda_api.h"

namespace rapshee::cuda {

// Steps that may be unfinished at once. What the host writes for a step belongs to its ticket's set
// until the step was finished.
inline constexpr int kStepSets = 2;
constexpr int set_of(uint64_t ticket) { return static_cast<int>(ticket % kStepSets); }

// One block of device memory, filled anew by each step: its address stays what a recorded launch
// knows until reserve() says that it moved.
class StepMemory {
 public:
  // Makes room for `bytes`. True if the device memory is another one now, which nothing that was
  // recorded knows. What the old one holds stays readable until the next time that it moves.
  bool reserve(size_t bytes, Stream stream) {
    if (bytes <= device_.size()) return false;
    api::synchronize(stream);
    retired_ = DeviceMemory();
    retired_ = std::exchange(device_, DeviceMemory(grown(bytes)));
    return true;
  }

  // Page-locked memory of at least `bytes` for the step of a set, whose last use has ended.
  std::byte* staging(int set, size_t bytes) {
    PinnedMemory& memory = staging_[static_cast<size_t>(set)];
    if (bytes > memory.size()) {
      memory = PinnedMemory();
      memory = PinnedMemory(grown(bytes));
    }
    return memory.data();
  }
  const std::byte* staging(int set) const { return staging_[static_cast<size_t>(set)].data(); }

  void upload(int set, size_t bytes, Stream stream) {
    if (bytes > 0) api::copy_to_device(device_.data(), staging(set), bytes, stream);
  }
  void download(int set, size_t bytes, Stream stream) {
    if (bytes > 0) api::copy_to_host(staging(set, bytes), device_.data(), bytes, stream);
  }

  template <class T = std::byte>
  T* device() const {
    return device_.data<T>();
  }

 private:
  static size_t grown(size_t bytes) { return std::max<size_t>(bytes + bytes / 2, 4096); }

  DeviceMemory device_, retired_;
  std::array<PinnedMemory, kStepSets> staging_;
};

// Lays arrays one behind the other into one StepMemory. Their places follow from the order and the
// sizes alone.
class ArrayPacker {
 public:
  ArrayPacker(std::byte* staging, const std::byte* device) : staging_(staging), device_(device) {}

  // `count` values, then `pad` up to `padded`; the array's place on the device.
  template <class T>
  const T* put(const T* values, size_t count, size_t padded, T pad) {
    used_ = (used_ + sizeof(T) - 1) / sizeof(T) * sizeof(T);
    T* to = reinterpret_cast<T*>(staging_ + used_);
    std::copy_n(values, count, to);
    std::fill_n(to + count, padded - count, pad);
    const auto* place = reinterpret_cast<const T*>(device_ + used_);
    used_ += padded * sizeof(T);
    return place;
  }

  size_t used() const { return used_; }

 private:
  std::byte* staging_;
  const std::byte* device_;
  size_t used_ = 0;
};

}  // namespace rapshee::cuda
