// The shared memory of the running block, and a detector of races on it.
//
// Every word remembers who wrote it last and who has read it since, and when; time advances at
// barriers. Two accesses by different threads, one of them a write, need a sync() between them, or
// a sync_warp() within a warp; shuffles and other operations of a warp order nothing. Copies of
// cp.async occupy their words from their start to the wait of the same thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rapshee::cuda::emu {

// Poisoned memory, no history.
void begin_shared_memory(size_t bytes);
uintptr_t shared_memory();

// The running thread passed a barrier with all others, or with its warp.
void order_block();
void order_warp(int warp);

// Each throws KernelError at a race, out of bounds or misaligned.
void read_shared(uintptr_t address, size_t bytes, size_t alignment);
void write_shared(uintptr_t address, size_t bytes, size_t alignment);
void update_shared(uintptr_t address, size_t bytes, size_t alignment);  // atomically
// Through a reference, whose use is found out later: a write if the bytes have changed.
void access_shared(uintptr_t address, size_t bytes, size_t alignment);
// Does that. Called before the thread does anything that others could see.
void settle_access();

// cp.async: 16 bytes are about to be written; they are, now.
void reserve_shared(uintptr_t address);
void land_shared(uintptr_t address);
void abandon_shared(uintptr_t address);

}  // namespace rapshee::cuda::emu
