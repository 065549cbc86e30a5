// Large aligned allocations.
#pragma once

#include <cstddef>
#include <span>

namespace rapshee {

// Zeroed bytes at an address that is a multiple of 64. From kMapThreshold on they are mapped
// straight from the system, in huge pages where it has them: then they take memory only when they
// are first touched, and all of it goes back at destruction.
class AlignedBuffer {
 public:
  static constexpr size_t kAlignment = 64;                  // a cache line and an AVX-512 register
  static constexpr size_t kMapThreshold = size_t{1} << 21;  // a huge page of x86-64

  AlignedBuffer() = default;
  // Throws DeviceError with the size if there is no memory.
  explicit AlignedBuffer(size_t bytes);
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;

  std::byte* data() noexcept { return data_; }
  const std::byte* data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }  // bytes
  bool empty() const noexcept { return size_ == 0; }

  // The buffer as whole elements of T.
  template <class T>
  std::span<T> as() noexcept {
    return {reinterpret_cast<T*>(data_), size_ / sizeof(T)};
  }
  template <class T>
  std::span<const T> as() const noexcept {
    return {reinterpret_cast<const T*>(data_), size_ / sizeof(T)};
  }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Gives what the process's allocator holds but does not use back to the system, where it can.
void return_unused_memory() noexcept;

}  // namespace rapshee
