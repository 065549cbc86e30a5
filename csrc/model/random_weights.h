// Weights for benchmarks without a checkpoint: activations keep their size through the layers.
#pragma once

#include <cmath>
#include <cstdint>

namespace rapshee {

// Uniform in [-1, 1), from the counter alone: the finaliser of SplitMix64 (Steele et al., 2014).
constexpr float counter_uniform(uint64_t key, uint64_t counter) {
  uint64_t z = key + counter * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<float>(z >> 40) * 0x1p-23f - 1.0f;
}

// Element `index` (row * cols + column) of a matrix of `cols` columns, with the variance 1 / cols.
inline float random_weight(uint64_t key, uint64_t index, int64_t cols) {
  return std::sqrt(3.0f / static_cast<float>(cols)) * counter_uniform(key, index);
}

}  // namespace rapshee
