#include "quant/quantize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "quant/formats.h"

namespace rapshee {
namespace {

std::vector<float> round_trip(DType dtype, const std::vector<float>& x) {
  const auto n = static_cast<int64_t>(x.size());
  std::vector<std::byte> blocks(static_cast<size_t>(row_bytes(dtype, n)));
  std::vector<float> out(x.size());
  quantize_row(dtype, x.data(), blocks.data(), n);
  dequantize_row(dtype, blocks.data(), out.data(), n);
  return out;
}

// Uniform in [-1, 1), from xorshift64.
std::vector<float> random_floats(size_t n, uint64_t state) {
  std::vector<float> x(n);
  for (float& value : x) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    value = static_cast<float>(static_cast<int64_t>(state)) * 0x1p-63f;
  }
  return x;
}

double squared_error(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
  return sum;
}

TEST_CASE(values_are_within_half_a_step) {
  for (const float scale : {1.0f, 1e-3f, 1e4f}) {
    std::vector<float> x = random_floats(512, 3);
    for (float& value : x) value *= scale;
    const std::vector<float> q8 = round_trip(DType::kQ8_0, x);
    for (size_t i = 0; i < x.size(); ++i) {
      CHECK(std::fabs(q8[i] - x[i]) <= scale * (0.5f / 127.0f) * 1.3f);
    }
  }
}

// By range alone: the largest number gets the code 15, the smallest 0.
double error_by_range(const std::vector<float>& x) {
  double sum = 0;
  for (size_t at = 0; at < x.size(); at += kQuantBlock) {
    float low = x[at], high = x[at];
    for (size_t i = at; i < at + kQuantBlock; ++i) {
      low = std::min(low, x[i]);
      high = std::max(high, x[i]);
    }
    const float d = (high - low) / 15.0f;
    for (size_t i = at; i < at + kQuantBlock; ++i) {
      const double off = double{d} * std::round((x[i] - low) / d) + low - x[i];
      sum += off * off;
    }
  }
  return sum;
}

TEST_CASE(the_search_beats_the_range_alone) {
  std::vector<float> x = random_floats(4096, 5);
  // Nearly normal: the tails are worth cutting.
  const std::vector<float> more = random_floats(8192, 6);
  for (size_t i = 0; i < x.size(); ++i) x[i] += more[i] + more[4096 + i];
  CHECK(squared_error(round_trip(DType::kQ4_1, x), x) < 0.9 * error_by_range(x));
}

TEST_CASE(blocks_of_one_number_keep_it) {
  for (const DType dtype : {DType::kQ8_0, DType::kQ4_1}) {
    for (const float value : {0.0f, 0.25f, -3.0f, 1e-20f}) {
      const std::vector<float> got = round_trip(dtype, std::vector<float>(64, value));
      for (const float x : got) CHECK(std::fabs(x - value) <= std::fabs(value) * 1e-3f + 1e-7f);
    }
  }
}

TEST_CASE(what_was_quantised_stays_as_it_is) {
  const std::vector<float> once = round_trip(DType::kQ8_0, random_floats(256, 9));
  CHECK(once == round_trip(DType::kQ8_0, once));
}

TEST_CASE(what_cannot_be_quantised_is_refused) {
  std::array<float, 32> x{};
  std::array<std::byte, 34> blocks;
  const auto quantize = [&](DType dtype, int64_t n) {
    quantize_row(dtype, x.data(), blocks.data(), n);
  };
  CHECK(!MESSAGE_OF(InvalidArgument, quantize(DType::kQ6K, 32)).empty());
  CHECK(!MESSAGE_OF(InvalidArgument, quantize(DType::kQ8_0, 31)).empty());
  for (const float value :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e30f}) {
    x[7] = value;
    for (const DType dtype : {DType::kQ8_0, DType::kQ4_1}) {
      CHECK(!MESSAGE_OF(WeightError, quantize(dtype, 32)).empty());
    }
  }
}

}  // namespace
}  // namespace rapshee

TEST_MAIN()
