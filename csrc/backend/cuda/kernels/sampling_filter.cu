// min-p, top-k and top-p: each keeps the logits from some value upwards (ties included), so
// together they are one threshold. This kernel finds it, and the mass of what is left of each
// chunk.
//
// Grid: a block for each row, a warp for each chunk up to 16; rows without filters leave at once.
// Candidates that include all that the filters keep are collected first, by a bound from the
// chunks' maxima, into shared memory; then selected from there (sampling_select.cuh). Where the
// distribution is so flat that they do not fit, the chunks are read again in each pass.
//
// Bytes: the statistics, and twice the chunks with a candidate, mostly from L2: for a usual top-k
// or nucleus 20 to 100 of 251 chunks. Expected bound: latency, of about 12 passes with two barriers
// each; estimate 12 us for few rows, 25 us for 256.
//
// Registers: 16 logits a lane; 64, for two blocks of 512 threads an SM. Shared memory: 18 KB.
//
// Determinism: the candidates' order varies, what is computed from it does not: counts, and sums of
// integers.
#include "backend/cuda/kernels/sampling_select.cuh"

namespace rapshee::cuda::sampling {
namespace {

// The key of the smallest float that is not below `value`, of finite ones.
RAPSHEE_DEVICE uint32_t key_upwards(double value) {
  if (!(value > -static_cast<double>(kLargest))) return kLowestKey;
  const auto rounded = static_cast<float>(value);
  return key_of(rounded) + (static_cast<double>(rounded) < value ? 1 : 0);
}

// One row's distribution and what the filters have left of it.
class Filter {
 public:
  RAPSHEE_DEVICE Filter(const SamplingStep& step, int row, const ChunkedRow& logits, uint64_t best)
      : step_(step),
        row_(row),
        logits_(logits),
        candidates_(logits),
        highest_(key_of_entry(best)),
        max_(value_of_entry(best)),
        temperature_(dev::Ptr<const float>(step.args.arrays.temperature)[step_row(step.args, row)]),
        scale_(mass_scale(temperature_)) {}

  RAPSHEE_DEVICE void apply(const Filters& filters) {
    if (filters.min_p > 0.0f) raise(key_of_mass(static_cast<double>(filters.min_p)));
    if (filters.top_k > 0) {
      keep_top_k(filters.top_k);
    } else if (filters.min_p > 0.0f && filters.top_p < 1.0f) {
      candidates_.collect(threshold_);
    }
    if (filters.top_p < 1.0f) {
      const bool collected = filters.top_k > 0 || filters.min_p > 0.0f;
      collected ? keep_top_p(filters.top_p) : collect_and_keep_top_p(filters.top_p);
    }
  }

  // Writes the threshold, and the mass of the survivors of each chunk.
  RAPSHEE_DEVICE void measure() const {
    const auto survivors = dev::Ptr<uint64_t>(step_.survivors) + int64_t{row_} * logits_.num_chunks;
    if (dev::thread() == 0) dev::Ptr<uint32_t>(step_.threshold)[row_] = threshold_;
    for (int c = dev::thread(); c < logits_.num_chunks; c += dev::num_threads()) {
      if (key_of_entry(logits_.best[c]) < threshold_) survivors[c] = 0;
    }
    visit_chunks(logits_, threshold_, [&](int chunk) {
      const Tile tile = logits_.load(chunk);
      uint64_t mass = 0;
      RAPSHEE_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        RAPSHEE_UNROLL
        for (int c = 0; c < kVector; ++c) {
          if (key_of(tile.x[i][c]) >= threshold_) {
            mass += fixed_point(mass_of(tile.x[i][c], max_, scale_));
          }
        }
      }
      mass = warp_sum(mass);
      if (dev::lane() == 0) survivors[chunk] = mass;
    });
  }

 private:
  RAPSHEE_DEVICE void raise(uint32_t key) { threshold_ = key > threshold_ ? key : threshold_; }

  // Of the logit with a given mass, 0 < mass <= 1.
  RAPSHEE_DEVICE uint32_t key_of_mass(double mass) const {
    const float inverse = dev::min(dev::divide(1.0f, temperature_), kLargest);
    return key_upwards(static_cast<double>(max_) + dev::log(mass) / static_cast<double>(inverse));
  }

  RAPSHEE_DEVICE uint64_t mass_of_entry(uint64_t entry) const {
    return fixed_point(mass_of(value_of_entry(entry), max_, scale_));
  }

  // Where an earlier filter left fewer than k, its threshold is the higher one.
  RAPSHEE_DEVICE void keep_top_k(int64_t k) {
    const uint32_t bound = bound_of_largest(logits_, k);
    candidates_.collect(bound > threshold_ ? bound : threshold_);
    if (candidates_.count() < k) return;
    raise(select_largest(candidates_, highest_, k).key);
  }

  RAPSHEE_DEVICE uint64_t mass_of_candidates() const {
    uint64_t mass = 0;
    candidates_.each([&](uint64_t entry) {
      if (key_of_entry(entry) >= threshold_) mass += mass_of_entry(entry);
    });
    return block_sum(mass);
  }

  RAPSHEE_DEVICE uint64_t mass_of_chunks() const {
    const auto masses = dev::Ptr<const float>(step_.mass) + int64_t{row_} * logits_.num_chunks;
    uint64_t mass = 0;
    for (int c = dev::thread(); c < logits_.num_chunks; c += dev::num_threads()) {
      mass += chunk_mass(logits_.best[c], masses[c], max_, scale_);
    }
    return block_sum(mass);
  }

  // The smallest integer that is not below top_p of `total`, 1 at least.
  RAPSHEE_DEVICE static uint64_t share_of(uint64_t total, float top_p) {
    const double exact = static_cast<double>(top_p) * static_cast<double>(total);
    auto share = static_cast<uint64_t>(exact);
    if (static_cast<double>(share) < exact || share == 0) ++share;
    return share;
  }

  // Of the candidates that are left.
  RAPSHEE_DEVICE void select_mass(uint64_t target) {
    raise(candidates_.bound());
    const auto add_all = [&](const auto& add) {
      candidates_.each([&](uint64_t entry) { add(key_of_entry(entry), mass_of_entry(entry)); });
    };
    raise(select(threshold_, highest_, target, add_all).key);
  }

  // Of the candidates, which are all that is left.
  RAPSHEE_DEVICE void keep_top_p(float top_p) {
    select_mass(share_of(mass_of_candidates(), top_p));
  }

  // A peaked distribution is done with the logits that reach the median maximum of a chunk, about
  // 0.7 n of them for n chunks. If not, those below a negligible mass can be left out: all together
  // they have at most half of what top-p may cut off.
  RAPSHEE_DEVICE void collect_and_keep_top_p(float top_p) {
    const uint64_t total = mass_of_chunks();
    const uint64_t target = share_of(total, top_p);
    candidates_.collect(bound_of_largest(logits_, (logits_.num_chunks + 1) / 2));
    if (mass_of_candidates() < target) {
      const double share = static_cast<double>(total) / static_cast<double>(fixed_point(1.0f)) /
                           static_cast<double>(step_.args.vocab);
      candidates_.collect(key_of_mass(0.5 * (1.0 - static_cast<double>(top_p)) * share));
    }
    select_mass(target);
  }

  const SamplingStep& step_;
  int row_;
  ChunkedRow logits_;
  Candidates candidates_;
  uint32_t threshold_ = kLowestKey;  // all but -inf
  uint32_t highest_;
  float max_, temperature_, scale_;
};

RAPSHEE_KERNEL(32 * kMaxWarps, 2)
filter_kernel(RAPSHEE_PARAM SamplingStep step) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const auto row = static_cast<int>(dev::block().x);
  const int64_t r = step_row(step.args, row);
  if (!is_filtered(step.args, r)) return;
  const ChunkedRow logits = ChunkedRow::drawn(step, row);
  const uint64_t best = best_of_row(logits);
  // Nothing to draw, as sampling_draw.cu finds too.
  if (key_of_entry(best) < kLowestKey || best == kNotFinite) return;
  clear_histogram();
  Filter filter(step, row, logits, best);
  filter.apply(Filters::read(step.args, r));
  filter.measure();
}

}  // namespace

void launch_filter(const SamplingStep& step, Stream stream) {
  dev::launch(filter_kernel,
              {{static_cast<unsigned>(step.args.rows)},
               threads_of_row(step.num_chunks),
               kSelectBytes,
               stream},
              step);
}

}  // namespace rapshee::cuda::sampling
