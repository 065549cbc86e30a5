#include "quant/formats.h"

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "check.h"

namespace rapshee {
namespace {

constexpr DType kAll[] = {DType::kF32,  DType::kF16,  DType::kBF16, DType::kQ4_0, DType::kQ4_1,
                          DType::kQ5_0, DType::kQ5_1, DType::kQ8_0, DType::kQ2K,  DType::kQ3K,
                          DType::kQ4K,  DType::kQ5K,  DType::kQ6K};

// Where the f16 numbers of a block lie.
std::vector<size_t> halves_of(DType dtype) {
  switch (dtype) {
    case DType::kQ4_1:
    case DType::kQ5_1:
    case DType::kQ4K:
    case DType::kQ5K:
      return {0, 2};
    case DType::kQ2K:
      return {80, 82};
    case DType::kQ3K:
      return {108};
    case DType::kQ6K:
      return {208};
    default:
      return {0};
  }
}

// Bytes from a fixed generator (xorshift64); the scales of blocks are made finite.
std::vector<std::byte> random_row(DType dtype, int64_t n, uint64_t state) {
  std::vector<std::byte> row(static_cast<size_t>(row_bytes(dtype, n)));
  for (std::byte& byte : row) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    byte = static_cast<std::byte>(state);
  }
  if (is_quantized(dtype)) {
    const size_t block = static_cast<size_t>(block_bytes(dtype));
    for (size_t at = 0; at < row.size(); at += block) {
      for (const size_t half : halves_of(dtype)) {
        row[at + half + 1] &= std::byte{0xbf};  // exponent below 16
      }
    }
  }
  return row;
}

uint16_t u16(const std::byte* at) {
  return static_cast<uint16_t>(std::to_integer<int>(at[0]) | std::to_integer<int>(at[1]) << 8);
}

// Element i of a block of 256, by the description of the format: d * s * code - m * t.
float super_element(DType dtype, const std::byte* block, size_t i) {
  const auto byte = [&](size_t at) { return std::to_integer<int>(block[at]); };
  const auto value = [&](size_t d, int s, int code) {
    return f16_to_f32(u16(block + d)) * static_cast<float>(s) * static_cast<float>(code);
  };
  const size_t half = i / 128, part = i / 32 % 4, in_part = i % 32;
  const auto two_bits = [&](size_t q) { return byte(q + 32 * half + in_part) >> 2 * part & 3; };
  if (dtype == DType::kQ2K) {
    const int scales = byte(i / 16);
    return value(80, scales % 16, two_bits(16)) -
           f16_to_f32(u16(block + 82)) * static_cast<float>(scales / 16);
  }
  if (dtype == DType::kQ3K) {
    const size_t g = i / 16;
    const int low = g < 8 ? byte(96 + g) % 16 : byte(96 + g - 8) / 16;
    const int high = byte(96 + 8 + g % 4) >> 2 * (g / 4) & 3;
    const int third = byte(in_part) >> i / 32 & 1;
    return value(108, low + 16 * high - 32, two_bits(32) + 4 * third - 4);
  }
  if (dtype == DType::kQ6K) {
    const int pair = byte(64 * half + i % 64);
    const int low = part < 2 ? pair % 16 : pair / 16;
    const int high = two_bits(128);
    return value(208, static_cast<int8_t>(block[192 + i / 16]), low + 16 * high - 32);
  }
  const size_t g = i / 32, first = dtype == DType::kQ5K ? 48 : 16;
  const int pair = byte(first + 32 * (i / 64) + in_part);
  const int high = dtype == DType::kQ5K ? byte(16 + in_part) >> g & 1 : 0;
  const int code = (g % 2 == 0 ? pair % 16 : pair / 16) + 16 * high;
  int s = byte(4 + g % 4) % 64, t = byte(8 + g % 4) % 64;
  if (g >= 4) {
    s = byte(12 + g % 4) % 16 + byte(4 + g % 4) / 64 * 16;
    t = byte(12 + g % 4) / 16 + byte(8 + g % 4) / 64 * 16;
  }
  return value(0, s, code) - f16_to_f32(u16(block + 2)) * static_cast<float>(t);
}

// Element i of a row, by the description of the format.
float element(DType dtype, std::span<const std::byte> row, size_t i) {
  const std::byte* block = row.data() + i / static_cast<size_t>(block_elements(dtype)) *
                                            static_cast<size_t>(block_bytes(dtype));
  const size_t in_block = i % static_cast<size_t>(block_elements(dtype));
  const auto byte = [&](size_t at) { return std::to_integer<int>(block[at]); };
  const auto bit = [&](size_t at) { return byte(at / 8) >> at % 8 & 1; };
  const auto nibble = [&](size_t header) {
    const int byte = std::to_integer<int>(block[header + in_block % 16]);
    return static_cast<float>(in_block < 16 ? byte % 16 : byte / 16);
  };
  switch (dtype) {
    case DType::kF32:
      return std::bit_cast<float>(static_cast<uint32_t>(u16(block)) |
                                  static_cast<uint32_t>(u16(block + 2)) << 16);
    case DType::kF16:
      return f16_to_f32(u16(block));
    case DType::kBF16:
      return bf16_to_f32(u16(block));
    case DType::kQ4_0:
      return (nibble(2) - 8.0f) * f16_to_f32(u16(block));
    case DType::kQ4_1:
      return nibble(4) * f16_to_f32(u16(block)) + f16_to_f32(u16(block + 2));
    case DType::kQ5_0: {
      const auto high = static_cast<float>(16 * bit(8 * 2 + in_block));
      return (nibble(6) + high - 16.0f) * f16_to_f32(u16(block));
    }
    case DType::kQ5_1: {
      const auto high = static_cast<float>(16 * bit(8 * 4 + in_block));
      return (nibble(8) + high) * f16_to_f32(u16(block)) + f16_to_f32(u16(block + 2));
    }
    case DType::kQ8_0:
      return static_cast<float>(static_cast<int8_t>(block[2 + in_block])) * f16_to_f32(u16(block));
    default:
      return super_element(dtype, block, in_block);
  }
  throw Error("no such dtype");
}

TEST_CASE(rows_equal_the_description) {
  for (const DType dtype : kAll) {
    for (const int64_t n : {int64_t{0}, int64_t{block_elements(dtype)}, int64_t{768}}) {
      const std::vector<std::byte> row = random_row(dtype, n, 0x9E3779B97F4A7C15u);
      std::vector<float> got(static_cast<size_t>(n) + 1, -1.0f);
      dequantize_row(dtype, row.data(), got.data(), n);
      for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
        CHECK_EQ(std::bit_cast<uint32_t>(got[i]), std::bit_cast<uint32_t>(element(dtype, row, i)));
      }
      CHECK_EQ(got[static_cast<size_t>(n)], -1.0f);  // nothing past the end is written
    }
  }
}

TEST_CASE(rows_may_lie_at_any_address) {
  for (const DType dtype : kAll) {
    const std::vector<std::byte> row = random_row(dtype, 256, 7);
    std::vector<std::byte> shifted(row.size() + 1);
    std::memcpy(shifted.data() + 1, row.data(), row.size());
    std::array<float, 256> aligned;
    std::array<float, 256> unaligned;
    dequantize_row(dtype, row.data(), aligned.data(), 256);
    dequantize_row(dtype, shifted.data() + 1, unaligned.data(), 256);
    CHECK_EQ(std::memcmp(aligned.data(), unaligned.data(), sizeof(aligned)), 0);
  }
}

TEST_CASE(parts_make_up_the_row) {
  for (const DType dtype : kAll) {
    if (!is_quantized(dtype)) continue;
    const std::vector<std::byte> row = random_row(dtype, 512, 11);
    const CodeFormat format = code_format(dtype);
    const size_t group = static_cast<size_t>(format.group);
    std::array<int8_t, 512> codes;
    std::array<float, 512> values;
    std::vector<float> scales(512 / group), minimums(512 / group, 0.0f);
    unpack_row(dtype, row.data(), 512, codes.data(), scales.data(), minimums.data());
    dequantize_row(dtype, row.data(), values.data(), 512);
    for (size_t i = 0; i < 512; ++i) {
      CHECK(codes[i] >= format.lowest && codes[i] < format.lowest + (1 << format.bits));
      const float value = scales[i / group] * static_cast<float>(codes[i]) + minimums[i / group];
      CHECK_EQ(values[i], value);
    }
    CHECK_EQ(format.minimums, minimums[0] != 0.0f);
  }
  CHECK(!MESSAGE_OF(InvalidArgument, code_format(DType::kF16)).empty());
  CHECK(!MESSAGE_OF(InvalidArgument, unpack_row(DType::kF32, nullptr, 0, {}, {}, {})).empty());
}

TEST_CASE(scales_of_super_blocks) {
  for (const DType dtype : {DType::kQ2K, DType::kQ3K, DType::kQ4K, DType::kQ5K, DType::kQ6K}) {
    const std::vector<std::byte> row = random_row(dtype, kSuperBlock, 13);
    const CodeFormat format = code_format(dtype);
    const auto groups = static_cast<size_t>(kSuperBlock / format.group);
    std::array<int8_t, kSuperBlock> codes;
    std::array<float, 16> scales, minimums{};
    unpack_row(dtype, row.data(), kSuperBlock, codes.data(), scales.data(), minimums.data());
    const SuperScales parts = super_scales(dtype, row.data());
    for (size_t g = 0; g < groups; ++g) {
      CHECK_EQ(scales[g], f16_to_f32(parts.d) * static_cast<float>(parts.s[g]));
      CHECK_EQ(minimums[g], -f16_to_f32(parts.m) * static_cast<float>(parts.t[g]));
    }
  }
  CHECK(!MESSAGE_OF(InvalidArgument, super_scales(DType::kQ5_1, nullptr)).empty());
}

TEST_CASE(extreme_codes) {
  BlockQ8_0 q8{0x3c00, {}};  // d = 1
  q8.q[0] = -128;
  q8.q[31] = 127;
  BlockQ4_0 q4{0xc000, {}};  // d = -2
  q4.q[0] = 0xf0;
  std::array<float, kQuantBlock> row;
  dequantize_row(DType::kQ8_0, reinterpret_cast<const std::byte*>(&q8), row.data(), kQuantBlock);
  CHECK_EQ(row[0], -128.0f);
  CHECK_EQ(row[31], 127.0f);
  dequantize_row(DType::kQ4_0, reinterpret_cast<const std::byte*>(&q4), row.data(), kQuantBlock);
  CHECK_EQ(row[0], 16.0f);
  CHECK_EQ(row[16], -14.0f);
}

TEST_CASE(half_a_block_is_refused) {
  std::array<std::byte, 64> bytes{};
  std::array<float, 64> row{};
  CHECK(!MESSAGE_OF(InvalidArgument, dequantize_row(DType::kQ4_0, bytes.data(), row.data(), 16))
             .empty());
}

}  // namespace
}  // namespace rapshee

TEST_MAIN()
