// Stacks for the threads of an emulated block, and the switch between them (x86-64).
#pragma once

#include <cstddef>

namespace rapshee::cuda::emu {

// A place to continue from: a suspended thread, or the caller of the block.
struct Fiber {
  void* stack_pointer = nullptr;
  // What AddressSanitizer must be told at a switch.
  const void* stack = nullptr;  // lowest byte
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

inline constexpr int kMaxFibers = 1024;

// Makes `fiber` begin with `entry`, which never returns, on stack `index`, at most kMaxFibers - 1.
// Stacks are kept and used again.
void prepare_fiber(Fiber& fiber, int index, void (*entry)());

// Continues `to`; returns when somebody switches to `from`. `last`: nobody will.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);

// The first act of an entry: the other half of the switch to it. `caller`: who never was prepared
// learns its own stack here, where it made the switch.
void arrive(Fiber& fiber, Fiber& caller);

}  // namespace rapshee::cuda::emu
