// Every call of the CUDA runtime that the host half makes, and nothing of CUDA's own headers.
//
// Two implementations, chosen when the library is built: the runtime's (cuda_api_runtime.cpp) and
// the emulator's (tests/emu), whose device is called cuda-emu. All functions throw DeviceError with
// the runtime's words and what to do about it; after a failed kernel every later call throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

struct CUstream_st;
struct CUevent_st;
struct CUgraphExec_st;

namespace rapshee::cuda {

using Stream = CUstream_st*;
using Event = CUevent_st*;
using Graph = CUgraphExec_st*;

namespace api {

// "cuda" or "cuda-emu": what devices of this build are called.
const char* device_kind() noexcept;
// 0 where there is no driver, or one too old for this build, or no device; never throws.
int device_count() noexcept;
// Why device_count() is 0, in one line; empty where it is not.
std::string unavailable_reason();

struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  size_t total_memory = 0;   // bytes
};
DeviceInfo device_info(int device);
// Of the calling thread, for all calls below.
void set_device(int device);

struct MemoryInfo {
  size_t free = 0, total = 0;  // bytes of the current device
};
MemoryInfo memory_info();
// Device memory, 256-byte aligned, undefined contents. DeviceError naming the bytes asked for where
// there is not enough; the device stays usable then.
void* allocate(size_t bytes);
void free(void* memory) noexcept;  // null is allowed
// Page-locked host memory, for asynchronous copies.
void* allocate_pinned(size_t bytes);
void free_pinned(void* memory) noexcept;

Stream create_stream();
void destroy_stream(Stream stream) noexcept;  // null is allowed
void synchronize(Stream stream);

// Asynchronous, in stream order. Host memory must be pinned and untouched until then.
void copy_to_device(void* to, const void* from, size_t bytes, Stream stream);
void copy_to_host(void* to, const void* from, size_t bytes, Stream stream);
void fill(void* memory, uint8_t value, size_t bytes, Stream stream);

Event create_event(bool timing = false);
void destroy_event(Event event) noexcept;  // null is allowed
void record(Event event, Stream stream);
void wait(Stream stream, Event event);  // later work of the stream waits for the event
void synchronize(Event event);
float elapsed_ms(Event from, Event to);

// Between the two, work on the stream is recorded instead of done. end_capture after a failed
// launch in between drops the recording and throws.
void begin_capture(Stream stream);
Graph end_capture(Stream stream);
void launch(Graph graph, Stream stream);
void destroy_graph(Graph graph) noexcept;  // null is allowed

}  // namespace api

// Owners of what the functions above make.
namespace detail {
template <class T, void (*kDestroy)(T) noexcept>
class Handle {
 public:
  Handle() = default;
  explicit Handle(T value) : value_(value) {}
  Handle(Handle&& other) noexcept : value_(std::exchange(other.value_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~Handle() { kDestroy(value_); }
  T get() const { return value_; }

 private:
  T value_ = nullptr;
};

template <bool kPinned>
void release(void* memory) noexcept {
  kPinned ? api::free_pinned(memory) : api::free(memory);
}
}  // namespace detail

using StreamOwner = detail::Handle<Stream, api::destroy_stream>;
using EventOwner = detail::Handle<Event, api::destroy_event>;
using GraphOwner = detail::Handle<Graph, api::destroy_graph>;

// Device memory (kPinned: page-locked host memory) of a fixed size, undefined contents.
template <bool kPinned>
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes)
      : handle_(bytes == 0 ? nullptr
                           : (kPinned ? api::allocate_pinned(bytes) : api::allocate(bytes))),
        bytes_(bytes) {}
  size_t size() const { return bytes_; }
  template <class T = std::byte>
  T* data() const {
    return static_cast<T*>(handle_.get());
  }

 private:
  detail::Handle<void*, detail::release<kPinned>> handle_;
  size_t bytes_ = 0;
};
using DeviceMemory = Memory<false>;
using PinnedMemory = Memory<true>;

}  // namespace rapshee::cuda
