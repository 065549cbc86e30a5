// The arithmetic of mma, for all lanes of a warp at once.
#pragma once

#include <cstdint>

namespace rapshee::cuda::emu {

// Of one lane, in the layout that device.cuh gives.
struct MmaOperand {
  float* d;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};

// Products are exact in float. The sixteen of an output are summed as a tree (k with k + 8, then
// k + 4, k + 2, k + 1), then added to d, and every addition truncates: like the device, and unlike
// any loop that an oracle would write, so that no comparison of bits succeeds by luck. An element
// of d depends on its row of a, its column of b and its own value, not on where they stand.
void mma_bf16(void* const* operands);
void mma_f16(void* const* operands);

}  // namespace rapshee::cuda::emu
