// The functions that one instruction set must supply. One table per ISA, chosen once per process;
// each is compiled from the same sources (ops/*.inc) with its own flags and namespace.
//
// Vectors are 16 floats wide everywhere ("lanes"), whatever the registers are, so that layouts and
// reduction orders are the same in every table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace rapshee::cpu {

inline constexpr int kLanes = 16;         // columns of a weight panel, keys of a cache group
inline constexpr int kGroup = 32;         // elements of K that share a scale
inline constexpr int kHalf = kGroup / 2;  // the same for activations quantised finely
inline constexpr int kSuper = 256;       // elements of K whose scales are integers times one number
inline constexpr int kSplit = 256;       // keys after which attention closes max, sum and output
inline constexpr int kVocabChunk = 256;  // tokens that share one partial sum of exponentials

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// How a panel is stored.
//   kF32     float  [K][16]
//   kBF16    bf16   [K/2][16][2]; K rounded up to even with zeros
//   the rest see LowBitFormat; M: with minimums, Z: with a zero in the middle of the codes, K: in
//            super-blocks
enum class PanelFormat : uint8_t {
  kF32,
  kBF16,
  kQ2K,
  kQ3K,
  kQ4M,
  kQ4Z,
  kQ4K,
  kQ5M,
  kQ5Z,
  kQ5K,
  kQ6K,
  kQ8
};

// A low-bit panel: codes [K/32][bits][64], then the scales, then, if there are any, the minimums.
// x = scale * (code - zero) + minimum, by exactly the numbers of the file.
//
// A group of 32 along K is 8 vectors of codes: byte 4 * c + i of vector j is column c, k = 4 * j +
// i. They are stored in planes of 4, 2 and 1 bits, low bits first, as far as `bits` is their sum; a
// plane of w bits takes w * 64 bytes, and holds vector j in its vector j % w from bit w * (j / w)
// of each byte on. 8 bits: the vectors as they are, signed.
//
// Scales are fp16 [K/group][16]; in super-blocks int8 [K/group][16], each to be multiplied with the
// one of its super-block, fp16 [K/256][16], which follow. Minimums likewise.
struct LowBitFormat {
  int bits = 0;  // 0: not a low-bit format
  int zero = 0;
  int group = kGroup;  // elements of K that share a scale: 16 or 32
  bool minimums = false;
  bool super_blocks = false;

  // Bytes of `cols` elements along K.
  constexpr int64_t code_bytes(int64_t cols) const { return cols / kGroup * bits * 64; }
  constexpr int64_t scale_bytes(int64_t cols) const {
    constexpr int64_t kHalfs = kLanes * sizeof(uint16_t);
    if (!super_blocks) return cols / group * kHalfs;
    return cols / group * kLanes + cols / kSuper * kHalfs;
  }
  constexpr int64_t bytes(int64_t cols) const {
    return code_bytes(cols) + scale_bytes(cols) * (minimums ? 2 : 1);
  }
};

constexpr LowBitFormat low_bit_format(PanelFormat format) {
  switch (format) {
    case PanelFormat::kQ2K:
      return {2, 0, kHalf, true, true};
    case PanelFormat::kQ3K:
      return {3, 4, kHalf, false, true};
    case PanelFormat::kQ4M:
      return {4, 0, kGroup, true, false};
    case PanelFormat::kQ4Z:
      return {4, 8, kGroup, false, false};
    case PanelFormat::kQ4K:
      return {4, 0, kGroup, true, true};
    case PanelFormat::kQ5M:
      return {5, 0, kGroup, true, false};
    case PanelFormat::kQ5Z:
      return {5, 16, kGroup, false, false};
    case PanelFormat::kQ5K:
      return {5, 0, kGroup, true, true};
    case PanelFormat::kQ6K:
      return {6, 32, kHalf, false, true};
    case PanelFormat::kQ8:
      return {8, 0, kGroup, false, false};
    case PanelFormat::kF32:
    case PanelFormat::kBF16:
      break;
  }
  return {};
}

struct PanelLayout {
  PanelFormat format = PanelFormat::kF32;
  int64_t rows = 0;        // output features
  int64_t cols = 0;        // K
  size_t panel_bytes = 0;  // a multiple of 64
  int64_t num_panels() const { return ceil_div(rows, kLanes); }
  size_t bytes() const { return static_cast<size_t>(num_panels()) * panel_bytes; }
};

// One row, or some whole groups of one, in the forms that panels multiply with.
struct ActRow {
  float* f32 = nullptr;
  uint16_t* bf16 = nullptr;
  int8_t* q8 = nullptr;
  float* q8_scale = nullptr;
  int32_t* q8_sum = nullptr;
  float* q8_total = nullptr;
};

// Rows of activations. Rows are padded with zeros to a multiple of kGroup.
struct ActRows {
  int64_t stride = 0;         // padded K, in elements
  float* f32 = nullptr;       // [rows, stride]
  uint16_t* bf16 = nullptr;   // [rows, stride]
  int8_t* q8 = nullptr;       // [rows, stride] codes
  float* q8_scale = nullptr;  // [rows, stride / 16] of each half; equal in a group unless fine
  int32_t* q8_sum = nullptr;  // [rows, stride / 16] sum of the codes of each half
  float* q8_total = nullptr;  // [rows, stride / 32] sum of scale * code over the group
  bool fine = false;          // halves have scales of their own

  // Row `row` from column `first` (a multiple of kGroup) on.
  ActRow at(int64_t row, int64_t first = 0) const {
    const int64_t i = row * stride + first;
    return {
        f32 + i, bf16 + i, q8 + i, q8_scale + i / kHalf, q8_sum + i / kHalf, q8_total + i / kGroup};
  }
  // The rows from `row` on.
  ActRows from(int64_t row) const {
    const ActRow r = at(row);
    return {stride, r.f32, r.bf16, r.q8, r.q8_scale, r.q8_sum, r.q8_total, fine};
  }
};

// kActQ8Fine: kActQ8 with a scale for each half of a group.
enum ActForm : uint8_t { kActF32 = 1, kActBF16 = 2, kActQ8 = 4, kActQ8Fine = 8 };

// What becomes of a panel's product.
struct LinearOut {
  float* y = nullptr;           // first row, the panel's first column
  int64_t stride = 0;           // elements between rows of y
  int columns = kLanes;         // columns of the panel that exist
  const float* bias = nullptr;  // of those columns, or null
  bool add = false;             // y += scale * product instead of y = product
  float scale = 1.0f;
};

// One tile of attention: query rows that share a KV head.
struct AttentionTile {
  const float* q = nullptr;    // first query row; row r = (token r / group, head r % group)
  int64_t q_token_stride = 0;  // elements
  float* out = nullptr;        // same indexing
  int64_t out_token_stride = 0;
  const int32_t* positions = nullptr;  // [num_tokens]
  int num_tokens = 0;
  int group = 0;  // query heads per KV head
  int head_dim = 0;
  float scale = 0.0f;
  float softcap = 0.0f;  // of the scaled scores; 0: none
  int window = 0;
  const std::byte* cache = nullptr;  // of this layer and KV head
  int64_t block_stride = 0;          // bytes between blocks
  const int32_t* block_table = nullptr;
  int block_size = 0;
};

// Whose peak to reach: fused multiply-adds of floats, dot products of bf16 pairs, of int8 fours.
enum class PeakKind : uint8_t { kF32, kBF16, kInt8 };

struct ChunkStats {
  float max;
  float sum;       // of exp(x - max); NaN where a logit is not finite
  int32_t argmax;  // first index of max
};

// Bytes of scratch for linear_panel: the panel unpacked to floats at most.
inline size_t linear_scratch_bytes(int64_t cols) {
  return static_cast<size_t>(round_up(cols, kGroup)) * kLanes * sizeof(float);
}

// Bytes of scratch for attention: queries, scores, weights and outputs of all rows of a tile.
inline size_t attention_scratch_bytes(int rows, int head_dim) {
  const size_t padded = static_cast<size_t>(round_up(head_dim, kLanes));
  const size_t floats = 3 * padded + 2 * kSplit + 4;
  return static_cast<size_t>(rows) * floats * sizeof(float) + 9 * 64;
}

struct KernelTable {
  const char* isa;
  int row_tile;  // rows that one pass over a panel multiplies

  // out = x * rsqrt(mean(x^2) + eps) * weight; weight null: out = x. Fills the ActForms of the
  // row, padded with zeros to whole groups.
  void (*prepare_row)(const float* x, int64_t n, const float* weight, float eps, uint8_t forms,
                      const ActRow& out);
  // The first `rows` rows of x times one panel. float_acts: low-bit and bf16 panels multiply f32
  // rows. scratch: linear_scratch_bytes(cols).
  void (*linear_panel)(const PanelLayout& layout, const std::byte* panel, const ActRows& x,
                       int64_t rows, bool float_acts, std::byte* scratch, const LinearOut& out);
  // gate[i] = silu(gate[i]) * up[i]
  void (*silu_mul)(float* gate, const float* up, int64_t n);
  // gate[i] = gelu(gate[i]) * up[i], GELU by its tanh approximation
  void (*gelu_mul)(float* gate, const float* up, int64_t n);
  // x[i] = x[i] * rsqrt(mean(x^2) + eps) * weight[i]
  void (*norm_in_place)(float* x, int64_t n, const float* weight, float eps);
  // x[i] += factor * y[i] * rsqrt(mean(y^2) + eps) * weight[i]
  void (*add_normed)(float* x, const float* y, int64_t n, const float* weight, float eps,
                     float factor);
  // x[i] = cap * tanh(scale * x[i] / cap); cap 0: x[i] = scale * x[i]
  void (*soft_cap)(float* x, int64_t n, float scale, float cap);
  // Rotates the first 2 * half dimensions of one head in place.
  void (*rope)(float* head, const float* cos, const float* sin, int half);
  // Writes one token's K and V of one KV head into its group of the cache (see cache_layout.h).
  void (*cache_write)(DType dtype, const float* k, const float* v, int head_dim, int offset,
                      bool last_of_step, std::byte* cache_block);
  void (*attention)(DType dtype, const AttentionTile& tile, std::byte* scratch);
  ChunkStats (*chunk_stats)(const float* x, int64_t n);
  // out[i] = exp((x[i] - max) * scale), returns the sum in lane order. out may be x. n is at most
  // kVocabChunk for the order of the sum to be that of the contract. exp(-inf) is exactly 0.
  float (*exp_chunk)(const float* x, int64_t n, float max, float scale, float* out);
  // Benchmarks: arithmetic without memory (steps is a multiple of 8), and the other way round (n is
  // a multiple of 128). The result only keeps the work from being left out.
  float (*run_peak)(PeakKind kind, int64_t steps, int64_t* operations);
  float (*sum_floats)(const float* x, int64_t n);
};

const KernelTable& scalar_kernels();
#if defined(__x86_64__)
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
#endif

}  // namespace rapshee::cpu
