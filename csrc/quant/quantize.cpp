#include "quant/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "quant/formats.h"

namespace rapshee {
namespace {

uint16_t to_half(float x) {
  const uint16_t half = f32_to_f16(x);
  if ((half & 0x7c00u) == 0x7c00u) {
    throw WeightError(concat("a scale of ", x, " is beyond the range of f16"));
  }
  return half;
}

BlockQ8_0 quantize_q8(const float* x) {
  float most = 0.0f;
  for (int i = 0; i < kQuantBlock; ++i) most = std::max(most, std::fabs(x[i]));
  BlockQ8_0 block{to_half(most / 127.0f), {}};
  // By the scale as it is stored: its rounding may then cost no code more than half a step.
  const float d = f16_to_f32(block.d);
  for (int i = 0; i < kQuantBlock; ++i) {
    const float code = d > 0.0f ? std::nearbyint(x[i] / d) : 0.0f;
    block.q[i] = static_cast<int8_t>(std::clamp(code, -127.0f, 127.0f));
  }
  return block;
}

// Four numbers of a block, which every x86-64 processor takes at once.
using Vec [[gnu::vector_size(16)]] = float;
using Ints [[gnu::vector_size(16)]] = int32_t;

struct Numbers {
  static constexpr int kVecs = kQuantBlock / 4;
  Vec v[kVecs];
};

template <class F>
float sum_of(F term) {
  Vec sum{};
  for (int i = 0; i < Numbers::kVecs; ++i) sum += term(i);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// Codes 0 to 15 of a block, their scale and minimum, and the squared error that they make.
struct Fit {
  float d = 0.0f, m = 0.0f;  // as f16 holds them
  float error = std::numeric_limits<float>::infinity();
  Numbers codes{};
};

Fit fit_codes(const Numbers& x, float d, float m) {
  Fit fit;
  fit.d = f16_to_f32(to_half(d));
  fit.m = f16_to_f32(to_half(m));
  const float inverse = fit.d != 0.0f ? 1.0f / fit.d : 0.0f;
  const Vec least{}, most = least + 15.0f;
  for (int i = 0; i < Numbers::kVecs; ++i) {
    Vec code = (x.v[i] - fit.m) * inverse + 0.5f;
    code = code > least ? code : least;
    code = code < most ? code : most;
    fit.codes.v[i] = __builtin_convertvector(__builtin_convertvector(code, Ints), Vec);
  }
  fit.error = sum_of([&](int i) {
    const Vec off = fit.d * fit.codes.v[i] + fit.m - x.v[i];
    return off * off;
  });
  return fit;
}

// The scale and minimum of the least squares for the codes of `fit`, and the codes for these.
Fit refit(const Numbers& x, const Fit& fit) {
  constexpr float kCount = kQuantBlock;
  const Vec* q = fit.codes.v;
  const float sum_q = sum_of([&](int i) { return q[i]; });
  const float sum_qq = sum_of([&](int i) { return q[i] * q[i]; });
  const float sum_x = sum_of([&](int i) { return x.v[i]; });
  const float sum_qx = sum_of([&](int i) { return q[i] * x.v[i]; });
  const float det = kCount * sum_qq - sum_q * sum_q;
  if (det <= 0.0f) return fit;  // all codes are equal
  const float d = (kCount * sum_qx - sum_q * sum_x) / det;
  return fit_codes(x, d, (sum_x - d * sum_q) / kCount);
}

BlockQ4_1 quantize_q4(const float* from) {
  Numbers x;
  std::memcpy(&x, from, sizeof x);
  const auto [lowest, highest] = std::minmax_element(from, from + kQuantBlock);
  const float low = *lowest, range = *highest - low;
  Fit best;
  // Outliers may be worth less than a finer step for the rest: some of the range is cut off.
  for (const float cut : {0.0f, 0.04f, 0.08f, 0.12f}) {
    const Fit first = fit_codes(x, range * (1.0f - 2.0f * cut) / 15.0f, low + cut * range);
    const Fit second = refit(x, first);
    if (first.error < best.error) best = first;
    if (second.error < best.error) best = second;
  }
  float codes[kQuantBlock];
  std::memcpy(codes, &best.codes, sizeof codes);
  BlockQ4_1 block{f32_to_f16(best.d), f32_to_f16(best.m), {}};
  for (int i = 0; i < kQuantBlock / 2; ++i) {
    const int low_code = static_cast<int>(codes[i]);
    const int high_code = static_cast<int>(codes[i + kQuantBlock / 2]);
    block.q[i] = static_cast<uint8_t>(low_code | high_code << 4);
  }
  return block;
}

template <class Block>
void quantize_blocks(const float* src, std::byte* dst, int64_t n, Block (*quantize)(const float*)) {
  for (int64_t i = 0; i < n; i += kQuantBlock, dst += sizeof(Block)) {
    const Block block = quantize(src + i);
    std::memcpy(dst, &block, sizeof block);
  }
}

}  // namespace

void quantize_row(DType dtype, const float* src, std::byte* dst, int64_t n) {
  RAPSHEE_CHECK(dtype == DType::kQ8_0 || dtype == DType::kQ4_1, "dtype: got ", dtype_name(dtype),
                ", expected q8_0 or q4_1");
  row_bytes(dtype, n);  // checks n
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(src[i])) {
      throw WeightError(concat("the value ", src[i], " cannot be quantised"));
    }
  }
  if (dtype == DType::kQ8_0) return quantize_blocks(src, dst, n, quantize_q8);
  quantize_blocks(src, dst, n, quantize_q4);
}

}  // namespace rapshee
