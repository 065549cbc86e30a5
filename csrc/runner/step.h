// What crosses the seam between Python and C++: one ragged step in, its samples out.
//
// T tokens, S sequences, R rows whose logits are wanted (R may exceed S), G groups of layers with
// one window (ModelConfig::kv_windows), M block-table width, V vocabulary, K the largest
// num_logprobs. Decode rows (sequences of one query token) come first.
#pragma once

#include <cstdint>
#include <vector>

namespace rapshee {

struct StepInput {
  std::vector<int32_t> token_ids;        // [T] < 0: sample of row ~id of the step before
  std::vector<int32_t> positions;        // [T] 0-based position in the sequence
  std::vector<int64_t> slot_mapping;     // [G, T] block * block_size + offset; -1: not written
  std::vector<int32_t> query_start_loc;  // [S + 1] row offsets of each sequence
  std::vector<int32_t> seq_lens;         // [S] tokens visible to attention, this step's included
  // [G, S, M] physical block per logical block; -1: unused, or gone, which only a block may be that
  // lies wholly before what the window of the sequence's first query token sees.
  std::vector<int32_t> block_tables;
  int64_t num_groups = 1;  // G
  int64_t max_blocks = 0;  // M

  std::vector<int32_t> sample_rows;       // [R] rows of T
  std::vector<int32_t> target_ids;        // [R] -1: draw; >= 0: score this token, draw nothing
  std::vector<float> temperature;         // [R] 0: greedy
  std::vector<int32_t> top_k;             // [R] 0: off
  std::vector<float> top_p;               // [R] (0, 1]; 1: off
  std::vector<float> min_p;               // [R] [0, 1]; 0: off
  std::vector<float> repetition_penalty;  // [R] > 0; 1: off
  std::vector<float> presence_penalty;    // [R]
  std::vector<float> frequency_penalty;   // [R]
  std::vector<uint64_t> seed;             // [R] of the request
  std::vector<uint32_t> draw_index;       // [R] index of the generated token, never the row
  std::vector<int32_t> num_logprobs;      // [R] 0 to V
  std::vector<int32_t> state_slot;        // [R] -1: the row uses no penalty
  std::vector<int32_t> bias_indptr;       // [R + 1]
  std::vector<int32_t> bias_ids;          // [nnz]
  std::vector<float> bias_values;         // [nnz] added to the logits
  std::vector<uint8_t> needs_mask;        // [R] sampling waits for set_masks

  int num_tokens() const { return static_cast<int>(token_ids.size()); }
  int num_seqs() const { return static_cast<int>(seq_lens.size()); }
  int num_rows() const { return static_cast<int>(sample_rows.size()); }
};

struct StepOutput {
  std::vector<int32_t> token_ids;   // [R] drawn token, or the row's target; -1: not samplable
  std::vector<float> logprobs;      // [R] of that token, under the unmodified logits
  std::vector<int32_t> ranks;       // [R] 1-based; 0 where not asked for
  std::vector<int32_t> top_ids;     // [R, K] best first; unused -1
  std::vector<float> top_logprobs;  // [R, K] unused -inf
  int64_t top_width = 0;            // K
  int64_t timing_us = 0;            // microseconds from the start of the forward pass
};

// KV blocks of the layers with one window.
struct KvGroup {
  int num_blocks = 0;
  int window = 0;  // 0: everything is seen
};

// What a step has to stay within.
struct StepLimits {
  int64_t vocab_size = 0;
  int64_t max_position = 0;
  int block_size = 0;
  int max_num_tokens = 0;
  int max_num_seqs = 0;
  std::vector<KvGroup> groups = {};
};

// Throws InvalidArgument naming field and value for anything out of range or inconsistent.
// previous_rows: R of the step launched before, which negative token ids refer to.
void validate_step(const StepInput& step, const StepLimits& limits, int previous_rows);

}  // namespace rapshee
