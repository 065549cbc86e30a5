#include "quant/formats.h"

#include <array>
#include <cstring>

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

void unpack(const BlockQ2K& block, const Parts& to) {
  const float d = f16_to_f32(block.d), m = f16_to_f32(block.m);
  for (int g = 0; g < kSuperBlock / 16; ++g) {
    to.scales[g] = d * static_cast<float>(block.scales[g] & 0xf);
    to.minimums[g] = -m * static_cast<float>(block.scales[g] >> 4);
  }
  for (int i = 0; i < kSuperBlock; ++i) to.codes[i] = code(two_bits(block.q, i));
}

void unpack(const BlockQ3K& block, const Parts& to) {
  const float d = f16_to_f32(block.d);
  for (int g = 0; g < kSuperBlock / 16; ++g) {
    const int low = g < 8 ? block.scales[g] & 0xf : block.scales[g - 8] >> 4;
    const int high = block.scales[8 + g % 4] >> (2 * (g / 4)) & 3;
    to.scales[g] = d * static_cast<float>((low | high << 4) - 32);
  }
  for (int i = 0; i < kSuperBlock; ++i) {
    const int high = block.high[i % 32] >> (i / 32) & 1;
    to.codes[i] = code((two_bits(block.q, i) | high << 2) - 4);
  }
}

// Scales and minimums of BlockQ4K and BlockQ5K.
template <class Block>
void unpack_scales(const Block& block, const Parts& to) {
  const float d = f16_to_f32(block.d), m = f16_to_f32(block.m);
  const uint8_t* s = block.scales;
  for (int g = 0; g < kSuperBlock / 32; ++g) {
    const int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 0xf) | s[g - 4] >> 6 << 4;
    const int minimum = g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | s[g] >> 6 << 4;
    to.scales[g] = d * static_cast<float>(scale);
    to.minimums[g] = -m * static_cast<float>(minimum);
  }
}

// Nibble i of BlockQ4K and BlockQ5K.
int nibble(const uint8_t* q, int i) {
  const int pair = q[i / 64 * 32 + i % 32];
  return i % 64 < 32 ? pair & 0xf : pair >> 4;
}

void unpack(const BlockQ4K& block, const Parts& to) {
  unpack_scales(block, to);
  for (int i = 0; i < kSuperBlock; ++i) to.codes[i] = code(nibble(block.q, i));
}

void unpack(const BlockQ5K& block, const Parts& to) {
  unpack_scales(block, to);
  for (int i = 0; i < kSuperBlock; ++i) {
    const int high = block.high[i % 32] >> (i / 32) & 1;
    to.codes[i] = code(nibble(block.q, i) | high << 4);
  }
}

void unpack(const BlockQ6K& block, const Parts& to) {
  const float d = f16_to_f32(block.d);
  for (int g = 0; g < kSuperBlock / 16; ++g) {
    to.scales[g] = d * static_cast<float>(block.scales[g]);
  }
  for (int i = 0; i < kSuperBlock; ++i) {
    const int pair = block.q[i / 128 * 64 + i % 64];
    const int low = i % 128 < 64 ? pair & 0xf : pair >> 4;
    to.codes[i] = code((low | two_bits(block.high, i) << 4) - 32);
  }
}

template <class Block>
void unpack_bytes(const std::byte* src, const Parts& to) {
  Block block;  // copied, for `src` may lie at any address
  std::memcpy(&block, src, sizeof block);
  unpack(block, to);
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
