// cuda_api.h on the emulated device: order of work, recorded graphs, misuse, failures.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "emulated_device.h"

namespace rapshee::cuda {
namespace {

using testing::Array;

// Every case begins with a device that works.
class Fixture {
 public:
  Fixture() { emu::reset_device(); }
  ~Fixture() { emu::reset_device(); }
};

// Page-locked host memory with copies of `values`.
class Pinned {
 public:
  explicit Pinned(const std::vector<uint32_t>& values) : memory_(values.size() * sizeof(uint32_t)) {
    std::copy(values.begin(), values.end(), data());
  }
  uint32_t* data() const { return memory_.data<uint32_t>(); }
  size_t bytes() const { return memory_.size(); }
  uint32_t& operator[](size_t i) const { return data()[i]; }

 private:
  PinnedMemory memory_;
};

struct Add {
  uint32_t* to;
  uint32_t value;
};

RAPSHEE_KERNEL(1, 1) add(RAPSHEE_PARAM Add args) {
  dev::pdl_wait();
  *dev::Ptr<uint32_t>(args.to) += args.value;
}

void launch_add(const Array<uint32_t>& to, uint32_t value, const StreamOwner& stream) {
  dev::launch(add, {{}, 1, 0, stream.get()}, Add{to.data(), value});
}

StreamOwner make_stream() { return StreamOwner(api::create_stream()); }

// Whether work on the device still does what it should.
bool device_works() {
  const Array<uint32_t> number(std::vector<uint32_t>{1});
  const StreamOwner stream = make_stream();
  launch_add(number, 2, stream);
  api::synchronize(stream.get());
  return number.read()[0] == 3;
}

TEST_CASE(the_device_tells_what_it_is) {
  const Fixture fixture;
  CHECK_EQ(std::string(api::device_kind()), "cuda-emu");
  CHECK_EQ(api::device_count(), 1);
  CHECK_EQ(api::unavailable_reason(), "");
  const api::DeviceInfo info = api::device_info(0);
  CHECK_EQ(info.major, 9);
  CHECK_EQ(info.total_memory, api::memory_info().total);
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::set_device(1)), "got 1, expected 0");
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::device_info(-1)), "got -1, expected 0");
  api::set_device(0);
}

// -------------------------------------------------------------------------------------- copies
TEST_CASE(copies_land_when_something_waits_for_them) {
  const Fixture fixture;
  const Array<uint32_t> device(std::vector<uint32_t>{1, 2});
  const Pinned host({8, 9}), back({0, 0}), seen({0, 0});
  const StreamOwner stream = make_stream(), other = make_stream();
  api::copy_to_device(device.data(), host.data(), host.bytes(), stream.get());
  api::copy_to_host(back.data(), device.data(), back.bytes(), stream.get());
  // Another stream does not see what this one has not done.
  api::copy_to_host(seen.data(), device.data(), seen.bytes(), other.get());
  api::synchronize(other.get());
  CHECK_EQ(seen[0], 1u);
  CHECK_EQ(back[0], 0u);
  api::synchronize(stream.get());
  CHECK_EQ(back[0], 8u);
  CHECK_EQ(back[1], 9u);
  CHECK_EQ(device.read()[1], 9u);
}

TEST_CASE(host_memory_must_stay_as_it_was_until_its_copy_is_done) {
  const Fixture fixture;
  const Array<uint32_t> device(2);
  const Pinned host({8, 9});
  const StreamOwner stream = make_stream();
  api::copy_to_device(device.data(), host.data(), host.bytes(), stream.get());
  host[1] = 10;
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::synchronize(stream.get())),
                 "the host has changed 8 bytes of page-locked memory");
}

TEST_CASE(the_device_may_change_host_memory_between_copies) {
  const Fixture fixture;
  const Array<uint32_t> from(std::vector<uint32_t>{5}), to(1);
  const Pinned host({0});
  const StreamOwner stream = make_stream();
  api::copy_to_host(host.data(), from.data(), host.bytes(), stream.get());
  api::copy_to_device(to.data(), host.data(), host.bytes(), stream.get());
  api::synchronize(stream.get());
  CHECK_EQ(to.read()[0], 5u);
}

TEST_CASE(copies_and_fills_stay_inside_of_memory) {
  const Fixture fixture;
  const Array<uint32_t> device(2);
  const Pinned host({1, 2});
  const StreamOwner stream = make_stream();
  const auto to_device = [&](void* to, const void* from, size_t bytes) {
    return MESSAGE_OF(DeviceError, api::copy_to_device(to, from, bytes, stream.get()));
  };
  CHECK_CONTAINS(to_device(device.data(), host.data(), 9), "copy to device, to: out of bounds");
  CHECK_CONTAINS(to_device(device.data() + 1, host.data(), 8), "copy to device, to: out of bounds");
  CHECK_CONTAINS(to_device(host.data(), host.data(), 8), "copy to device, to: address");
  uint32_t pageable[2] = {};
  CHECK_CONTAINS(to_device(device.data(), pageable, 8), "is in no page-locked host memory");
  CHECK_CONTAINS(
      MESSAGE_OF(DeviceError, api::copy_to_host(pageable, device.data(), 8, stream.get())),
      "is in no page-locked host memory");
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::fill(device.data(), 0, 9, stream.get())),
                 "fill: out of bounds");
  api::copy_to_device(nullptr, nullptr, 0, stream.get());
  api::copy_to_host(nullptr, nullptr, 0, stream.get());
  api::fill(nullptr, 0, 0, stream.get());
  api::fill(device.data() + 1, 0xab, 4, stream.get());
  api::synchronize(stream.get());
  CHECK_EQ(device.read()[1], 0xababababu);
  CHECK_EQ(device.read()[0], 0xffffffffu);
}

// -------------------------------------------------------------------------------------- events
TEST_CASE(an_event_waits_for_what_came_before_it) {
  const Fixture fixture;
  const Array<uint32_t> device(std::vector<uint32_t>{1});
  const Pinned first({0}), second({0});
  const StreamOwner stream = make_stream();
  const EventOwner event(api::create_event());
  api::synchronize(event.get());  // never recorded: nothing to wait for
  api::copy_to_host(first.data(), device.data(), first.bytes(), stream.get());
  api::record(event.get(), stream.get());
  api::copy_to_host(second.data(), device.data(), second.bytes(), stream.get());
  api::synchronize(event.get());
  CHECK_EQ(first[0], 1u);
  CHECK_EQ(second[0], 0u);
  api::synchronize(stream.get());
  CHECK_EQ(second[0], 1u);
}

TEST_CASE(streams_wait_for_each_other_by_events) {
  const Fixture fixture;
  for (const bool waits : {false, true}) {
    const Array<uint32_t> number(std::vector<uint32_t>{1});
    const Pinned seen({0});
    const StreamOwner writer = make_stream(), reader = make_stream();
    const EventOwner written(api::create_event());
    launch_add(number, 4, writer);
    api::record(written.get(), writer.get());
    launch_add(number, 10, writer);
    if (waits) api::wait(reader.get(), written.get());
    api::copy_to_host(seen.data(), number.data(), seen.bytes(), reader.get());
    api::synchronize(reader.get());
    CHECK_EQ(seen[0], waits ? 5u : 1u);
  }
}

TEST_CASE(a_wait_is_for_the_record_before_it) {
  const Fixture fixture;
  const Array<uint32_t> number(std::vector<uint32_t>{1});
  const Pinned seen({0});
  const StreamOwner writer = make_stream(), reader = make_stream();
  const EventOwner event(api::create_event());
  api::wait(reader.get(), event.get());
  api::record(event.get(), writer.get());
  api::wait(reader.get(), event.get());
  launch_add(number, 4, writer);
  api::record(event.get(), writer.get());
  api::copy_to_host(seen.data(), number.data(), seen.bytes(), reader.get());
  api::synchronize(reader.get());
  CHECK_EQ(seen[0], 1u);
}

TEST_CASE(time_passes_between_events) {
  const Fixture fixture;
  const StreamOwner stream = make_stream();
  const EventOwner from(api::create_event(true)), to(api::create_event(true)),
      untimed(api::create_event());
  api::record(from.get(), stream.get());
  api::record(untimed.get(), stream.get());
  api::record(to.get(), stream.get());
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::elapsed_ms(from.get(), to.get())),
                 "has not happened");
  api::synchronize(to.get());
  CHECK(api::elapsed_ms(from.get(), to.get()) >= 0.0f);
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::elapsed_ms(from.get(), untimed.get())),
                 "without timing");
}

// -------------------------------------------------------------------------------------- graphs
GraphOwner record_graph(const StreamOwner& stream, const Array<uint32_t>& number,
                        const Pinned& host) {
  api::begin_capture(stream.get());
  api::copy_to_device(number.data(), host.data(), host.bytes(), stream.get());
  launch_add(number, 100, stream);
  api::copy_to_host(host.data() + 1, number.data(), sizeof(uint32_t), stream.get());
  return GraphOwner(api::end_capture(stream.get()));
}

TEST_CASE(a_graph_does_what_was_recorded_with_what_its_memory_holds_then) {
  const Fixture fixture;
  const Array<uint32_t> number(std::vector<uint32_t>{1, 1});
  const Pinned host({7, 0});
  const StreamOwner stream = make_stream(), other = make_stream();
  const GraphOwner graph = record_graph(stream, number, host);
  api::synchronize(stream.get());
  CHECK_EQ(number.read()[0], 1u);  // recorded, not done
  for (const uint32_t value : {20u, 30u}) {
    host[0] = value;
    api::launch(graph.get(), value == 20 ? stream.get() : other.get());
    CHECK(host[1] != value + 100);
    api::synchronize(value == 20 ? stream.get() : other.get());
    CHECK_EQ(host[1], value + 100);
  }
  host[0] = 40;
  api::launch(graph.get(), stream.get());
  host[0] = 41;
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::synchronize(stream.get())), "the host has changed");
}

TEST_CASE(a_graph_outlives_its_stream_and_its_launches_outlive_it) {
  const Fixture fixture;
  const Array<uint32_t> number(std::vector<uint32_t>{1, 1});
  const Pinned host({7, 0});
  const StreamOwner other = make_stream();
  {
    GraphOwner graph;
    {
      const StreamOwner stream = make_stream();
      graph = record_graph(stream, number, host);
    }
    api::launch(graph.get(), other.get());
  }
  api::synchronize(other.get());
  CHECK_EQ(host[1], 107u);
}

TEST_CASE(a_graph_that_knows_freed_memory_fails) {
  for (const bool pinned : {false, true}) {
    const Fixture fixture;
    Array<uint32_t> number(std::vector<uint32_t>{1, 1});
    Pinned host({7, 0});
    const StreamOwner stream = make_stream();
    const GraphOwner graph = record_graph(stream, number, host);
    if (pinned) {
      host = Pinned({7, 0});
    } else {
      number = Array<uint32_t>(2);
    }
    api::launch(graph.get(), stream.get());
    CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::synchronize(stream.get())), "that has been freed");
  }
}

TEST_CASE(a_kernel_in_a_graph_that_knows_freed_memory_fails) {
  const Fixture fixture;
  Array<uint32_t> number(std::vector<uint32_t>{1});
  const StreamOwner stream = make_stream();
  api::begin_capture(stream.get());
  launch_add(number, 1, stream);
  const GraphOwner graph(api::end_capture(stream.get()));
  number = Array<uint32_t>(1);
  api::launch(graph.get(), stream.get());
  const std::string message = MESSAGE_OF(DeviceError, api::synchronize(stream.get()));
  CHECK_CONTAINS(message, "that has been freed");
  CHECK_CONTAINS(message, "::Add");
}

TEST_CASE(freeing_memory_waits_for_work_that_uses_it) {
  const Fixture fixture;
  const Array<uint32_t> number(std::vector<uint32_t>{1});
  const StreamOwner stream = make_stream();
  {
    const Pinned host({9});
    api::copy_to_device(number.data(), host.data(), host.bytes(), stream.get());
  }
  api::synchronize(stream.get());
  CHECK_EQ(number.read()[0], 9u);
}

// ------------------------------------------------------------------------------ capture's rules
TEST_CASE(what_a_capture_forbids_ends_it) {
  const Fixture fixture;
  const Array<uint32_t> number(std::vector<uint32_t>{1});
  const StreamOwner stream = make_stream();
  const auto check_forbidden = [&](auto&& act, const char* problem) {
    api::begin_capture(stream.get());
    launch_add(number, 1, stream);
    try {
      act();
    } catch (const DeviceError& error) {
      CHECK_CONTAINS(error.what(), problem);
    }
    CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::end_capture(stream.get())), problem);
    CHECK(device_works());
  };
  check_forbidden([&] { api::synchronize(stream.get()); }, "synchronisation of the stream");
  check_forbidden([&] { api::allocate(1); }, "allocation");
  check_forbidden([&] { api::allocate_pinned(1); }, "allocation");
  check_forbidden([&] { api::begin_capture(stream.get()); }, "another capture");
  void* const memory = api::allocate(1);
  check_forbidden([&] { api::free(memory); }, "memory was freed");
  const Array<uint32_t> other(1);
  check_forbidden([&] { api::fill(other.data(), 0, 5, stream.get()); }, "out of bounds");
  check_forbidden([&] { dev::launch(add, {{}, 0, 0, stream.get()}, Add{}); }, "threads: got 0");
  CHECK_EQ(number.read()[0], 1u);
}

TEST_CASE(a_capture_has_a_beginning_and_an_end) {
  const Fixture fixture;
  const StreamOwner stream = make_stream();
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::end_capture(stream.get())), "is not being captured");
  // One that is given up by destroying its stream.
  const StreamOwner abandoned = make_stream();
  api::begin_capture(abandoned.get());
}

TEST_CASE(other_threads_may_allocate_during_a_capture) {
  const Fixture fixture;
  const StreamOwner stream = make_stream();
  api::begin_capture(stream.get());
  std::string problem;
  std::thread([&] {
    try {
      api::free(api::allocate(1));
    } catch (const DeviceError& error) {
      problem = error.what();
    }
  }).join();
  CHECK_EQ(problem, "");
  const GraphOwner graph(api::end_capture(stream.get()));
}

TEST_CASE(events_do_not_cross_the_border_of_a_capture) {
  const Fixture fixture;
  const StreamOwner stream = make_stream(), other = make_stream();
  const EventOwner event(api::create_event());
  api::record(event.get(), other.get());
  api::begin_capture(stream.get());
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::wait(stream.get(), event.get())),
                 "between a captured stream and another");
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::end_capture(stream.get())), "between a captured");

  api::begin_capture(stream.get());
  api::record(event.get(), stream.get());
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::wait(other.get(), event.get())),
                 "between a captured stream and another");
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::synchronize(event.get())), "recorded in a capture");
  api::wait(stream.get(), event.get());
  const GraphOwner graph(api::end_capture(stream.get()));
  api::launch(graph.get(), stream.get());
  api::synchronize(stream.get());
}

// -------------------------------------------------------------------------------------- memory
TEST_CASE(memory_is_accounted_for) {
  const Fixture fixture;
  const api::MemoryInfo before = api::memory_info();
  {
    const DeviceMemory some(1), more(257);
    CHECK_EQ(api::memory_info().free, before.free - 3 * 256);
    CHECK_EQ(reinterpret_cast<uintptr_t>(some.data()) % 256, 0u);
    const PinnedMemory pinned(1000);
    CHECK_EQ(api::memory_info().free, before.free - 3 * 256);
  }
  CHECK_EQ(api::memory_info().free, before.free);
  CHECK_EQ(api::memory_info().total, before.total);
  CHECK(api::allocate(0) == nullptr);
  api::free(nullptr);
  api::free_pinned(nullptr);
}

TEST_CASE(too_much_memory_is_refused_and_the_device_stays_usable) {
  const Fixture fixture;
  const size_t free = api::memory_info().free;
  const std::string message = MESSAGE_OF(DeviceError, api::allocate(free + 1));
  CHECK_CONTAINS(message, concat("out of memory: ", free + 1, " bytes"));
  CHECK_CONTAINS(message, concat(free, " of ", api::memory_info().total));
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::allocate(SIZE_MAX)), "out of memory");
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::allocate_pinned(SIZE_MAX)), "page-locked");
  CHECK_EQ(api::memory_info().free, free);
  CHECK(device_works());
}

TEST_CASE(the_size_of_memory_comes_from_the_environment) {
  ::setenv("RAPSHEE_EMU_MEMORY", "65536", 1);
  {
    const Fixture fixture;
    CHECK_EQ(api::memory_info().total, 65536u);
    CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::allocate(65537)), "out of memory");
  }
  ::unsetenv("RAPSHEE_EMU_MEMORY");
  const Fixture fixture;
  CHECK(api::memory_info().total > 65536u);
}

TEST_CASE(an_allocation_fails_where_the_test_wants_it) {
  const Fixture fixture;
  emu::fail_allocation(2);
  const DeviceMemory first(1);
  const PinnedMemory pinned(1);
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::allocate(10)), "out of memory: 10 bytes");
  CHECK(device_works());
}

TEST_CASE(wrong_frees_fail_the_device) {
  {
    const Fixture fixture;
    int none = 0;
    api::free(&none);
    CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::create_stream()), "free of a pointer that no");
  }
  {
    const Fixture fixture;
    void* const memory = api::allocate(1);
    api::free_pinned(memory);
    CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::create_stream()), "free of a pointer that no");
    api::free(memory);
  }
  const Fixture fixture;
  void* const memory = api::allocate(1);
  api::free(memory);
  api::free(memory);
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::create_stream()), "has been freed before");
}

// ------------------------------------------------------------------------------------ failures
TEST_CASE(launches_that_no_device_takes_are_refused) {
  const Fixture fixture;
  const StreamOwner stream = make_stream();
  const auto refused = [&](const dev::Grid& grid, int threads, size_t shared_bytes) {
    return MESSAGE_OF(DeviceError,
                      dev::launch(add, {grid, threads, shared_bytes, stream.get()}, Add{}));
  };
  CHECK_CONTAINS(refused({}, 0, 0), "threads: got 0");
  CHECK_CONTAINS(refused({}, 1025, 0), "threads: got 1025");
  CHECK_CONTAINS(refused({0, 1, 1}, 1, 0), "grid: got (0, 1, 1)");
  CHECK_CONTAINS(refused({1, 65536, 1}, 1, 0), "grid: got (1, 65536, 1)");
  CHECK_CONTAINS(refused({}, 1, emu::kMaxSharedBytes + 1), "shared memory: got 232449 bytes");
  CHECK_CONTAINS(refused({}, 0, 0), "test_cuda_api_emu.cpp:");
  CHECK(device_works());
}

TEST_CASE(after_a_failed_kernel_every_call_throws) {
  Fixture fixture;
  const Array<uint32_t> number(std::vector<uint32_t>{1});
  const Pinned host({0});
  StreamOwner stream = make_stream();
  EventOwner event(api::create_event(true));
  api::begin_capture(stream.get());
  GraphOwner graph(api::end_capture(stream.get()));
  emu::fail_launch(2);
  launch_add(number, 1, stream);
  launch_add(number, 1, stream);
  api::record(event.get(), stream.get());
  const std::string first = MESSAGE_OF(DeviceError, api::synchronize(stream.get()));
  CHECK_CONTAINS(first, "illegal memory access");
  const auto check_fails = [&](auto&& call) { CHECK_EQ(MESSAGE_OF(DeviceError, call()), first); };
  check_fails([&] { api::synchronize(stream.get()); });
  check_fails([&] { api::synchronize(event.get()); });
  check_fails([&] { api::elapsed_ms(event.get(), event.get()); });
  check_fails([&] { launch_add(number, 1, stream); });
  check_fails([&] { api::launch(graph.get(), stream.get()); });
  check_fails([&] { api::begin_capture(stream.get()); });
  check_fails([&] { api::end_capture(stream.get()); });
  check_fails([&] { api::copy_to_device(number.data(), host.data(), 4, stream.get()); });
  check_fails([&] { api::copy_to_host(host.data(), number.data(), 4, stream.get()); });
  check_fails([&] { api::fill(number.data(), 0, 4, stream.get()); });
  check_fails([&] { api::record(event.get(), stream.get()); });
  check_fails([&] { api::wait(stream.get(), event.get()); });
  check_fails([&] { api::create_stream(); });
  check_fails([&] { api::create_event(); });
  check_fails([&] { api::allocate(1); });
  check_fails([&] { api::allocate_pinned(1); });
  check_fails([&] { api::memory_info(); });
  check_fails([&] { api::set_device(0); });
  check_fails([&] { api::device_info(0); });
  // What exists can still be given back.
  stream = StreamOwner();
  event = EventOwner();
  graph = GraphOwner();
  emu::reset_device();
  CHECK_EQ(number.read()[0], 2u);
  CHECK(device_works());
}

TEST_CASE(a_failure_is_found_by_whoever_waits_first) {
  const Fixture fixture;
  const Array<uint32_t> number(std::vector<uint32_t>{1});
  const StreamOwner failing = make_stream(), waiting = make_stream();
  const EventOwner event(api::create_event());
  emu::fail_launch(1);
  launch_add(number, 1, failing);
  api::record(event.get(), failing.get());
  api::wait(waiting.get(), event.get());
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::synchronize(waiting.get())), "illegal memory access");
}

TEST_CASE(a_launch_fails_where_the_environment_wants_it) {
  const Fixture fixture;
  const Array<uint32_t> number(std::vector<uint32_t>{1});
  const StreamOwner stream = make_stream();
  ::setenv("RAPSHEE_EMU_FAIL_LAUNCH", "1", 1);
  launch_add(number, 1, stream);
  CHECK_CONTAINS(MESSAGE_OF(DeviceError, api::synchronize(stream.get())), "planned by the test");
  ::unsetenv("RAPSHEE_EMU_FAIL_LAUNCH");
  emu::reset_device();
  CHECK(device_works());
}

}  // namespace
}  // namespace rapshee::cuda

TEST_MAIN()
