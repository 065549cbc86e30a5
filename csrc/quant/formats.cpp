#include "quant/formats.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <type_traits>

#include "core/error.h"

namespace rapshee {
namespace {

// Where the parts of one block go.
struct Parts {
  int8_t* codes;
  float* scales;
  float* minimums;
};

int8_t code(int x) { return static_cast<int8_t>(x); }

// Nibbles of a block of 32, less `zero`; bit i of `high` is worth 16.
void unpack_nibbles(const uint8_t* q, uint32_t high, int zero, int8_t* codes) {
  for (int i = 0; i < kQuantBlock; ++i) {
    const int nibble = i < kQuantBlock / 2 ? q[i] & 0xf : q[i - kQuantBlock / 2] >> 4;
    codes[i] = code((nibble | static_cast<int>(high >> i & 1) << 4) - zero);
  }
}

uint32_t high_bits(const uint8_t (&high)[kQuantBlock / 8]) {
  return high[0] | high[1] << 8 | high[2] << 16 | static_cast<uint32_t>(high[3]) << 24;
}

void unpack(const BlockQ4_0& block, const Parts& to) {
  *to.scales = f16_to_f32(block.d);
  unpack_nibbles(block.q, 0, 8, to.codes);
}

void unpack(const BlockQ4_1& block, const Parts& to) {
  *to.scales = f16_to_f32(block.d);
  *to.minimums = f16_to_f32(block.m);
  unpack_nibbles(block.q, 0, 0, to.codes);
}

void unpack(const BlockQ5_0& block, const Parts& to) {
  *to.scales = f16_to_f32(block.d);
  unpack_nibbles(block.q, high_bits(block.high), 16, to.codes);
}

void unpack(const BlockQ5_1& block, const Parts& to) {
  *to.scales = f16_to_f32(block.d);
  *to.minimums = f16_to_f32(block.m);
  unpack_nibbles(block.q, high_bits(block.high), 0, to.codes);
}

void unpack(const BlockQ8_0& block, const Parts& to) {
  *to.scales = f16_to_f32(block.d);
  std::memcpy(to.codes, block.q, sizeof block.q);
}

// Element i of the codes of 2 bits in BlockQ2K and BlockQ3K, and of the high bits in BlockQ6K.
int two_bits(const uint8_t* q, int i) { return q[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3; }

SuperScales scales_of(const BlockQ2K& block) {
  SuperScales scales{block.d, block.m, {}, {}};
  for (size_t g = 0; g < scales.s.size(); ++g) {
    scales.s[g] = code(block.scales[g] & 0xf);
    scales.t[g] = code(block.scales[g] >> 4);
  }
  return scales;
}

SuperScales scales_of(const BlockQ3K& block) {
  SuperScales scales{block.d, 0, {}, {}};
  for (size_t g = 0; g < scales.s.size(); ++g) {
    const int low = g < 8 ? block.scales[g] & 0xf : block.scales[g - 8] >> 4;
    const int high = block.scales[8 + g % 4] >> (2 * (g / 4)) & 3;
    scales.s[g] = code((low | high << 4) - 32);
  }
  return scales;
}

// Of BlockQ4K and BlockQ5K.
template <class Block>
SuperScales scales_of(const Block& block) {
  SuperScales scales{block.d, block.m, {}, {}};
  const uint8_t* from = block.scales;
  for (size_t g = 0; g < kSuperBlock / 32; ++g) {
    scales.s[g] = code(g < 4 ? from[g] & 63 : (from[g + 4] & 0xf) | from[g - 4] >> 6 << 4);
    scales.t[g] = code(g < 4 ? from[g + 4] & 63 : from[g + 4] >> 4 | from[g] >> 6 << 4);
  }
  return scales;
}

SuperScales scales_of(const BlockQ6K& block) {
  SuperScales scales{block.d, 0, {}, {}};
  std::copy(std::begin(block.scales), std::end(block.scales), scales.s.begin());
  return scales;
}

int code_of(const BlockQ2K& block, int i) { return two_bits(block.q, i); }

int code_of(const BlockQ3K& block, int i) {
  const int high = block.high[i % 32] >> (i / 32) & 1;
  return (two_bits(block.q, i) | high << 2) - 4;
}

// Nibble i of BlockQ4K and BlockQ5K.
int nibble(const uint8_t* q, int i) {
  const int pair = q[i / 64 * 32 + i % 32];
  return i % 64 < 32 ? pair & 0xf : pair >> 4;
}

int code_of(const BlockQ4K& block, int i) { return nibble(block.q, i); }

int code_of(const BlockQ5K& block, int i) {
  return nibble(block.q, i) | (block.high[i % 32] >> (i / 32) & 1) << 4;
}

int code_of(const BlockQ6K& block, int i) {
  const int pair = block.q[i / 128 * 64 + i % 64];
  return ((i % 128 < 64 ? pair & 0xf : pair >> 4) | two_bits(block.high, i) << 4) - 32;
}

// Any block of 256.
template <class Block>
void unpack(const Block& block, const Parts& to) {
  constexpr int kGroups = std::is_same_v<Block, BlockQ4K> || std::is_same_v<Block, BlockQ5K>
                              ? kSuperBlock / 32
                              : kSuperBlock / 16;
  const SuperScales scales = scales_of(block);
  const float d = f16_to_f32(scales.d), m = f16_to_f32(scales.m);
  for (size_t g = 0; g < kGroups; ++g) {
    to.scales[g] = d * static_cast<float>(scales.s[g]);
    if constexpr (requires { block.m; }) to.minimums[g] = -m * static_cast<float>(scales.t[g]);
  }
  for (int i = 0; i < kSuperBlock; ++i) to.codes[i] = code(code_of(block, i));
}

// A block is copied, for `src` may lie at any address.
template <class Block>
void unpack_bytes(const std::byte* src, const Parts& to) {
  Block block;
  std::memcpy(&block, src, sizeof block);
  unpack(block, to);
}

template <class Block>
SuperScales scales_at(const std::byte* src) {
  Block block;
  std::memcpy(&block, src, sizeof block);
  return scales_of(block);
}

struct LowBit {
  CodeFormat format;
  void (*unpack)(const std::byte* src, const Parts& to);  // one block
};

LowBit low_bit(DType dtype) {
  switch (dtype) {
    case DType::kQ4_0:
      return {{32, 4, -8, false}, unpack_bytes<BlockQ4_0>};
    case DType::kQ4_1:
      return {{32, 4, 0, true}, unpack_bytes<BlockQ4_1>};
    case DType::kQ5_0:
      return {{32, 5, -16, false}, unpack_bytes<BlockQ5_0>};
    case DType::kQ5_1:
      return {{32, 5, 0, true}, unpack_bytes<BlockQ5_1>};
    case DType::kQ8_0:
      return {{32, 8, -128, false}, unpack_bytes<BlockQ8_0>};
    case DType::kQ2K:
      return {{16, 2, 0, true}, unpack_bytes<BlockQ2K>};
    case DType::kQ3K:
      return {{16, 3, -4, false}, unpack_bytes<BlockQ3K>};
    case DType::kQ4K:
      return {{32, 4, 0, true}, unpack_bytes<BlockQ4K>};
    case DType::kQ5K:
      return {{32, 5, 0, true}, unpack_bytes<BlockQ5K>};
    case DType::kQ6K:
      return {{16, 6, -32, false}, unpack_bytes<BlockQ6K>};
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
    case DType::kI8:
      break;
  }
  RAPSHEE_CHECK(false, "dtype: got ", dtype_name(dtype), ", expected one of blocks");
}

void dequantize_blocks(DType dtype, const std::byte* src, float* dst, int64_t n) {
  const LowBit blocks = low_bit(dtype);
  const int elements = block_elements(dtype), group = blocks.format.group;
  std::array<int8_t, kSuperBlock> codes;
  std::array<float, kSuperBlock / 16> scales, minimums{};
  for (int64_t at = 0; at < n; at += elements, src += block_bytes(dtype)) {
    blocks.unpack(src, {codes.data(), scales.data(), minimums.data()});
    for (int i = 0; i < elements; ++i) {
      const auto g = static_cast<size_t>(i / group);
      const float product = scales[g] * static_cast<float>(codes[static_cast<size_t>(i)]);
      dst[at + i] = blocks.format.minimums ? product + minimums[g] : product;
    }
  }
}

template <float (*Convert)(uint16_t)>
void convert_halves(const std::byte* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, src + i * static_cast<int64_t>(sizeof(bits)), sizeof(bits));
    dst[i] = Convert(bits);
  }
}

}  // namespace

CodeFormat code_format(DType dtype) { return low_bit(dtype).format; }

SuperScales super_scales(DType dtype, const std::byte* block) {
  switch (dtype) {
    case DType::kQ2K:
      return scales_at<BlockQ2K>(block);
    case DType::kQ3K:
      return scales_at<BlockQ3K>(block);
    case DType::kQ4K:
      return scales_at<BlockQ4K>(block);
    case DType::kQ5K:
      return scales_at<BlockQ5K>(block);
    case DType::kQ6K:
      return scales_at<BlockQ6K>(block);
    default:
      RAPSHEE_CHECK(false, "dtype: got ", dtype_name(dtype), ", expected one of blocks of 256");
  }
}

void unpack_row(DType dtype, const std::byte* src, int64_t n, int8_t* codes, float* scales,
                float* minimums) {
  const LowBit blocks = low_bit(dtype);
  row_bytes(dtype, n);  // checks n
  const int elements = block_elements(dtype), groups = elements / blocks.format.group;
  Parts to{codes, scales, minimums};
  for (int64_t at = 0; at < n; at += elements, src += block_bytes(dtype)) {
    blocks.unpack(src, to);
    to.codes += elements;
    to.scales += groups;
    if (blocks.format.minimums) to.minimums += groups;
  }
}

void dequantize_row(DType dtype, const std::byte* src, float* dst, int64_t n) {
  const int64_t bytes = row_bytes(dtype, n);
  if (bytes == 0) return;
  switch (dtype) {
    case DType::kF32:
      std::memcpy(dst, src, static_cast<size_t>(bytes));
      return;
    case DType::kF16:
      return convert_halves<f16_to_f32>(src, dst, n);
    case DType::kBF16:
      return convert_halves<bf16_to_f32>(src, dst, n);
    default:
      return dequantize_blocks(dtype, src, dst, n);
  }
}

}  // namespace rapshee
