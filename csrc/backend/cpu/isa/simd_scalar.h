// 16-lane vectors in portable C++: the readable reference, and what other processors run.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace rapshee::cpu::scalar {

struct F16 {
  float v[16];
};
struct I16 {
  int32_t v[16];
};
struct Codes {  // 64 bytes: 16 columns x 4 consecutive k
  uint8_t v[64];
};
struct Mask {
  bool v[16];
};

inline constexpr const char* kIsaName = "scalar";
inline constexpr int kRowTile = 2;
inline constexpr int kSignedOffset = 0;
// Vectors live in memory anyway.
inline constexpr int kUnroll = 1;

template <class T, class F>
inline T each(F f) {
  T out;
  for (int i = 0; i < 16; ++i) out.v[i] = f(i);
  return out;
}

// Asks for the cache line at p, which need not be a valid address.
inline void prefetch(const void* p) { __builtin_prefetch(p); }

inline F16 zero() { return {}; }
inline F16 set1(float x) {
  return each<F16>([=](int) { return x; });
}
inline F16 load(const float* p) {
  F16 out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
inline void store(float* p, const F16& x) { std::memcpy(p, x.v, sizeof x.v); }
inline F16 add(const F16& a, const F16& b) {
  return each<F16>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F16 sub(const F16& a, const F16& b) {
  return each<F16>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F16 mul(const F16& a, const F16& b) {
  return each<F16>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F16 div(const F16& a, const F16& b) {
  return each<F16>([&](int i) { return a.v[i] / b.v[i]; });
}
inline F16 max(const F16& a, const F16& b) {
  return each<F16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F16 min(const F16& a, const F16& b) {
  return each<F16>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F16 abs(const F16& a) {
  return each<F16>([&](int i) { return std::fabs(a.v[i]); });
}
inline F16 fma(const F16& a, const F16& b, const F16& c) {
  return each<F16>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F16 round(const F16& a) {
  return each<F16>([&](int i) { return std::nearbyint(a.v[i]); });
}
// Lanes beyond int32 (NaN included) become its minimum, as the vector instructions have it.
inline I16 to_int(const F16& a) {
  return each<I16>([&](int i) {
    return a.v[i] > -2147483648.0f && a.v[i] < 2147483648.0f
               ? static_cast<int32_t>(std::lrint(a.v[i]))
               : INT32_MIN;
  });
}
inline F16 from_int(const I16& a) {
  return each<F16>([&](int i) { return static_cast<float>(a.v[i]); });
}
// a * 2^n for n that keep the exponent in range.
inline F16 ldexp(const F16& a, const I16& n) {
  return each<F16>([&](int i) {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], sizeof bits);
    bits += static_cast<uint32_t>(n.v[i]) << 23;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  });
}
inline Mask less(const F16& a, const F16& b) {
  return each<Mask>([&](int i) { return a.v[i] < b.v[i]; });
}
// Lanes [begin, end) of the vector.
inline Mask lanes(int begin, int end) {
  return each<Mask>([=](int i) { return i >= begin && i < end; });
}
inline F16 select(const Mask& m, const F16& yes, const F16& no) {
  return each<F16>([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; });
}

inline float reduce_add(F16 x) {
  for (int w = 8; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) x.v[i] += x.v[i + w];
  return x.v[0];
}
inline float reduce_max(const F16& x) {
  float m = x.v[0];
  for (int i = 1; i < 16; ++i) m = x.v[i] > m ? x.v[i] : m;
  return m;
}
inline int reduce_add(const I16& x) {
  int sum = 0;
  for (int i = 0; i < 16; ++i) sum += x.v[i];
  return sum;
}

inline F16 load_f16(const uint16_t* p) {
  return each<F16>([=](int i) { return f16_to_f32(p[i]); });
}
inline F16 load_bf16(const uint16_t* p) {
  return each<F16>([=](int i) { return bf16_to_f32(p[i]); });
}
inline void store_bf16(uint16_t* p, const F16& x) {
  for (int i = 0; i < 16; ++i) p[i] = f32_to_bf16(x.v[i]);
}
inline void store_i8(int8_t* p, const I16& x) {
  for (int i = 0; i < 16; ++i) {
    p[i] = static_cast<int8_t>(x.v[i] < -128 ? -128 : x.v[i] > 127 ? 127 : x.v[i]);
  }
}
inline I16 load_i8(const std::byte* p) {
  return each<I16>([=](int i) { return static_cast<int8_t>(p[i]); });
}

inline I16 izero() { return {}; }
inline I16 iset1(int32_t x) {
  return each<I16>([=](int) { return x; });
}
inline I16 iadd(const I16& a, const I16& b) {
  return each<I16>([&](int i) { return a.v[i] + b.v[i]; });
}

inline Codes load_codes(const std::byte* p) {
  Codes c;
  std::memcpy(c.v, p, sizeof c.v);
  return c;
}
inline void store_codes(std::byte* p, const Codes& c) { std::memcpy(p, c.v, sizeof c.v); }
// Bits of each byte: those from `from` on, as far as `mask` has them, moved to bit `to`.
inline Codes take_bits(Codes c, int from, int mask, int to) {
  for (uint8_t& b : c.v) b = static_cast<uint8_t>((b >> from & mask) << to);
  return c;
}
inline Codes join(Codes a, const Codes& b) {
  for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
  return a;
}
// Makes the compiler believe that c may have changed; for loops that only measure.
inline void forget(Codes& c) { asm volatile("" : "+m"(c)); }
// Signed codes as the operand of dot<true>.
inline Codes signed_operand(const Codes& c) { return c; }

// Calls of dot<false> between dot_begin and dot_end, with codes up to `most`: sums have 32 bits.
constexpr int dots_held(int most) { return INT32_MAX / (4 * 127 * most); }
// dot_end(dot(... dot(dot_begin(start), w, x) ...), start) is start[c] + sum over all w and i of
// w[4 c + i] * x[i].
template <bool kSigned>
inline I16 dot_begin(const I16& start) {
  return start;
}
template <bool kSigned>
inline I16 dot(const I16& sum, const Codes& w, const int8_t* x) {
  return each<I16>([&](int c) {
    int32_t out = sum.v[c];
    for (int i = 0; i < 4; ++i) {
      const int code = kSigned ? static_cast<int8_t>(w.v[4 * c + i]) : w.v[4 * c + i];
      out += code * x[i];
    }
    return out;
  });
}
template <bool kSigned>
inline I16 dot_end(const I16& sum, const I16& /*start*/) {
  return sum;
}

// acc[c] += w[2 c] * x[0] + w[2 c + 1] * x[1], all bf16.
[[gnu::always_inline]] inline F16 dot_bf16(const F16& acc, const uint16_t* w, const uint16_t* x) {
  const float x0 = bf16_to_f32(x[0]), x1 = bf16_to_f32(x[1]);
  return each<F16>([&](int c) {
    const float even = acc.v[c] + bf16_to_f32(w[2 * c]) * x0;
    return even + bf16_to_f32(w[2 * c + 1]) * x1;
  });
}

}  // namespace rapshee::cpu::scalar
