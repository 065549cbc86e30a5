// 16-lane vectors on AVX-512 F, BW, DQ, VL with VNNI and BF16.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rapshee::cpu::avx512 {

using F16 = __m512;     // 16 floats
using I16 = __m512i;    // 16 int32
using Codes = __m512i;  // 64 bytes: 16 columns x 4 consecutive k
using Mask = __mmask16;

inline constexpr const char* kIsaName = "avx512";
// 8 rows: 8 integer and 8 float accumulators, weights, scales and minimums fit the 32 registers.
inline constexpr int kRowTile = 8;
// vpdpbusd takes weights as the unsigned operand, so signed codes are offset by 128.
inline constexpr int kSignedOffset = 128;
// Loops over arrays of vectors are unrolled, so that the arrays become registers.
inline constexpr int kUnroll = 8;

// Asks for the cache line at p, which need not be a valid address.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline F16 zero() { return _mm512_setzero_ps(); }
inline F16 set1(float x) { return _mm512_set1_ps(x); }
inline F16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F16 x) { _mm512_storeu_ps(p, x); }
inline F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
inline F16 sub(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
inline F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
inline F16 div(F16 a, F16 b) { return _mm512_div_ps(a, b); }
inline F16 max(F16 a, F16 b) { return _mm512_max_ps(a, b); }
inline F16 min(F16 a, F16 b) { return _mm512_min_ps(a, b); }
inline F16 abs(F16 a) { return _mm512_abs_ps(a); }
inline F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F16 round(F16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline I16 to_int(F16 a) { return _mm512_cvtps_epi32(a); }
inline F16 from_int(I16 a) { return _mm512_cvtepi32_ps(a); }
// a * 2^n for n that keep the exponent in range.
inline F16 ldexp(F16 a, I16 n) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(n, 23)));
}
inline Mask less(F16 a, F16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
// Lanes [begin, end) of the vector.
inline Mask lanes(int begin, int end) {
  const uint32_t upto = end >= 16 ? 0xffffu : (1u << end) - 1;
  return static_cast<Mask>(begin <= 0 ? upto : upto & ~((1u << begin) - 1));
}
inline F16 select(Mask m, F16 yes, F16 no) { return _mm512_mask_blend_ps(m, no, yes); }

inline float reduce_add(F16 x) {
  alignas(64) float v[16];
  _mm512_store_ps(v, x);
  for (int w = 8; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) v[i] += v[i + w];
  return v[0];
}
inline float reduce_max(F16 x) { return _mm512_reduce_max_ps(x); }
inline int reduce_add(I16 x) { return _mm512_reduce_add_epi32(x); }

inline F16 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F16 load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline void store_bf16(uint16_t* p, F16 x) {
  const __m256bh h = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &h, sizeof h);
}
inline void store_i8(int8_t* p, I16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x));
}
inline I16 load_i8(const std::byte* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline I16 izero() { return _mm512_setzero_si512(); }
inline I16 iset1(int32_t x) { return _mm512_set1_epi32(x); }
inline I16 iadd(I16 a, I16 b) { return _mm512_add_epi32(a, b); }

inline Codes load_codes(const std::byte* p) { return _mm512_loadu_si512(p); }
inline void store_codes(std::byte* p, Codes c) { _mm512_storeu_si512(p, c); }
// Bits of each byte: those from `from` on, as far as `mask` has them, moved to bit `to`.
inline Codes take_bits(Codes c, int from, int mask, int to) {
  const auto right = static_cast<unsigned>(from - to), left = static_cast<unsigned>(to - from);
  c = from >= to ? _mm512_srli_epi16(c, right) : _mm512_slli_epi16(c, left);
  return _mm512_and_si512(c, _mm512_set1_epi8(static_cast<char>(mask << to)));
}
inline Codes join(Codes a, Codes b) { return _mm512_or_si512(a, b); }
// Makes the compiler believe that c may have changed; for loops that only measure.
inline void forget(Codes& c) { asm volatile("" : "+v"(c)); }
// Signed codes as the operand of dot<true>.
inline Codes signed_operand(Codes c) { return _mm512_xor_si512(c, _mm512_set1_epi8(-128)); }

// Calls of dot<false> between dot_begin and dot_end, with codes up to `most`: sums have 32 bits.
constexpr int dots_held(int most) { return INT32_MAX / (4 * 127 * most); }
// dot_end(dot(... dot(dot_begin(start), w, x) ...), start) is start[c] + sum over all w and i of
// w[4 c + i] * x[i].
template <bool kSigned>
inline I16 dot_begin(I16 start) {
  return start;
}
template <bool kSigned>
inline I16 dot(I16 sum, Codes w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(four));
}
template <bool kSigned>
inline I16 dot_end(I16 sum, I16 /*start*/) {
  return sum;
}

// acc[c] += w[2 c] * x[0] + w[2 c + 1] * x[1], all bf16.
inline F16 dot_bf16(F16 acc, const uint16_t* w, const uint16_t* x) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(pair));
}

}  // namespace rapshee::cpu::avx512
