// Block layouts of GGUF (github.com/ggml-org/ggml, docs/gguf.md and ggml-common.h) and their
// scalar dequantisation, the reference for every repacked layout.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace rapshee {

inline constexpr int kQuantBlock = 32;  // elements of a block, neighbours along a row

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

// x[i] = d * q[i]
struct BlockQ8_0 {
  uint16_t d;  // f16
  int8_t q[kQuantBlock];
};

static_assert(sizeof(BlockQ4_0) == block_bytes(DType::kQ4_0));
static_assert(sizeof(BlockQ4_1) == block_bytes(DType::kQ4_1));
static_assert(sizeof(BlockQ8_0) == block_bytes(DType::kQ8_0));
static_assert(block_elements(DType::kQ4_0) == kQuantBlock);
static_assert(block_elements(DType::kQ4_1) == kQuantBlock);
static_assert(block_elements(DType::kQ8_0) == kQuantBlock);

// Converts a row of `n` elements, a whole number of blocks (else InvalidArgument), to f32.
// Reads row_bytes(dtype, n) bytes of `src`, at any alignment; writes dst[0, n).
// f32, f16 and bf16 are exact; blocks round once a product and once a sum.
void dequantize_row(DType dtype, const std::byte* src, float* dst, int64_t n);

}  // namespace rapshee
