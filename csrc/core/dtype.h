// Element types of tensors, their sizes, and scalar conversion of 16-bit floats.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "core/error.h"

namespace rapshee {

// kQ*: blocks of 32 elements, or of 256 (kQ*K), as in GGUF; see quant/formats.h. kI8: of KV caches
// alone, whose scales lie beside.
enum class DType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2K,
  kQ3K,
  kQ4K,
  kQ5K,
  kQ6K,
  kI8,
};

namespace detail {

struct DTypeInfo {
  std::string_view name;
  int block_elements;  // elements that are stored together
  int block_bytes;     // bytes that they take
};

inline constexpr DTypeInfo kDTypes[] = {
    {"f32", 1, 4},      {"f16", 1, 2},      {"bf16", 1, 2},     {"q4_0", 32, 18},
    {"q4_1", 32, 20},   {"q5_0", 32, 22},   {"q5_1", 32, 24},   {"q8_0", 32, 34},
    {"q2_k", 256, 84},  {"q3_k", 256, 110}, {"q4_k", 256, 144}, {"q5_k", 256, 176},
    {"q6_k", 256, 210}, {"i8", 1, 1},
};

constexpr const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<size_t>(dtype)]; }

}  // namespace detail

constexpr std::string_view dtype_name(DType dtype) { return detail::info(dtype).name; }
constexpr int block_elements(DType dtype) { return detail::info(dtype).block_elements; }
constexpr int block_bytes(DType dtype) { return detail::info(dtype).block_bytes; }
constexpr bool is_quantized(DType dtype) { return block_elements(dtype) > 1; }

// The dtype of a tensor. Throws InvalidArgument for a name that is none.
inline DType parse_dtype(std::string_view name) {
  std::string known;
  for (size_t i = 0; i < static_cast<size_t>(DType::kI8); ++i) {
    if (detail::kDTypes[i].name == name) return static_cast<DType>(i);
    known += (i ? ", " : "") + std::string(detail::kDTypes[i].name);
  }
  RAPSHEE_CHECK(false, "dtype: got '", name, "', expected one of ", known);
}

// Bytes of a row of `n` elements. Throws InvalidArgument unless n is a whole number of blocks.
inline int64_t row_bytes(DType dtype, int64_t n) {
  RAPSHEE_CHECK(n >= 0 && n % block_elements(dtype) == 0, "row of ", dtype_name(dtype), ": got ", n,
                " elements, expected a multiple of ", block_elements(dtype));
  return n / block_elements(dtype) * block_bytes(dtype);
}

constexpr float bf16_to_f32(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// To nearest, ties to even; overflow becomes infinity. A NaN stays a (quiet) NaN of its sign.
constexpr uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

constexpr float f16_to_f32(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24 is exact in f32
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  const uint32_t wide = exponent == 0x1fu ? 0xffu : exponent + (127 - 15);
  return std::bit_cast<float>(sign | (wide << 23) | (fraction << 13));
}

// To nearest, ties to even; overflow becomes infinity. A NaN stays a (quiet) NaN of its sign.
constexpr uint16_t f32_to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 2^16
  const uint32_t exponent = magnitude >> 23;
  // Units of the result per unit of the f32 significand: normals drop 13 bits; below 2^-14 each
  // power of two drops one more; below 2^-25 everything is dropped.
  const uint32_t drop = exponent >= 113 ? 13 : 126 - exponent;
  if (drop > 24) return static_cast<uint16_t>(sign);
  const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
  const uint32_t kept = significand >> drop;
  const uint32_t rest = significand & ((1u << drop) - 1);
  const uint32_t half = 1u << (drop - 1);
  const uint32_t rounded = kept + (rest > half || (rest == half && (kept & 1u)) ? 1 : 0);
  // `rounded` holds the implicit bit of normals, which counts as one exponent step; a carry out of
  // the fraction moves to the next exponent, and past the largest one to infinity.
  const uint32_t base = exponent >= 113 ? (exponent - 113) << 10 : 0;
  return static_cast<uint16_t>(sign | (base + rounded));
}

}  // namespace rapshee
