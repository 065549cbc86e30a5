// What this machine can do at most, measured: the denominators of the benchmarks.
#pragma once

#include <cstddef>

#include "backend/cpu/kernel_table.h"

namespace rapshee::cpu {

// Bytes a second that `threads` threads read from `bytes` of memory together, over and over. A
// working set above the caches gives the bandwidth of the memory, one within them theirs.
double measure_read(const KernelTable& kernels, int threads, size_t bytes);

// Multiplications and additions a second of `threads` threads, operands in registers.
double measure_peak(const KernelTable& kernels, int threads, PeakKind kind);

}  // namespace rapshee::cpu
