// The kernel table of one instruction set: its vectors, then the shared operations.
#include "backend/cpu/cache_layout.h"
#include "backend/cpu/isa/simd_avx2.h"
#include "backend/cpu/kernel_table.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace rapshee::cpu::avx2 {
namespace {

#include "backend/cpu/ops/math.inc"

#include "backend/cpu/ops/norm.inc"

#include "backend/cpu/ops/linear.inc"

#include "backend/cpu/ops/elementwise.inc"

#include "backend/cpu/ops/attention.inc"

#include "backend/cpu/ops/head.inc"

#include "backend/cpu/ops/roofline.inc"

}  // namespace

#include "backend/cpu/ops/table.inc"

}  // namespace rapshee::cpu::avx2

namespace rapshee::cpu {
const KernelTable& avx2_kernels() { return avx2::kTable; }
}  // namespace rapshee::cpu
