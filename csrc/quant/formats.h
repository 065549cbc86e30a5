// Block layouts of GGUF (github.com/ggml-org/ggml, docs/gguf.md and ggml-common.h) and their
// scalar dequantisation, the reference for every repacked layout.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace rapshee {

inline constexpr int kQuantBlock = 32;   // elements of a block, neighbours along a row
inline constexpr int kSuperBlock = 256;  // of a block of groups, whose scales are integers

// x[i] = d * (q[i] - 8). Nibble i of the low halves is element i, of the high halves i + 16.
struct BlockQ4_0 {
  uint16_t d;  // f16
  uint8_t q[kQuantBlock / 2];
};

// x[i] = d * q[i] + m. Nibbles as in BlockQ4_0.
struct BlockQ4_1 {
  uint16_t d;  // f16
  uint16_t m;  // f16
  uint8_t q[kQuantBlock / 2];
};

// x[i] = d * (q[i] - 16). Nibbles as in BlockQ4_0; bit i of `high`, little-endian, is the fifth bit
// of element i.
struct BlockQ5_0 {
  uint16_t d;  // f16
  uint8_t high[kQuantBlock / 8];
  uint8_t q[kQuantBlock / 2];
};

// x[i] = d * q[i] + m. Codes as in BlockQ5_0.
struct BlockQ5_1 {
  uint16_t d;  // f16
  uint16_t m;  // f16
  uint8_t high[kQuantBlock / 8];
  uint8_t q[kQuantBlock / 2];
};

// x[i] = d * q[i]
struct BlockQ8_0 {
  uint16_t d;  // f16
  int8_t q[kQuantBlock];
};

// x[i] = d * s * q[i] - m * t, where byte i / 16 of `scales` is s + 16 t. Codes of 2 bits: element
// i is in byte 32 * (i / 128) + i % 32 at bit 2 * (i / 32 % 4).
struct BlockQ2K {
  uint8_t scales[kSuperBlock / 16];
  uint8_t q[kSuperBlock / 4];
  uint16_t d;  // f16
  uint16_t m;  // f16
};

// x[i] = d * (s - 32) * (q[i] - 4). The low 2 bits of codes as in BlockQ2K; the third of element i
// is bit i / 32 of byte i % 32 of `high`. s of group g = i / 16 has 6 bits: low nibbles of groups
// 0-7, then 8-15 in the two halves of bytes 0-7; the high bits in byte 8 + g % 4 at bit 2 * (g /
// 4).
struct BlockQ3K {
  uint8_t high[kSuperBlock / 8];
  uint8_t q[kSuperBlock / 4];
  uint8_t scales[12];
  uint16_t d;  // f16
};

// x[i] = d * s * q[i] - m * t. Nibbles: element i is in byte 32 * (i / 64) + i % 32, in the high
// half where i % 64 >= 32. s and t have 6 bits, each for a group of 32: of groups 0-3 in the low
// bits of bytes 0-3 (s) and 4-7 (t); of group 4 + g nibbles in byte 8 + g (s low, t high) and their
// high 2 bits in the top of bytes g and 4 + g.
struct BlockQ4K {
  uint16_t d;  // f16
  uint16_t m;  // f16
  uint8_t scales[12];
  uint8_t q[kSuperBlock / 2];
};

// The same with a fifth bit of the code of element i: bit i / 32 of byte i % 32 of `high`.
struct BlockQ5K {
  uint16_t d;  // f16
  uint16_t m;  // f16
  uint8_t scales[12];
  uint8_t high[kSuperBlock / 8];
  uint8_t q[kSuperBlock / 2];
};

// x[i] = d * scales[i / 16] * (q[i] - 32). Nibbles: element i is in byte 64 * (i / 128) + i % 64,
// in the high half where i % 128 >= 64; the high 2 bits of its code in byte 32 * (i / 128) + i % 32
// of `high` at bit 2 * (i / 32 % 4).
struct BlockQ6K {
  uint8_t q[kSuperBlock / 2];
  uint8_t high[kSuperBlock / 4];
  int8_t scales[kSuperBlock / 16];
  uint16_t d;  // f16
};

static_assert(sizeof(BlockQ4_0) == block_bytes(DType::kQ4_0));
static_assert(sizeof(BlockQ4_1) == block_bytes(DType::kQ4_1));
static_assert(sizeof(BlockQ5_0) == block_bytes(DType::kQ5_0));
static_assert(sizeof(BlockQ5_1) == block_bytes(DType::kQ5_1));
static_assert(sizeof(BlockQ8_0) == block_bytes(DType::kQ8_0));
static_assert(sizeof(BlockQ2K) == block_bytes(DType::kQ2K));
static_assert(sizeof(BlockQ3K) == block_bytes(DType::kQ3K));
static_assert(sizeof(BlockQ4K) == block_bytes(DType::kQ4K));
static_assert(sizeof(BlockQ5K) == block_bytes(DType::kQ5K));
static_assert(sizeof(BlockQ6K) == block_bytes(DType::kQ6K));
static_assert(block_elements(DType::kQ8_0) == kQuantBlock);
static_assert(block_elements(DType::kQ6K) == kSuperBlock);

// What the blocks of a low-bit dtype hold, whatever their layout: x[i] = scale * code[i] + minimum,
// where each `group` neighbours share a scale (and a minimum).
struct CodeFormat {
  int group;      // 16 or 32
  int bits;       // of a code
  int lowest;     // code; the highest is lowest + 2^bits - 1
  bool minimums;  // else they are 0
};

// Throws InvalidArgument unless is_quantized(dtype).
CodeFormat code_format(DType dtype);

// The scales of a block of 256: those of group g are scale = d * s[g], minimum = -m * t[g].
struct SuperScales {
  uint16_t d, m;  // f16; m is 0 where the format has no minimums
  std::array<int8_t, kSuperBlock / 16> s, t;
};

// Throws InvalidArgument unless block_elements(dtype) is 256. `block`: at any alignment.
SuperScales super_scales(DType dtype, const std::byte* block);

// Takes a row of `n` elements apart: codes[0, n), scales[0, n / group), and minimums of as many
// groups where the format has them; else they are not touched. All are exact. `src` and `n` as
// below. Throws InvalidArgument unless is_quantized(dtype).
void unpack_row(DType dtype, const std::byte* src, int64_t n, int8_t* codes, float* scales,
                float* minimums);

// Converts a row of `n` elements, a whole number of blocks (else InvalidArgument), to f32.
// Reads row_bytes(dtype, n) bytes of `src`, at any alignment; writes dst[0, n).
// f32, f16 and bf16 are exact; blocks round once a product and once a sum.
void dequantize_row(DType dtype, const std::byte* src, float* dst, int64_t n);

}  // namespace rapshee
