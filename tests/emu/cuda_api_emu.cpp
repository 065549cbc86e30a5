// cuda_api.h on the emulated device.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "backend/cuda/cuda_api.h"
#include "core/error.h"
#include "emu/memory.h"
#include "emu/runtime.h"

namespace rapshee::cuda::emu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kDefaultMemory = size_t{1} << 30;
constexpr unsigned kMaxGridYz = 65535;
constexpr uint64_t kMaxGridX = (uint64_t{1} << 31) - 1;

// One recording of an event.
struct Mark {
  CUstream_st* stream = nullptr;
  bool in_capture = false;  // orders the capture, nothing else
  bool done = false;
  Clock::time_point time;
};

struct Copy {
  void* to = nullptr;
  const void* from = nullptr;
  size_t bytes = 0;
  bool to_device = false;
  std::optional<uint64_t> digest;  // of host memory when the copy was queued
};
struct Fill {
  void* memory = nullptr;
  uint8_t value = 0;
  size_t bytes = 0;
};
struct Record {
  std::shared_ptr<Mark> mark;
};
struct Wait {
  std::shared_ptr<Mark> mark;
};
using Operation = std::variant<Kernel, Copy, Fill, Record, Wait>;

struct Capture {
  std::vector<Operation> operations;
  std::thread::id thread;
  std::string problem;  // why it cannot become a graph
};

}  // namespace
}  // namespace rapshee::cuda::emu

struct CUstream_st {
  std::deque<rapshee::cuda::emu::Operation> queue;
  std::unique_ptr<rapshee::cuda::emu::Capture> capture;
};
struct CUevent_st {
  bool timing = false;
  std::shared_ptr<rapshee::cuda::emu::Mark> mark;  // the latest
};
struct CUgraphExec_st {
  std::vector<rapshee::cuda::emu::Operation> operations;
};

namespace rapshee::cuda::emu {
namespace {

std::optional<uint64_t> number_in(const char* variable) {
  const char* text = std::getenv(variable);
  if (text == nullptr || *text == '\0') return std::nullopt;
  char* end = nullptr;
  const uint64_t value = std::strtoull(text, &end, 10);
  if (*end != '\0') throw DeviceError(concat(variable, ": got '", text, "', expected a number"));
  return value;
}

struct Device {
  std::mutex mutex;
  std::set<CUstream_st*> streams;
  size_t total = 0, used = 0;
  std::string failure;            // of a kernel; empty: none
  uint64_t allocations_left = 0;  // until one fails, 0: none does
  uint64_t launches_left = 0;
  std::string launch_variable;  // RAPSHEE_EMU_FAIL_LAUNCH as last seen
  std::optional<uint64_t> seed;
  uint64_t num_kernels = 0;
};

Device& device() {
  static Device& only = *[] {
    auto* made = new Device;
    made->total = number_in("RAPSHEE_EMU_MEMORY").value_or(kDefaultMemory);
    made->allocations_left = number_in("RAPSHEE_EMU_FAIL_ALLOCATION").value_or(0);
    return made;
  }();
  return only;
}

size_t accounted(size_t bytes) {
  return (bytes + kAllocationAlignment - 1) / kAllocationAlignment * kAllocationAlignment;
}

void check_device() {
  if (!device().failure.empty()) throw DeviceError(device().failure);
}

void check_stream(CUstream_st* stream) {
  check_device();
  if (!device().streams.contains(stream)) throw DeviceError("the stream does not exist");
}

// Nobody waits for what will not happen.
void drop_queues() {
  for (CUstream_st* stream : device().streams) {
    for (const Operation& operation : stream->queue) {
      if (const auto* record = std::get_if<Record>(&operation)) record->mark->done = true;
    }
    stream->queue.clear();
  }
}

[[noreturn]] void fail_device(const std::string& message) {
  if (device().failure.empty()) device().failure = message;
  drop_queues();
  throw DeviceError(device().failure);
}

// -------------------------------------------------------------------------------- running work
uint64_t digest_of(const Copy& copy) {
  const auto* bytes = static_cast<const char*>(copy.from);
  uint64_t digest = copy.bytes;
  for (size_t i = 0; i < copy.bytes; i += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, std::min(sizeof word, copy.bytes - i));
    digest = (digest ^ word) * 0x9e3779b97f4a7c15u;
    digest ^= digest >> 29;
  }
  return digest;
}

// Why an operation cannot be done, empty: it can.
std::string range_problem(const void* memory, size_t bytes, Space space, const char* what) {
  if (bytes == 0) return "";
  const std::string problem = access_problem(reinterpret_cast<uintptr_t>(memory), bytes, space);
  return problem.empty() ? "" : concat(what, ": ", problem);
}

std::string copy_problem(const Copy& copy) {
  const auto of = [&](const void* memory, bool on_device, const char* what) {
    return range_problem(memory, copy.bytes, on_device ? Space::kDevice : Space::kPinned, what);
  };
  const std::string problem =
      of(copy.to, copy.to_device, copy.to_device ? "copy to device, to" : "copy to host, to");
  if (!problem.empty()) return problem;
  return of(copy.from, !copy.to_device,
            copy.to_device ? "copy to device, from" : "copy to host, from");
}

std::string fill_problem(const Fill& fill) {
  return range_problem(fill.memory, fill.bytes, Space::kDevice, "fill");
}

void require_none(const std::string& problem) {
  if (!problem.empty()) throw DeviceError(problem);
}

// Copies in queues whose host memory the device itself overwrites need not find it as it was.
void forget_digests(const Copy& to_host) {
  const auto* begin = static_cast<const char*>(to_host.to);
  for (CUstream_st* stream : device().streams) {
    for (Operation& operation : stream->queue) {
      auto* copy = std::get_if<Copy>(&operation);
      if (copy == nullptr || !copy->digest) continue;
      const auto* from = static_cast<const char*>(copy->from);
      if (from < begin + to_host.bytes && begin < from + copy->bytes) copy->digest.reset();
    }
  }
}

void run_until_done(const Mark& mark);

struct Runner {
  void operator()(const Kernel& kernel) const {
    Device& d = device();
    const char* variable = std::getenv("RAPSHEE_EMU_FAIL_LAUNCH");
    if (const std::string value = variable == nullptr ? "" : variable; value != d.launch_variable) {
      d.launch_variable = value;
      d.launches_left = number_in("RAPSHEE_EMU_FAIL_LAUNCH").value_or(0);
    }
    if (d.launches_left > 0 && --d.launches_left == 0) {
      throw KernelError("an illegal memory access was encountered (planned by the test)");
    }
    const uint64_t seed = d.seed ? *d.seed : number_in("RAPSHEE_EMU_SEED").value_or(0);
    run_kernel(kernel, seed * 0x9e3779b97f4a7c15u + d.num_kernels++);
  }
  void operator()(const Copy& copy) const {
    require_none(copy_problem(copy));
    if (copy.digest && *copy.digest != digest_of(copy)) {
      throw DeviceError(concat("the host has changed ", copy.bytes,
                               " bytes of page-locked memory while their copy was queued"));
    }
    if (!copy.to_device) forget_digests(copy);
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  void operator()(const Fill& fill) const {
    require_none(fill_problem(fill));
    if (fill.bytes > 0) std::memset(fill.memory, fill.value, fill.bytes);
  }
  void operator()(const Record& record) const {
    record.mark->time = Clock::now();
    record.mark->done = true;
  }
  void operator()(const Wait& wait) const { run_until_done(*wait.mark); }
};

void run_next(CUstream_st& stream) {
  const Operation operation = std::move(stream.queue.front());
  stream.queue.pop_front();
  try {
    std::visit(Runner{}, operation);
  } catch (const std::exception& error) {
    fail_device(error.what());
  }
}

void run_all(CUstream_st& stream) {
  while (!stream.queue.empty()) run_next(stream);
}

void run_everything() {
  for (CUstream_st* stream : device().streams) run_all(*stream);
}

void run_until_done(const Mark& mark) {
  while (!mark.done) run_next(*mark.stream);
}

// ------------------------------------------------------------------------------- queueing work
Capture* capture_of_thread() {
  for (CUstream_st* stream : device().streams) {
    if (stream->capture && stream->capture->thread == std::this_thread::get_id()) {
      return stream->capture.get();
    }
  }
  return nullptr;
}

// Throws for what a capture does not allow, which ends its use.
void forbid_in_capture(Capture* capture, const char* what) {
  if (capture == nullptr) return;
  capture->problem = concat(what, " is not allowed while a stream is being captured");
  throw DeviceError(capture->problem);
}

// `check`: what may throw.
template <class Check>
void push(CUstream_st* stream, Operation operation, Check&& check) {
  check_stream(stream);
  try {
    check();
  } catch (const DeviceError& error) {
    if (stream->capture) stream->capture->problem = error.what();
    throw;
  }
  if (stream->capture) {
    stream->capture->operations.push_back(std::move(operation));
    return;
  }
  auto* copy = std::get_if<Copy>(&operation);
  if (copy != nullptr && copy->to_device && copy_problem(*copy).empty()) {
    copy->digest = digest_of(*copy);
  }
  stream->queue.push_back(std::move(operation));
}

void push_copy(const Copy& copy, CUstream_st* stream) {
  push(stream, copy, [&] { require_none(copy_problem(copy)); });
}

void check_launch(const Kernel& kernel) {
  const auto require = [&](bool holds, const auto&... parts) {
    if (!holds) {
      throw DeviceError(
          concat("launch at ", kernel.site.file_name(), ":", kernel.site.line(), ": ", parts...));
    }
  };
  require(kernel.threads > 0 && kernel.threads <= kMaxFibers, "threads: got ", kernel.threads,
          ", expected 1 to ", kMaxFibers);
  const Extent& grid = kernel.grid;
  require(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= kMaxGridX && grid.y <= kMaxGridYz &&
              grid.z <= kMaxGridYz,
          "grid: got (", grid.x, ", ", grid.y, ", ", grid.z, "), expected 1 to ", kMaxGridX, ", ",
          kMaxGridYz, ", ", kMaxGridYz);
  require(kernel.shared_bytes <= kMaxSharedBytes, "shared memory: got ", kernel.shared_bytes,
          " bytes, expected at most ", kMaxSharedBytes);
}

void* allocate(size_t bytes, Space space) {
  Device& d = device();
  const std::lock_guard lock(d.mutex);
  check_device();
  forbid_in_capture(capture_of_thread(), "allocation");
  if (bytes == 0) return nullptr;
  const bool on_device = space == Space::kDevice;
  const bool planned = on_device && d.allocations_left > 0 && --d.allocations_left == 0;
  const bool fits = !on_device || (bytes <= d.total && accounted(bytes) <= d.total - d.used);
  Region* const region = planned || !fits ? nullptr : allocate_region(bytes, space);
  if (region == nullptr) {
    throw DeviceError(concat("out of memory: ", bytes, " bytes of ",
                             on_device ? "device" : "page-locked host", " memory asked for, ",
                             d.total - d.used, " of ", d.total, " on the device are free"));
  }
  if (on_device) d.used += accounted(bytes);
  return reinterpret_cast<void*>(region->begin);
}

void free(void* memory, Space space) {
  if (memory == nullptr) return;
  Device& d = device();
  const std::lock_guard lock(d.mutex);
  try {
    Region* const region = region_at(reinterpret_cast<uintptr_t>(memory));
    if (region == nullptr || region->space != space) {
      fail_device("free of a pointer that no allocation returned");
    }
    if (region->freed) fail_device("free of memory that has been freed before");
    if (Capture* capture = capture_of_thread()) capture->problem = "memory was freed";
    try {
      run_everything();
    } catch (const DeviceError&) {
      // The device has failed; the next call says so.
    }
    if (space == Space::kDevice) d.used -= accounted(region->allocated);
    free_region(*region);
  } catch (const DeviceError&) {
  }
}

}  // namespace

void reset_device() {
  Device& d = device();
  const std::lock_guard lock(d.mutex);
  drop_queues();
  for (CUstream_st* stream : d.streams) stream->capture.reset();
  d.failure.clear();
  d.allocations_left = 0;
  d.launches_left = 0;
  d.seed.reset();
  d.num_kernels = 0;
  d.total = number_in("RAPSHEE_EMU_MEMORY").value_or(kDefaultMemory);
}

void fail_allocation(int n) {
  const std::lock_guard lock(device().mutex);
  device().allocations_left = static_cast<uint64_t>(n);
}

void fail_launch(int n) {
  const std::lock_guard lock(device().mutex);
  device().launches_left = static_cast<uint64_t>(n);
}

void set_seed(uint64_t seed) {
  const std::lock_guard lock(device().mutex);
  device().seed = seed;
}

void enqueue(Kernel kernel, CUstream_st* stream) {
  const std::lock_guard lock(device().mutex);
  const Kernel& checked = kernel;
  push(stream, Operation(kernel), [&] { check_launch(checked); });
}

}  // namespace rapshee::cuda::emu

namespace rapshee::cuda::api {

using emu::device;
using Lock = std::lock_guard<std::mutex>;

const char* device_kind() noexcept { return "cuda-emu"; }
int device_count() noexcept { return 1; }
std::string unavailable_reason() { return ""; }

DeviceInfo device_info(int index) {
  set_device(index);
  return {"emulated", 9, 0, device().total};
}

void set_device(int index) {
  const Lock lock(device().mutex);
  emu::check_device();
  if (index != 0) throw DeviceError(concat("device: got ", index, ", expected 0"));
}

MemoryInfo memory_info() {
  const Lock lock(device().mutex);
  emu::check_device();
  return {device().total - device().used, device().total};
}

void* allocate(size_t bytes) { return emu::allocate(bytes, emu::Space::kDevice); }
void free(void* memory) noexcept { emu::free(memory, emu::Space::kDevice); }
void* allocate_pinned(size_t bytes) { return emu::allocate(bytes, emu::Space::kPinned); }
void free_pinned(void* memory) noexcept { emu::free(memory, emu::Space::kPinned); }

Stream create_stream() {
  const Lock lock(device().mutex);
  emu::check_device();
  auto stream = std::make_unique<CUstream_st>();
  device().streams.insert(stream.get());
  return stream.release();
}

void destroy_stream(Stream stream) noexcept {
  if (stream == nullptr) return;
  const Lock lock(device().mutex);
  try {
    emu::run_all(*stream);
  } catch (const DeviceError&) {
    // The device has failed; the next call says so.
  }
  device().streams.erase(stream);
  delete stream;
}

void synchronize(Stream stream) {
  const Lock lock(device().mutex);
  emu::check_stream(stream);
  emu::forbid_in_capture(stream->capture.get(), "synchronisation of the stream");
  emu::run_all(*stream);
}

void copy_to_device(void* to, const void* from, size_t bytes, Stream stream) {
  const Lock lock(device().mutex);
  emu::push_copy({to, from, bytes, true, {}}, stream);
}

void copy_to_host(void* to, const void* from, size_t bytes, Stream stream) {
  const Lock lock(device().mutex);
  emu::push_copy({to, from, bytes, false, {}}, stream);
}

void fill(void* memory, uint8_t value, size_t bytes, Stream stream) {
  const Lock lock(device().mutex);
  const emu::Fill fill{memory, value, bytes};
  emu::push(stream, fill, [&] { emu::require_none(emu::fill_problem(fill)); });
}

Event create_event(bool timing) {
  const Lock lock(device().mutex);
  emu::check_device();
  return new CUevent_st{timing, nullptr};
}

void destroy_event(Event event) noexcept { delete event; }

void record(Event event, Stream stream) {
  const Lock lock(device().mutex);
  emu::check_stream(stream);
  auto mark = std::make_shared<emu::Mark>();
  mark->stream = stream;
  mark->in_capture = stream->capture != nullptr;
  emu::push(stream, emu::Record{mark}, [] {});
  event->mark = std::move(mark);
}

void wait(Stream stream, Event event) {
  const Lock lock(device().mutex);
  emu::check_stream(stream);
  const std::shared_ptr<emu::Mark> mark = event->mark;
  if (mark == nullptr) return;
  emu::push(stream, emu::Wait{mark}, [&] {
    if (mark->in_capture != (stream->capture != nullptr) ||
        (mark->in_capture && mark->stream != stream)) {
      throw DeviceError("a wait between a captured stream and another one");
    }
  });
}

void synchronize(Event event) {
  const Lock lock(device().mutex);
  emu::check_device();
  if (event->mark == nullptr) return;
  if (event->mark->in_capture) throw DeviceError("the event was recorded in a capture");
  emu::run_until_done(*event->mark);
}

float elapsed_ms(Event from, Event to) {
  const Lock lock(device().mutex);
  emu::check_device();
  for (const Event event : {from, to}) {
    if (!event->timing) throw DeviceError("elapsed_ms: an event was made without timing");
    if (event->mark == nullptr || !event->mark->done) {
      throw DeviceError("elapsed_ms: an event has not happened yet");
    }
  }
  return std::chrono::duration<float, std::milli>(to->mark->time - from->mark->time).count();
}

void begin_capture(Stream stream) {
  const Lock lock(device().mutex);
  emu::check_stream(stream);
  emu::forbid_in_capture(stream->capture.get(), "another capture");
  stream->capture = std::make_unique<emu::Capture>();
  stream->capture->thread = std::this_thread::get_id();
}

Graph end_capture(Stream stream) {
  const Lock lock(device().mutex);
  emu::check_stream(stream);
  const std::unique_ptr<emu::Capture> capture = std::move(stream->capture);
  if (capture == nullptr) throw DeviceError("end_capture: the stream is not being captured");
  if (!capture->problem.empty()) {
    throw DeviceError(concat("the capture is of no use: ", capture->problem));
  }
  // Events order the capture; they do not happen when it is replayed.
  std::erase_if(capture->operations, [](const emu::Operation& operation) {
    return std::holds_alternative<emu::Record>(operation) ||
           std::holds_alternative<emu::Wait>(operation);
  });
  return new CUgraphExec_st{std::move(capture->operations)};
}

void launch(Graph graph, Stream stream) {
  const Lock lock(device().mutex);
  emu::check_stream(stream);
  // What has been freed since is found when it is used.
  for (const emu::Operation& operation : graph->operations) emu::push(stream, operation, [] {});
}

void destroy_graph(Graph graph) noexcept { delete graph; }

}  // namespace rapshee::cuda::api
