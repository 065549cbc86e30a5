// The emulated device: what tests can do to it, and how launches reach it.
//
// Work on streams is queued and runs as late as it may: when something synchronises with it. Blocks
// run one after the other, their threads in an order drawn from a seed (see block.h). A kernel that
// does something wrong fails the device: every later call throws DeviceError with the first
// failure's message, until reset_device() or in a new process.
//
// Environment variables, for tests that cannot call the functions below:
//   RAPSHEE_EMU_SEED=n             order of threads and blocks (default 0); read at each kernel
//   RAPSHEE_EMU_MEMORY=bytes       device memory (default 1 GiB); read at the first use of the
//                                  device and at reset_device()
//   RAPSHEE_EMU_FAIL_ALLOCATION=n  the n-th allocation of device memory from the first use of the
//                                  device on finds no memory
//   RAPSHEE_EMU_FAIL_LAUNCH=n      the n-th kernel that runs after the variable got this value
//                                  fails; read at each kernel. Once it has failed one, it has to be
//                                  removed or changed, and another kernel to run, before it can
//                                  fail the next.
#pragma once

#include <cstdint>

#include "emu/block.h"

struct CUstream_st;

namespace rapshee::cuda::emu {

// Forgets failures, planned ones too, and work that has not run. Allocations stay.
void reset_device();
// The n-th allocation of device memory from now on finds no memory; 0: none does.
void fail_allocation(int n);
// The n-th kernel that runs from now on fails, and the device with it; 0: none does.
void fail_launch(int n);
// Overrides RAPSHEE_EMU_SEED.
void set_seed(uint64_t seed);

// Queues a kernel, or records it in a capture. DeviceError where the device would refuse it.
void enqueue(Kernel kernel, CUstream_st* stream);

}  // namespace rapshee::cuda::emu
