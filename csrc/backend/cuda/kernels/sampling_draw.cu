// The last kernel that every row of sampling needs: merges the statistics of the chunks, draws the
// token, and writes it, its log-probability and its count.
//
// Grid: a warp for each row, a block each. The draw is an inverse CDF in id order, first over the
// masses of the chunks, then over the tokens of one.
//
// Bytes: the statistics, 12 to 24 for each 512 logits, and one chunk of logits. Expected bound:
// latency, of about six dependent reads and two scans; estimate 3 us.
//
// Registers: 16 logits, their masses, doubles; about 72, and many more would do, as a block is one
// warp.
//
// Determinism: sums of masses are integers; the sum of exponentials is taken chunk by chunk in each
// lane, then by a tree: an order that the vocabulary fixes.
#include "backend/cuda/kernels/sampling_row.cuh"

namespace rapshee::cuda::sampling {
namespace {

constexpr int kThreads = 32;

// Philox4x32-10 of Salmon, Moraes, Dror and Shaw (SC 2011), counter (draw_index, 0, 0, 0), key
// `seed`: 64 random bits, of which the upper 53 are a uniform number in [0, 1).
RAPSHEE_DEVICE uint64_t philox_bits(uint64_t seed, uint32_t draw_index) {
  constexpr int kRounds = 10;
  constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;  // golden ratio, sqrt(3) - 1
  uint32_t c0 = draw_index, c1 = 0, c2 = 0, c3 = 0;
  auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t high0 = dev::mul_high(kMultiplier0, c0), low0 = kMultiplier0 * c0;
    const uint32_t high1 = dev::mul_high(kMultiplier1, c2), low1 = kMultiplier1 * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  constexpr uint64_t kUpper53 = ~uint64_t{0} << 11;
  return (static_cast<uint64_t>(c1) << 32 | c0) & kUpper53;
}

// Natural logarithm of the sum of exp(logit); NaN if a logit is not finite.
RAPSHEE_DEVICE double merge_sums(const SamplingStep& step, int row, uint64_t best) {
  if (best == kNotFinite) return std::numeric_limits<double>::quiet_NaN();
  const ChunkedRow raw = ChunkedRow::raw(step, row);
  const auto sums = dev::Ptr<const float>(step.raw_sum) + int64_t{row} * step.num_chunks;
  const double max = value_of_entry(best);
  double sum = 0.0;
  for (int c = dev::lane(); c < step.num_chunks; c += 32) {
    sum = dev::fma(static_cast<double>(sums[c]), dev::exp(value_of_entry(raw.best[c]) - max), sum);
  }
  return max + dev::log(warp_sum(sum));
}

// A place in the cumulative distribution: a chunk, or a token, and how far into it.
struct Place {
  int index;
  uint64_t rest;
};

// What the tokens of a row weigh.
struct Distribution {
  ChunkedRow logits;
  float max, scale;
  bool filtered;
  uint32_t threshold;  // lowest key that is kept
  dev::Ptr<const uint64_t> survivors;
  dev::Ptr<const float> masses;

  RAPSHEE_DEVICE uint64_t mass_of_chunk(int chunk) const {
    return filtered ? survivors[chunk] : chunk_mass(logits.best[chunk], masses[chunk], max, scale);
  }
  RAPSHEE_DEVICE uint64_t mass_of_token(float logit) const {
    return key_of(logit) >= threshold ? fixed_point(mass_of(logit, max, scale)) : 0;
  }

  // The chunk in which the cumulative distribution passes u / 2^64. A lane has a run of chunks.
  RAPSHEE_DEVICE Place find_chunk(uint64_t u) const {
    const int run = (logits.num_chunks + 31) / 32;
    const int begin = dev::lane() * run;
    const int end = begin + run < logits.num_chunks ? begin + run : logits.num_chunks;
    uint64_t mine = 0;
    for (int c = begin; c < end; ++c) mine += mass_of_chunk(c);
    const uint64_t reached = warp_scan(mine);
    const uint64_t point = dev::mul_high(u, dev::shfl(reached, 31));
    const bool here = point < reached && point >= reached - mine;
    Place place{begin, point - (reached - mine)};
    if (here) {
      for (uint64_t m = mass_of_chunk(begin); place.rest >= m; m = mass_of_chunk(place.index)) {
        place.rest -= m;
        ++place.index;
      }
    }
    const int owner = lowest_bit(dev::ballot(here));
    return {dev::shfl(place.index, owner), dev::shfl(place.rest, owner)};
  }

  // The token of the chunk at which the mass in id order passes `rest`. The chunk's mass may have
  // been rounded up: beyond its last token with mass it is that one.
  RAPSHEE_DEVICE int find_token(int chunk, uint64_t rest) const {
    const Tile tile = logits.load(chunk);
    const int first = chunk * kChunk;
    int token = -1;
    int last = -1;
    uint64_t before = 0;
    RAPSHEE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      uint64_t mine = 0;
      RAPSHEE_UNROLL
      for (int c = 0; c < kVector; ++c) mine += mass_of_token(tile.x[i][c]);
      const uint64_t reached = before + warp_scan(mine);
      uint64_t passed = reached - mine;
      RAPSHEE_UNROLL
      for (int c = 0; c < kVector; ++c) {
        const uint64_t m = mass_of_token(tile.x[i][c]);
        const int id = first + offset_of(i) + c;
        if (m > 0) last = id;
        if (rest >= passed && rest - passed < m) token = id;
        passed += m;
      }
      before = dev::shfl(reached, 31);
    }
    token = warp_max(token);
    if (token >= 0) return token;
    last = warp_max(last);
    return last >= 0 ? last : id_of_entry(logits.best[chunk]);
  }
};

// What a draw depends on, read before it is needed.
struct DrawOptions {
  ChunkedRow logits;
  bool filtered;
  float temperature;
  uint64_t u;  // uniform, of 2^64

  RAPSHEE_DEVICE static DrawOptions read(const SamplingStep& step, int row, int64_t r) {
    const SamplingArrays& a = step.args.arrays;
    return {ChunkedRow::drawn(step, row), is_filtered(step.args, r),
            dev::Ptr<const float>(a.temperature)[r],
            philox_bits(dev::Ptr<const uint64_t>(a.seed)[r],
                        dev::Ptr<const uint32_t>(a.draw_index)[r])};
  }
};

// -1 where nothing is allowed.
RAPSHEE_DEVICE int draw(const SamplingStep& step, int row, const DrawOptions& options) {
  const auto& [logits, filtered, temperature, u] = options;
  const uint64_t best = best_of_row(logits);
  if (key_of_entry(best) < kLowestKey) return -1;
  if (temperature == 0.0f) return id_of_entry(best);
  const int64_t cell = int64_t{row} * step.num_chunks;
  const Distribution distribution{
      logits,
      value_of_entry(best),
      mass_scale(temperature),
      filtered,
      filtered ? dev::Ptr<const uint32_t>(step.threshold)[row] : kLowestKey,
      dev::Ptr<const uint64_t>(step.survivors) + cell,
      dev::Ptr<const float>(step.mass) + cell};
  const Place place = distribution.find_chunk(u);
  return distribution.find_token(place.index, place.rest);
}

RAPSHEE_KERNEL(kThreads, 1)
draw_kernel(RAPSHEE_PARAM SamplingStep step) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const SampleArgs& args = step.args;
  const auto row = static_cast<int>(dev::block().x);
  const int64_t r = step_row(args, row);
  const DrawOptions options = DrawOptions::read(step, row, r);
  const ChunkedRow raw = ChunkedRow::raw(step, row);
  const uint64_t best = best_of_row(raw);
  const double log_sum_exp = merge_sums(step, row, best);
  const int32_t target = dev::Ptr<const int32_t>(args.arrays.target_ids)[r];
  int token = -1;
  if (best != kNotFinite) token = target >= 0 ? target : draw(step, row, options);
  if (dev::lane() != 0) return;

  dev::Ptr<double>(step.log_sum_exp)[row] = log_sum_exp;
  dev::Ptr<int32_t>(args.token_ids)[r] = token;
  dev::Ptr<int32_t>(args.ranks)[r] = 0;
  dev::Ptr<float>(args.logprobs)[r] = token < 0
                                          ? std::numeric_limits<float>::quiet_NaN()
                                          : static_cast<float>(raw.logits[token] - log_sum_exp);
  const int32_t slot = dev::Ptr<const int32_t>(args.arrays.state_slot)[r];
  if (token >= 0 && target < 0 && slot >= 0) {
    dev::atomic_add(dev::Ptr<uint32_t>(args.counts) + (slot * args.vocab + token), 1u);
  }
}

}  // namespace

void launch_draw(const SamplingStep& step, Stream stream) {
  dev::launch(draw_kernel, {{static_cast<unsigned>(step.args.rows)}, kThreads, 0, stream}, step);
}

}  // namespace rapshee::cuda::sampling
