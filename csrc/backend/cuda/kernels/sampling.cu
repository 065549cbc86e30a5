// Sampling: from rows of logits to tokens, log-probabilities, ranks and the most likely tokens.
//
// Two to four kernels, each in a file of its own:
//   sampling_stats.cu   statistics of chunks, mask, bias, penalties      all logits, once
//   sampling_filter.cu  min-p, top-k, top-p                              if any row needs it
//   sampling_draw.cu    the token and its log-probability
//   sampling_rank.cu    its rank, the most likely tokens                 if any row needs it
//
// Which of them run depends on the needs of the launch, what they compute for a row on the row's
// own options and logits: a row that needs less than others leaves a kernel at once.
#include "backend/cuda/kernels/sampling_row.cuh"

namespace rapshee::cuda {
namespace {

using sampling::SamplingStep;

// Hands out parts of the workspace, or of none to count its bytes.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}

  template <class T>
  void take(T*& array, int64_t count) {
    array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    constexpr size_t kAlignment = 256;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  size_t bytes_ = 0;
};

// Sizes and workspace of a launch of `rows`; returns the bytes of the workspace.
size_t lay_out(std::byte* workspace, int64_t rows, int64_t vocab, int64_t top_width,
               SamplingStep& step) {
  step.num_chunks = static_cast<int>((vocab + sampling::kChunk - 1) / sampling::kChunk);
  step.processed_stride = (vocab + sampling::kVector - 1) / sampling::kVector * sampling::kVector;
  const int64_t chunks = rows * step.num_chunks;
  Arena arena(workspace);
  arena.take(step.raw_best, chunks);
  arena.take(step.raw_sum, chunks);
  arena.take(step.log_sum_exp, rows);
  arena.take(step.best, chunks);
  arena.take(step.mass, chunks);
  arena.take(step.survivors, chunks);
  arena.take(step.threshold, rows);
  arena.take(step.processed, rows * step.processed_stride);
  if (top_width > sampling::kSharedSort) {
    arena.take(step.sorted, rows * sampling::sort_size(top_width));
  }
  return arena.bytes();
}

}  // namespace

size_t sample_workspace_bytes(int max_rows, int64_t vocab, int max_top_width) {
  SamplingStep step;
  return lay_out(nullptr, max_rows, vocab, max_top_width, step);
}

void sample(const SampleArgs& args, Stream stream) {
  constexpr int kMaxRows = 65535;  // of a grid's y
  RAPSHEE_CHECK(args.vocab > 0 && args.vocab <= sampling::kMaxVocab, "vocab: got ", args.vocab,
                ", expected 1 to ", sampling::kMaxVocab);
  RAPSHEE_CHECK(args.rows >= 0 && args.rows <= kMaxRows, "rows: got ", args.rows,
                ", expected 0 to ", kMaxRows);
  RAPSHEE_CHECK(args.needs.top_width >= 0 && args.needs.top_width <= args.vocab, "top_width: got ",
                args.needs.top_width, ", expected 0 to ", args.vocab);
  if (args.rows == 0) return;
  SamplingStep step;
  step.args = args;
  step.vectors = args.vocab % sampling::kVector == 0 &&
                 reinterpret_cast<uintptr_t>(args.logits) % sizeof(dev::Vec16) == 0;
  lay_out(static_cast<std::byte*>(args.workspace), args.rows, args.vocab, args.needs.top_width,
          step);
  sampling::launch_stats(step, stream);
  if (args.needs.filter) sampling::launch_filter(step, stream);
  sampling::launch_draw(step, stream);
  if (args.needs.rank || args.needs.top_width > 0) sampling::launch_rank(step, stream);
}

}  // namespace rapshee::cuda
