// From packed weights (launchers.h) to what linear_core.cuh multiplies: codes as exact halves in
// the order of the mma A operand, scales and minimums as floats.
#pragma once

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda::linear_core {

// Four int8 codes, the pairs (0, 1) and (2, 3), as exact halves.
template <class T>
struct ByteCodes;
template <>
struct ByteCodes<dev::F16> {
  // 1024 + (code + 128) has the code's bits at the end of its fraction.
  RAPSHEE_DEVICE static void expand(uint32_t word, uint32_t& low, uint32_t& high) {
    constexpr uint32_t k1024 = 0x64646464u, k1152 = 0x64806480u;
    const uint32_t biased = word ^ 0x80808080u;
    low = dev::sub2<dev::F16>(dev::permute_bytes(biased, k1024, 0x4140), k1152);
    high = dev::sub2<dev::F16>(dev::permute_bytes(biased, k1024, 0x4342), k1152);
  }
};
template <>
struct ByteCodes<dev::Bf16> {
  // bf16 has 7 bits of fraction: the same in float, 2^23 + (code + 128), then packed.
  RAPSHEE_DEVICE static float value(uint32_t biased, uint32_t selector) {
    return dev::bits_to_float(dev::permute_bytes(biased, 0x4b000000u, selector)) - 8388736.0f;
  }
  RAPSHEE_DEVICE static void expand(uint32_t word, uint32_t& low, uint32_t& high) {
    const uint32_t biased = word ^ 0x80808080u;
    low = dev::pack2<dev::Bf16>(value(biased, 0x7440), value(biased, 0x7441));
    high = dev::pack2<dev::Bf16>(value(biased, 0x7442), value(biased, 0x7443));
  }
};

// A half pair whose fraction ends in the bits of a small integer added to it: 1024 in f16, 128 in
// bf16.
template <class T>
constexpr uint32_t kIntegerBase = 0x43004300u;
template <>
inline constexpr uint32_t kIntegerBase<dev::F16> = 0x64006400u;

template <class T>
constexpr uint32_t kOnes = 0x3f803f80u;
template <>
inline constexpr uint32_t kOnes<dev::F16> = 0x3c003c00u;

// Pair j of a word of 4-bit codes less the code's zero, as exact halves.
template <class T, WeightFormat kFormat>
RAPSHEE_DEVICE uint32_t nibble_pair(uint32_t word, int j) {
  constexpr uint32_t kZero = kFormat == WeightFormat::kQ4Z ? 0x00080008u : 0u;
  const uint32_t biased = (word >> (4 * j) & 0x000f000fu) | kIntegerBase<T>;
  return dev::sub2<T>(biased, kIntegerBase<T> + kZero);
}

inline constexpr int kGroupCols = 32;  // columns that are multiplied at a time: two k16 steps
// Words of a lane's 16 bytes that hold so many.
constexpr int group_words(WeightFormat format) { return 4 * kGroupCols / chunk_cols(format); }

// Operand A of k16 step `step` of the group in the first words: rows of the first panel, rows of
// the second.
template <class T, WeightFormat kFormat>
RAPSHEE_DEVICE void fragment(const dev::Vec16& first, const dev::Vec16& second, int step,
                             uint32_t (&a)[4]) {
  if constexpr (kFormat == WeightFormat::kHalf) {
    a[0] = first.word[2 * step];
    a[2] = first.word[2 * step + 1];
    a[1] = second.word[2 * step];
    a[3] = second.word[2 * step + 1];
  } else if constexpr (kFormat == WeightFormat::kQ8) {
    ByteCodes<T>::expand(first.word[step], a[0], a[2]);
    ByteCodes<T>::expand(second.word[step], a[1], a[3]);
  } else {
    a[0] = nibble_pair<T, kFormat>(first.word[0], 2 * step);
    a[2] = nibble_pair<T, kFormat>(first.word[0], 2 * step + 1);
    a[1] = nibble_pair<T, kFormat>(second.word[0], 2 * step);
    a[3] = nibble_pair<T, kFormat>(second.word[0], 2 * step + 1);
  }
}

// Moves the words of the next group to the front, so that a loop over groups need not be unrolled.
template <WeightFormat kFormat>
RAPSHEE_DEVICE void next_group(dev::Vec16& codes) {
  constexpr int kWords = group_words(kFormat);
  RAPSHEE_UNROLL
  for (int i = 0; i + kWords < 4; ++i) codes.word[i] = codes.word[i + kWords];
}

// Codes in planes: what a lane has of a group of 32 columns of a panel, moved to the low bits.
struct PlaneWords {
  uint32_t low = 0, high = 0;
};

// The lane's part of a plane of kBits for `group`, its pairs from bit 0 on.
template <int kBits>
RAPSHEE_DEVICE uint32_t plane_word(const dev::SharedPtr<const std::byte>& plane, int group) {
  const auto words = dev::cast<const uint32_t>(plane);
  constexpr int kPairs = 4;  // of a group
  return words[group * kBits / kPairs * 32 + dev::lane()] >> (kPairs * kBits * group % 16);
}

template <WeightFormat kFormat>
RAPSHEE_DEVICE PlaneWords plane_words(const dev::SharedPtr<const std::byte>& chunk, int group) {
  constexpr FormatInfo kInfo = format_info(kFormat);
  PlaneWords words{plane_word<kInfo.low_bits>(chunk, group), 0};
  if constexpr (kInfo.high_bits > 0) {
    constexpr int kLowBytes = kInfo.low_bits * 32 * 4;
    words.high = plane_word<kInfo.high_bits>(chunk + kLowBytes, group);
  }
  return words;
}

// Pair j of a group, less the code's zero, as exact halves.
template <class T, WeightFormat kFormat>
RAPSHEE_DEVICE uint32_t plane_pair(const PlaneWords& words, int j) {
  constexpr FormatInfo kInfo = format_info(kFormat);
  constexpr uint32_t kPair = 0x00010001u;
  constexpr uint32_t kLowMask = ((1u << kInfo.low_bits) - 1) * kPair;
  uint32_t biased = (words.low >> (kInfo.low_bits * j) & kLowMask) | kIntegerBase<T>;
  if constexpr (kInfo.high_bits > 0) {
    constexpr uint32_t kHighMask = (((1u << kInfo.high_bits) - 1) << kInfo.low_bits) * kPair;
    const int right = kInfo.high_bits * j - kInfo.low_bits;
    biased |= (right >= 0 ? words.high >> right : words.high << -right) & kHighMask;
  }
  return dev::sub2<T>(biased, kIntegerBase<T> + static_cast<uint32_t>(kInfo.zero) * kPair);
}

// Operand A of k16 step `step` of a group, as above.
template <class T, WeightFormat kFormat>
RAPSHEE_DEVICE void fragment(const PlaneWords& first, const PlaneWords& second, int step,
                             uint32_t (&a)[4]) {
  a[0] = plane_pair<T, kFormat>(first, 2 * step);
  a[2] = plane_pair<T, kFormat>(first, 2 * step + 1);
  a[1] = plane_pair<T, kFormat>(second, 2 * step);
  a[3] = plane_pair<T, kFormat>(second, 2 * step + 1);
}

// Scales (and minimums) of a row for the 32 columns of a group: one, or one for each k16 step.
template <WeightFormat kFormat>
struct GroupScales {
  static constexpr FormatInfo kInfo = format_info(kFormat);
  static constexpr int kCount = kInfo.group == 16 ? 2 : 1;
  static constexpr int kBytes = kCount * (kInfo.minimum ? 4 : 2);

  float scale[kCount] = {};
  float minimum[kCount] = {};

  RAPSHEE_DEVICE void load(const dev::SharedPtr<const std::byte>& from) {
    if constexpr (kInfo.minimum) {
      RAPSHEE_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const dev::Float2 two = dev::unpack2<dev::F16>(dev::cast<const uint32_t>(from)[i]);
        scale[i] = two.x;
        minimum[i] = two.y;
      }
    } else if constexpr (kCount == 2) {
      const dev::Float2 two = dev::unpack2<dev::F16>(*dev::cast<const uint32_t>(from));
      scale[0] = two.x;
      scale[1] = two.y;
    } else {
      scale[0] = dev::to_float(*dev::cast<const dev::F16>(from));
    }
  }
};

}  // namespace rapshee::cuda::linear_core
