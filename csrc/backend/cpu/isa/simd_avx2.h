// 16-lane vectors on AVX2, FMA and F16C: two registers each.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rapshee::cpu::avx2 {

struct F16 {
  __m256 lo, hi;
};
struct I16 {
  __m256i lo, hi;
};
struct Codes {  // 64 bytes: 16 columns x 4 consecutive k
  __m256i lo, hi;
};
struct Mask {
  __m256 lo, hi;
};

inline constexpr const char* kIsaName = "avx2";
// 4 rows: 8 accumulators keep both multipliers busy, and leave registers for the operands.
inline constexpr int kRowTile = 4;
// vpmaddubsw on |code| and the activation with the code's sign needs no offset.
inline constexpr int kSignedOffset = 0;
// Loops over arrays of vectors are unrolled, so that the arrays become registers.
inline constexpr int kUnroll = 8;

// Asks for the cache line at p, which need not be a valid address.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
inline F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F16 abs(F16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F16 round(F16 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
inline I16 to_int(F16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline F16 from_int(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// a * 2^n for n that keep the exponent in range.
inline F16 ldexp(F16 a, I16 n) {
  const auto shift = [](__m256 x, __m256i e) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(e, 23)));
  };
  return {shift(a.lo, n.lo), shift(a.hi, n.hi)};
}
inline Mask less(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
// Lanes [begin, end) of the vector.
inline Mask lanes(int begin, int end) {
  const auto half = [=](__m256i index) {
    const __m256i from = _mm256_cmpgt_epi32(index, _mm256_set1_epi32(begin - 1));
    const __m256i upto = _mm256_cmpgt_epi32(_mm256_set1_epi32(end), index);
    return _mm256_castsi256_ps(_mm256_and_si256(from, upto));
  };
  return {half(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          half(_mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}
inline F16 select(Mask m, F16 yes, F16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}

inline float reduce_add(F16 x) {
  alignas(32) float v[8];
  _mm256_store_ps(v, _mm256_add_ps(x.lo, x.hi));
  for (int w = 4; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) v[i] += v[i + w];
  return v[0];
}
inline float reduce_max(F16 x) {
  alignas(32) float v[8];
  _mm256_store_ps(v, _mm256_max_ps(x.lo, x.hi));
  for (int w = 4; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) v[i] = v[i] > v[i + w] ? v[i] : v[i + w];
  return v[0];
}
inline int reduce_add(I16 x) {
  alignas(32) int v[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(v), _mm256_add_epi32(x.lo, x.hi));
  return v[0] + v[1] + v[2] + v[3] + v[4] + v[5] + v[6] + v[7];
}

inline F16 load_f16(const uint16_t* p) {
  const auto half = [](const uint16_t* q) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
  };
  return {half(p), half(p + 8)};
}
inline F16 load_bf16(const uint16_t* p) {
  const auto half = [](const uint16_t* q) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  };
  return {half(p), half(p + 8)};
}
// Round to nearest even; NaN keeps a quiet payload.
inline void store_bf16(uint16_t* p, F16 x) {
  const auto half = [](__m256 f) {
    const __m256i bits = _mm256_castps_si256(f);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256 nan = _mm256_cmp_ps(f, f, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
  };
  const __m256i packed = _mm256_packus_epi32(half(x.lo), half(x.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store_i8(int8_t* p, I16 x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.lo, x.hi), 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline I16 load_i8(const std::byte* p) {
  const auto half = [](const std::byte* q) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
  };
  return {half(p), half(p + 8)};
}

inline I16 izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I16 iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I16 iadd(I16 a, I16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}

inline Codes load_codes(const std::byte* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store_codes(std::byte* p, Codes c) {
  auto* q = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(q, c.lo);
  _mm256_storeu_si256(q + 1, c.hi);
}
// Bits of each byte: those from `from` on, as far as `mask` has them, moved to bit `to`.
inline Codes take_bits(Codes c, int from, int mask, int to) {
  const __m256i kept = _mm256_set1_epi8(static_cast<char>(mask << to));
  const auto half = [&](__m256i x) {
    x = from >= to ? _mm256_srli_epi16(x, from - to) : _mm256_slli_epi16(x, to - from);
    return _mm256_and_si256(x, kept);
  };
  return {half(c.lo), half(c.hi)};
}
inline Codes join(Codes a, Codes b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
// Makes the compiler believe that c may have changed; for loops that only measure.
inline void forget(Codes& c) { asm volatile("" : "+x"(c.lo), "+x"(c.hi)); }
// Signed codes as the operand of dot<true>.
inline Codes signed_operand(Codes c) { return c; }

// Sums of pairs of 16 bits as sums of fours.
inline I16 widen_pairs(I16 pairs) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(pairs.lo, ones), _mm256_madd_epi16(pairs.hi, ones)};
}
// Calls of dot<false> between dot_begin and dot_end, with codes up to `most`: vpmaddubsw yields
// pairs of 16 bits, which are summed as they are (activations stay within +-127).
constexpr int dots_held(int most) { return 32767 / (2 * 127 * most); }
// dot_end(dot(... dot(dot_begin(start), w, x) ...), start), with dots_held calls of dot at most, is
// start[c] + sum over all w and i of w[4 c + i] * x[i]. With signed codes a pair may reach 2 * 128
// * 127 = 32,512, so each is widened at once, and there may be any number of calls.
template <bool kSigned>
inline I16 dot_begin(I16 start) {
  return kSigned ? start : izero();
}
template <bool kSigned>
inline I16 dot(I16 sum, Codes w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  const __m256i row = _mm256_set1_epi32(four);
  if constexpr (kSigned) {
    const auto pairs = [&](__m256i codes) {
      return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(row, codes));
    };
    sum = iadd(sum, widen_pairs({pairs(w.lo), pairs(w.hi)}));
  } else {
    sum.lo = _mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(w.lo, row));
    sum.hi = _mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(w.hi, row));
  }
  // Without this, GCC forms all products of a group and adds them as a tree: too many registers.
  asm("" : "+x"(sum.lo), "+x"(sum.hi));
  return sum;
}
template <bool kSigned>
inline I16 dot_end(I16 sum, I16 start) {
  return kSigned ? sum : iadd(start, widen_pairs(sum));
}

// acc[c] += w[2 c] * x[0] + w[2 c + 1] * x[1], all bf16.
inline F16 dot_bf16(F16 acc, const uint16_t* w, const uint16_t* x) {
  const auto even = [](__m256i p) { return _mm256_castsi256_ps(_mm256_slli_epi32(p, 16)); };
  const auto odd = [](__m256i p) {
    return _mm256_castsi256_ps(_mm256_and_si256(p, _mm256_set1_epi32(int32_t(0xffff0000))));
  };
  int32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  const __m256i row = _mm256_set1_epi32(pair);
  const auto half = [&](__m256 a, const uint16_t* q) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    return _mm256_fmadd_ps(odd(pairs), odd(row), _mm256_fmadd_ps(even(pairs), even(row), a));
  };
  return {half(acc.lo, w), half(acc.hi, w + 16)};
}

}  // namespace rapshee::cpu::avx2
