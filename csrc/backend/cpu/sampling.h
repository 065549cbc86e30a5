// From one row of logits to a token and its log-probabilities.
//
// Order: allowed tokens, logit bias, repetition, frequency and presence penalty, temperature,
// min-p, top-k, top-p, draw. Log-probabilities and ranks are those of the unmodified logits.
//
// min-p, top-k and top-p each keep the logits from some value upwards (ties included), so together
// they are one threshold, and their order only matters for the mass that top-p refers to. The draw
// is an inverse CDF over the survivors in id order, with one Philox uniform keyed by the request's
// seed and the token's index. Which path a row takes, and every bit of its result, depends on its
// own options and logits alone.
//
// A row that cannot be sampled, because a logit is not finite or no token is allowed, gets token -1
// (even if it has a target), log-probability NaN and rank 0; nothing is thrown, so that only this
// request fails.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernel_table.h"
#include "backend/cpu/radix_threshold.h"
#include "backend/cpu/token_counts.h"

namespace rapshee::cpu {

// Of one row of unmodified logits; max and argmax mean something if log_sum_exp is finite.
struct RowStats {
  float max;
  double log_sum_exp;  // natural logarithm of the sum of exp(logit); NaN if one is not finite
  int32_t argmax;      // lowest id of max
};

// Chunk c holds the statistics of tokens [c * kVocabChunk, (c + 1) * kVocabChunk), its argmax
// counts from the chunk's first token. Merged in order.
RowStats merge_stats(std::span<const ChunkStats> chunks);

class Sampler {
 public:
  // Working memory of one row, reused from row to row; one per worker.
  struct Scratch {
    explicit Scratch(int64_t vocab_size);

    std::vector<float> processed;        // [V] logits after mask, bias and penalties
    std::vector<float> lane_max;         // [chunks, kLanes] of the chunk's tokens 16 apart
    std::vector<float> chunk_max;        // [chunks]
    std::vector<double> chunk_mass;      // [chunks] probability mass, unnormalised
    std::vector<float> candidates;       // [V] logits that reach a bound
    std::vector<int32_t> candidate_ids;  // [V] their tokens
    std::vector<float> candidate_mass;   // [V] their mass
    RadixHistogram histogram;
  };

  Sampler(int64_t vocab_size, int max_num_seqs);

  // Replaces the tokens seen by the request in `slot`; see Backend::set_state. Throws
  // InvalidArgument for a slot, token or prompt length out of range.
  void set_state(int slot, std::span<const int32_t> token_ids, int64_t num_prompt_tokens);

  // Whether row r needs more than its statistics. If not, its logits need not be written.
  static bool needs_logits(const SamplingRows& rows, int r);

  // Writes the results of row r and adds a drawn token to the row's state. `mask`: its allowed
  // tokens if it needs_mask, else unused. `logits` [V] is left as it is, null if !needs_logits.
  // Values of `rows` are in range: 0 <= temperature, 0 < top_p <= 1, 0 <= min_p <= 1,
  // repetition_penalty > 0, all finite. Several threads may call it at once for rows with different
  // state slots.
  void sample_row(const KernelTable& kernels, const SamplingRows& rows, int r, const uint32_t* mask,
                  const float* logits, const RowStats& stats, Scratch& scratch,
                  const SampleResults& results);

 private:
  int32_t draw(const KernelTable& kernels, const SamplingRows& rows, int r, const uint32_t* mask,
               const float* logits, const RowStats& stats, Scratch& scratch) const;
  void process(const SamplingRows& rows, int r, const uint32_t* mask, const float* logits,
               float* processed) const;
  void score(const SamplingRows& rows, int r, int32_t token, const float* logits,
             const RowStats& stats, Scratch& scratch, const SampleResults& results) const;
  void list_top(int count, const float* logits, const RowStats& stats, Scratch& scratch,
                int32_t* ids, float* logprobs) const;

  int64_t vocab_size_;
  std::vector<TokenCounts> states_;  // [max_num_seqs]
};

}  // namespace rapshee::cpu
