// Sums over a block, for the norms of rows.
#pragma once

#include "backend/cuda/kernels/device.cuh"

namespace rapshee::cuda {

inline constexpr int kMaxBlockWarps = 32;

// The sum of `value` over the block, for every thread: of a warp's lanes pairwise, then of the
// warps in order. Takes kMaxBlockWarps floats of shared memory, from float `at` on, which a kernel
// uses for one sum alone.
RAPSHEE_DEVICE float block_sum(float value, int at = 0) {
  RAPSHEE_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) value += dev::shfl_xor(value, mask);
  const auto sums = dev::shared<float>() + at;
  if (dev::lane() == 0) sums[dev::warp()] = value;
  dev::sync();
  float total = 0.0f;
  for (int warp = 0; warp < dev::num_threads() / 32; ++warp) total += sums[warp];
  return total;
}

// 1 over the root mean square of `count` numbers, by the sum of their squares.
RAPSHEE_DEVICE float inverse_rms(float squares, int64_t count, float eps) {
  const float mean = dev::divide(squares, static_cast<float>(count));
  return dev::divide(1.0f, dev::sqrt(mean + eps));
}

}  // namespace rapshee::cuda
