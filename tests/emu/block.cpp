#include "emu/block.h"

#include <cxxabi.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>

#include "core/error.h"
#include "emu/memory.h"
#include "emu/pointer.h"
#include "emu/shared_memory.h"

namespace rapshee::cuda::emu {
namespace {

// splitmix64: small, and good enough for orders.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t below(size_t bound) {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(((z >> 32) * bound) >> 32);
  }

 private:
  uint64_t state_;
};

// Threads that wait for the others in one operation.
struct Rendezvous {
  const char* operation = nullptr;
  Site site;
  int arrived = 0;
  int exited = 0;  // threads that will never come
};

struct Warp {
  Rendezvous meeting;
  void* operands[kWarpSize];
};

struct Block {
  const Kernel* kernel = nullptr;
  Fiber caller;
  std::array<Thread, kMaxFibers> threads;
  std::array<Warp, kMaxWarps> warps;
  Rendezvous barrier;
  bool any = false;     // of the predicates so far
  bool result = false;  // of the last barrier
  std::array<Thread*, kMaxFibers> ready;
  size_t num_ready = 0;
  int num_exited = 0;
  Random random{0};
  std::string error;
};
Block block;

std::string at(const Site& site) { return concat(site.file_name(), ":", site.line()); }

std::string name_of(const std::type_info& type) {
  int status = 0;
  char* const demangled = abi::__cxa_demangle(type.name(), nullptr, nullptr, &status);
  std::string name = demangled == nullptr ? type.name() : demangled;
  std::free(demangled);
  return name;
}

std::string describe(const Kernel& kernel) {
  return concat("kernel of ", name_of(*kernel.arguments), " launched at ", at(kernel.site));
}

std::string locate(const Thread& thread) {
  std::string text = concat(describe(*block.kernel), ", block (", context.block.x, ", ",
                            context.block.y, ", ", context.block.z, "), thread ", thread.index);
  if (thread.site.line() != 0) text += ", last operation at " + at(thread.site);
  return text;
}

[[noreturn]] void fail_divergent(const std::string& detail) { fail("divergent: " + detail); }

Thread& take_ready() {
  const size_t index = block.random.below(block.num_ready);
  Thread* const next = block.ready[index];
  block.ready[index] = block.ready[--block.num_ready];
  return *next;
}

void make_ready(Thread& thread) {
  thread.waits_in = nullptr;
  block.ready[block.num_ready++] = &thread;
}

// Nobody can go on: some wait in one operation, some in another.
void describe_deadlock() {
  const Thread* waiting[2] = {nullptr, nullptr};
  const auto end = block.threads.begin() + context.num_threads;
  for (auto thread = block.threads.begin(); thread != end; ++thread) {
    if (thread->exited) continue;
    if (waiting[0] == nullptr) waiting[0] = &*thread;
    if (thread->waits_in != waiting[0]->waits_in) waiting[1] = &*thread;
  }
  block.error = locate(*waiting[0]);
  block.error += concat(": divergent: it waits in ", waiting[0]->waits_in);
  if (waiting[1] != nullptr) {
    block.error += concat(", thread ", waiting[1]->index, " in ", waiting[1]->waits_in, " at ",
                          at(waiting[1]->site));
  }
}

// Where the running thread stops for now, or for good.
void leave(bool last) {
  Thread& self = *context.thread;
  if (block.num_ready == 0) {
    if (block.num_exited < context.num_threads && block.error.empty()) describe_deadlock();
    switch_fiber(self.fiber, block.caller, last);
    return;
  }
  Thread& next = take_ready();
  context.thread = &next;
  switch_fiber(self.fiber, next.fiber, last);
}

void join(Rendezvous& meeting, const char* operation, const Site& site, const char* of) {
  Thread& self = *context.thread;
  self.site = site;
  if (meeting.exited > 0) {
    fail_divergent(concat(operation, " of the ", of, ", but ", meeting.exited,
                          " of its threads have left the kernel"));
  }
  if (meeting.arrived++ == 0) {
    meeting.operation = operation;
    meeting.site = site;
  } else if (std::strcmp(meeting.operation, operation) != 0 || meeting.site.line() != site.line() ||
             meeting.site.column() != site.column()) {
    fail_divergent(concat(operation, ", but other threads of the ", of, " wait in ",
                          meeting.operation, " at ", at(meeting.site)));
  }
  self.waits_in = operation;
}

void check_exit(Rendezvous& meeting, const char* of) {
  ++meeting.exited;
  if (meeting.arrived > 0) {
    fail_divergent(concat("it leaves the kernel, but other threads of the ", of, " wait in ",
                          meeting.operation, " at ", at(meeting.site)));
  }
}

void run_body() {
  block.kernel->body();
  settle_access();
  check_exit(block.warps[context.thread->index / kWarpSize].meeting, "warp");
  check_exit(block.barrier, "block");
}

void enter() {
  Thread& self = *context.thread;
  arrive(self.fiber, block.caller);
  try {
    run_body();
  } catch (const KernelError& error) {
    block.error = error.what();
  } catch (const std::exception& error) {
    block.error = concat(locate(self), ": threw ", error.what());
  }
  self.exited = true;
  ++block.num_exited;
  if (!block.error.empty()) block.num_ready = 0;  // the others are abandoned
  leave(true);
}

void prepare_thread(Thread& thread, int index) {
  prepare_fiber(thread.fiber, index, enter);
  thread.index = index;
  thread.pdl_waited = false;
  thread.exited = false;
  thread.waits_in = nullptr;
  thread.site = {};
  thread.copies.clear();
  thread.groups.clear();
}

void run_block(uint64_t seed) {
  const int threads = block.kernel->threads;
  block.random = Random(seed);
  block.caller = {};
  block.barrier = {};
  block.num_ready = 0;
  block.num_exited = 0;
  block.any = false;
  block.error.clear();
  const int warps = (threads + kWarpSize - 1) / kWarpSize;
  for (int w = 0; w < warps; ++w) {
    block.warps[static_cast<size_t>(w)].meeting = {};
    // Lanes that the launch left out never come.
    block.warps[static_cast<size_t>(w)].meeting.exited = std::max(0, (w + 1) * kWarpSize - threads);
  }
  begin_shared_memory(block.kernel->shared_bytes);
  for (int i = 0; i < threads; ++i) {
    Thread& thread = block.threads[static_cast<size_t>(i)];
    prepare_thread(thread, i);
    make_ready(thread);
  }
  context.thread = &take_ready();
  switch_fiber(block.caller, context.thread->fiber);
  for (int i = 0; i < threads; ++i) {
    for (const AsyncCopy& copy : block.threads[static_cast<size_t>(i)].copies) {
      abandon_shared(copy.to);
    }
  }
  context.thread = nullptr;
  if (!block.error.empty()) throw KernelError(block.error);
}

}  // namespace

void run_kernel(const Kernel& kernel, uint64_t seed) {
  block.kernel = &kernel;
  context.grid = kernel.grid;
  context.num_threads = kernel.threads;
  context.shared_begin = shared_memory();
  context.shared_bytes = kernel.shared_bytes;
  context.pdl_waited = false;
  const Extent& grid = kernel.grid;
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  Random random(seed);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  for (const uint64_t index : order) {
    context.block = {static_cast<unsigned>(index % grid.x),
                     static_cast<unsigned>(index / grid.x % grid.y),
                     static_cast<unsigned>(index / grid.x / grid.y)};
    run_block(seed ^ (index + 1) * 0xd1342543de82ef95u);
  }
  if (!context.pdl_waited) {
    throw KernelError(concat(describe(kernel),
                             ": no thread called pdl_wait, so that the kernel "
                             "may end, and the next one start, before the one before has ended"));
  }
}

void fail_global(const Region* region, uintptr_t address, size_t bytes, size_t alignment) {
  if (address == 0) fail(concat("null pointer: ", bytes, " bytes of device memory"));
  // A pointer may have been moved from the region it was made in to another: that is out of bounds.
  const std::string problem =
      region->space == Space::kDevice && !region->freed && address - region->begin >= region->size
          ? concat("out of bounds: ", bytes, " bytes at byte ",
                   static_cast<int64_t>(address - region->begin), " of an allocation of ",
                   region->allocated, " bytes")
          : access_problem(address, bytes, Space::kDevice);
  if (!problem.empty()) fail(problem);
  if (address % alignment != 0) {
    fail(concat("misaligned: byte ", address - region->begin, " of an allocation of ",
                region->allocated, " bytes, expected a multiple of ", alignment));
  }
  fail(concat("access before pdl_wait: ", bytes, " bytes at byte ", address - region->begin,
              " of an allocation of ", region->allocated, " bytes"));
}

void fail(const std::string& problem) {
  throw KernelError(locate(*context.thread) + ": " + problem);
}

void meet_warp(const char* operation, void* operand, void (*complete)(void* const*),
               const Site& site) {
  settle_access();
  Thread& self = *context.thread;
  const int warp_index = self.index / kWarpSize;
  Warp& warp = block.warps[static_cast<size_t>(warp_index)];
  join(warp.meeting, operation, site, "warp");
  warp.operands[self.index % kWarpSize] = operand;
  if (warp.meeting.arrived < kWarpSize) {
    leave(false);
    return;
  }
  warp.meeting.arrived = 0;
  self.waits_in = nullptr;
  complete(warp.operands);
  Thread* const lanes = block.threads.data() + warp_index * kWarpSize;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes + lane != &self) make_ready(lanes[lane]);
  }
}

void sync_warp(const Site& site) {
  meet_warp(
      "sync_warp", nullptr, [](void* const*) { order_warp(context.thread->index / kWarpSize); },
      site);
}

bool sync_block(const char* operation, bool predicate, const Site& site) {
  settle_access();
  Thread& self = *context.thread;
  join(block.barrier, operation, site, "block");
  block.any |= predicate;
  if (block.barrier.arrived < context.num_threads) {
    leave(false);
    return block.result;
  }
  block.barrier.arrived = 0;
  self.waits_in = nullptr;
  block.result = std::exchange(block.any, false);
  order_block();
  for (int i = 0; i < context.num_threads; ++i) {
    Thread& thread = block.threads[static_cast<size_t>(i)];
    if (&thread != &self) make_ready(thread);
  }
  return block.result;
}

void begin_copy(uintptr_t to, uintptr_t from) {
  reserve_shared(to);
  context.thread->copies.push_back({to, from});
}

void commit_copies() { context.thread->groups.push_back(context.thread->copies.size()); }

void land_copies(size_t pending_groups) {
  settle_access();
  Thread& self = *context.thread;
  if (self.groups.size() <= pending_groups) return;
  const size_t landed_groups = self.groups.size() - pending_groups;
  const size_t landed = self.groups[landed_groups - 1];
  for (size_t i = 0; i < landed; ++i) {
    const AsyncCopy& copy = self.copies[i];
    if (copy.from == 0) {
      std::memset(reinterpret_cast<void*>(copy.to), 0, kAsyncBytes);
    } else {
      std::memcpy(reinterpret_cast<void*>(copy.to), reinterpret_cast<const void*>(copy.from),
                  kAsyncBytes);
    }
    land_shared(copy.to);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(landed));
  self.groups.erase(self.groups.begin(),
                    self.groups.begin() + static_cast<std::ptrdiff_t>(landed_groups));
  for (size_t& group : self.groups) group -= landed;
}

}  // namespace rapshee::cuda::emu
