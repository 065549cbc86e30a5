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

constexpr DType kAll[] = {DType::kF32,  DType::kF16,  DType::kBF16,
                          DType::kQ4_0, DType::kQ4_1, DType::kQ8_0};

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
      row[at + 1] &= std::byte{0xbf};  // exponent below 16
      if (dtype == DType::kQ4_1) row[at + 3] &= std::byte{0xbf};
    }
  }
  return row;
}

uint16_t u16(const std::byte* at) {
  return static_cast<uint16_t>(std::to_integer<int>(at[0]) | std::to_integer<int>(at[1]) << 8);
}

// Element i of a row, by the description of the format.
float element(DType dtype, std::span<const std::byte> row, size_t i) {
  const std::byte* block = row.data() + i / static_cast<size_t>(block_elements(dtype)) *
                                            static_cast<size_t>(block_bytes(dtype));
  const size_t in_block = i % kQuantBlock;
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
    case DType::kQ8_0:
      return static_cast<float>(static_cast<int8_t>(block[2 + in_block])) * f16_to_f32(u16(block));
  }
  throw Error("no such dtype");
}

TEST_CASE(rows_equal_the_description) {
  for (const DType dtype : kAll) {
    for (const int64_t n : {int64_t{0}, int64_t{32}, int64_t{576}}) {
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
    const std::vector<std::byte> row = random_row(dtype, 64, 7);
    std::vector<std::byte> shifted(row.size() + 1);
    std::memcpy(shifted.data() + 1, row.data(), row.size());
    std::array<float, 64> aligned;
    std::array<float, 64> unaligned;
    dequantize_row(dtype, row.data(), aligned.data(), 64);
    dequantize_row(dtype, shifted.data() + 1, unaligned.data(), 64);
    CHECK_EQ(std::memcmp(aligned.data(), unaligned.data(), sizeof(aligned)), 0);
  }
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
