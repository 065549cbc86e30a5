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
inline constexpr int kSplit = 256;        // keys after which attention closes max, sum and output
inline constexpr int kVocabChunk = 256;   // tokens that share one partial sum of exponentials

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// How the codes of a panel are stored.
//   kF32   float  [K][16]
//   kBF16  bf16   [K/2][16][2]; K rounded up to even with zeros
//   kQ4M   nibbles [K/32][4][64], then fp16 scales [K/32][16], then fp16 minimums [K/32][16]
//          (byte 4 * c + i of vector j holds column c, k = 4 * j + i low, k + 16 high)
//   kQ4Z   the same without minimums; the code's zero is 8
//   kQ8    int8 [K/32][8][64] (byte 4 * c + i of vector j: column c, k = 4 * j + i), then scales
enum class PanelFormat : uint8_t { kF32, kBF16, kQ4M, kQ4Z, kQ8 };

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
