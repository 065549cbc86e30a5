#include "emu/fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#error "the CUDA emulator switches stacks by x86-64 instructions"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" {
// Saves what the calling convention preserves, and continues at another such point.
void rapshee_emu_switch(void** from, void* to);
}

asm(R"(
  .text
  .globl rapshee_emu_switch
  .hidden rapshee_emu_switch
  .type rapshee_emu_switch, @function
rapshee_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size rapshee_emu_switch, . - rapshee_emu_switch
)");

namespace rapshee::cuda::emu {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kGuardBytes = 4 << 10;
constexpr int kSavedRegisters = 6;

// All stacks in one mapping, an inaccessible page below each.
char* map_stacks() {
  constexpr size_t kBytes = kMaxFibers * (kStackBytes + kGuardBytes);
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  auto* stacks = static_cast<char*>(memory);
  for (int i = 0; i < kMaxFibers; ++i) {
    mprotect(stacks + static_cast<size_t>(i) * (kStackBytes + kGuardBytes), kGuardBytes, PROT_NONE);
  }
  return stacks;
}

}  // namespace

void prepare_fiber(Fiber& fiber, int index, void (*entry)()) {
  static char* const stacks = map_stacks();
  char* stack = stacks + static_cast<size_t>(index) * (kStackBytes + kGuardBytes) + kGuardBytes;
#if defined(__SANITIZE_ADDRESS__)
  // An abandoned fiber leaves the marks of its frames behind.
  ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);
#endif
  // Frames at equal depths would otherwise share the same few lines of the cache.
  constexpr size_t kStagger = 192, kPhases = 64;
  char* top = stack + kStackBytes - static_cast<size_t>(index) % kPhases * kStagger;
  auto* slot = reinterpret_cast<uint64_t*>(top);
  *--slot = 0;  // where `entry` would return to: the stack is aligned as after a call
  *--slot = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--slot = 0;
  fiber = {slot, stack, kStackBytes, nullptr};
}

#if defined(__SANITIZE_ADDRESS__)

void switch_fiber(Fiber& from, Fiber& to, bool last) {
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  rapshee_emu_switch(&from.stack_pointer, to.stack_pointer);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void arrive(Fiber& fiber, Fiber& caller) {
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &stack, &bytes);
  if (caller.stack == nullptr) {
    caller.stack = stack;
    caller.stack_bytes = bytes;
  }
}

#else

void switch_fiber(Fiber& from, Fiber& to, bool) {
  rapshee_emu_switch(&from.stack_pointer, to.stack_pointer);
}

void arrive(Fiber&, Fiber&) {}

#endif

}  // namespace rapshee::cuda::emu
