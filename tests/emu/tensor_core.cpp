#include "emu/tensor_core.h"

#include <xmmintrin.h>

#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>

namespace rapshee::cuda::emu {
namespace {

constexpr int kRows = 16, kColumns = 8, kDepth = 16;

struct Tiles {
  alignas(64) float a[kRows][kDepth];
  alignas(64) float b[kDepth][kColumns];
  alignas(64) float d[kRows][kColumns];
};

struct WidenBf16 {
  static float of(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
};

struct WidenF16 {
  static float of(uint32_t bits) {
    // As float bits the value lies 112 powers of two too low, subnormals included; infinities and
    // NaNs are those whose exponent then is that of 2^16 or more.
    const uint32_t magnitude =
        std::bit_cast<uint32_t>(std::bit_cast<float>((bits & 0x7fffu) << 13) * 0x1p112f);
    const uint32_t special = magnitude >= 0x47800000u ? 0x7f800000u : 0;
    return std::bit_cast<float>(magnitude | special | (bits & 0x8000u) << 16);
  }
};

template <class Widen>
void unpack(void* const* operands, Tiles& tiles) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operand = *static_cast<const MmaOperand*>(operands[lane]);
    const int row = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* const to = tiles.a[row + i % 2 * 8] + pair + i / 2 * 8;
      to[0] = Widen::of(operand.a[i] & 0xffffu);
      to[1] = Widen::of(operand.a[i] >> 16);
      tiles.d[row + i / 2 * 8][pair + i % 2] = operand.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      tiles.b[pair + i * 8][row] = Widen::of(operand.b[i] & 0xffffu);
      tiles.b[pair + i * 8 + 1][row] = Widen::of(operand.b[i] >> 16);
    }
  }
}

// A function of its own, as the caller changes how additions round.
[[gnu::noinline]] void multiply(Tiles& tiles) {
  for (int row = 0; row < kRows; ++row) {
    alignas(64) float sums[kDepth][kColumns];
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < kColumns; ++n) sums[k][n] = tiles.a[row][k] * tiles.b[k][n];
    }
    for (int half = kDepth / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) {
        for (int n = 0; n < kColumns; ++n) sums[k][n] += sums[k + half][n];
      }
    }
    for (int n = 0; n < kColumns; ++n) tiles.d[row][n] += sums[0][n];
  }
}

template <class Widen>
void mma(void* const* operands) {
  Tiles tiles;
  unpack<Widen>(operands, tiles);
  const unsigned rounding = _MM_GET_ROUNDING_MODE();
  _MM_SET_ROUNDING_MODE(_MM_ROUND_TOWARD_ZERO);
  multiply(tiles);
  _MM_SET_ROUNDING_MODE(rounding);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operand = *static_cast<const MmaOperand*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      float value = tiles.d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      // Truncation stops at the largest float where the device overflows.
      if (std::fabs(value) == FLT_MAX) {
        value = std::copysign(std::numeric_limits<float>::infinity(), value);
      }
      operand.d[i] = value;
    }
  }
}

}  // namespace

void mma_bf16(void* const* operands) { mma<WidenBf16>(operands); }
void mma_f16(void* const* operands) { mma<WidenF16>(operands); }

}  // namespace rapshee::cuda::emu
