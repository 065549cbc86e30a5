// Ranks and the most likely tokens, by the logits as they are.
//
// Grid: a block for each row, a warp for each chunk up to 16. The rank counts larger logits in the
// chunks whose maximum is larger. The n most likely tokens are selected as by top-k, ties by id,
// then sorted by a bitonic network.
//
// Bytes: the statistics, and the chunks with a larger logit or a candidate: for a likely token or
// n = 20 about 20 of 251 chunks; for an unlikely one up to all, 4 bytes a logit. Expected bound:
// latency, of about 10 passes with two barriers each; estimate 10 us for few rows.
//
// Registers: 16 logits a lane; 63, for two blocks of 512 threads an SM. Shared memory: 26 KB.
//
// Determinism: counts, and an order without equals.
#include "backend/cuda/kernels/sampling_select.cuh"

namespace rapshee::cuda::sampling {
namespace {

constexpr size_t kSharedBytes = kSelectBytes + kSharedSort * sizeof(uint64_t);

RAPSHEE_DEVICE int64_t count_larger(const ChunkedRow& row, float logit) {
  uint64_t count = 0;
  visit_chunks(row, key_of(logit) + 1, [&](int chunk) {
    const Tile tile = row.load(chunk);
    RAPSHEE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      RAPSHEE_UNROLL
      for (int c = 0; c < kVector; ++c) count += tile.x[i][c] > logit ? 1 : 0;
    }
  });
  return static_cast<int64_t>(block_sum(count));
}

// An entry that exactly n of the row reach, all of them candidates.
RAPSHEE_DEVICE uint64_t select_entry(const ChunkedRow& row, int64_t n, Candidates& candidates) {
  candidates.collect(bound_of_largest(row, n));
  const Selection logit = select_largest(candidates, kHighestKey, n);
  const uint64_t first = static_cast<uint64_t>(logit.key) << 32;
  if (logit.wanted == logit.inside) return first;
  const uint32_t lowest = ~static_cast<uint32_t>(row.size);
  const auto add_equals = [&](const auto& add) {
    candidates.each([&](uint64_t entry) {
      if (key_of_entry(entry) == logit.key) add(static_cast<uint32_t>(entry), uint64_t{1});
    });
  };
  return first | select(lowest, ~0u, logit.wanted, add_equals).key;
}

// Descending; size: a power of two. Pointer: to shared or global memory.
template <class Pointer>
RAPSHEE_DEVICE void sort(const Pointer& entries, int64_t size) {
  for (int64_t run = 2; run <= size; run *= 2) {
    for (int64_t distance = run / 2; distance > 0; distance /= 2) {
      dev::sync();
      for (int64_t i = dev::thread(); i < size / 2; i += dev::num_threads()) {
        const int64_t low = i / distance * 2 * distance + i % distance;
        const int64_t high = low + distance;
        const uint64_t a = entries[low], b = entries[high];
        const bool descending = (low & run) == 0;
        if (a != b && (a < b) == descending) {
          entries[low] = b;
          entries[high] = a;
        }
      }
    }
  }
  dev::sync();
}

template <class Pointer>
RAPSHEE_DEVICE void list_top(const SamplingStep& step, int row, int64_t n,
                             const Candidates& candidates, uint64_t lowest,
                             const Pointer& entries) {
  const auto count = shared_cell(kCount);
  const int64_t size = sort_size(n);
  for (int64_t i = n + dev::thread(); i < size; i += dev::num_threads()) entries[i] = 0;
  dev::sync();
  if (dev::thread() == 0) *count = 0;
  dev::sync();
  candidates.each([&](uint64_t entry) {
    if (entry >= lowest) entries[dev::atomic_add(count, 1u)] = entry;
  });
  sort(entries, size);
  const int64_t cell = step_row(step.args, row) * step.args.needs.top_width;
  const dev::Ptr<int32_t> ids(step.args.top_ids);
  const dev::Ptr<float> logprobs(step.args.top_logprobs);
  const double log_sum_exp = dev::Ptr<const double>(step.log_sum_exp)[row];
  for (int64_t i = dev::thread(); i < n; i += dev::num_threads()) {
    const uint64_t entry = entries[i];
    ids[cell + i] = id_of_entry(entry);
    logprobs[cell + i] =
        static_cast<float>(static_cast<double>(value_of_entry(entry)) - log_sum_exp);
  }
}

RAPSHEE_KERNEL(32 * kMaxWarps, 2)
rank_kernel(RAPSHEE_PARAM SamplingStep step) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const SampleArgs& args = step.args;
  const auto row = static_cast<int>(dev::block().x);
  const int64_t r = step_row(args, row);
  const int32_t token = dev::Ptr<const int32_t>(args.token_ids)[r];
  const int32_t num_logprobs = dev::Ptr<const int32_t>(args.arrays.num_logprobs)[r];
  const int width = args.needs.top_width;
  int64_t n = num_logprobs < width ? num_logprobs : width;
  if (token < 0) n = 0;
  for (int64_t i = n + dev::thread(); i < width; i += dev::num_threads()) {
    dev::Ptr<int32_t>(args.top_ids)[r * width + i] = -1;
    dev::Ptr<float>(args.top_logprobs)[r * width + i] = -kInfinity;
  }
  const bool ranked = num_logprobs > 0 || dev::Ptr<const int32_t>(args.arrays.target_ids)[r] >= 0;
  if (token < 0 || !ranked) return;

  const ChunkedRow logits = ChunkedRow::raw(step, row);
  const int64_t larger = count_larger(logits, logits.logits[token]);
  if (dev::thread() == 0) dev::Ptr<int32_t>(args.ranks)[r] = static_cast<int32_t>(larger + 1);
  if (n == 0) return;
  clear_histogram();
  Candidates candidates(logits);
  const uint64_t lowest = select_entry(logits, n, candidates);
  if (n <= kSharedSort) {
    list_top(step, row, n, candidates, lowest, dev::shared<uint64_t>(kSelectBytes));
  } else {
    list_top(step, row, n, candidates, lowest,
             dev::Ptr<uint64_t>(step.sorted) + row * sort_size(width));
  }
}

}  // namespace

void launch_rank(const SamplingStep& step, Stream stream) {
  dev::launch(rank_kernel,
              {{static_cast<unsigned>(step.args.rows)},
               threads_of_row(step.num_chunks),
               kSharedBytes,
               stream},
              step);
}

}  // namespace rapshee::cuda::sampling
