// The only door from kernels to the device.
//
// Under nvcc these are intrinsics and PTX. Under RAPSHEE_EMU the same names come from the emulator
// (tests/emu/device.h): threads are fibers that run in random order, warp and block operations are
// rendezvous that fail unless all threads reach them, asynchronous copies land only at the wait,
// shared memory starts poisoned, and every access through Ptr and SharedPtr is bounds-checked.
//
// Rules for kernels:
//  - One parameter: a plain struct, `RAPSHEE_PARAM Args args`. Its raw pointers are wrapped before
//    use: `const dev::Ptr<const float> x(args.x);`.
//  - All shared memory is dynamic: dev::shared<T>(byte_offset), its size given at launch.
//  - Warp operations take all 32 lanes; block operations all threads of the block.
//  - Threads of a block are numbered in x; grids have x, y and z.
//  - Call dev::pdl_wait() before the first access to anything that an earlier kernel wrote (or
//    still reads), then dev::pdl_trigger(): the next kernel may then start early and does the same.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/error.h"

namespace rapshee::cuda::dev {

// Sixteen bytes, the widest access.
struct alignas(16) Vec16 {
  uint32_t word[4];
};
struct alignas(8) Vec8 {
  uint32_t word[2];
};

// 16-bit floats as storage; arithmetic is done in float or by mma.
struct alignas(2) Bf16 {
  uint16_t bits;
};
struct alignas(2) F16 {
  uint16_t bits;
};

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

struct Float2 {
  float x, y;
};

}  // namespace rapshee::cuda::dev

// Before a loop of constant length: arrays that it indexes stay in registers. RAPSHEE_UNROLL_BY: so
// many iterations at a time.
#if defined(RAPSHEE_EMU)
#define RAPSHEE_UNROLL
#define RAPSHEE_UNROLL_BY(count)
#else
#define RAPSHEE_PRAGMA(text) _Pragma(#text)
#define RAPSHEE_UNROLL _Pragma("unroll")
#define RAPSHEE_UNROLL_BY(count) RAPSHEE_PRAGMA(unroll(count))
#endif

#if defined(RAPSHEE_EMU)

#include "emu/device.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RAPSHEE_KERNEL(max_threads, min_blocks) \
  __global__ void __launch_bounds__(max_threads, min_blocks)
#define RAPSHEE_PARAM const __grid_constant__
#define RAPSHEE_DEVICE __device__ __forceinline__

namespace rapshee::cuda::dev {

// ------------------------------------------------------------------------------------- memory
template <class T>
using Ptr = T*;  // global
template <class T>
using SharedPtr = T*;

// The same address as another type.
template <class To, class From>
RAPSHEE_DEVICE To* cast(From* p) {
  return reinterpret_cast<To*>(p);
}

extern __shared__ __align__(128) unsigned char dynamic_shared[];

template <class T>
RAPSHEE_DEVICE SharedPtr<T> shared(size_t byte_offset = 0) {
  return reinterpret_cast<T*>(dynamic_shared + byte_offset);
}

// p: 16-byte aligned, global or shared.
template <class T>
RAPSHEE_DEVICE Vec16 load16(const T* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
template <class T>
RAPSHEE_DEVICE void store16(T* p, const Vec16& v) {
  *reinterpret_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
template <class T>
RAPSHEE_DEVICE Vec8 load8(const T* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  return {{v.x, v.y}};
}
template <class T>
RAPSHEE_DEVICE void store8(T* p, const Vec8& v) {
  *reinterpret_cast<uint2*>(p) = make_uint2(v.word[0], v.word[1]);
}
// Global memory that no kernel writes while this one runs, read once: weights. It may be read
// before pdl_wait().
template <class T>
RAPSHEE_DEVICE Vec16 load16_stream(const T* p) {
  Vec16 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}

// ---------------------------------------------------------------------------- asynchronous copy
RAPSHEE_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// 16 bytes from global to shared memory, zeros unless `valid` (then src is not read). They have
// arrived for this thread after cp_async_wait, for the block after a sync() behind it.
template <class T>
RAPSHEE_DEVICE void cp_async16(T* dst, const T* src, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src),
               "r"(valid ? 16 : 0)
               : "memory");
}
// The same of memory that no kernel writes while this one runs, read once: weights. It may be read
// before pdl_wait().
template <class T>
RAPSHEE_DEVICE void cp_async16_stream(T* dst, const T* src, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(dst)),
               "l"(src), "r"(valid ? 16 : 0)
               : "memory");
}
RAPSHEE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last kPending committed groups have arrived.
template <int kPending>
RAPSHEE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ------------------------------------------------------------------------------ threads, blocks
RAPSHEE_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
RAPSHEE_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
RAPSHEE_DEVICE int lane() { return static_cast<int>(threadIdx.x % 32); }
RAPSHEE_DEVICE int warp() { return static_cast<int>(threadIdx.x / 32); }
RAPSHEE_DEVICE Grid block() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
RAPSHEE_DEVICE Grid grid() { return {gridDim.x, gridDim.y, gridDim.z}; }

RAPSHEE_DEVICE void sync() { __syncthreads(); }
RAPSHEE_DEVICE bool sync_or(bool predicate) { return __syncthreads_or(predicate); }
RAPSHEE_DEVICE void sync_warp() { __syncwarp(); }
// Writes of this thread are seen by the device before those that follow.
RAPSHEE_DEVICE void fence() { __threadfence(); }

// T: 4 or 8 bytes.
template <class T>
RAPSHEE_DEVICE T shfl(T v, int from_lane) {
  return __shfl_sync(0xffffffffu, v, from_lane);
}
template <class T>
RAPSHEE_DEVICE T shfl_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
// The value of lane - delta; lanes below delta keep their own.
template <class T>
RAPSHEE_DEVICE T shfl_up(T v, int delta) {
  return __shfl_up_sync(0xffffffffu, v, delta);
}
RAPSHEE_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// Return the value before. Integers alone: their order does not matter. p: global or shared.
RAPSHEE_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }
RAPSHEE_DEVICE uint64_t atomic_add(uint64_t* p, uint64_t v) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
RAPSHEE_DEVICE uint32_t atomic_max(uint32_t* p, uint32_t v) { return atomicMax(p, v); }
RAPSHEE_DEVICE uint64_t atomic_max(uint64_t* p, uint64_t v) {
  return atomicMax(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
RAPSHEE_DEVICE uint32_t atomic_min(uint32_t* p, uint32_t v) { return atomicMin(p, v); }

// ---------------------------------------------------------------- programmatic dependent launch
// Earlier kernels of the stream have ended and their writes are visible.
RAPSHEE_DEVICE void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel of the stream may start (up to its pdl_wait).
RAPSHEE_DEVICE void pdl_trigger() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --------------------------------------------------------------------------------- conversions
RAPSHEE_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
RAPSHEE_DEVICE uint32_t float_to_bits(float v) { return __float_as_uint(v); }
RAPSHEE_DEVICE float to_float(Bf16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}
RAPSHEE_DEVICE float to_float(F16 v) { return __half2float(__ushort_as_half(v.bits)); }
// To nearest, ties to even.
template <class T>
RAPSHEE_DEVICE T from_float(float v);
template <>
RAPSHEE_DEVICE Bf16 from_float<Bf16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
RAPSHEE_DEVICE F16 from_float<F16>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}
// Two 16-bit floats in a word, x in the low half.
template <class T>
RAPSHEE_DEVICE uint32_t pack2(float x, float y);
template <>
RAPSHEE_DEVICE uint32_t pack2<Bf16>(float x, float y) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
  return word;
}
template <>
RAPSHEE_DEVICE uint32_t pack2<F16>(float x, float y) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
  return word;
}
template <class T>
RAPSHEE_DEVICE Float2 unpack2(uint32_t word) {
  return {to_float(T{static_cast<uint16_t>(word & 0xffffu)}),
          to_float(T{static_cast<uint16_t>(word >> 16)})};
}
// a - b on two 16-bit floats at once.
template <class T>
RAPSHEE_DEVICE uint32_t sub2(uint32_t a, uint32_t b);
template <>
RAPSHEE_DEVICE uint32_t sub2<Bf16>(uint32_t a, uint32_t b) {
  uint32_t r;
  // a * 1 + (-b): sub.bf16x2 needs sm_90.
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
  return r;
}
template <>
RAPSHEE_DEVICE uint32_t sub2<F16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes of {a (0-3), b (4-7)}.
RAPSHEE_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// ------------------------------------------------------------------------------------- numbers
RAPSHEE_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
RAPSHEE_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
RAPSHEE_DEVICE float min(float a, float b) { return fminf(a, b); }
RAPSHEE_DEVICE float max(float a, float b) { return fmaxf(a, b); }
RAPSHEE_DEVICE float exp2(float x) {  // about 2 ulp; exp2(-inf) is 0
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
RAPSHEE_DEVICE float sqrt(float x) { return __fsqrt_rn(x); }
RAPSHEE_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
RAPSHEE_DEVICE float tanh(float x) { return ::tanhf(x); }
RAPSHEE_DEVICE double log(double x) { return ::log(x); }
RAPSHEE_DEVICE double exp(double x) { return ::exp(x); }
RAPSHEE_DEVICE float rint(float x) { return ::rintf(x); }
RAPSHEE_DEVICE double rint(double x) { return ::rint(x); }
// sin(pi x) and cos(pi x).
RAPSHEE_DEVICE void sincospi(float x, float* sin, float* cos) { ::sincospif(x, sin, cos); }
RAPSHEE_DEVICE uint32_t mul_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
RAPSHEE_DEVICE uint64_t mul_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
RAPSHEE_DEVICE int count_leading_zeros(uint32_t v) { return __clz(static_cast<int>(v)); }
RAPSHEE_DEVICE int count_bits(uint32_t v) { return __popc(v); }

// ------------------------------------------------------------------------------- tensor cores
// Four (two) 8 x 8 matrices of 16-bit elements: lane 8 i + r gives the address of row r (16 bytes,
// aligned) of matrix i, and receives of each matrix the elements [lane / 4][2 (lane % 4) + 0, 1]
// ([2 (lane % 4) + 0, 1][lane / 4] when transposed). Of x2, lanes 16-31 give no address.
template <class T>
RAPSHEE_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
template <class T>
RAPSHEE_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
template <class T>
RAPSHEE_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
// d [16, 8] += a [16, 16] b [16, 8], T: Bf16 or F16, sums in float. With g = lane / 4, t = lane %
// 4:
//   a[0] rows g,     columns 2t, 2t + 1      a[2] rows g,     columns 2t + 8, 2t + 9
//   a[1] rows g + 8, columns 2t, 2t + 1      a[3] rows g + 8, columns 2t + 8, 2t + 9
//   b[0] rows 2t, 2t + 1, column g           b[1] rows 2t + 8, 2t + 9, column g
//   d[0], d[1] row g, columns 2t, 2t + 1     d[2], d[3] row g + 8, columns 2t, 2t + 1
template <class T>
RAPSHEE_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
RAPSHEE_DEVICE void mma<Bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
RAPSHEE_DEVICE void mma<F16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --------------------------------------------------------------------------------------- launch
struct Launch {
  Grid grid;
  int threads = 0;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

// Whether kernels of a stream may overlap (see pdl_wait): from compute capability 9.0 on.
inline bool has_dependent_launch() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

// Starts a kernel; it may overlap the end of the one before (see pdl_wait). DeviceError where the
// launch is refused.
template <class Args>
void launch(void (*kernel)(Args), const Launch& config, const Args& args) {
  static_assert(sizeof(Args) <= 4096, "kernel parameters take 4 KB at most");
  const auto check = [](cudaError_t status) {
    if (status != cudaSuccess) {
      throw DeviceError(concat("launch of a CUDA kernel: ", cudaGetErrorString(status)));
    }
  };
  constexpr size_t kWithoutAsking = 48 << 10;
  if (config.shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(config.shared_bytes)));
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = dim3(config.grid.x, config.grid.y, config.grid.z);
  launch_config.blockDim = dim3(static_cast<unsigned>(config.threads));
  launch_config.dynamicSmemBytes = config.shared_bytes;
  launch_config.stream = config.stream;
  launch_config.attrs = &overlap;
  launch_config.numAttrs = has_dependent_launch() ? 1 : 0;
  check(cudaLaunchKernelEx(&launch_config, kernel, args));
}

}  // namespace rapshee::cuda::dev

#endif
