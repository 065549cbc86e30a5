// The device for kernels that are compiled for the host: included by kernels/device.cuh, whose
// other half says what each name means.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numbers>
#include <type_traits>

#include "backend/cuda/kernels/device.cuh"
#include "core/dtype.h"
#include "emu/block.h"
#include "emu/pointer.h"
#include "emu/runtime.h"
#include "emu/tensor_core.h"

struct CUstream_st;

#define RAPSHEE_KERNEL(max_threads, min_blocks) void
#define RAPSHEE_PARAM const
#define RAPSHEE_DEVICE inline

namespace rapshee::cuda::dev {

using emu::Site;

// ------------------------------------------------------------------------------------- memory
template <class T>
using Ptr = emu::Pointer<T, emu::Global>;
template <class T>
using SharedPtr = emu::Pointer<T, emu::Shared>;

template <class To, class From, class Memory>
emu::Pointer<To, Memory> cast(const emu::Pointer<From, Memory>& p) {
  static_assert(std::is_const_v<To> || !std::is_const_v<From>, "the cast drops const");
  return {p.address(), p.memory()};
}

template <class T>
SharedPtr<T> shared(size_t byte_offset = 0) {
  return {emu::context.shared_begin + byte_offset, emu::Shared()};
}

template <class T, class Memory>
Vec16 load16(const emu::Pointer<T, Memory>& p) {
  return emu::load_vector<Vec16>(p);
}
template <class T, class Memory>
void store16(const emu::Pointer<T, Memory>& p, const Vec16& v) {
  emu::store_vector(p, v);
}
template <class T, class Memory>
Vec8 load8(const emu::Pointer<T, Memory>& p) {
  return emu::load_vector<Vec8>(p);
}
template <class T, class Memory>
void store8(const emu::Pointer<T, Memory>& p, const Vec8& v) {
  emu::store_vector(p, v);
}
template <class T>
Vec16 load16_stream(const Ptr<T>& p) {
  emu::check_global(p.memory().region(), p.address(), sizeof(Vec16), sizeof(Vec16),
                    emu::Before::kAllowed);
  Vec16 v;
  std::memcpy(&v, reinterpret_cast<const void*>(p.address()), sizeof v);
  return v;
}
// &p[i]: a plain pointer, into shared or global memory.
template <class T>
Vec16 load16(T* p) {
  return emu::is_shared(p) ? load16(SharedPtr<T>(p)) : load16(Ptr<T>(p));
}
template <class T>
void store16(T* p, const Vec16& v) {
  emu::is_shared(p) ? store16(SharedPtr<T>(p), v) : store16(Ptr<T>(p), v);
}
template <class T>
Vec8 load8(T* p) {
  return emu::is_shared(p) ? load8(SharedPtr<T>(p)) : load8(Ptr<T>(p));
}
template <class T>
void store8(T* p, const Vec8& v) {
  emu::is_shared(p) ? store8(SharedPtr<T>(p), v) : store8(Ptr<T>(p), v);
}
template <class T>
Vec16 load16_stream(T* p) {
  return load16_stream(Ptr<T>(p));
}

// ---------------------------------------------------------------------------- asynchronous copy
template <class T, class U>
void cp_async16(const SharedPtr<T>& dst, const Ptr<U>& src, bool valid = true) {
  static_assert(std::is_same_v<T, std::remove_const_t<U>>);
  if (valid) src.memory().read(src.address(), emu::kAsyncBytes, emu::kAsyncBytes);
  emu::begin_copy(dst.address(), valid ? src.address() : 0);
}
template <class T, class U>
void cp_async16_stream(const SharedPtr<T>& dst, const Ptr<U>& src, bool valid = true) {
  static_assert(std::is_same_v<T, std::remove_const_t<U>>);
  if (valid) {
    emu::check_global(src.memory().region(), src.address(), emu::kAsyncBytes, emu::kAsyncBytes,
                      emu::Before::kAllowed);
  }
  emu::begin_copy(dst.address(), valid ? src.address() : 0);
}
inline void cp_async_commit() { emu::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  static_assert(kPending >= 0);
  emu::land_copies(kPending);
}

// ------------------------------------------------------------------------------ threads, blocks
inline int thread() { return emu::context.thread->index; }
inline int num_threads() { return emu::context.num_threads; }
inline int lane() { return thread() % emu::kWarpSize; }
inline int warp() { return thread() / emu::kWarpSize; }
inline Grid block() { return {emu::context.block.x, emu::context.block.y, emu::context.block.z}; }
inline Grid grid() { return {emu::context.grid.x, emu::context.grid.y, emu::context.grid.z}; }

inline void sync(const Site& site = Site::current()) { emu::sync_block("sync", false, site); }
inline bool sync_or(bool predicate, const Site& site = Site::current()) {
  return emu::sync_block("sync_or", predicate, site);
}
inline void sync_warp(const Site& site = Site::current()) { emu::sync_warp(site); }
inline void fence() {}

namespace detail {

struct Shuffle {
  uint64_t value;
  int from;  // lane
  uint64_t result;
};

inline void exchange(void* const* operands) {
  for (int lane = 0; lane < emu::kWarpSize; ++lane) {
    auto& mine = *static_cast<Shuffle*>(operands[lane]);
    mine.result = static_cast<const Shuffle*>(operands[mine.from])->value;
  }
}

template <class T>
T shuffle(const char* operation, T v, int from, const Site& site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  Shuffle operand{0, from & (emu::kWarpSize - 1), 0};
  std::memcpy(&operand.value, &v, sizeof(T));
  emu::meet_warp(operation, &operand, exchange, site);
  T result;
  std::memcpy(&result, &operand.result, sizeof(T));
  return result;
}

}  // namespace detail

template <class T>
T shfl(T v, int from_lane, const Site& site = Site::current()) {
  return detail::shuffle("shfl", v, from_lane, site);
}
template <class T>
T shfl_xor(T v, int mask, const Site& site = Site::current()) {
  return detail::shuffle("shfl_xor", v, lane() ^ mask, site);
}
template <class T>
T shfl_up(T v, int delta, const Site& site = Site::current()) {
  return detail::shuffle("shfl_up", v, lane() < delta ? lane() : lane() - delta, site);
}
inline uint32_t ballot(bool predicate, const Site& site = Site::current()) {
  struct Vote {
    bool predicate;
    uint32_t result;
  } vote{predicate, 0};
  emu::meet_warp(
      "ballot", &vote,
      [](void* const* operands) {
        uint32_t votes = 0;
        for (int i = 0; i < emu::kWarpSize; ++i) {
          votes |= static_cast<uint32_t>(static_cast<const Vote*>(operands[i])->predicate) << i;
        }
        for (int i = 0; i < emu::kWarpSize; ++i) static_cast<Vote*>(operands[i])->result = votes;
      },
      site);
  return vote.result;
}

template <class T, class Memory>
T atomic_add(const emu::Pointer<T, Memory>& p, std::type_identity_t<T> v) {
  static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);
  return emu::update(p, [v](T before) { return before + v; });
}
template <class T, class Memory>
T atomic_max(const emu::Pointer<T, Memory>& p, std::type_identity_t<T> v) {
  static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);
  return emu::update(p, [v](T before) { return std::max(before, v); });
}
template <class Memory>
uint32_t atomic_min(const emu::Pointer<uint32_t, Memory>& p, uint32_t v) {
  return emu::update(p, [v](uint32_t before) { return std::min(before, v); });
}
template <class T>
T atomic_add(T* p, std::type_identity_t<T> v) {
  return emu::is_shared(p) ? atomic_add(SharedPtr<T>(p), v) : atomic_add(Ptr<T>(p), v);
}
template <class T>
T atomic_max(T* p, std::type_identity_t<T> v) {
  return emu::is_shared(p) ? atomic_max(SharedPtr<T>(p), v) : atomic_max(Ptr<T>(p), v);
}
inline uint32_t atomic_min(uint32_t* p, uint32_t v) {
  return emu::is_shared(p) ? atomic_min(SharedPtr<uint32_t>(p), v)
                           : atomic_min(Ptr<uint32_t>(p), v);
}

// ---------------------------------------------------------------- programmatic dependent launch
inline void pdl_wait() { emu::context.thread->pdl_waited = emu::context.pdl_waited = true; }
inline void pdl_trigger() {}

// --------------------------------------------------------------------------------- conversions
inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_to_bits(float v) { return std::bit_cast<uint32_t>(v); }
inline float to_float(Bf16 v) { return bf16_to_f32(v.bits); }
inline float to_float(F16 v) { return f16_to_f32(v.bits); }
template <class T>
T from_float(float v);
template <>
inline Bf16 from_float<Bf16>(float v) {
  return {v != v ? uint16_t{0x7fff} : f32_to_bf16(v)};  // the device has one NaN
}
template <>
inline F16 from_float<F16>(float v) {
  return {v != v ? uint16_t{0x7fff} : f32_to_f16(v)};
}
template <class T>
uint32_t pack2(float x, float y) {
  return from_float<T>(x).bits | static_cast<uint32_t>(from_float<T>(y).bits) << 16;
}
template <class T>
Float2 unpack2(uint32_t word) {
  return {to_float(T{static_cast<uint16_t>(word & 0xffffu)}),
          to_float(T{static_cast<uint16_t>(word >> 16)})};
}
// In float a difference of halves is exact, or so much wider that rounding twice changes nothing.
template <class T>
uint32_t sub2(uint32_t a, uint32_t b) {
  const Float2 x = unpack2<T>(a), y = unpack2<T>(b);
  return pack2<T>(x.x - y.x, x.y - y.y);
}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = selector >> (4 * i) & 7u;
    result |= static_cast<uint32_t>(bytes >> (8 * from) & 0xffu) << (8 * i);
  }
  return result;
}

// ------------------------------------------------------------------------------------- numbers
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float exp2(float x) {
  const auto flushed = [](float v) { return std::fpclassify(v) == FP_SUBNORMAL ? 0.0f : v; };
  return flushed(std::exp2(flushed(x)));
}
inline float sqrt(float x) { return std::sqrt(x); }
inline float divide(float a, float b) { return a / b; }
inline float tanh(float x) { return std::tanh(x); }
inline double log(double x) { return std::log(x); }
inline double exp(double x) { return std::exp(x); }
inline float rint(float x) { return std::rint(x); }
inline double rint(double x) { return std::rint(x); }
inline void sincospi(float x, float* sin, float* cos) {
  // A quarter turn at a time: exact at multiples of one half.
  const double turns = std::remainder(static_cast<double>(x), 2.0);
  const double quarter = std::rint(2.0 * turns);
  const double angle = std::numbers::pi * (turns - 0.5 * quarter);
  const auto s = static_cast<float>(std::sin(angle)), c = static_cast<float>(std::cos(angle));
  switch (static_cast<int>(quarter) & 3) {
    case 0:
      *sin = s, *cos = c;
      break;
    case 1:
      *sin = c, *cos = -s;
      break;
    case 2:
      *sin = -s, *cos = -c;
      break;
    default:
      *sin = -c, *cos = s;
      break;
  }
}
inline uint32_t mul_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
inline uint64_t mul_high(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>(static_cast<Wide>(a) * b >> 64);
}
inline int count_leading_zeros(uint32_t v) { return std::countl_zero(v); }
inline int count_bits(uint32_t v) { return std::popcount(v); }

// ------------------------------------------------------------------------------- tensor cores
namespace detail {

constexpr int kMatrixRows = 8;

struct MatrixRow {
  uint16_t elements[kMatrixRows];
  uint32_t* result;
};

template <int kMatrices, bool kTransposed>
void distribute(void* const* operands) {
  const auto element = [&](int matrix, int row, int column) -> uint32_t {
    return static_cast<const MatrixRow*>(operands[kMatrixRows * matrix + row])->elements[column];
  };
  for (int lane = 0; lane < emu::kWarpSize; ++lane) {
    uint32_t* const result = static_cast<const MatrixRow*>(operands[lane])->result;
    const int fixed = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < kMatrices; ++i) {
      result[i] = kTransposed ? element(i, pair, fixed) | element(i, pair + 1, fixed) << 16
                              : element(i, fixed, pair) | element(i, fixed, pair + 1) << 16;
    }
  }
}

template <int kMatrices, bool kTransposed, class T>
void load_matrices(const char* operation, uint32_t (&r)[kMatrices], const SharedPtr<T>& row,
                   const Site& site) {
  static_assert(sizeof(T) <= 4);
  MatrixRow operand;
  operand.result = r;
  if (lane() < kMatrixRows * kMatrices) {
    const Vec16 v = emu::load_vector<Vec16>(row);
    std::memcpy(operand.elements, &v, sizeof v);
  }
  emu::meet_warp(operation, &operand, distribute<kMatrices, kTransposed>, site);
}

}  // namespace detail

template <class T>
void ldmatrix_x4(uint32_t (&r)[4], const SharedPtr<T>& row, const Site& site = Site::current()) {
  detail::load_matrices<4, false>("ldmatrix_x4", r, row, site);
}
template <class T>
void ldmatrix_x4_trans(uint32_t (&r)[4], const SharedPtr<T>& row,
                       const Site& site = Site::current()) {
  detail::load_matrices<4, true>("ldmatrix_x4_trans", r, row, site);
}
template <class T>
void ldmatrix_x2(uint32_t (&r)[2], const SharedPtr<T>& row, const Site& site = Site::current()) {
  detail::load_matrices<2, false>("ldmatrix_x2", r, row, site);
}
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         const Site& site = Site::current()) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, F16>);
  emu::MmaOperand operand{d, a, b};
  emu::meet_warp("mma", &operand, std::is_same_v<T, Bf16> ? emu::mma_bf16 : emu::mma_f16, site);
}

// --------------------------------------------------------------------------------------- launch
struct Launch {
  Grid grid;
  int threads = 0;
  size_t shared_bytes = 0;
  CUstream_st* stream = nullptr;
};

template <class Args>
void launch(void (*kernel)(Args), const Launch& config, const Args& args,
            const Site& site = Site::current()) {
  static_assert(sizeof(Args) <= 4096, "kernel parameters take 4 KB at most");
  static_assert(std::is_trivially_copyable_v<Args>);
  const emu::Extent grid{config.grid.x, config.grid.y, config.grid.z};
  emu::enqueue({[kernel, args] { kernel(args); }, grid, config.threads, config.shared_bytes, site,
                &typeid(Args)},
               config.stream);
}

}  // namespace rapshee::cuda::dev
