// Selection without sorting: the value at which a descending walk over unsorted floats has gathered
// a given mass. With mass 1 each it finds the k-th largest, with probabilities the edge of top-p.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <span>

namespace rapshee::cpu {

// Digits of 11, 11 and 10 bits: three passes over a 32-bit key with a histogram of 16 KiB, which
// stays in L1 beside the values that stream by.
inline constexpr int kRadixBits = 11;
using RadixHistogram = std::array<double, 1 << kRadixBits>;

// Unsigned integers in the order of the floats; -0 sorts just below +0.
constexpr uint32_t ordered_key(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

constexpr float from_ordered_key(uint32_t key) {
  return std::bit_cast<float>((key >> 31) != 0 ? key & 0x7FFFFFFFu : ~key);
}

// The largest t among `values` for which the mass of {v >= t} reaches `target`; where rounding
// keeps the whole mass below it, the smallest value with mass. `mass_of(i)` >= 0 belongs to
// values[i]; some must be positive, as must be the target.
template <typename MassOf>
float radix_threshold(std::span<const float> values, double target, MassOf mass_of,
                      RadixHistogram& histogram) {
  uint32_t prefix = 0;  // digits found so far
  double above = 0.0;   // mass of the keys above them
  int shift = 32;
  for (const int bits : {kRadixBits, kRadixBits, 10}) {
    const int known = shift;  // keys must agree with prefix from this bit on
    shift -= bits;
    const uint32_t num_buckets = 1u << bits;
    std::fill_n(histogram.begin(), num_buckets, 0.0);
    for (size_t i = 0; i < values.size(); ++i) {
      const uint64_t key = ordered_key(values[i]);
      if (key >> known == prefix) histogram[(key >> shift) & (num_buckets - 1)] += mass_of(i);
    }
    uint32_t digit = 0;
    double reached = above;
    for (uint32_t bucket = num_buckets; bucket-- > 0 && reached < target;) {
      if (histogram[bucket] == 0.0) continue;
      digit = bucket;
      above = reached;
      reached += histogram[bucket];
    }
    prefix = prefix << bits | digit;
  }
  return from_ordered_key(prefix);
}

}  // namespace rapshee::cpu
