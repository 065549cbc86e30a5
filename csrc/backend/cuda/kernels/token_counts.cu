// Token counts of a slot from the tokens of its request, for the penalties.
//
// Grid: a block for each 2048 tokens of the vocabulary, which counts them in shared memory: one
// launch clears, marks and adds, and needs no atomics on device memory. Every block reads all
// tokens of the request, once as a prompt, once as output; a few hundred KB from L2.
//
// Bytes: 4 a token of the vocabulary written, 4 a token of the request read by each block. Expected
// bound: latency; requests of 100,000 tokens about 10 us. It runs when a request is admitted.
//
// Shared memory: 8 KB a block. Determinism: counts are integers.
#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRange = 2048;  // tokens of a block
constexpr uint32_t kInPrompt = 1u << 31;

RAPSHEE_KERNEL(kThreads, 4)
set_token_counts_kernel(RAPSHEE_PARAM SetStateArgs args) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const auto counts = dev::shared<uint32_t>();
  const int64_t first = int64_t{dev::block().x} * kRange;
  const int64_t left = args.vocab - first;
  const auto size = static_cast<int>(left < kRange ? left : kRange);
  const dev::Ptr<const int32_t> tokens(args.tokens);
  for (int i = dev::thread(); i < size; i += kThreads) counts[i] = 0;
  dev::sync();
  for (int i = dev::thread(); i < args.num_prompt_tokens; i += kThreads) {
    const int64_t at = tokens[i] - first;
    if (at >= 0 && at < size) dev::atomic_max(counts + at, kInPrompt);
  }
  dev::sync();
  for (int i = args.num_prompt_tokens + dev::thread(); i < args.num_tokens; i += kThreads) {
    const int64_t at = tokens[i] - first;
    if (at >= 0 && at < size) dev::atomic_add(counts + at, 1u);
  }
  dev::sync();
  const auto out = dev::Ptr<uint32_t>(args.counts) + first;
  for (int i = dev::thread(); i < size; i += kThreads) out[i] = counts[i];
}

}  // namespace

void set_token_counts(const SetStateArgs& args, Stream stream) {
  RAPSHEE_CHECK(args.num_prompt_tokens >= 0 && args.num_prompt_tokens <= args.num_tokens,
                "num_prompt_tokens: got ", args.num_prompt_tokens, ", expected 0 to ",
                args.num_tokens);
  if (args.vocab == 0) return;
  const dev::Grid grid{static_cast<unsigned>((args.vocab + kRange - 1) / kRange)};
  constexpr size_t kSharedBytes = size_t{kRange} * sizeof(uint32_t);
  dev::launch(set_token_counts_kernel, {grid, kThreads, kSharedBytes, stream}, args);
}

}  // namespace rapshee::cuda
