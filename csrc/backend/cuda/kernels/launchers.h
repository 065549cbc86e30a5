// Every launcher of the CUDA kernels: what it computes, on which shapes. One .cu file for each
// operation; the launcher is its only public symbol. It checks what it can, launches on `stream`
// and returns at once.
//
// All pointers are device memory unless said otherwise. T: rows of a step; rows may be padding
// (token 0, slot -1, sequence length 0): they are computed like others and read by nobody. What a
// row gets depends on that row alone, whatever the number of rows and the form of a launch.
//
// "half" is Bf16 or F16, as HalfType says: the type of activations that a matrix multiplies, of the
// KV cache and of weights that are not quantised. The residual stream, partial sums and logits are
// float.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace rapshee::cuda {

using Stream = CUstream_st*;

enum class HalfType : uint8_t { kBF16, kF16 };

// ------------------------------------------------------------------------------------ weights
// A matrix [rows, cols] repacked into panels of 8 rows, so that a lane's 16 bytes of a panel are
// its part of the mma A operand. A panel is a run of chunks of 512 bytes, lane (4 g + t)'s 16 bytes
// at 16 * lane: row g of the panel, and of the chunk's columns the pairs (2t, 2t + 1) and
// (2t + 8, 2t + 9) of each 16, in this order. Missing rows and columns are zeros.
//   kHalf  32 columns a chunk: 8 halves, four pairs
//   kQ8    64 columns a chunk: 16 int8, eight pairs
//   kQ4Z   128 columns a chunk: four words, one for each 32 columns; of its four pairs, pair j has
//          its first code in nibble j and its second in nibble j + 4; the code's zero is 8
//   kQ4M   the same; the code's zero is 0, and a minimum is added
//   kPlain no chunks: the panel's rows of halves one behind the other, as they were (gemv, gemm)
// Codes of 2, 3, 5 and 6 bits lie in planes, the low bits in front of the high ones. A chunk has
// 128 columns; a plane of b bits is b words of each lane, [word][32 lanes], word i for the 16 / b
// pairs from 16 i / b on: pair j of them has its first code in the bits from b j on and its second
// in those from b j + 16 on.
//   kQ2M   2 bits; a minimum is added
//   kQ3    2 bits and 1; the code's zero is 4
//   kQ5M   4 bits and 1; a minimum is added
//   kQ6    4 bits and 2; the code's zero is 32
// Scales (and minimums) are fp16, one for each row and group of 32 columns, or of 16 (kQ2M, kQ3,
// kQ6): [panel][chunk][8 rows][groups], with minimums [groups][2].
enum class WeightFormat : uint8_t { kHalf, kQ8, kQ4Z, kQ4M, kQ2M, kQ3, kQ5M, kQ6, kPlain };

inline constexpr int kPanelRows = 8;

struct FormatInfo {
  int chunk_cols = 128;
  int chunk_bytes = 512;            // of codes
  int group = 32;                   // columns that share a scale; 0: there are none
  bool minimum = false;             // beside each scale
  int low_bits = 0, high_bits = 0;  // of the two planes; 0: no such plane
  int zero = 0;                     // code of the weight 0, in planes

  constexpr bool has_planes() const { return low_bits > 0; }
};
constexpr FormatInfo planes_of(int low_bits, int high_bits, int group, bool minimum, int zero) {
  constexpr int kBytesOfBit = 128;  // of 8 rows and 128 columns
  return {128, (low_bits + high_bits) * kBytesOfBit, group, minimum, low_bits, high_bits, zero};
}
constexpr FormatInfo format_info(WeightFormat format) {
  switch (format) {
    case WeightFormat::kHalf:
    case WeightFormat::kPlain:
      return {.chunk_cols = 32, .group = 0};
    case WeightFormat::kQ8:
      return {.chunk_cols = 64};
    case WeightFormat::kQ4Z:
      return {};
    case WeightFormat::kQ4M:
      return {.minimum = true};
    case WeightFormat::kQ2M:
      return planes_of(2, 0, 16, true, 0);
    case WeightFormat::kQ3:
      return planes_of(2, 1, 16, false, 4);
    case WeightFormat::kQ5M:
      return planes_of(4, 1, 32, true, 0);
    case WeightFormat::kQ6:
      return planes_of(4, 2, 16, false, 32);
  }
  return {};
}
constexpr int chunk_cols(WeightFormat format) { return format_info(format).chunk_cols; }
constexpr int chunk_bytes(WeightFormat format) { return format_info(format).chunk_bytes; }
// Halves of scales and minimums of one row of a chunk.
constexpr int chunk_scales(WeightFormat format) {
  const FormatInfo info = format_info(format);
  return info.group == 0 ? 0 : info.chunk_cols / info.group * (info.minimum ? 2 : 1);
}
// Bytes of the scales of one chunk of one panel.
constexpr int chunk_scale_bytes(WeightFormat format) {
  return kPanelRows * 2 * chunk_scales(format);
}

struct WeightView {
  WeightFormat format = WeightFormat::kHalf;
  int64_t rows = 0, cols = 0;
  const std::byte* codes = nullptr;   // [panels][chunks][chunk_bytes]; kPlain: [8 panels][cols]
  const std::byte* scales = nullptr;  // [panels][chunks][chunk_scale_bytes], null without scales

  constexpr int64_t num_panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  constexpr int64_t num_chunks() const {
    return (cols + chunk_cols(format) - 1) / chunk_cols(format);
  }
  constexpr size_t panel_code_bytes() const {
    const int64_t bytes = format == WeightFormat::kPlain ? kPanelRows * cols * 2  // of a half
                                                         : num_chunks() * chunk_bytes(format);
    return static_cast<size_t>(bytes);
  }
  constexpr size_t code_bytes() const {
    return static_cast<size_t>(num_panels()) * panel_code_bytes();
  }
  constexpr size_t scale_bytes() const {
    return static_cast<size_t>(num_panels() * num_chunks()) *
           static_cast<size_t>(chunk_scale_bytes(format));
  }
};

// Fills a weight (codes and scales) with counter-based random numbers, uniform with the variance
// 1 / cols: for benchmarks without a checkpoint.
void fill_random(const WeightView& weight, HalfType half, uint64_t seed, Stream stream);

// ------------------------------------------------------------------------------------- a step
// token_ids[i] < 0 becomes samples[~token_ids[i]] (0 where that is negative: its request has
// failed already).
struct ResolveArgs {
  int32_t* token_ids = nullptr;  // [rows]
  const int32_t* samples = nullptr;
  int rows = 0;
};
void resolve_tokens(const ResolveArgs& args, Stream stream);

// Cosine and sine of float(position) * inv_freq[i] (a float product, as the reference
// implementations have it), times the attention factor.
struct RopeTableArgs {
  const int32_t* positions = nullptr;  // [rows]
  const float* inv_freq = nullptr;     // [half_dim]
  int half_dim = 0;
  float attention_factor = 1.0f;
  float* cos = nullptr;  // [rows, half_dim]
  float* sin = nullptr;
  int rows = 0;
};
void rope_table(const RopeTableArgs& args, Stream stream);

struct EmbedArgs {
  WeightView table;  // [vocab, hidden]
  HalfType half = HalfType::kBF16;
  const int32_t* token_ids = nullptr;  // [rows], resolved
  float scale = 1.0f;
  float* x = nullptr;  // [rows, hidden]
  int rows = 0;
};
void embed(const EmbedArgs& args, Stream stream);

// x += residual_scale * y for y = partials[0] + partials[1] + ..., or its RMSNorm times
// post_weight; then out = rms_norm(x) * weight, or x itself.
struct AddNormArgs {
  float* x = nullptr;               // [., hidden] residual stream; written back unless gathered
  const float* partials = nullptr;  // [splits][., hidden] or null: nothing to add
  int splits = 0;
  int64_t split_stride = 0;            // elements between splits
  const float* post_weight = nullptr;  // [hidden] or null: y is added as it is
  float residual_scale = 1.0f;
  const int32_t* row_ids = nullptr;  // null, or out's row r is x's row row_ids[r] (gathered)
  const float* weight = nullptr;     // [hidden] or null: x is rounded as it is
  float eps = 0.0f;
  HalfType half = HalfType::kBF16;
  void* out = nullptr;  // [rows, hidden] halves
  int64_t hidden = 0;
  int rows = 0;
};
void add_rms_norm(const AddNormArgs& args, Stream stream);

// ------------------------------------------------------------------------------------- linear
// y = W x + bias for up to three matrices of one format (not kPlain) that share x, laid side by
// side.
struct LinearSegment {
  WeightView weight;
  const float* bias = nullptr;  // [rows of weight] or null; added by split 0
  int64_t column = 0;           // of y, where the segment's outputs begin
};
struct LinearArgs {
  HalfType half = HalfType::kBF16;
  const void* x = nullptr;  // [rows, cols] halves, 16-byte aligned rows; cols a multiple of 8
  int64_t x_stride = 0;     // elements
  int rows = 0;
  LinearSegment segments[3];
  int num_segments = 0;
  float* y = nullptr;  // [partials][rows, y_stride]; whoever reads y adds the partials in order
  int64_t y_stride = 0;
  int k_splits = 1;          // linear_splits(all outputs of the fused layer, cols)
  int64_t split_stride = 0;  // elements between partials
};
void linear(const LinearArgs& args, Stream stream);

// Into how many runs of K a layer is cut, so that few rows still fill the device: a function of
// the layer's shape alone, never of the number of rows.
int linear_splits(int64_t outputs, int64_t cols);
// How many partials y has: k_splits, or 1 for many rows, whose splits the kernel adds up itself (in
// the same order).
int linear_partials(int rows, int k_splits);

enum class GatedActivation : uint8_t { kSilu, kGeluTanh };

// out = act(G x + g) * (U x + u) for G and U of one format.
struct GatedLinearArgs {
  HalfType half = HalfType::kBF16;
  const void* x = nullptr;  // [rows, cols] as in LinearArgs
  int64_t x_stride = 0;
  int rows = 0;
  WeightView gate, up;
  const float* gate_bias = nullptr;  // or null
  const float* up_bias = nullptr;
  GatedActivation activation = GatedActivation::kSilu;
  void* out = nullptr;  // [rows, out_stride] halves
  int64_t out_stride = 0;
};
void gated_linear(const GatedLinearArgs& args, Stream stream);

// The same two for plain weights and 1 to kGemvRows rows; k_splits is 1. Sums in an order of its
// own: a row gets the same bits with any number of rows, but not those of linear.
inline constexpr int kGemvRows = 8;
void gemv(const LinearArgs& args, Stream stream);
void gated_gemv(const GatedLinearArgs& args, Stream stream);

// The same of products that are there already (gate and up of different formats):
// out[r][i] = act(gate_up[r][i]) * gate_up[r][size + i].
struct GatedActivationArgs {
  const float* gate_up = nullptr;  // [rows, 2 * size]
  GatedActivation activation = GatedActivation::kSilu;
  HalfType half = HalfType::kBF16;
  void* out = nullptr;  // [rows, size] halves
  int64_t size = 0;
  int rows = 0;
};
void gated_activation(const GatedActivationArgs& args, Stream stream);

// ---------------------------------------------------------------------------------- attention
// Keys and values of one layer: [block][kv_head][token of the block][head_dim] halves each.
struct KvCacheView {
  void* k = nullptr;
  void* v = nullptr;
  int block_size = 0;  // tokens, a multiple of 16
  int num_kv_heads = 0;
  int head_dim = 0;          // a multiple of 8, at most 256
  int64_t block_stride = 0;  // elements between blocks of k, and of v
};

// Sums the splits of q, k and v, normalises q and k where there are norms (RMSNorm over a head, or
// over a whole row where row_factors is there), rotates both, rounds, and writes q to q_out, k and
// v to their slots.
struct QkNormRopeCacheArgs {
  HalfType half = HalfType::kBF16;
  const float* qkv = nullptr;  // [splits][rows, (num_heads + 2 num_kv_heads) head_dim]
  int splits = 1;
  int64_t split_stride = 0;
  const float* q_norm = nullptr;  // [head_dim], of a whole row [num_heads * head_dim], or null
  const float* k_norm = nullptr;  // the same of k
  float eps = 0.0f;
  float* row_factors = nullptr;  // [rows, 2] to work with; null: norms are of heads
  const float* cos = nullptr;    // [rows, half_dim]; dimension i turns with i + half_dim
  const float* sin = nullptr;
  int half_dim = 0;
  const int64_t* slot_mapping = nullptr;  // [rows] block * block_size + offset; -1: not written
  int num_heads = 0;
  void* q_out = nullptr;  // [rows, num_heads * head_dim] halves
  KvCacheView cache;
  int rows = 0;
};
void qk_norm_rope_cache(const QkNormRopeCacheArgs& args, Stream stream);

inline constexpr int kAttentionSplit = 256;  // keys after which attention closes max, sum, output

// Attention closes its running maximum, sum and output at absolute multiples of kAttentionSplit
// keys, and merges these splits in ascending order by one formula, in decode and prefill alike.
struct AttentionArgs {
  HalfType half = HalfType::kBF16;
  const void* q = nullptr;  // [T, num_heads * head_dim] halves
  void* out = nullptr;      // [T, num_heads * head_dim] halves
  int num_heads = 0;        // query head h uses KV head h / (num_heads / num_kv_heads)
  KvCacheView cache;
  const int32_t* block_tables = nullptr;     // [S, table_stride]
  const int32_t* table_stride = nullptr;     // [1], as it differs from step to step
  const int32_t* seq_lens = nullptr;         // [S]; 0: padding, nothing is read or written
  const int32_t* query_start_loc = nullptr;  // [S + 1]
  const int32_t* positions = nullptr;        // [T], ascending by one within a sequence
  float scale = 1.0f;
  int window = 0;        // 0: everything is seen; else the last `window` keys, one's own included
  float softcap = 0.0f;  // 0: none; else scores become softcap * tanh(score / softcap)
};

// Sequences of one query token: sequence s has row query_start_loc[s]. Work is a list of splits,
// in device memory so that a recorded launch can be replayed on other lengths.
struct DecodeWork {
  const int32_t* num_items = nullptr;   // [1]
  const int32_t* items = nullptr;       // [num_items][2] sequence, split (first key / 256) it sees
  const int32_t* first_item = nullptr;  // [S] of the sequence; its splits are consecutive
  const int32_t* num_splits = nullptr;  // [S] of the sequence, 0 for padding
  int max_items = 0;                    // room in the workspace
  int num_seqs = 0;
};
// Bytes of the partial results of decode attention, and of the counters of those that have arrived.
// The first use needs it zeroed, each launch leaves it ready for the next; launches that share it
// have one max_items, num_heads and head_dim. 16-byte aligned.
size_t decode_workspace_bytes(int max_items, int max_seqs, int num_heads, int head_dim);
void paged_attention_decode(const AttentionArgs& args, const DecodeWork& work, void* workspace,
                            Stream stream);

// Sequences of any number of query tokens, in tiles of prefill_tile_tokens() at most.
struct PrefillWork {
  const int32_t* tiles = nullptr;  // [num_tiles][2] sequence, first row of T
  int num_tiles = 0;
};
int prefill_tile_tokens(int num_heads, int num_kv_heads, int head_dim);
void paged_attention_prefill(const AttentionArgs& args, const PrefillWork& work, Stream stream);

// ------------------------------------------------------------------------------------- logits
// In place: logit = scale * logit, then softcap * tanh(logit / softcap) unless softcap is 0. What
// is not finite stays so.
struct ScaleLogitsArgs {
  float* logits = nullptr;  // [count], 16-byte aligned
  int64_t count = 0;
  float scale = 1.0f;
  float softcap = 0.0f;
};
void scale_logits(const ScaleLogitsArgs& args, Stream stream);

// ----------------------------------------------------------------------------------- sampling
// How the rows of a step are sampled, structure of arrays over its R rows: SamplingRows of
// backend.h in device memory. Order and meaning are those of backend/cpu/sampling.h: allowed
// tokens, bias, penalties, temperature, min-p, top-k, top-p, draw by inverse CDF in id order from
// philox_uniform(seed, draw_index); log-probabilities and ranks of the unmodified logits.
struct SamplingArrays {
  const int32_t* target_ids = nullptr;
  const float* temperature = nullptr;
  const int32_t* top_k = nullptr;
  const float* top_p = nullptr;
  const float* min_p = nullptr;
  const float* repetition_penalty = nullptr;
  const float* presence_penalty = nullptr;
  const float* frequency_penalty = nullptr;
  const uint64_t* seed = nullptr;
  const uint32_t* draw_index = nullptr;
  const int32_t* num_logprobs = nullptr;
  const int32_t* state_slot = nullptr;
  const int32_t* bias_indptr = nullptr;  // [R + 1]
  const int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  const int32_t* mask_index = nullptr;  // row of `masks`, -1: everything is allowed
  const uint32_t* masks = nullptr;      // [., ceil(V / 32)]
};
// What the rows of a launch need at most; kernels that no row needs are left out. A row's result
// does not depend on what the other rows need.
struct SamplingNeeds {
  bool process = false;  // a mask, biases or penalties
  bool draw = false;     // a temperature above 0
  bool filter = false;   // min-p, top-k or top-p
  bool rank = false;     // a target, or num_logprobs > 0
  int top_width = 0;     // largest num_logprobs
};
struct SampleArgs {
  const float* logits = nullptr;  // [rows, vocab] of rows first_row, first_row + 1, ...
  int64_t vocab = 0;
  int first_row = 0;
  int rows = 0;
  SamplingArrays arrays;
  SamplingNeeds needs;
  // Token counts of the penalties: [slots, vocab], bit 31: in the prompt, below: times in the
  // output. A drawn token is added.
  uint32_t* counts = nullptr;
  // Results, indexed by the step's row.
  int32_t* token_ids = nullptr;   // [R] -1: not samplable (log-probability NaN, rank 0)
  float* logprobs = nullptr;      // [R]
  int32_t* ranks = nullptr;       // [R] 0 where not asked for
  int32_t* top_ids = nullptr;     // [R, top_width]; unused -1
  float* top_logprobs = nullptr;  // [R, top_width]; unused -inf
  void* workspace = nullptr;
};
// Bytes for launches of up to max_rows rows.
size_t sample_workspace_bytes(int max_rows, int64_t vocab, int max_top_width);
void sample(const SampleArgs& args, Stream stream);

// counts[slot] becomes that of `tokens` [num_tokens], the first num_prompt_tokens the prompt's.
struct SetStateArgs {
  uint32_t* counts = nullptr;  // [vocab] of the slot
  int64_t vocab = 0;
  const int32_t* tokens = nullptr;
  int num_tokens = 0;
  int num_prompt_tokens = 0;
};
void set_token_counts(const SetStateArgs& args, Stream stream);

}  // namespace rapshee::cuda
