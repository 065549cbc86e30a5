// The first kernel of sampling, the only one that reads all logits of every row: statistics of each
// chunk, and for rows with a mask, biases or penalties the logits that they leave, with statistics
// of their own.
//
// Grid: (chunks / 4, rows); a warp for each chunk, 16 logits a lane, so that one row fills 63
// blocks and a launch's form says nothing about how a chunk is computed.
//
// Bytes: 4 a logit, and 12 a chunk for the statistics; processed rows read 4 more where they have
// penalties and write 4. Operations: about 12 a logit, one or two exponentials of them. Expected
// bound: memory; for 256 rows of 128,256 logits the operations take as long as two thirds of the
// bytes do. Estimate 85 % of the copy bandwidth.
//
// Registers: 40, for twelve blocks an SM: 96 KB in flight, more than bandwidth times latency (25 to
// 40 KB an SM). Where rows are processed 79, for six blocks: 48 KB.
//
// Determinism: a chunk is one warp's, in an order that kChunk fixes.
#include "backend/cuda/kernels/sampling_row.cuh"

namespace rapshee::cuda::sampling {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr uint32_t kInPrompt = 1u << 31;  // of a count; below: occurrences in the output

RAPSHEE_DEVICE bool is_finite(float x) {
  return (dev::float_to_bits(x) & 0x7f800000u) != 0x7f800000u;
}

// The same for all lanes.
RAPSHEE_DEVICE bool has_all_finite(const Tile& tile, int first, int64_t vocab) {
  bool bad = false;
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    RAPSHEE_UNROLL
    for (int c = 0; c < kVector; ++c) {
      bad |= first + offset_of(i) + c < vocab && !is_finite(tile.x[i][c]);
    }
  }
  return dev::ballot(bad) == 0;
}

RAPSHEE_DEVICE uint64_t best_of_tile(const Tile& tile, int first) {
  float best = tile.x[0][0];
  int offset = offset_of(0);
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    RAPSHEE_UNROLL
    for (int c = 0; c < kVector; ++c) {
      if (!(tile.x[i][c] > best)) continue;
      best = tile.x[i][c];
      offset = offset_of(i) + c;
    }
  }
  return warp_max(entry_of(best, first + offset));
}

RAPSHEE_DEVICE float mass_of_tile(const Tile& tile, float max, float scale) {
  if (max == -kInfinity) return 0.0f;
  float sum = 0.0f;
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    RAPSHEE_UNROLL
    for (int c = 0; c < kVector; ++c) sum += mass_of(tile.x[i][c], max, scale);
  }
  return warp_sum(sum);
}

RAPSHEE_DEVICE void apply_mask(const dev::Ptr<const uint32_t>& mask, int first, int64_t vocab,
                               Tile& y) {
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const int id = first + offset_of(i);
    if (id >= vocab) continue;
    const uint32_t allowed = mask[id / 32] >> (id % 32);
    RAPSHEE_UNROLL
    for (int c = 0; c < kVector; ++c) {
      if ((allowed >> c & 1u) == 0) y.x[i][c] = -kInfinity;
    }
  }
}

// Biases begin to end, in order: a token may have several.
RAPSHEE_DEVICE void apply_biases(const SamplingArrays& a, int begin, int end, int first, Tile& y) {
  const dev::Ptr<const int32_t> ids(a.bias_ids);
  const dev::Ptr<const float> values(a.bias_values);
  for (int base = begin; base < end; base += 32) {
    const int mine = base + dev::lane();
    const int offset = mine < end ? ids[mine] - first : -1;
    const bool here = offset >= 0 && offset < kChunk;
    const float value = here ? values[mine] : 0.0f;
    for (uint32_t left = dev::ballot(here); left != 0; left &= left - 1) {
      const int from = lowest_bit(left);
      const int at = dev::shfl(offset, from);
      const float bias = dev::shfl(value, from);
      RAPSHEE_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        RAPSHEE_UNROLL
        for (int c = 0; c < kVector; ++c) {
          if (offset_of(i) + c == at) y.x[i][c] = dev::min(y.x[i][c] + bias, kLargest);
        }
      }
    }
  }
}

// Repetition penalty on all tokens seen, frequency and presence on those of the output. Results
// stay finite upwards, whatever the penalties; an excluded token (-inf) stays excluded.
RAPSHEE_DEVICE float penalize(float logit, uint32_t count, const Penalties& penalties) {
  if (count == 0 || logit == -kInfinity) return logit;
  logit = logit > 0.0f ? dev::divide(logit, penalties.repetition) : logit * penalties.repetition;
  logit = dev::max(dev::min(logit, kLargest), -kLargest);  // inf - inf below would be NaN
  const uint32_t times = count & ~kInPrompt;
  if (times > 0) {
    // Rounded before it is subtracted, as on the CPU: in double the product is exact, and the
    // compiler cannot fuse the two.
    logit -= static_cast<float>(static_cast<double>(penalties.frequency) * times);
    logit -= penalties.presence;
  }
  return dev::min(logit, kLargest);
}

RAPSHEE_DEVICE void apply_penalties(const SamplingStep& step, const Penalties& penalties, int first,
                                    Tile& y) {
  const int64_t vocab = step.args.vocab;
  const auto counts = dev::Ptr<const uint32_t>(step.args.counts) + penalties.slot * vocab;
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    RAPSHEE_UNROLL
    for (int c = 0; c < kVector; ++c) {
      const int id = first + offset_of(i) + c;
      if (id < vocab) y.x[i][c] = penalize(y.x[i][c], counts[id], penalties);
    }
  }
}

RAPSHEE_DEVICE void process(const SamplingStep& step, const Changes& changes, int first, Tile& y) {
  const SamplingArrays& a = step.args.arrays;
  const int64_t vocab = step.args.vocab;
  if (changes.mask >= 0) {
    const int64_t words = (vocab + 31) / 32;
    apply_mask(dev::Ptr<const uint32_t>(a.masks) + changes.mask * words, first, vocab, y);
  }
  apply_biases(a, changes.first_bias, changes.end_bias, first, y);
  if (changes.penalties.any()) apply_penalties(step, changes.penalties, first, y);
}

RAPSHEE_DEVICE void store_tile(const Tile& tile, const dev::Ptr<float>& to, int first,
                               int64_t size) {
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const int id = first + offset_of(i);
    if (id >= size) continue;
    dev::store16(to + id,
                 dev::Vec16{{dev::float_to_bits(tile.x[i][0]), dev::float_to_bits(tile.x[i][1]),
                             dev::float_to_bits(tile.x[i][2]), dev::float_to_bits(tile.x[i][3])}});
  }
}

template <bool kProcess>
RAPSHEE_KERNEL(kThreads, 6)
stats_kernel(RAPSHEE_PARAM SamplingStep step) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const SampleArgs& args = step.args;
  const int chunk = static_cast<int>(dev::block().x) * (dev::num_threads() / 32) + dev::warp();
  if (chunk >= step.num_chunks) return;
  const auto row = static_cast<int>(dev::block().y);
  const int64_t r = step_row(args, row);
  const int first = chunk * kChunk;
  const int64_t cell = int64_t{row} * step.num_chunks + chunk;

  Tile tile = load_tile(dev::Ptr<const float>(args.logits) + row * args.vocab, first, args.vocab,
                        step.vectors);
  const float temperature = dev::Ptr<const float>(args.arrays.temperature)[r];
  const bool finite = has_all_finite(tile, first, args.vocab);
  uint64_t best = finite ? best_of_tile(tile, first) : kNotFinite;
  const float sum = finite ? mass_of_tile(tile, value_of_entry(best), kLog2E) : 0.0f;
  if (dev::lane() == 0) {
    dev::Ptr<uint64_t>(step.raw_best)[cell] = best;
    dev::Ptr<float>(step.raw_sum)[cell] = sum;
  }

  bool processed = false;
  if constexpr (kProcess) {
    const Changes changes = Changes::read(args.arrays, r);
    processed = changes.any();
    if (processed) {
      process(step, changes, first, tile);
      store_tile(tile, dev::Ptr<float>(step.processed) + row * step.processed_stride, first,
                 step.processed_stride);
      if (finite) best = best_of_tile(tile, first);
      if (dev::lane() == 0) dev::Ptr<uint64_t>(step.best)[cell] = best;
    }
  }
  if (!(temperature > 0.0f) || !finite) return;
  const float scale = mass_scale(temperature);
  const bool same = !processed && scale == kLog2E;
  const float mass = same ? sum : mass_of_tile(tile, value_of_entry(best), scale);
  if (dev::lane() == 0) dev::Ptr<float>(step.mass)[cell] = mass;
}

}  // namespace

void launch_stats(const SamplingStep& step, Stream stream) {
  const int warps = step.num_chunks < kWarps ? step.num_chunks : kWarps;
  const dev::Grid grid{static_cast<unsigned>((step.num_chunks + warps - 1) / warps),
                       static_cast<unsigned>(step.args.rows)};
  const dev::Launch config{grid, 32 * warps, 0, stream};
  dev::launch(step.args.needs.process ? stats_kernel<true> : stats_kernel<false>, config, step);
}

}  // namespace rapshee::cuda::sampling
