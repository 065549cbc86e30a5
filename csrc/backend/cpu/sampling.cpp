#include "backend/cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "backend/cpu/philox.h"
#include "core/error.h"

namespace rapshee::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLargest = std::numeric_limits<float>::max();
// The threshold of a row without filters: everything except -inf, which is how a token is excluded.
constexpr float kKeepAll = std::numeric_limits<float>::lowest();

double unit_mass(size_t) { return 1.0; }

// The smallest float that is not below `value`, so that x >= value can be decided in float.
float round_upwards(double value) {
  const float rounded = static_cast<float>(std::max<double>(value, kKeepAll));
  return rounded < value ? std::nextafter(rounded, kInfinity) : rounded;
}

bool uses_penalties(const SamplingRows& rows, int r) {
  return rows.state_slot[r] >= 0 &&
         (rows.repetition_penalty[r] != 1.0f || rows.presence_penalty[r] != 0.0f ||
          rows.frequency_penalty[r] != 0.0f);
}

bool is_processed(const SamplingRows& rows, int r) {
  return rows.needs_mask[r] != 0 || rows.bias_indptr[r] != rows.bias_indptr[r + 1] ||
         uses_penalties(rows, r);
}

// One row of logits, cut into chunks of kVocabChunk tokens.
struct Logits {
  const float* data;
  int64_t size;

  int64_t num_chunks() const { return ceil_div(size, kVocabChunk); }
  std::span<const float> chunk(int64_t c) const {
    const int64_t begin = c * kVocabChunk;
    return {data + begin, static_cast<size_t>(std::min<int64_t>(kVocabChunk, size - begin))};
  }
};

// Fills lane_max and chunk_max; returns the overall maximum.
float find_maxima(const Logits& logits, Sampler::Scratch& scratch) {
  for (int64_t c = 0; c < logits.num_chunks(); ++c) {
    const std::span<const float> chunk = logits.chunk(c);
    float* lanes = scratch.lane_max.data() + c * kLanes;
    std::fill_n(lanes, kLanes, -kInfinity);
    size_t i = 0;
    for (; i + kLanes <= chunk.size(); i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lanes[j] = std::max(lanes[j], chunk[i + j]);
    }
    for (int j = 0; i < chunk.size(); ++i, ++j) lanes[j] = std::max(lanes[j], chunk[i]);
    scratch.chunk_max[c] = *std::max_element(lanes, lanes + kLanes);
  }
  return *std::max_element(scratch.chunk_max.begin(), scratch.chunk_max.end());
}

// The lowest id of the maximum. Needs maxima.
int32_t find_argmax(const Logits& logits, const Sampler::Scratch& scratch) {
  const auto best = std::max_element(scratch.chunk_max.begin(), scratch.chunk_max.end());
  const int64_t c = best - scratch.chunk_max.begin();
  const std::span<const float> chunk = logits.chunk(c);
  return static_cast<int32_t>(c * kVocabChunk +
                              (std::find(chunk.begin(), chunk.end(), *best) - chunk.begin()));
}

// Collects the logits >= bound and their ids, lane by lane of each chunk; returns how many. Needs
// maxima.
size_t collect_candidates(const Logits& logits, float bound, Sampler::Scratch& scratch) {
  size_t count = 0;
  for (int64_t c = 0; c < logits.num_chunks(); ++c) {
    if (scratch.chunk_max[c] < bound) continue;
    const std::span<const float> chunk = logits.chunk(c);
    for (size_t lane = 0; lane < kLanes; ++lane) {
      if (scratch.lane_max[c * kLanes + lane] < bound) continue;
      for (size_t i = lane; i < chunk.size(); i += kLanes) {  // writes, then keeps or not
        scratch.candidates[count] = chunk[i];
        scratch.candidate_ids[count] = static_cast<int32_t>(c * kVocabChunk + i);
        count += chunk[i] >= bound ? 1 : 0;
      }
    }
  }
  return count;
}

// Collects at least the k largest logits (all but -inf if there are fewer) and returns how many.
// The k-th largest of k or more maxima of disjoint groups bounds the k-th largest logit from below,
// and is found among far fewer values. Needs maxima.
size_t collect_largest(const Logits& logits, size_t k, Sampler::Scratch& scratch) {
  const std::vector<float>& maxima =
      k <= scratch.chunk_max.size() ? scratch.chunk_max : scratch.lane_max;
  float bound = kKeepAll;
  if (k <= maxima.size()) {
    bound = std::max(bound,
                     radix_threshold(maxima, static_cast<double>(k), unit_mass, scratch.histogram));
  }
  return collect_candidates(logits, bound, scratch);
}

// softmax(scale * logits) restricted to the logits that reach a threshold.
class Distribution {
 public:
  // `max` of the logits is finite.
  Distribution(const KernelTable& kernels, Logits logits, float max, float temperature,
               Sampler::Scratch& scratch)
      : kernels_(kernels),
        logits_(logits),
        max_(max),
        scale_(std::min(1.0f / temperature, kLargest)),  // finite: 0 * scale is the maximum's
        scratch_(scratch) {}

  // Each of the filters needs maxima.
  void keep_min_p(float min_p) { threshold_ = std::max(threshold_, logit_of_mass(min_p)); }

  // Where an earlier filter left fewer than k, its threshold is the higher one.
  void keep_top_k(size_t k) {
    const std::span<const float> largest{scratch_.candidates.data(),
                                         collect_largest(logits_, k, scratch_)};
    if (largest.size() < k) return;
    threshold_ = std::max(threshold_, radix_threshold(largest, static_cast<double>(k), unit_mass,
                                                      scratch_.histogram));
  }

  void keep_top_p(float top_p) {
    const double target = top_p * measure();
    const size_t count = collect_top_p(target, top_p);
    const float* mass = scratch_.candidate_mass.data();
    threshold_ = radix_threshold(
        {scratch_.candidates.data(), count}, target,
        [mass](size_t i) { return static_cast<double>(mass[i]); }, scratch_.histogram);
  }

  // The token at which the cumulative distribution in id order passes u, 0 <= u < 1. Rounding
  // cannot leave the survivors: beyond the last of them, it is the last.
  int32_t token_at(double u) {
    const double point = u * measure();
    double reached = 0.0;
    int64_t chunk = -1;
    double before = 0.0;  // mass of the chunks before `chunk`
    for (int64_t c = 0; c < logits_.num_chunks() && !(point < reached); ++c) {
      if (scratch_.chunk_mass[c] == 0.0) continue;
      chunk = c;
      before = reached;
      reached += scratch_.chunk_mass[c];
    }
    return chunk < 0 ? -1 : token_in_chunk(chunk, point - before);
  }

 private:
  // The logit whose unnormalised mass is `mass`, 0 <= mass <= 1.
  float logit_of_mass(double mass) const { return round_upwards(max_ + std::log(mass) / scale_); }

  // Fills chunk_mass with the mass of the survivors in each chunk; returns their sum.
  double measure() {
    double total = 0.0;
    for (int64_t c = 0; c < logits_.num_chunks(); ++c) {
      scratch_.chunk_mass[c] = mass_of_chunk(c);
      total += scratch_.chunk_mass[c];
    }
    return total;
  }

  double mass_of_chunk(int64_t c) {
    if (threshold_ != kKeepAll && scratch_.chunk_max[c] < threshold_) return 0.0;
    const std::span<const float> x = logits_.chunk(c);
    const float sum = weigh(x);
    return threshold_ == kKeepAll ? sum : sum_survivors(x);
  }

  // In lanes, as the kernels add: a single running sum would wait for each addition.
  float sum_survivors(std::span<const float> x) const {
    float lanes[kLanes] = {};
    const auto survivor = [&](size_t i) { return x[i] >= threshold_ ? weights_[i] : 0.0f; };
    size_t i = 0;
    for (; i + kLanes <= x.size(); i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lanes[j] += survivor(i + j);
    }
    for (int j = 0; i < x.size(); ++i, ++j) lanes[j] += survivor(i);
    return std::accumulate(lanes, lanes + kLanes, 0.0f);
  }

  int32_t token_in_chunk(int64_t c, double point) {
    const std::span<const float> x = logits_.chunk(c);
    weigh(x);
    double reached = 0.0;
    int32_t token = -1;
    for (size_t i = 0; i < x.size() && !(point < reached); ++i) {
      if (!(x[i] >= threshold_) || weights_[i] == 0.0f) continue;
      token = static_cast<int32_t>(c * kVocabChunk + i);
      reached += weights_[i];
    }
    return token;
  }

  float weigh(std::span<const float> x) {
    return kernels_.exp_chunk(x.data(), x.size(), max_, scale_, weights_);
  }

  // Collects and weighs survivors that include all that top-p keeps; returns how many. A peaked
  // distribution is done with the logits that reach the lowest maximum of a chunk, about
  // n log(n) of them for n chunks. If not, those below a `negligible` mass can be left out: all
  // together they have at most half of what top-p may cut off.
  size_t collect_top_p(double target, double top_p) {
    const float few = *std::min_element(scratch_.chunk_max.begin(), scratch_.chunk_max.end());
    size_t count = collect_candidates(logits_, std::max(threshold_, few), scratch_);
    if (weigh_candidates(count) >= target) return count;
    const double negligible =
        0.5 * (1.0 - top_p) * (target / top_p) / static_cast<double>(logits_.size);
    count = collect_candidates(logits_, std::max(threshold_, logit_of_mass(negligible)), scratch_);
    weigh_candidates(count);
    return count;
  }

  // Returns the sum.
  double weigh_candidates(size_t count) {
    double sum = 0.0;
    for (size_t i = 0; i < count; i += kVocabChunk) {
      const size_t n = std::min<size_t>(kVocabChunk, count - i);
      sum += kernels_.exp_chunk(scratch_.candidates.data() + i, n, max_, scale_,
                                scratch_.candidate_mass.data() + i);
    }
    return sum;
  }

  const KernelTable& kernels_;
  Logits logits_;
  float max_;
  float scale_;
  float threshold_ = kKeepAll;
  Sampler::Scratch& scratch_;
  float weights_[kVocabChunk];  // of the chunk weighed last
};

// Allowed logits as they are, the others -inf. mask: one bit a token.
void copy_allowed(const float* logits, int64_t size, const uint32_t* mask, float* out) {
  for (int64_t begin = 0; begin < size; begin += 32) {
    const uint32_t word = mask[begin / 32];
    const int64_t end = std::min<int64_t>(begin + 32, size);
    for (int64_t t = begin; t < end; ++t) {
      out[t] = (word >> (t - begin) & 1) != 0 ? logits[t] : -kInfinity;
    }
  }
}

int32_t rank_of(float logit, const float* logits, int64_t size) {
  int32_t greater = 0;
  for (int64_t t = 0; t < size; ++t) greater += logits[t] > logit ? 1 : 0;
  return 1 + greater;
}

float log_probability(float logit, const RowStats& stats) {
  return static_cast<float>(logit - stats.log_sum_exp);
}

}  // namespace

RowStats merge_stats(std::span<const ChunkStats> chunks) {
  RowStats stats{-kInfinity, 0.0, -1};
  for (size_t c = 0; c < chunks.size(); ++c) {
    if (!(chunks[c].max > stats.max)) continue;
    stats.max = chunks[c].max;
    stats.argmax = static_cast<int32_t>(c * kVocabChunk) + chunks[c].argmax;
  }
  double sum = 0.0;
  for (const ChunkStats& chunk : chunks) {
    sum += chunk.sum * std::exp(static_cast<double>(chunk.max) - stats.max);
  }
  stats.log_sum_exp = stats.max + std::log(sum);
  return stats;
}

Sampler::Scratch::Scratch(int64_t vocab_size)
    : processed(vocab_size),
      lane_max(ceil_div(vocab_size, kVocabChunk) * kLanes),
      chunk_max(ceil_div(vocab_size, kVocabChunk)),
      chunk_mass(ceil_div(vocab_size, kVocabChunk)),
      candidates(vocab_size),
      candidate_ids(vocab_size),
      candidate_mass(vocab_size) {}

Sampler::Sampler(int64_t vocab_size, int max_num_seqs)
    : vocab_size_(vocab_size), states_(max_num_seqs, TokenCounts(vocab_size)) {}

void Sampler::set_state(int slot, std::span<const int32_t> token_ids, int64_t num_prompt_tokens) {
  RAPSHEE_CHECK(slot >= 0 && slot < std::ssize(states_), "slot must be from 0 to ",
                std::ssize(states_) - 1, ", got ", slot);
  RAPSHEE_CHECK(num_prompt_tokens >= 0 && num_prompt_tokens <= std::ssize(token_ids),
                "num_prompt_tokens must be from 0 to ", std::ssize(token_ids), ", got ",
                num_prompt_tokens);
  for (const int32_t token : token_ids) {
    RAPSHEE_CHECK(token >= 0 && token < vocab_size_, "token_ids must be from 0 to ",
                  vocab_size_ - 1, ", got ", token);
  }
  states_[slot].reset(token_ids, num_prompt_tokens);
}

bool Sampler::needs_logits(const SamplingRows& rows, int r) {
  return rows.temperature[r] > 0.0f || rows.target_ids[r] >= 0 || rows.num_logprobs[r] > 0 ||
         is_processed(rows, r);
}

void Sampler::sample_row(const KernelTable& kernels, const SamplingRows& rows, int r,
                         const uint32_t* mask, const float* logits, const RowStats& stats,
                         Scratch& scratch, const SampleResults& results) {
  int32_t token = -1;
  if (std::isfinite(stats.log_sum_exp)) {
    const int32_t target = rows.target_ids[r];
    token = target >= 0 ? target : draw(kernels, rows, r, mask, logits, stats, scratch);
  }
  results.token_ids[r] = token;
  results.logprobs[r] = kNaN;
  results.ranks[r] = 0;
  if (token < 0) return;
  if (rows.target_ids[r] < 0 && rows.state_slot[r] >= 0) {
    states_[rows.state_slot[r]].add_output(token);
  }
  score(rows, r, token, logits, stats, scratch, results);
}

int32_t Sampler::draw(const KernelTable& kernels, const SamplingRows& rows, int r,
                      const uint32_t* mask, const float* logits, const RowStats& stats,
                      Scratch& scratch) const {
  const bool processed = is_processed(rows, r);
  const float temperature = rows.temperature[r];
  if (temperature == 0.0f && !processed) return stats.argmax;
  if (processed) process(rows, r, mask, logits, scratch.processed.data());
  const Logits row{processed ? scratch.processed.data() : logits, vocab_size_};

  const bool top_k = rows.top_k[r] > 0 && rows.top_k[r] < vocab_size_;
  const bool filtered = rows.min_p[r] > 0.0f || top_k || rows.top_p[r] < 1.0f;
  const float max = processed || filtered ? find_maxima(row, scratch) : stats.max;
  if (max == -kInfinity) return -1;
  if (temperature == 0.0f) return find_argmax(row, scratch);

  Distribution distribution(kernels, row, max, temperature, scratch);
  if (rows.min_p[r] > 0.0f) distribution.keep_min_p(rows.min_p[r]);
  if (top_k) distribution.keep_top_k(rows.top_k[r]);
  if (rows.top_p[r] < 1.0f) distribution.keep_top_p(rows.top_p[r]);
  return distribution.token_at(philox_uniform(rows.seed[r], rows.draw_index[r]));
}

void Sampler::process(const SamplingRows& rows, int r, const uint32_t* mask, const float* logits,
                      float* processed) const {
  if (rows.needs_mask[r]) {
    copy_allowed(logits, vocab_size_, mask, processed);
  } else {
    std::copy_n(logits, vocab_size_, processed);
  }
  for (int32_t i = rows.bias_indptr[r]; i < rows.bias_indptr[r + 1]; ++i) {
    float& logit = processed[rows.bias_ids[i]];
    logit = std::min(logit + rows.bias_values[i], kLargest);
  }
  if (uses_penalties(rows, r)) {
    states_[rows.state_slot[r]].penalize(rows.repetition_penalty[r], rows.frequency_penalty[r],
                                         rows.presence_penalty[r], processed);
  }
}

void Sampler::score(const SamplingRows& rows, int r, int32_t token, const float* logits,
                    const RowStats& stats, Scratch& scratch, const SampleResults& results) const {
  const float logit = token == stats.argmax ? stats.max : logits[token];
  results.logprobs[r] = log_probability(logit, stats);
  const int32_t num_logprobs = std::min(rows.num_logprobs[r], results.top_width);
  if (rows.num_logprobs[r] > 0 || rows.target_ids[r] >= 0) {
    results.ranks[r] = rank_of(logit, logits, vocab_size_);
  }
  if (num_logprobs > 0) {
    const int64_t cell = static_cast<int64_t>(r) * results.top_width;
    list_top(num_logprobs, logits, stats, scratch, results.top_ids + cell,
             results.top_logprobs + cell);
  }
}

void Sampler::list_top(int count, const float* logits, const RowStats& stats, Scratch& scratch,
                       int32_t* ids, float* logprobs) const {
  const Logits row{logits, vocab_size_};
  find_maxima(row, scratch);
  const auto candidates = std::span(scratch.candidate_ids)
                              .first(collect_largest(row, static_cast<size_t>(count), scratch));
  const size_t listed = std::min(candidates.size(), static_cast<size_t>(count));
  std::partial_sort(candidates.begin(), candidates.begin() + listed, candidates.end(),
                    [logits](int32_t a, int32_t b) {
                      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
                    });
  for (size_t i = 0; i < listed; ++i) {
    ids[i] = candidates[i];
    logprobs[i] = log_probability(logits[candidates[i]], stats);
  }
}

}  // namespace rapshee::cpu
