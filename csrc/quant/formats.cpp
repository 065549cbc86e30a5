#include "quant/formats.h"

#include <cstring>

#include "core/error.h"

namespace rapshee {
namespace {

void dequantize(const BlockQ4_0& block, float* dst) {
  const float d = f16_to_f32(block.d);
  for (int i = 0; i < kQuantBlock / 2; ++i) {
    dst[i] = d * static_cast<float>((block.q[i] & 0xf) - 8);
    dst[i + kQuantBlock / 2] = d * static_cast<float>((block.q[i] >> 4) - 8);
  }
}

void dequantize(const BlockQ4_1& block, float* dst) {
  const float d = f16_to_f32(block.d);
  const float m = f16_to_f32(block.m);
  for (int i = 0; i < kQuantBlock / 2; ++i) {
    dst[i] = d * static_cast<float>(block.q[i] & 0xf) + m;
    dst[i + kQuantBlock / 2] = d * static_cast<float>(block.q[i] >> 4) + m;
  }
}

void dequantize(const BlockQ8_0& block, float* dst) {
  const float d = f16_to_f32(block.d);
  for (int i = 0; i < kQuantBlock; ++i) dst[i] = d * static_cast<float>(block.q[i]);
}

template <class Block>
void dequantize_blocks(const std::byte* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; i += kQuantBlock, src += sizeof(Block)) {
    Block block;  // copied, for `src` may lie at any address
    std::memcpy(&block, src, sizeof(block));
    dequantize(block, dst + i);
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
    case DType::kQ4_0:
      return dequantize_blocks<BlockQ4_0>(src, dst, n);
    case DType::kQ4_1:
      return dequantize_blocks<BlockQ4_1>(src, dst, n);
    case DType::kQ8_0:
      return dequantize_blocks<BlockQ8_0>(src, dst, n);
  }
  RAPSHEE_CHECK(false, "dtype: got ", static_cast<int>(dtype), ", which is none");
}

}  // namespace rapshee
