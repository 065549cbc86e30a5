#include "backend/cpu/sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "backend/cpu/philox.h"
#include "check.h"

using namespace rapshee;
using namespace rapshee::cpu;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The two functions that sampling needs, from the standard library: what is tested here must not
// depend on the kernels.
ChunkStats chunk_stats(const float* x, int64_t n) {
  ChunkStats stats{x[0], 0.0f, 0};
  for (int64_t i = 1; i < n; ++i) {
    if (x[i] > stats.max) stats.max = x[i], stats.argmax = static_cast<int32_t>(i);
  }
  for (int64_t i = 0; i < n; ++i) stats.sum += std::exp(x[i] - stats.max) + 0.0f * x[i];
  return stats;
}

float exp_chunk(const float* x, int64_t n, float max, float scale, float* out) {
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) sum += out[i] = std::exp((x[i] - max) * scale);
  return sum;
}

const KernelTable kKernels = [] {
  KernelTable table{};
  table.chunk_stats = chunk_stats;
  table.exp_chunk = exp_chunk;
  return table;
}();

struct Options {
  int32_t target_id = -1;
  float temperature = 1.0f;
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  uint64_t seed = 0;
  uint32_t draw_index = 0;
  int32_t num_logprobs = 0;
  int32_t state_slot = -1;
  std::vector<int32_t> bias_ids = {};
  std::vector<float> bias_values = {};
  std::vector<uint32_t> mask = {};
};

struct Result {
  int32_t token_id = -2;
  float logprob = 0.0f;
  int32_t rank = -2;
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
};

// `options` as a batch of one row. Valid while `options` lives.
struct OneRow {
  explicit OneRow(const Options& options)
      : bias_indptr{0, static_cast<int32_t>(options.bias_ids.size())},
        needs_mask(options.mask.empty() ? 0 : 1) {
    rows = {.num_rows = 1,
            .target_ids = &options.target_id,
            .temperature = &options.temperature,
            .top_k = &options.top_k,
            .top_p = &options.top_p,
            .min_p = &options.min_p,
            .repetition_penalty = &options.repetition_penalty,
            .presence_penalty = &options.presence_penalty,
            .frequency_penalty = &options.frequency_penalty,
            .seed = &options.seed,
            .draw_index = &options.draw_index,
            .num_logprobs = &options.num_logprobs,
            .state_slot = &options.state_slot,
            .bias_indptr = bias_indptr.data(),
            .bias_ids = options.bias_ids.data(),
            .bias_values = options.bias_values.data(),
            .needs_mask = &needs_mask};
  }
  OneRow(const OneRow&) = delete;

  std::array<int32_t, 2> bias_indptr;
  uint8_t needs_mask;
  SamplingRows rows;
};

RowStats stats_of(const std::vector<float>& logits) {
  std::vector<ChunkStats> chunks;
  const auto size = static_cast<int64_t>(logits.size());
  for (int64_t begin = 0; begin < size; begin += kVocabChunk) {
    chunks.push_back(
        chunk_stats(logits.data() + begin, std::min<int64_t>(kVocabChunk, size - begin)));
  }
  return merge_stats(chunks);
}

// Logits and masks are copied to allocations of their exact size, so that a sanitizer sees every
// access beyond them.
Result sample(Sampler& sampler, const std::vector<float>& logits, const Options& options,
              const KernelTable& kernels = kKernels) {
  const auto exact = std::make_unique<float[]>(logits.size());
  std::copy(logits.begin(), logits.end(), exact.get());
  const OneRow row(options);
  Sampler::Scratch scratch(static_cast<int64_t>(logits.size()));
  Result result;
  result.top_ids.assign(options.num_logprobs, -1);
  result.top_logprobs.assign(options.num_logprobs, -kInfinity);
  sampler.sample_row(kernels, row.rows, 0, options.mask.data(),
                     Sampler::needs_logits(row.rows, 0) ? exact.get() : nullptr, stats_of(logits),
                     scratch,
                     {&result.token_id, &result.logprob, &result.rank, result.top_ids.data(),
                      result.top_logprobs.data(), options.num_logprobs});
  return result;
}

Result sample(const std::vector<float>& logits, const Options& options) {
  Sampler sampler(static_cast<int64_t>(logits.size()), 0);
  return sample(sampler, logits, options);
}

std::vector<float> random_logits(size_t size, uint32_t seed) {
  std::mt19937 engine(seed);
  std::vector<float> logits(size);
  for (float& logit : logits) logit = static_cast<float>(engine() % 20001) / 1000.0f - 10.0f;
  return logits;
}

std::vector<uint32_t> mask_of(size_t vocab, const std::function<bool(size_t)>& allowed) {
  std::vector<uint32_t> words((vocab + 31) / 32);
  for (size_t t = 0; t < vocab; ++t) words[t / 32] |= (allowed(t) ? 1u : 0u) << t % 32;
  return words;
}

const std::vector<Options> kDrawing = {
    {},
    {.temperature = 0.0f},
    {.temperature = 0.2f},
    {.top_k = 1},
    {.top_k = 7},
    {.top_k = 400},
    {.top_p = 0.5f},
    {.top_p = 0.999f},
    {.top_p = 1e-6f},
    {.min_p = 0.1f},
    {.min_p = 1.0f},
    {.temperature = 0.7f, .top_k = 40, .top_p = 0.9f, .min_p = 0.02f},
};
const std::vector<size_t> kSizes = {1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 4097};

}  // namespace

TEST_CASE(philox_gives_the_vectors_of_random123) {
  const uint32_t f = 0xFFFFFFFF;
  CHECK((philox4x32_10({0, 0, 0, 0}, {0, 0}) ==
         PhiloxCounter{0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}));
  CHECK((philox4x32_10({f, f, f, f}, {f, f}) ==
         PhiloxCounter{0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}));
  CHECK(
      (philox4x32_10({0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}, {0xA4093822, 0x299F31D0}) ==
       PhiloxCounter{0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}));
}

TEST_CASE(uniforms_fill_the_unit_interval) {
  std::array<int, 10> counts{};
  for (uint32_t i = 0; i < 10000; ++i) {
    const double u = philox_uniform(99, i);
    CHECK(u >= 0.0 && u < 1.0);
    ++counts[static_cast<size_t>(u * 10.0)];
  }
  for (const int count : counts) CHECK(std::abs(count - 1000) < 150);
  CHECK(philox_uniform(1, 0) != philox_uniform(1ull << 32, 0));
}

TEST_CASE(ordered_keys_sort_like_floats) {
  const std::vector<float> ascending = {-kInfinity, -3e38f, -1.0f, -1e-45f,
                                        0.0f,       1e-45f, 1.0f,  kInfinity};
  for (size_t i = 0; i < ascending.size(); ++i) {
    CHECK_EQ(from_ordered_key(ordered_key(ascending[i])), ascending[i]);
    if (i > 0) CHECK(ordered_key(ascending[i - 1]) < ordered_key(ascending[i]));
  }
  CHECK(ordered_key(-0.0f) < ordered_key(0.0f));
}

TEST_CASE(radix_threshold_finds_each_order_statistic) {
  RadixHistogram histogram;
  for (const size_t size : kSizes) {
    std::vector<float> values = random_logits(size, 3);
    values[size / 2] = values[0];
    std::vector<float> descending = values;
    std::sort(descending.begin(), descending.end(), std::greater<>());
    for (size_t k = 1; k <= size; k += 1 + size / 50) {
      const float found =
          radix_threshold(values, static_cast<double>(k), [](size_t) { return 1.0; }, histogram);
      CHECK_EQ(found, descending[k - 1]);
    }
  }
}

TEST_CASE(radix_threshold_stops_at_the_smallest_value_with_mass) {
  RadixHistogram histogram;
  const std::vector<float> values = {1.0f, -2.0f, 3.0f, -4.0f};
  const std::vector<double> masses = {0.25, 0.25, 0.5, 0.0};
  const auto mass_of = [&](size_t i) { return masses[i]; };
  CHECK_EQ(radix_threshold(values, 0.4, mass_of, histogram), 3.0f);
  CHECK_EQ(radix_threshold(values, 0.5, mass_of, histogram), 3.0f);
  CHECK_EQ(radix_threshold(values, 0.6, mass_of, histogram), 1.0f);
  CHECK_EQ(radix_threshold(values, 1.0, mass_of, histogram), -2.0f);
  CHECK_EQ(radix_threshold(values, 1.5, mass_of, histogram), -2.0f);
}

TEST_CASE(stats_merge_over_chunks) {
  for (const size_t size : kSizes) {
    const std::vector<float> logits = random_logits(size, 1);
    const RowStats stats = stats_of(logits);
    const auto best = std::max_element(logits.begin(), logits.end());
    double sum = 0.0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
    CHECK_EQ(stats.max, *best);
    CHECK_EQ(stats.argmax, best - logits.begin());
    CHECK(std::abs(stats.log_sum_exp - std::log(sum)) < 1e-5);
  }
}

TEST_CASE(greedy_rows_take_the_lowest_id_and_no_logits) {
  for (const size_t size : kSizes) {
    std::vector<float> logits(size, -1.0f);
    logits[size - 1] = logits[size / 2] = 2.0f;
    const Options greedy{.temperature = 0.0f};
    CHECK(!Sampler::needs_logits(OneRow(greedy).rows, 0));
    CHECK_EQ(sample(logits, greedy).token_id, static_cast<int32_t>(size / 2));
    const Options listed{.temperature = 0.0f, .num_logprobs = 1};
    CHECK(Sampler::needs_logits(OneRow(listed).rows, 0));
    CHECK_EQ(sample(logits, listed).logprob, sample(logits, greedy).logprob);
    CHECK_EQ(sample(logits, listed).rank, 1);
    CHECK_EQ(sample(logits, greedy).rank, 0);
  }
}

TEST_CASE(whatever_needs_logits_says_so) {
  const std::vector<Options> needing = {
      {},
      {.target_id = 0, .temperature = 0.0f},
      {.temperature = 0.0f, .num_logprobs = 1},
      {.temperature = 0.0f, .bias_ids = {0}, .bias_values = {1.0f}},
      {.temperature = 0.0f, .mask = {1}},
      {.temperature = 0.0f, .repetition_penalty = 1.1f, .state_slot = 0},
      {.temperature = 0.0f, .presence_penalty = 1.0f, .state_slot = 0},
      {.temperature = 0.0f, .frequency_penalty = 1.0f, .state_slot = 0},
  };
  for (const Options& options : needing) CHECK(Sampler::needs_logits(OneRow(options).rows, 0));
  const Options neutral{.temperature = 0.0f, .top_k = 3, .top_p = 0.5f, .state_slot = 0};
  CHECK(!Sampler::needs_logits(OneRow(neutral).rows, 0));
}

TEST_CASE(a_mask_of_one_token_is_obeyed_everywhere) {
  for (const size_t size : kSizes) {
    const std::vector<float> logits = random_logits(size, 2);
    for (const size_t only : {size_t{0}, size / 2, size - 1}) {
      for (Options options : kDrawing) {
        options.mask = mask_of(size, [only](size_t t) { return t == only; });
        CHECK_EQ(sample(logits, options).token_id, static_cast<int32_t>(only));
      }
    }
  }
}

TEST_CASE(draws_stay_within_their_filters) {
  for (const size_t size : kSizes) {
    const std::vector<float> logits = random_logits(size, 4);
    std::vector<float> descending = logits;
    std::sort(descending.begin(), descending.end(), std::greater<>());
    for (uint32_t i = 0; i < 50; ++i) {
      const Options top_k{.temperature = 2.0f, .top_k = 5, .draw_index = i};
      CHECK(logits[sample(logits, top_k).token_id] >= descending[std::min<size_t>(4, size - 1)]);
      const Options min_p{.min_p = 0.1f, .draw_index = i};
      CHECK(logits[sample(logits, min_p).token_id] >= descending[0] + std::log(0.1f));
      const Options top_p{.top_p = 1e-6f, .draw_index = i};
      CHECK_EQ(logits[sample(logits, top_p).token_id], descending[0]);
    }
  }
}

TEST_CASE(rounding_cannot_leave_the_allowed_tokens) {
  // Sums that promise more mass than the chunk has: the draw lands beyond its last token.
  KernelTable generous = kKernels;
  generous.exp_chunk = [](const float* x, int64_t n, float max, float scale, float* out) {
    return 1000.0f * exp_chunk(x, n, max, scale, out);
  };
  const std::vector<float> logits(300, 1.0f);
  Sampler sampler(300, 0);
  for (uint32_t i = 0; i < 100; ++i) {
    const Options options{.draw_index = i, .mask = mask_of(300, [](size_t t) {
                                             return t == 3 || t == 77 || t == 258;
                                           })};
    const int32_t token = sample(sampler, logits, options, generous).token_id;
    CHECK(token == 3 || token == 77 || token == 258);
  }
}

TEST_CASE(extreme_options_stay_finite) {
  const std::vector<float> logits = {1.0f, 3e38f, -3e38f, 3e38f, 2.0f};
  const float tiny = std::numeric_limits<float>::denorm_min();
  for (Options options : kDrawing) {
    options.temperature = std::min(options.temperature, tiny);
    options.draw_index = 3;
    const int32_t token = sample(logits, options).token_id;
    CHECK(token == 1 || token == 3);
  }
  Sampler sampler(5, 1);
  const std::vector<int32_t> prompt = {0};
  sampler.set_state(0, prompt, 1);
  for (Options options : kDrawing) {  // infinity would take all the mass and make it NaN
    options.repetition_penalty = tiny;
    options.state_slot = 0;
    sampler.set_state(0, prompt, 1);
    CHECK_EQ(sample(sampler, {1.0f, 9.0f, -8.0f, 9.0f, 2.0f}, options).token_id, 0);
  }
}

TEST_CASE(rows_that_cannot_be_sampled_get_no_token) {
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity}) {
    for (const size_t size : kSizes) {
      for (const size_t at : {size_t{0}, size / 2, size - 1}) {
        std::vector<float> logits = random_logits(size, 5);
        logits[at] = value;
        for (Options options : kDrawing) {
          options.num_logprobs = 1;
          const Result result = sample(logits, options);
          CHECK_EQ(result.token_id, -1);
          CHECK(std::isnan(result.logprob));
          CHECK_EQ(result.rank, 0);
          CHECK_EQ(result.top_ids[0], -1);
        }
        CHECK_EQ(sample(logits, {.target_id = 0}).token_id, -1);
      }
    }
  }
  for (Options options : kDrawing) {
    options.mask = mask_of(40, [](size_t) { return false; });
    CHECK_EQ(sample(random_logits(40, 5), options).token_id, -1);
  }
}

TEST_CASE(bits_of_a_mask_beyond_the_vocabulary_are_ignored) {
  const Options options{.mask = {0x80000004u}};
  CHECK_EQ(sample({1.0f, 1.0f, 1.0f}, options).token_id, 2);
}

TEST_CASE(penalties_follow_the_tokens_seen) {
  Sampler sampler(3, 2);
  const std::vector<float> logits = {1.0f, 0.9f, 0.8f};
  const Options presence{.temperature = 0.0f, .presence_penalty = 0.5f, .state_slot = 1};
  for (const int32_t expected : {0, 1, 2, 0, 0}) {  // each drawn token is penalised once
    CHECK_EQ(sample(sampler, logits, presence).token_id, expected);
  }
  const std::vector<int32_t> prompt_and_output = {0, 0, 1};
  sampler.set_state(1, prompt_and_output, 2);  // replaces what was counted
  CHECK_EQ(sample(sampler, logits, presence).token_id, 0);
  sampler.set_state(1, prompt_and_output, 3);
  const Options repetition{.temperature = 0.0f, .repetition_penalty = 2.0f, .state_slot = 1};
  CHECK_EQ(sample(sampler, logits, repetition).token_id, 2);
  sampler.set_state(1, {}, 0);
  CHECK_EQ(sample(sampler, logits, repetition).token_id, 0);
}

TEST_CASE(scored_tokens_are_not_counted) {
  Sampler sampler(3, 1);
  const std::vector<float> logits = {1.0f, 0.9f, 0.8f};
  sample(sampler, logits, {.target_id = 0, .state_slot = 0});
  const Options options{.temperature = 0.0f, .frequency_penalty = 1.0f, .state_slot = 0};
  CHECK_EQ(sample(sampler, logits, options).token_id, 0);
}

TEST_CASE(states_refuse_what_is_out_of_range) {
  Sampler sampler(10, 2);
  const std::vector<int32_t> tokens = {3, 9};
  const std::vector<int32_t> too_large = {3, 10};
  const std::vector<int32_t> negative = {-1};
  CHECK(MESSAGE_OF(InvalidArgument, sampler.set_state(2, tokens, 0)).find("got 2") !=
        std::string::npos);
  CHECK(MESSAGE_OF(InvalidArgument, sampler.set_state(-1, tokens, 0)).find("got -1") !=
        std::string::npos);
  CHECK(MESSAGE_OF(InvalidArgument, sampler.set_state(0, tokens, 3)).find("got 3") !=
        std::string::npos);
  CHECK(MESSAGE_OF(InvalidArgument, sampler.set_state(0, too_large, 0)).find("got 10") !=
        std::string::npos);
  CHECK(MESSAGE_OF(InvalidArgument, sampler.set_state(0, negative, 0)).find("got -1") !=
        std::string::npos);
}

TEST_CASE(top_tokens_are_listed_best_first) {
  for (const size_t size : kSizes) {
    std::vector<float> logits = random_logits(size, 6);
    for (float& logit : logits) logit = std::round(logit / 4.0f);  // many ties
    std::vector<int32_t> expected(size);
    for (size_t t = 0; t < size; ++t) expected[t] = static_cast<int32_t>(t);
    std::stable_sort(expected.begin(), expected.end(),
                     [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    for (const size_t count : {size_t{1}, std::min<size_t>(20, size), size}) {
      const Result result =
          sample(logits, {.temperature = 0.0f, .num_logprobs = static_cast<int32_t>(count)});
      CHECK(std::equal(result.top_ids.begin(), result.top_ids.end(), expected.begin()));
      CHECK_EQ(result.top_logprobs[0], result.logprob);
    }
  }
}

TEST_MAIN()
