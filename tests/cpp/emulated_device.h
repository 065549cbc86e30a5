// Support for tests of the emulated device: arrays on it, runs of one kernel.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "backend/cuda/cuda_api.h"
#include "backend/cuda/kernels/device.cuh"
#include "check.h"
#include "core/error.h"
#include "emu/runtime.h"

namespace rapshee::cuda::testing {

// Device memory with elements of T, and copies of it that are complete when they return.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : memory_(count * sizeof(T)) {}
  explicit Array(const std::vector<T>& values) : Array(values.size()) { write(values); }

  T* data() const { return memory_.template data<T>(); }
  size_t size() const { return memory_.size() / sizeof(T); }

  void write(const std::vector<T>& values) const {
    const StreamOwner stream(api::create_stream());
    const PinnedMemory staging(memory_.size());
    std::copy(values.begin(), values.end(), staging.template data<T>());
    api::copy_to_device(data(), staging.data(), memory_.size(), stream.get());
    api::synchronize(stream.get());
  }
  std::vector<T> read() const {
    const StreamOwner stream(api::create_stream());
    const PinnedMemory staging(memory_.size());
    api::copy_to_host(staging.data(), data(), memory_.size(), stream.get());
    api::synchronize(stream.get());
    const T* const values = staging.template data<T>();
    return {values, values + size()};
  }

 private:
  DeviceMemory memory_;
};

// Runs a kernel to its end. What the device says that it did wrong, empty: nothing; the device is
// usable again in both cases.
template <class Args>
std::string run(void (*kernel)(Args), const Args& args, int threads, size_t shared_bytes = 0,
                const dev::Grid& grid = {}) {
  const StreamOwner stream(api::create_stream());
  try {
    dev::launch(kernel, {grid, threads, shared_bytes, stream.get()}, args);
    api::synchronize(stream.get());
  } catch (const DeviceError& error) {
    emu::reset_device();
    return error.what();
  }
  return "";
}

inline void check_contains(const std::string& text, const std::string& part, int line) {
  rapshee::testing::check(text.find(part) != std::string::npos, "message", line, "got '", text,
                          "', expected '", part, "' in it");
}

}  // namespace rapshee::cuda::testing

#define CHECK_CONTAINS(text, part) \
  ::rapshee::cuda::testing::check_contains((text), (part), __LINE__)
