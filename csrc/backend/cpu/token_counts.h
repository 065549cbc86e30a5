// What the penalties of one request need to know of its tokens so far.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace rapshee::cpu {

// Dense counts, so that adding a token is one increment, beside the list of distinct tokens, so
// that applying and clearing cost what the request has used and not the vocabulary.
class TokenCounts {
 public:
  explicit TokenCounts(int64_t vocab_size) : vocab_size_(vocab_size) {}

  // Forgets everything and counts `token_ids`, the first `num_prompt_tokens` as the prompt's.
  void reset(std::span<const int32_t> token_ids, int64_t num_prompt_tokens) {
    for (const int32_t token : distinct_) seen_[token] = 0;
    distinct_.clear();
    for (const int32_t token : token_ids.first(num_prompt_tokens)) slot(token) |= kInPrompt;
    for (const int32_t token : token_ids.subspan(num_prompt_tokens)) add_output(token);
  }

  void add_output(int32_t token) { ++slot(token); }

  // Repetition penalty on all tokens seen, frequency and presence on those of the output. Results
  // stay finite upwards, whatever the penalties; an excluded token (-inf) stays excluded.
  void penalize(float repetition, float frequency, float presence, float* logits) const {
    constexpr float kLargest = std::numeric_limits<float>::max();
    for (const int32_t token : distinct_) {
      float logit = logits[token];
      if (logit == -std::numeric_limits<float>::infinity()) continue;
      logit = logit > 0.0f ? logit / repetition : logit * repetition;
      logit = std::clamp(logit, -kLargest, kLargest);  // inf - inf below would be NaN
      const uint32_t count = seen_[token] & ~kInPrompt;
      if (count > 0) {
        logit -= frequency * static_cast<float>(count);
        logit -= presence;
      }
      logits[token] = std::min(logit, kLargest);
    }
  }

 private:
  static constexpr uint32_t kInPrompt = 1u << 31;  // the bits below count occurrences in the output

  uint32_t& slot(int32_t token) {
    if (seen_.empty()) seen_.resize(vocab_size_);  // most requests use no penalty
    if (seen_[token] == 0) distinct_.push_back(token);
    return seen_[token];
  }

  int64_t vocab_size_;
  std::vector<uint32_t> seen_;     // [V], empty until the first token
  std::vector<int32_t> distinct_;  // tokens with seen_ != 0
};

}  // namespace rapshee::cpu
