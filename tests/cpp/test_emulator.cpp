// Kernels that do one thing wrong, their correct twins, and the values of device operations.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "emulated_device.h"

namespace rapshee::cuda {
namespace {

using testing::Array;
using testing::run;

constexpr uint64_t kSeeds = 6;  // orders of threads in which each fault has to be found
constexpr int kThreads = 64;    // two warps
constexpr size_t kSharedBytes = kThreads * sizeof(uint32_t);

// `args` without a fault leaves no problem behind, in any order of threads; with `planted`, the
// problem and the kernel (by its arguments) are named, whatever the order.
template <class Args>
void check_fault(void (*kernel)(Args), Args args, const char* arguments, const char* problem,
                 size_t shared_bytes = kSharedBytes, int line = __builtin_LINE()) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emu::set_seed(seed);
    args.planted = false;
    rapshee::testing::check_equal(run(kernel, args, kThreads, shared_bytes), "", __FILE__, line,
                                  "the correct twin");
    args.planted = true;
    emu::set_seed(seed);
    const std::string message = run(kernel, args, kThreads, shared_bytes);
    testing::check_contains(message, problem, line);
    testing::check_contains(message, std::string("::") + arguments, line);
    testing::check_contains(message, "block (0, 0, 0), thread ", line);
  }
}

// --------------------------------------------------------------------------------------- races
struct Reverse {
  uint32_t* out;  // [kThreads]
  bool planted;
};

RAPSHEE_KERNEL(kThreads, 1) reverse(RAPSHEE_PARAM Reverse args) {
  dev::pdl_wait();
  const dev::Ptr<uint32_t> out(args.out);
  const auto values = dev::shared<uint32_t>();
  values[dev::thread()] = static_cast<uint32_t>(dev::thread());
  if (!args.planted) dev::sync();
  out[dev::thread()] = values[dev::num_threads() - 1 - dev::thread()];
}

RAPSHEE_KERNEL(kThreads, 1) reverse_with_warp_barrier(RAPSHEE_PARAM Reverse args) {
  dev::pdl_wait();
  const dev::Ptr<uint32_t> out(args.out);
  const auto values = dev::shared<uint32_t>();
  values[dev::thread()] = static_cast<uint32_t>(dev::thread());
  dev::sync_warp();
  const int other =
      args.planted ? dev::num_threads() - 1 - dev::thread() : 32 * dev::warp() + 31 - dev::lane();
  out[dev::thread()] = values[other];
}

RAPSHEE_KERNEL(kThreads, 1) reverse_after_shuffle(RAPSHEE_PARAM Reverse args) {
  dev::pdl_wait();
  const dev::Ptr<uint32_t> out(args.out);
  const auto values = dev::shared<uint32_t>();
  values[dev::thread()] = static_cast<uint32_t>(dev::thread());
  dev::shfl(0, 0);
  if (!args.planted) dev::sync_warp();
  out[dev::thread()] = values[32 * dev::warp() + 31 - dev::lane()];
}

TEST_CASE(a_missing_barrier_is_found) {
  const Array<uint32_t> out(kThreads);
  const Reverse args{out.data(), false};
  check_fault(reverse, args, "Reverse", "race on shared memory");
  check_fault(reverse_with_warp_barrier, args, "Reverse", "race on shared memory");
  check_fault(reverse_after_shuffle, args, "Reverse", "race on shared memory");
  CHECK_EQ(run(reverse, args, kThreads, kSharedBytes), "");
  const std::vector<uint32_t> values = out.read();
  for (uint32_t i = 0; i < kThreads; ++i) CHECK_EQ(values[i], kThreads - 1 - i);
}

// Everybody reads what the neighbour wrote, then overwrites its own.
RAPSHEE_KERNEL(kThreads, 1) overwrite(RAPSHEE_PARAM Reverse args) {
  dev::pdl_wait();
  const auto values = dev::shared<uint32_t>();
  const dev::Ptr<uint32_t> out(args.out);
  values[dev::thread()] = 1;
  dev::sync();
  out[dev::thread()] = values[(dev::thread() + 1) % dev::num_threads()];
  if (!args.planted) dev::sync();
  values[dev::thread()] = 2;
}

// Bytes of one word by different threads are no race, the same byte is.
RAPSHEE_KERNEL(kThreads, 1) write_bytes(RAPSHEE_PARAM Reverse args) {
  dev::pdl_wait();
  const auto bytes = dev::shared<uint8_t>();
  bytes[args.planted ? dev::thread() / 2 : dev::thread()] = static_cast<uint8_t>(dev::thread());
}

// Atomic operations may meet each other, but no plain read.
RAPSHEE_KERNEL(kThreads, 1) count_threads(RAPSHEE_PARAM Reverse args) {
  dev::pdl_wait();
  const dev::Ptr<uint32_t> out(args.out);
  const auto sum = dev::shared<uint32_t>();
  if (dev::thread() == 0) sum[0] = 0;
  dev::sync();
  dev::atomic_add(sum, 1u);
  if (!args.planted) dev::sync();
  out[dev::thread()] = sum[0];
}

TEST_CASE(writes_race_with_reads_writes_and_atomics) {
  const Array<uint32_t> out(kThreads);
  const Reverse args{out.data(), false};
  check_fault(overwrite, args, "Reverse", "race on shared memory");
  check_fault(write_bytes, args, "Reverse", "race on shared memory: write");
  check_fault(count_threads, args, "Reverse", "race on shared memory");
  CHECK_EQ(run(count_threads, args, kThreads, kSharedBytes), "");
  for (const uint32_t value : out.read()) CHECK_EQ(value, unsigned{kThreads});
}

// ----------------------------------------------------------------------------------- cp.async
enum class CopyFault { kNone, kNoWait, kEarlyWait, kNoCommit, kNoBarrier };

struct AsyncCopies {
  const uint32_t* from;  // [4 * kThreads]
  uint32_t* to;          // the same, the copies of odd threads left out
  CopyFault fault;
  bool planted;
};

RAPSHEE_KERNEL(kThreads, 1) copy_async(RAPSHEE_PARAM AsyncCopies args) {
  dev::pdl_wait();
  const CopyFault fault = args.planted ? args.fault : CopyFault::kNone;
  const dev::Ptr<const uint32_t> from(args.from);
  const dev::Ptr<uint32_t> to(args.to);
  const auto staged = dev::shared<uint32_t>();
  const bool valid = dev::thread() % 2 == 0;
  // Where nothing is copied, the address may be any.
  dev::cp_async16(staged + 4 * dev::thread(), valid ? from + 4 * dev::thread() : from - 4, valid);
  if (fault != CopyFault::kNoCommit) dev::cp_async_commit();
  if (fault == CopyFault::kEarlyWait) {
    dev::cp_async_wait<1>();
  } else if (fault != CopyFault::kNoWait) {
    dev::cp_async_wait<0>();
  }
  if (fault != CopyFault::kNoBarrier) dev::sync();
  const int other = kThreads - 1 - dev::thread();
  dev::store16(to + 4 * other, dev::load16(staged + 4 * other));
}

TEST_CASE(a_missing_wait_for_an_asynchronous_copy_is_found) {
  std::vector<uint32_t> values(4 * kThreads);
  std::iota(values.begin(), values.end(), 1u);
  const Array<uint32_t> from(values), to(values.size());
  constexpr size_t kBytes = kThreads * emu::kAsyncBytes;
  for (const CopyFault fault :
       {CopyFault::kNoWait, CopyFault::kEarlyWait, CopyFault::kNoCommit, CopyFault::kNoBarrier}) {
    check_fault(copy_async, {from.data(), to.data(), fault, false}, "AsyncCopies",
                fault == CopyFault::kNoBarrier ? "race on shared memory" : "cp.async", kBytes);
  }
  CHECK_EQ(run(copy_async, {from.data(), to.data(), CopyFault::kNone, false}, kThreads, kBytes),
           "");
  const std::vector<uint32_t> got = to.read();
  for (size_t i = 0; i < got.size(); ++i) CHECK_EQ(got[i], i / 4 % 2 == 0 ? values[i] : 0u);
}

// Two groups are under way; the wait for all but one makes the first alone usable.
RAPSHEE_KERNEL(kThreads, 1) pipeline(RAPSHEE_PARAM AsyncCopies args) {
  dev::pdl_wait();
  const dev::Ptr<const uint32_t> from(args.from);
  const dev::Ptr<uint32_t> to(args.to);
  const auto staged = dev::shared<uint32_t>() + 8 * dev::thread();
  for (int group = 0; group < 2; ++group) {
    dev::cp_async16(staged + 4 * group, from + 4 * group);
    dev::cp_async_commit();
  }
  dev::cp_async_wait<1>();
  dev::store16(to + 4 * dev::thread(), dev::load16(staged + (args.planted ? 4 : 0)));
  dev::cp_async_wait<0>();
}

TEST_CASE(groups_of_copies_arrive_one_after_the_other) {
  std::vector<uint32_t> values(4 * kThreads);
  std::iota(values.begin(), values.end(), 1u);
  const Array<uint32_t> from(values), to(values.size());
  constexpr size_t kBytes = 2 * kThreads * emu::kAsyncBytes;
  const AsyncCopies args{from.data(), to.data(), CopyFault::kNone, false};
  check_fault(pipeline, args, "AsyncCopies", "cp.async", kBytes);
  CHECK_EQ(run(pipeline, args, kThreads, kBytes), "");
  CHECK_EQ(to.read()[5], 2u);
}

// --------------------------------------------------------------------------- bounds, alignment
enum class Access { kRead, kWrite, kReadVector, kWriteVector, kAtomic, kCopyAsync, kStream };

struct Accesses {
  uint32_t* global;  // [count]; null: shared memory
  int64_t count;
  int64_t index;  // of the fault
  Access access;
  bool planted;
};

template <class Pointer>
RAPSHEE_DEVICE void access_once(const Pointer& p, Access access) {
  switch (access) {
    case Access::kRead:
      if (*p == 1) *p = 1;
      return;
    case Access::kWrite:
      *p = 1;
      return;
    case Access::kReadVector:
      dev::load16(p);
      return;
    case Access::kWriteVector:
      dev::store16(p, {{1, 1, 1, 1}});
      return;
    default:
      dev::atomic_max(p, 1u);
  }
}

RAPSHEE_KERNEL(kThreads, 1) access_memory(RAPSHEE_PARAM Accesses args) {
  dev::pdl_wait();
  if (dev::thread() > 0) return;
  const int64_t index = args.planted ? args.index : 0;
  if (args.global == nullptr) {
    access_once(dev::shared<uint32_t>() + index, args.access);
  } else if (args.access == Access::kCopyAsync) {
    dev::cp_async16(dev::shared<uint32_t>(), dev::Ptr<const uint32_t>(args.global) + index);
    dev::cp_async_commit();
    dev::cp_async_wait<0>();
  } else if (args.access == Access::kStream) {
    dev::load16_stream(dev::Ptr<const uint32_t>(args.global) + index);
  } else {
    access_once(dev::Ptr<uint32_t>(args.global) + index, args.access);
  }
}

constexpr std::array kAccesses = {Access::kRead,        Access::kWrite,  Access::kReadVector,
                                  Access::kWriteVector, Access::kAtomic, Access::kCopyAsync,
                                  Access::kStream};
constexpr bool is_vector(Access access) {
  return access != Access::kRead && access != Access::kWrite && access != Access::kAtomic;
}

TEST_CASE(what_lies_outside_of_memory_is_found) {
  // The end is in the middle of a vector, and of the words that a page of the host holds.
  const Array<uint32_t> global(kThreads + 2);
  const auto count = static_cast<int64_t>(global.size());
  for (const Access access : kAccesses) {
    for (const int64_t index : {int64_t{-4}, is_vector(access) ? count - 2 : count, count + 1022}) {
      check_fault(access_memory, {global.data(), count, index, access, false}, "Accesses",
                  "out of bounds");
    }
  }
  constexpr size_t kBytes = kSharedBytes + 8;
  for (const Access access : kAccesses) {
    if (access == Access::kCopyAsync || access == Access::kStream) continue;
    for (const int64_t index : {int64_t{-4}, is_vector(access) ? count - 2 : count}) {
      check_fault(access_memory, {nullptr, count, index, access, false}, "Accesses",
                  "bytes of shared memory", kBytes);
    }
  }
}

TEST_CASE(what_is_misaligned_is_found) {
  const Array<uint32_t> global(kThreads);
  for (const Access access : kAccesses) {
    if (!is_vector(access)) continue;
    check_fault(access_memory, {global.data(), kThreads, 2, access, false}, "Accesses",
                "misaligned: byte 8");
    if (access == Access::kCopyAsync || access == Access::kStream) continue;
    check_fault(access_memory, {nullptr, kThreads, 2, access, false}, "Accesses",
                "misaligned: byte 8 of shared memory");
  }
}

struct Element {
  const uint32_t* from;
  uint32_t* to;
};

RAPSHEE_KERNEL(1, 1) copy_element(RAPSHEE_PARAM Element args) {
  dev::pdl_wait();
  dev::Ptr<uint32_t>(args.to)[0] = dev::Ptr<const uint32_t>(args.from)[0];
}

RAPSHEE_KERNEL(1, 1) copy_odd_address(RAPSHEE_PARAM Element args) {
  dev::pdl_wait();
  const auto bytes = dev::cast<const uint8_t>(dev::Ptr<const uint32_t>(args.from));
  dev::Ptr<uint32_t>(args.to)[0] = *dev::cast<const uint32_t>(bytes + 1);
}

TEST_CASE(memory_that_is_none_of_the_device_is_found) {
  const Array<uint32_t> some(std::vector<uint32_t>{7, 8}), other(1);
  CHECK_EQ(run(copy_element, {some.data(), other.data()}, 1), "");
  CHECK_EQ(other.read()[0], 7u);

  CHECK_CONTAINS(run(copy_odd_address, {some.data(), other.data()}, 1), "misaligned: byte 1");
  CHECK_CONTAINS(run(copy_element, {nullptr, other.data()}, 1), "null pointer");
  const uint32_t on_the_host = 1;
  CHECK_CONTAINS(run(copy_element, {&on_the_host, other.data()}, 1), "is in no device memory");
  const PinnedMemory pinned(sizeof(uint32_t));
  CHECK_CONTAINS(run(copy_element, {some.data(), pinned.data<uint32_t>()}, 1),
                 "is page-locked host memory, not device memory");

  const uint32_t* freed = nullptr;
  {
    const Array<uint32_t> gone(1);
    freed = gone.data();
  }
  const std::string message = run(copy_element, {freed, other.data()}, 1);
  CHECK_CONTAINS(message, "that has been freed");
  CHECK_CONTAINS(message, "::Element");
}

struct Pair {
  uint32_t* first;
  uint32_t* second;
};

RAPSHEE_KERNEL(1, 1) reach_over(RAPSHEE_PARAM Pair args) {
  dev::pdl_wait();
  dev::Ptr<uint32_t>(args.first)[args.second - args.first] = 1;
}

TEST_CASE(a_pointer_does_not_reach_into_other_allocations) {
  const Array<uint32_t> first(1), second(1);
  CHECK_CONTAINS(run(reach_over, {first.data(), second.data()}, 1), "out of bounds");
}

// ---------------------------------------------------------------------------------- divergence
struct Diverge {
  uint32_t* out;
  bool planted;
};

// A lane goes past a shuffle, to the barrier behind it.
RAPSHEE_KERNEL(kThreads, 1) skip_shuffle(RAPSHEE_PARAM Diverge args) {
  dev::pdl_wait();
  if (!(args.planted && dev::thread() == 35)) dev::shfl_xor(1u, 1);
  dev::sync();
}

RAPSHEE_KERNEL(kThreads, 1) leave_before_shuffle(RAPSHEE_PARAM Diverge args) {
  dev::pdl_wait();
  if (args.planted && dev::thread() == 3) return;
  dev::shfl_xor(1u, 1);
}

RAPSHEE_KERNEL(kThreads, 1) vote_instead_of_shuffling(RAPSHEE_PARAM Diverge args) {
  dev::pdl_wait();
  if (args.planted && dev::lane() < 16) {
    dev::ballot(true);
  } else {
    dev::shfl(1u, 0);
  }
}

RAPSHEE_KERNEL(kThreads, 1) shuffle_at_two_places(RAPSHEE_PARAM Diverge args) {
  dev::pdl_wait();
  if (args.planted && dev::lane() == 31) {
    dev::shfl(1u, 0);
  } else {
    dev::shfl(1u, 0);
  }
}

RAPSHEE_KERNEL(kThreads, 1) leave_before_barrier(RAPSHEE_PARAM Diverge args) {
  dev::pdl_wait();
  if (args.planted && dev::warp() == 1) return;
  dev::sync();
}

RAPSHEE_KERNEL(kThreads, 1) wait_at_two_barriers(RAPSHEE_PARAM Diverge args) {
  dev::pdl_wait();
  if (args.planted && dev::warp() == 1) {
    dev::sync();
  } else {
    dev::sync();
  }
}

TEST_CASE(divergence_is_found) {
  const Diverge args{nullptr, false};
  check_fault(skip_shuffle, args, "Diverge", "divergent");
  check_fault(leave_before_shuffle, args, "Diverge", "divergent");
  check_fault(vote_instead_of_shuffling, args, "Diverge", "divergent");
  check_fault(shuffle_at_two_places, args, "Diverge", "divergent");
}

TEST_CASE(a_barrier_that_not_all_reach_is_found) {
  const Diverge args{nullptr, false};
  check_fault(leave_before_barrier, args, "Diverge", "divergent");
  check_fault(wait_at_two_barriers, args, "Diverge", "divergent");
}

RAPSHEE_KERNEL(kThreads, 1) shuffle(RAPSHEE_PARAM Diverge) {
  dev::pdl_wait();
  dev::shfl(1u, 0);
}

TEST_CASE(a_warp_that_the_launch_left_incomplete_cannot_shuffle) {
  CHECK_EQ(run(shuffle, {}, 32), "");
  CHECK_CONTAINS(run(shuffle, {}, 40), "divergent");
}

// ------------------------------------------------------------------ programmatic dependent launch
struct Early {
  uint32_t* memory;  // [kThreads]
  bool write;
  bool planted;
};

RAPSHEE_KERNEL(kThreads, 1) access_early(RAPSHEE_PARAM Early args) {
  const dev::Ptr<uint32_t> memory(args.memory);
  if (!args.planted) dev::pdl_wait();
  if (args.write) {
    memory[dev::thread()] = 1;
  } else {
    dev::load16(memory);
  }
  if (args.planted) dev::pdl_wait();
}

RAPSHEE_KERNEL(kThreads, 1) never_wait(RAPSHEE_PARAM Early args) {
  if (!args.planted && dev::thread() == 0) dev::pdl_wait();
}

RAPSHEE_KERNEL(kThreads, 1) read_weights_early(RAPSHEE_PARAM Early args) {
  const dev::Vec16 v = dev::load16_stream(dev::Ptr<const uint32_t>(args.memory));
  dev::pdl_wait();
  dev::Ptr<uint32_t>(args.memory)[dev::thread()] = v.word[1];
}

TEST_CASE(accesses_before_the_kernel_before_has_ended_are_found) {
  const Array<uint32_t> memory(std::vector<uint32_t>(kThreads, 5));
  for (const bool write : {false, true}) {
    check_fault(access_early, {memory.data(), write, false}, "Early", "access before pdl_wait");
  }
  CHECK_EQ(run(read_weights_early, {memory.data(), false, false}, kThreads), "");
  CHECK_EQ(memory.read()[0], 1u);
}

TEST_CASE(a_kernel_that_never_waits_is_found) {
  CHECK_EQ(run(never_wait, {nullptr, false, false}, kThreads), "");
  const std::string message = run(never_wait, {nullptr, false, true}, kThreads);
  CHECK_CONTAINS(message, "no thread called pdl_wait");
  CHECK_CONTAINS(message, "::Early");
}

// --------------------------------------------------------------------------- poison, exceptions
struct Floats {
  float* out;
};

RAPSHEE_KERNEL(1, 1) sum_of_shared(RAPSHEE_PARAM Floats args) {
  dev::pdl_wait();
  const auto values = dev::shared<float>();
  values[0] = 1.0f;
  dev::Ptr<float>(args.out)[0] = values[0] + values[1];
}

TEST_CASE(what_nobody_wrote_is_nan) {
  const Array<float> out(2);
  for (const float value : out.read()) CHECK(std::isnan(value));
  for (int repeat = 0; repeat < 2; ++repeat) {
    CHECK_EQ(run(sum_of_shared, {out.data()}, 1, 8), "");
    CHECK(std::isnan(out.read()[0]));
  }
}

RAPSHEE_KERNEL(kThreads, 1) throw_error(RAPSHEE_PARAM Floats) {
  dev::pdl_wait();
  dev::sync();
  if (dev::thread() == 5) throw InvalidArgument("five is too many");
  dev::sync();
}

TEST_CASE(an_exception_fails_the_kernel) {
  CHECK_CONTAINS(run(throw_error, {nullptr}, kThreads), "thread 5");
  CHECK_CONTAINS(run(throw_error, {nullptr}, kThreads), "threw five is too many");
}

// -------------------------------------------------------------------------------- order, blocks
struct Order {
  uint32_t* count;  // [1]
  uint32_t* turn;   // of each thread
};

RAPSHEE_KERNEL(kThreads, 1) take_turns(RAPSHEE_PARAM Order args) {
  dev::pdl_wait();
  const auto block = static_cast<int>(dev::block().x + dev::grid().x * dev::block().y);
  dev::Ptr<uint32_t>(args.turn)[block * kThreads + dev::thread()] =
      dev::atomic_add(dev::Ptr<uint32_t>(args.count), 1u);
}

std::vector<uint32_t> turns(uint64_t seed) {
  constexpr size_t kCount = 2 * 3 * kThreads;
  emu::reset_device();
  emu::set_seed(seed);
  const Array<uint32_t> count(std::vector<uint32_t>{0}), turn(kCount);
  CHECK_EQ(run(take_turns, {count.data(), turn.data()}, kThreads, 0, {2, 3}), "");
  return turn.read();
}

TEST_CASE(the_seed_decides_the_order_of_threads_and_blocks) {
  const std::vector<uint32_t> some = turns(1), other = turns(2);
  CHECK(some == turns(1));
  CHECK(some != other);
  CHECK(!std::is_sorted(some.begin(), some.begin() + kThreads));
  const auto first_block = [](const std::vector<uint32_t>& order) {
    return (std::find(order.begin(), order.end(), 0u) - order.begin()) / kThreads;
  };
  bool differs = false;
  for (uint64_t seed = 3; seed < 9; ++seed)
    differs |= first_block(turns(seed)) != first_block(some);
  CHECK(differs);
  std::vector<uint32_t> sorted = other;
  std::sort(sorted.begin(), sorted.end());
  for (uint32_t i = 0; i < sorted.size(); ++i) CHECK_EQ(sorted[i], i);
}

// ---------------------------------------------------------------------------- warp operations
struct WarpValues {
  uint32_t* out;     // [4][kThreads]
  uint64_t* wide;    // [kThreads]
  uint32_t* any_of;  // [2][kThreads]
};

RAPSHEE_KERNEL(kThreads, 1) shuffle_values(RAPSHEE_PARAM WarpValues args) {
  dev::pdl_wait();
  const int t = dev::thread();
  const auto value = static_cast<uint32_t>(t);
  const auto out = dev::Ptr<uint32_t>(args.out) + t;
  out[0] = dev::shfl(value, 31 - dev::lane());
  out[kThreads] = dev::shfl_xor(value, 5);
  out[2 * kThreads] = dev::shfl_up(value, 4);
  out[3 * kThreads] = dev::ballot(t % 3 == 0);
  dev::Ptr<uint64_t>(args.wide)[t] = dev::shfl(uint64_t{value} << 40 | value, 7);
  const auto any = dev::Ptr<uint32_t>(args.any_of) + t;
  any[0] = dev::sync_or(t == 40);
  any[kThreads] = dev::sync_or(false);
}

TEST_CASE(shuffles_and_votes_give_what_they_should) {
  const Array<uint32_t> out(4 * kThreads), any_of(2 * kThreads);
  const Array<uint64_t> wide(kThreads);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emu::set_seed(seed);
    CHECK_EQ(run(shuffle_values, {out.data(), wide.data(), any_of.data()}, kThreads), "");
    const std::vector<uint32_t> got = out.read(), any = any_of.read();
    const std::vector<uint64_t> got_wide = wide.read();
    for (uint32_t t = 0; t < kThreads; ++t) {
      const uint32_t lane = t % 32, first = t - lane;
      CHECK_EQ(got[t], first + 31 - lane);
      CHECK_EQ(got[kThreads + t], first + (lane ^ 5));
      CHECK_EQ(got[2 * kThreads + t], lane < 4 ? t : t - 4);
      // Multiples of three from 0 and from 33.
      CHECK_EQ(got[3 * kThreads + t], t < 32 ? 0x49249249u : 0x92492492u);
      CHECK_EQ(got_wide[t], uint64_t{first + 7} << 40 | (first + 7));
      CHECK_EQ(any[t], 1u);
      CHECK_EQ(any[kThreads + t], 0u);
    }
  }
}

struct Atomics {
  uint32_t* narrow;  // [3]: sum, maximum, minimum
  uint64_t* wide;    // [2]: sum, maximum
  uint32_t* before;  // [kThreads]
};

RAPSHEE_KERNEL(kThreads, 1) combine(RAPSHEE_PARAM Atomics args) {
  dev::pdl_wait();
  const dev::Ptr<uint32_t> narrow(args.narrow);
  const dev::Ptr<uint64_t> wide(args.wide);
  const auto value = static_cast<uint32_t>(dev::thread()) + 10;
  dev::Ptr<uint32_t>(args.before)[dev::thread()] = dev::atomic_add(narrow, 1u);
  dev::atomic_max(narrow + 1, value);
  dev::atomic_min(narrow + 2, value);
  dev::atomic_add(wide, uint64_t{value} << 32);
  dev::atomic_max(&wide[1], uint64_t{value} << 33);
}

TEST_CASE(atomics_combine_the_values_of_all_threads) {
  const Array<uint32_t> narrow(std::vector<uint32_t>{0, 0, 1000}), before(kThreads);
  const Array<uint64_t> wide(std::vector<uint64_t>{1, 0});
  CHECK_EQ(run(combine, {narrow.data(), wide.data(), before.data()}, kThreads), "");
  CHECK(narrow.read() == (std::vector<uint32_t>{kThreads, kThreads + 9, 10}));
  constexpr uint64_t kSum = kThreads * (kThreads + 19) / 2;
  CHECK(wide.read() == (std::vector<uint64_t>{(kSum << 32) + 1, uint64_t{kThreads + 9} << 33}));
  std::vector<uint32_t> turns = before.read();
  std::sort(turns.begin(), turns.end());
  for (uint32_t i = 0; i < kThreads; ++i) CHECK_EQ(turns[i], i);
}

// ------------------------------------------------------------------------------- tensor cores
template <class T>
struct Half;
template <>
struct Half<dev::Bf16> {
  static constexpr int kExponentBits = 8, kFractionBits = 7;
};
template <>
struct Half<dev::F16> {
  static constexpr int kExponentBits = 5, kFractionBits = 10;
};

// By the definition of the formats.
template <class T>
double value_of(uint32_t bits) {
  constexpr int kFractionBits = Half<T>::kFractionBits,
                kBias = (1 << (Half<T>::kExponentBits - 1)) - 1;
  const uint32_t fraction = bits & ((1u << kFractionBits) - 1);
  const auto exponent =
      static_cast<int>(bits >> kFractionBits & ((1u << Half<T>::kExponentBits) - 1));
  const double sign = bits >> 15 & 1 ? -1.0 : 1.0;
  if (exponent == 2 * kBias + 1) return fraction == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - kBias - kFractionBits);
  return sign * std::ldexp(fraction + (1u << kFractionBits), exponent - kBias - kFractionBits);
}

// To nearest, ties to even.
template <class T>
double rounded(double x) {
  constexpr int kFractionBits = Half<T>::kFractionBits,
                kBias = (1 << (Half<T>::kExponentBits - 1)) - 1;
  if (x == 0 || !std::isfinite(x)) return x;
  const int unit = std::max(std::ilogb(x), 1 - kBias) - kFractionBits;
  const double result = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  return std::fabs(result) < std::ldexp(1.0, kBias + 1) ? result : std::copysign(INFINITY, x);
}

struct Matrices {
  const uint16_t* in;  // [4][8][8]
  uint32_t* out;       // [3][32][4]
};

RAPSHEE_KERNEL(32, 1) load_matrices(RAPSHEE_PARAM Matrices args) {
  dev::pdl_wait();
  constexpr int kStride = 24;  // elements between rows, so that nothing lies where it would anyway
  const auto rows = dev::shared<dev::Bf16>();
  const auto mine = rows + kStride * dev::lane();
  dev::store16(mine, dev::load16(dev::Ptr<const uint16_t>(args.in) + 8 * dev::lane()));
  dev::sync_warp();
  uint32_t plain[4], transposed[4], pair[2];
  dev::ldmatrix_x4(plain, mine);
  dev::ldmatrix_x4_trans(transposed, mine);
  dev::ldmatrix_x2(pair, dev::lane() < 16 ? mine : dev::SharedPtr<dev::Bf16>());
  const auto out = dev::Ptr<uint32_t>(args.out) + 4 * dev::lane();
  for (int i = 0; i < 4; ++i) {
    out[i] = plain[i];
    out[128 + i] = transposed[i];
    out[256 + i] = i < 2 ? pair[i] : 0;
  }
}

TEST_CASE(ldmatrix_distributes_rows_or_columns) {
  std::vector<uint16_t> in(4 * 8 * 8);
  std::iota(in.begin(), in.end(), uint16_t{100});
  const Array<uint16_t> from(in);
  const Array<uint32_t> out(3 * 32 * 4);
  CHECK_EQ(run(load_matrices, {from.data(), out.data()}, 32, 32 * 24 * 2), "");
  const std::vector<uint32_t> got = out.read();
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t i = 0; i < 4; ++i) {
      const auto element = [&](uint32_t row, uint32_t column) {
        return uint32_t{in[i * 64 + row * 8 + column]};
      };
      const uint32_t fixed = lane / 4, pair = 2 * (lane % 4);
      const uint32_t plain = element(fixed, pair) | element(fixed, pair + 1) << 16;
      CHECK_EQ(got[lane * 4 + i], plain);
      CHECK_EQ(got[128 + lane * 4 + i], element(pair, fixed) | element(pair + 1, fixed) << 16);
      CHECK_EQ(got[256 + lane * 4 + i], i < 2 ? plain : 0u);
    }
  }
}

struct Product {
  const uint16_t* a;  // [16][16]
  const uint16_t* b;  // [16][8]
  float* d;           // [16][8]
};

template <class T>
RAPSHEE_KERNEL(32, 1)
multiply(RAPSHEE_PARAM Product args) {
  dev::pdl_wait();
  const dev::Ptr<const uint16_t> a(args.a), b(args.b);
  const dev::Ptr<float> d(args.d);
  const int g = dev::lane() / 4, t = dev::lane() % 4;
  const auto pair = [](uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; };
  uint32_t a_words[4], b_words[2];
  for (int i = 0; i < 4; ++i) {
    const auto row = a + 16 * (g + i % 2 * 8) + 2 * t + i / 2 * 8;
    a_words[i] = pair(row[0], row[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const auto column = b + 8 * (2 * t + 8 * i) + g;
    b_words[i] = pair(column[0], column[8]);
  }
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[8 * (g + i / 2 * 8) + 2 * t + i % 2];
  dev::mma<T>(sums, a_words, b_words);
  for (int i = 0; i < 4; ++i) d[8 * (g + i / 2 * 8) + 2 * t + i % 2] = sums[i];
}

template <class T>
void check_product(uint16_t exponent) {
  std::mt19937 random(1);
  std::vector<uint16_t> a(256), b(128);
  std::vector<float> d(128);
  // All signs and fractions, and the four exponents from `exponent` on.
  const auto half = [&] {
    const auto bits = static_cast<uint32_t>(random());
    const uint32_t fraction = bits & ((1u << Half<T>::kFractionBits) - 1);
    return static_cast<uint16_t>(
        fraction | (exponent + (bits >> 20 & 3u)) << Half<T>::kFractionBits | (bits >> 31) << 15);
  };
  std::generate(a.begin(), a.end(), half);
  std::generate(b.begin(), b.end(), half);
  for (float& value : d) value = static_cast<float>(random() % 2000) / 1000.0f - 1.0f;
  const Array<uint16_t> device_a(a), device_b(b);
  const Array<float> device_d(d);
  CHECK_EQ(run(multiply<T>, {device_a.data(), device_b.data(), device_d.data()}, 32), "");
  const std::vector<float> got = device_d.read();
  for (size_t row = 0; row < 16; ++row) {
    for (size_t column = 0; column < 8; ++column) {
      double sum = d[row * 8 + column], scale = std::fabs(sum);
      for (size_t k = 0; k < 16; ++k) {
        const double product = value_of<T>(a[row * 16 + k]) * value_of<T>(b[k * 8 + column]);
        sum += product;
        scale += std::fabs(product);
      }
      const float value = got[row * 8 + column];
      CHECK(std::fabs(value - sum) <= 5 * 0x1p-23 * scale);  // five truncations
    }
  }
}

TEST_CASE(mma_is_a_product_of_matrices) {
  check_product<dev::Bf16>(126);
  check_product<dev::F16>(14);
  check_product<dev::F16>(0);  // subnormal numbers too
}

TEST_CASE(mma_truncates_its_sums_and_nothing_else) {
  // 1 + 1.5 * 2^-24 is nearer to the float after 1.
  std::vector<uint16_t> a(256, 0), b(128, 0);
  a[0] = 0x3f80;                  // 1
  b[0] = (127 - 24) << 7 | 0x40;  // 1.5 * 2^-24
  const Array<uint16_t> device_a(a), device_b(b);
  const Array<float> d(std::vector<float>(128, 1.0f));
  CHECK_EQ(run(multiply<dev::Bf16>, {device_a.data(), device_b.data(), d.data()}, 32), "");
  for (const float value : d.read()) CHECK_EQ(value, 1.0f);
  volatile float one = 1.0f;
  CHECK(one + 1.5f * 0x1p-24f > 1.0f);
}

TEST_CASE(mma_overflows_and_carries_nan) {
  std::vector<uint16_t> a(256, 0), b(128, 0);
  const uint16_t huge = 0x7f00, nan = 0x7fc0, infinite = 0x7f80;  // 2^127
  a[0] = huge;
  b[0] = huge;
  b[1] = infinite;
  a[3 * 16] = nan;
  const Array<uint16_t> device_a(a), device_b(b);
  const Array<float> d(std::vector<float>(128, 0.0f));
  CHECK_EQ(run(multiply<dev::Bf16>, {device_a.data(), device_b.data(), d.data()}, 32), "");
  const std::vector<float> got = d.read();
  CHECK_EQ(got[0], INFINITY);
  CHECK_EQ(got[1], INFINITY);
  CHECK_EQ(got[2], 0.0f);
  CHECK(std::isnan(got[3 * 8 + 5]));
  CHECK(std::isnan(got[8 + 1]));  // 0 * infinity
  CHECK_EQ(got[8], 0.0f);
}

// ------------------------------------------------------------------------------------- numbers
TEST_CASE(halves_are_rounded_to_nearest_even) {
  CHECK_EQ(dev::pack2<dev::Bf16>(1.0f, -2.0f), 0xc0003f80u);
  CHECK_EQ(dev::pack2<dev::F16>(1.0f, -2.0f), 0xc0003c00u);
  const auto check_all = []<class T>(T) {
    std::mt19937 random(2);
    for (int i = 0; i < 20000; ++i) {
      // Of all exponents, or of those around the halves' own range.
      float x = std::bit_cast<float>(static_cast<uint32_t>(random()));
      if (i % 2 == 0)
        x = std::ldexp(std::copysign(1.0f + static_cast<float>(random() % 8192) / 8192.0f, x),
                       static_cast<int>(random() % 48) - 30);
      const uint32_t word = dev::pack2<T>(x, 1.0f);
      const dev::Float2 back = dev::unpack2<T>(word);
      CHECK_EQ(back.y, 1.0f);
      CHECK_EQ(dev::from_float<T>(x).bits, word & 0xffffu);
      if (std::isnan(x)) {
        CHECK_EQ(word & 0xffffu, 0x7fffu);
      } else {
        CHECK_EQ(double{back.x}, rounded<T>(x));
        CHECK_EQ(value_of<T>(word & 0xffffu), double{back.x});
      }
    }
  };
  check_all(dev::Bf16{});
  check_all(dev::F16{});
}

TEST_CASE(differences_of_halves_are_rounded_once) {
  const auto check_all = []<class T>(T) {
    std::mt19937 random(3);
    for (int i = 0; i < 20000; ++i) {
      const auto a = static_cast<uint32_t>(random()), b = static_cast<uint32_t>(random());
      const uint32_t difference = dev::sub2<T>(a, b);
      for (const int shift : {0, 16}) {
        const double expected =
            rounded<T>(value_of<T>(a >> shift & 0xffffu) - value_of<T>(b >> shift & 0xffffu));
        const double got = value_of<T>(difference >> shift & 0xffffu);
        CHECK(std::isnan(expected) ? std::isnan(got) : got == expected);
      }
    }
  };
  check_all(dev::Bf16{});
  check_all(dev::F16{});
}

TEST_CASE(integers_are_those_of_the_device) {
  CHECK_EQ(dev::permute_bytes(0x33221100u, 0x77665544u, 0x7620u), 0x77662200u);
  CHECK_EQ(dev::permute_bytes(0x33221100u, 0x77665544u, 0x3210u), 0x33221100u);
  CHECK_EQ(dev::permute_bytes(0x33221100u, 0x77665544u, 0x4567u), 0x44556677u);
  CHECK_EQ(dev::mul_high(0x80000000u, 6u), 3u);
  CHECK_EQ(dev::mul_high(uint64_t{1} << 63, uint64_t{6}), 3u);
  CHECK_EQ(dev::count_leading_zeros(0u), 32);
  CHECK_EQ(dev::count_leading_zeros(0x00800000u), 8);
  CHECK_EQ(dev::count_bits(0xf00f0001u), 9);
}

TEST_CASE(functions_are_those_of_the_device) {
  CHECK_EQ(dev::exp2(-INFINITY), 0.0f);
  CHECK_EQ(dev::exp2(-127.0f), 0.0f);  // subnormal results are flushed
  CHECK_EQ(dev::exp2(-126.0f), 0x1p-126f);
  CHECK_EQ(dev::exp2(200.0f), INFINITY);
  CHECK(std::isnan(dev::exp2(NAN)));
  for (float x = -20.0f; x < 20.0f; x += 0.37f) {
    CHECK(std::fabs(dev::exp2(x) - std::exp2(double{x})) <= 0x1p-22 * std::exp2(double{x}));
    float sin = 0.0f, cos = 0.0f;
    dev::sincospi(x, &sin, &cos);
    CHECK(std::fabs(sin - std::sin(std::numbers::pi * double{x})) < 1e-6);
    CHECK(std::fabs(cos - std::cos(std::numbers::pi * double{x})) < 1e-6);
  }
  float sin = 1.0f, cos = 1.0f;
  dev::sincospi(1.5f, &sin, &cos);
  CHECK_EQ(sin, -1.0f);
  CHECK_EQ(cos, 0.0f);
  CHECK_EQ(dev::min(NAN, 2.0f), 2.0f);
  CHECK_EQ(dev::max(NAN, 2.0f), 2.0f);
  CHECK_EQ(dev::rint(2.5f), 2.0f);
  CHECK_EQ(dev::fma(0x1p-12f + 1.0f, 0x1p-12f + 1.0f, -1.0f), 0x1p-11f + 0x1p-24f);
  CHECK_EQ(dev::bits_to_float(0x3f800000u), 1.0f);
  CHECK_EQ(dev::float_to_bits(-2.0f), 0xc0000000u);
}

}  // namespace
}  // namespace rapshee::cuda

TEST_MAIN()
