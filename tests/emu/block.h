// Runs the blocks of a kernel, one after the other, each thread on a fiber of its own.
//
// A thread runs until it waits for others; which one goes on then is drawn by chance, from the
// seed. Warp and block operations are rendezvous: whoever comes last does the work for all. It is
// an error if threads that should meet wait in different operations, or at different places of the
// source, or have left the kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <vector>

#include "emu/fibers.h"

namespace rapshee::cuda::emu {

using Site = std::source_location;

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxWarps = kMaxFibers / kWarpSize;
inline constexpr size_t kMaxSharedBytes = 232448;  // of a block, as on compute capability 9.0
inline constexpr size_t kAsyncBytes = 16;          // that a cp.async copies

struct Extent {
  unsigned x = 1, y = 1, z = 1;
};

// A launch with its arguments by value.
struct Kernel {
  std::function<void()> body;
  Extent grid;
  int threads = 0;
  size_t shared_bytes = 0;
  Site site;                                  // of the launch
  const std::type_info* arguments = nullptr;  // their type, which tells kernels apart in messages
};

// What kernels do wrong. The message names kernel, block and thread.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Runs all blocks, in an order that depends on the seed. KernelError ends the kernel.
void run_kernel(const Kernel& kernel, uint64_t seed);

// -------------------------------------------------------------------------- for running threads
// Copies that cp.async has begun.
struct AsyncCopy {
  uintptr_t to = 0;    // shared memory
  uintptr_t from = 0;  // global memory, 0: zeros
};

struct Thread {
  Fiber fiber;
  int index = 0;
  bool pdl_waited = false;
  bool exited = false;
  const char* waits_in = nullptr;  // the operation, while it waits
  Site site;                       // of its last operation
  std::vector<AsyncCopy> copies;
  std::vector<size_t> groups;  // committed: how many of `copies` each ends after
};

// Of the thread that runs. Kernels run one at a time.
struct Context {
  Thread* thread = nullptr;
  Extent block, grid;
  int num_threads = 0;
  uintptr_t shared_begin = 0;
  size_t shared_bytes = 0;
  bool pdl_waited = false;  // some thread of the grid
};
inline constinit Context context;

// Throws KernelError for the running thread.
[[noreturn, gnu::cold, gnu::noinline]] void fail(const std::string& problem);

// Every lane of the warp brings `operand`; the last to come calls `complete` on all 32, in the
// order of lanes.
void meet_warp(const char* operation, void* operand, void (*complete)(void* const* operands),
               const Site& site);
// The same, and what lanes did to shared memory before is seen by the others.
void sync_warp(const Site& site);
// All threads of the block; true where `predicate` is for any of them.
bool sync_block(const char* operation, bool predicate, const Site& site);

void begin_copy(uintptr_t to, uintptr_t from);
void commit_copies();
void land_copies(size_t pending_groups);

}  // namespace rapshee::cuda::emu
