#include "core/dtype.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "check.h"

namespace rapshee {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

uint32_t bits(float value) { return std::bit_cast<uint32_t>(value); }

// IEEE 754 binary16 by its definition.
float half_by_definition(uint16_t half) {
  const int exponent = (half >> 10) & 0x1f;
  const int fraction = half & 0x3ff;
  double value = 0.0;
  if (exponent == 31) {
    value = fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : kInf;
  } else if (exponent == 0) {
    value = std::ldexp(fraction, -24);
  } else {
    value = std::ldexp(1024 + fraction, exponent - 25);
  }
  return static_cast<float>(std::copysign(value, (half & 0x8000) != 0 ? -1.0 : 1.0));
}

// Checks To around the point halfway between each two neighbours of a 16-bit format whose finite
// magnitudes are [0, infinity_bits): ties go to the even one, anything else to the nearer one.
void check_rounding(uint16_t infinity_bits, float (*from)(uint16_t), uint16_t (*to)(float)) {
  for (uint32_t low = 0; low < infinity_bits; ++low) {
    const uint32_t high = low + 1;  // the next magnitude, or infinity
    const float below = from(static_cast<uint16_t>(low));
    const float step = below - (low > 0 ? from(static_cast<uint16_t>(low - 1)) : -from(1));
    const float above = high == infinity_bits ? below + step : from(static_cast<uint16_t>(high));
    const float middle = below + (above - below) / 2;
    for (const int sign : {0, 1}) {
      const float s = sign != 0 ? -1.0f : 1.0f;
      const uint32_t sign_bit = sign != 0 ? 0x8000u : 0u;
      CHECK_EQ(to(s * below), low | sign_bit);
      CHECK_EQ(to(s * middle), ((low & 1u) != 0 ? high : low) | sign_bit);
      CHECK_EQ(to(s * std::nextafter(middle, 0.0f)), low | sign_bit);
      CHECK_EQ(to(s * std::nextafter(middle, kInf)), high | sign_bit);
    }
  }
}

TEST_CASE(all_halves_widen_by_the_definition) {
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const float got = f16_to_f32(static_cast<uint16_t>(half));
    const float expected = half_by_definition(static_cast<uint16_t>(half));
    if (std::isnan(expected)) {
      CHECK(std::isnan(got));
      CHECK_EQ(std::signbit(got), (half & 0x8000u) != 0);
    } else {
      CHECK_EQ(bits(got), bits(expected));
    }
  }
}

TEST_CASE(all_halves_survive_a_round_trip) {
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const bool nan = (half & 0x7fffu) > 0x7c00u;
    CHECK_EQ(f32_to_f16(f16_to_f32(static_cast<uint16_t>(half))), nan ? half | 0x200u : half);
  }
}

TEST_CASE(halves_round_to_nearest_even) { check_rounding(0x7c00, f16_to_f32, f32_to_f16); }

TEST_CASE(halves_beyond_the_range) {
  CHECK_EQ(f32_to_f16(65519.996f), 0x7bffu);
  CHECK_EQ(f32_to_f16(65520.0f), 0x7c00u);
  CHECK_EQ(f32_to_f16(-1e30f), 0xfc00u);
  CHECK_EQ(f32_to_f16(kInf), 0x7c00u);
  CHECK_EQ(f32_to_f16(1e-30f), 0u);
  CHECK_EQ(f32_to_f16(-std::numeric_limits<float>::denorm_min()), 0x8000u);
}

TEST_CASE(all_bf16_survive_a_round_trip) {
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const float wide = bf16_to_f32(static_cast<uint16_t>(half));
    CHECK_EQ(bits(wide), half << 16);
    const bool nan = (half & 0x7fffu) > 0x7f80u;
    CHECK_EQ(f32_to_bf16(wide), nan ? half | 0x40u : half);
  }
}

TEST_CASE(bf16_rounds_to_nearest_even) {
  for (uint32_t half = 0; half < 0x10000; ++half) {
    if ((half & 0x7fffu) >= 0x7f80u) continue;  // infinities and NaNs have no neighbours
    const uint32_t exact = half << 16;
    CHECK_EQ(f32_to_bf16(std::bit_cast<float>(exact | 0x7fffu)), half);
    CHECK_EQ(f32_to_bf16(std::bit_cast<float>(exact | 0x8000u)), half + (half & 1u));
    CHECK_EQ(f32_to_bf16(std::bit_cast<float>(exact | 0x8001u)), half + 1);
  }
}

TEST_CASE(nan_stays_nan_even_if_its_payload_is_cut) {
  const float low_payload = std::bit_cast<float>(0x7f800001u);
  CHECK(std::isnan(bf16_to_f32(f32_to_bf16(low_payload))));
  CHECK(std::isnan(f16_to_f32(f32_to_f16(low_payload))));
  const float negative = std::bit_cast<float>(0xff800001u);
  CHECK(std::signbit(bf16_to_f32(f32_to_bf16(negative))));
  CHECK(std::signbit(f16_to_f32(f32_to_f16(negative))));
}

TEST_CASE(names_and_sizes) {
  for (int i = 0; i <= static_cast<int>(DType::kQ6K); ++i) {
    const auto dtype = static_cast<DType>(i);
    CHECK(parse_dtype(dtype_name(dtype)) == dtype);
  }
  CHECK_EQ(row_bytes(DType::kF32, 7), 28);
  CHECK_EQ(row_bytes(DType::kBF16, 7), 14);
  CHECK_EQ(row_bytes(DType::kQ4_0, 64), 36);
  CHECK_EQ(row_bytes(DType::kQ4_1, 64), 40);
  CHECK_EQ(row_bytes(DType::kQ8_0, 64), 68);
  CHECK_EQ(row_bytes(DType::kQ5_1, 64), 48);
  CHECK_EQ(row_bytes(DType::kQ6K, 512), 420);
  CHECK_EQ(row_bytes(DType::kQ8_0, 0), 0);
  CHECK(is_quantized(DType::kQ4_1) && !is_quantized(DType::kF16));
}

TEST_CASE(wrong_names_and_rows_are_refused) {
  CHECK(MESSAGE_OF(InvalidArgument, parse_dtype("q5_2")).find("q5_2") != std::string::npos);
  CHECK(MESSAGE_OF(InvalidArgument, row_bytes(DType::kQ4_0, 33)).find("33") != std::string::npos);
  CHECK(!MESSAGE_OF(InvalidArgument, row_bytes(DType::kF32, -1)).empty());
}

}  // namespace
}  // namespace rapshee

TEST_MAIN()
