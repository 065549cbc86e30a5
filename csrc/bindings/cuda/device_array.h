// Arrays on the device for single kernels, and the stream they run on.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <functional>
#include <string_view>
#include <vector>

#include "backend/cuda/cuda_api.h"
#include "bindings/array_args.h"

namespace rapshee::bindings {

// One stream of device 0 for a call of a binding.
class CallStream {
 public:
  CallStream() {
    cuda::api::set_device(0);
    stream_ = cuda::StreamOwner(cuda::api::create_stream());
  }
  cuda::Stream get() const { return stream_.get(); }
  void synchronize() const { cuda::api::synchronize(stream_.get()); }

  // Device memory with a copy of `values`; at least one byte is allocated.
  template <class T>
  cuda::DeviceMemory upload(const T* values, size_t count) const {
    const size_t bytes = count * sizeof(T);
    cuda::DeviceMemory memory(std::max<size_t>(bytes, 1));
    const cuda::PinnedMemory staging(std::max<size_t>(bytes, 1));
    std::copy_n(values, count, staging.data<T>());
    cuda::api::copy_to_device(memory.data(), staging.data(), bytes, get());
    synchronize();
    return memory;
  }
  template <class T>
  cuda::DeviceMemory upload(const py::array_t<T>& array) const {
    return upload(array.data(), static_cast<size_t>(array.size()));
  }

  template <class T>
  void download(const cuda::DeviceMemory& memory, T* values, size_t count) const {
    const cuda::PinnedMemory staging(std::max<size_t>(count * sizeof(T), 1));
    cuda::api::copy_to_host(staging.data(), memory.data(), count * sizeof(T), get());
    synchronize();
    std::copy_n(staging.data<T>(), count, values);
  }
  template <class T>
  py::array_t<T> download(const cuda::DeviceMemory& memory, std::vector<py::ssize_t> shape) const {
    py::array_t<T> array(std::move(shape));
    download(memory, array.mutable_data(), static_cast<size_t>(array.size()));
    return array;
  }

  // Microseconds of each of `repeats` runs of `body`, by events on the stream. Before each, other
  // memory of the size of a cache is written.
  std::vector<float> time(int repeats, const std::function<void()>& body) const {
    // Several times the cache; an emulated device has none.
    const bool has_cache = std::string_view(cuda::api::device_kind()) == "cuda";
    const cuda::DeviceMemory flush(has_cache ? size_t{256} << 20 : 256);
    const cuda::EventOwner from(cuda::api::create_event(true)), to(cuda::api::create_event(true));
    std::vector<float> microseconds;
    for (int i = 0; i < repeats; ++i) {
      cuda::api::fill(flush.data(), 0, flush.size(), get());
      cuda::api::record(from.get(), get());
      body();
      cuda::api::record(to.get(), get());
      cuda::api::synchronize(to.get());
      microseconds.push_back(1000.0f * cuda::api::elapsed_ms(from.get(), to.get()));
    }
    return microseconds;
  }

 private:
  cuda::StreamOwner stream_;
};

}  // namespace rapshee::bindings
