// Whole steps of a tiny model, on each instruction set and weight format. Under sanitizers this
// walks through the decoder, the kernels and the sampler; what comes out is compared bit by bit
// between different ways to cut the same prompt into steps and different numbers of threads.
#include "runner/model_runner.h"

#include <stdlib.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "backend/cpu/cpu_features.h"
#include "check.h"
#include "core/dtype.h"
#include "temp_folder.h"

namespace rapshee {
namespace {

using testing::TempFolder;

constexpr int kBlockSize = 16;
constexpr int kNumBlocks = 8;
constexpr int kWindow = 20;
constexpr int kWindowBlocks = 3;  // of the layers with a window, each used again after a while
constexpr int kPrompt = 37;
constexpr int kGenerated = 14;

// Sizes that are no multiples of what kernels work in, wherever the formats allow it.
ModelConfig tiny_config() {
  ModelConfig config;
  config.vocab_size = 301;
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.max_position = kBlockSize * kNumBlocks;
  config.rms_norm_eps = 1e-5f;
  config.query_scale = 0.25f;
  config.tie_embeddings = true;
  config.ropes = {Rope{{1.0f, 0.5f, 0.25f, 0.125f, 0.1f, 0.05f, 0.02f, 0.01f}, 1.0f}};
  config.layers = {LayerConfig{}, LayerConfig{0, kWindow}};
  return config;
}

// Collects tensors with random content and writes them to one file.
class TinyCheckpoint {
 public:
  TinyCheckpoint(const ModelConfig& config, DType matrices) : matrices_(matrices) {
    matrix("embed.weight", config.vocab_size, config.hidden_size);
    for (int i = 0; i < config.num_layers(); ++i) {
      const std::string at = "layers." + std::to_string(i) + ".";
      norm(at + "attn_norm.weight", config.hidden_size);
      matrix(at + "q.weight", config.q_size(), config.hidden_size);
      matrix(at + "k.weight", config.kv_size(), config.hidden_size);
      matrix(at + "v.weight", config.kv_size(), config.hidden_size);
      matrix(at + "o.weight", config.hidden_size, config.q_size());
      norm(at + "mlp_norm.weight", config.hidden_size);
      matrix(at + "gate.weight", config.intermediate_size, config.hidden_size);
      matrix(at + "up.weight", config.intermediate_size, config.hidden_size);
      matrix(at + "down.weight", config.hidden_size, config.intermediate_size);
    }
    norm("final_norm.weight", config.hidden_size);
    const std::string path = folder_.write("model.bin", bytes_);
    for (TensorEntry& entry : entries_) entry.file = path;
  }

  const std::vector<TensorEntry>& entries() const { return entries_; }

 private:
  uint32_t random() {  // xorshift32
    state_ ^= state_ << 13;
    state_ ^= state_ >> 17;
    state_ ^= state_ << 5;
    return state_;
  }

  template <class T>
  void append(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }

  void block() {
    const float uniform = static_cast<float>(random() >> 8) / 0x1p24f - 0.5f;
    switch (matrices_) {
      case DType::kF32:
        return append(uniform);
      case DType::kF16:
        return append(f32_to_f16(uniform));
      case DType::kBF16:
        return append(f32_to_bf16(uniform));
      default:
        append(f32_to_f16(matrices_ == DType::kQ8_0 ? 0.004f : 0.06f));
        if (matrices_ == DType::kQ4_1) append(f32_to_f16(-0.45f));
        const int codes = matrices_ == DType::kQ8_0 ? 32 : 16;
        for (int i = 0; i < codes; ++i) append(static_cast<uint8_t>(random() >> 24));
    }
  }

  void matrix(const std::string& name, int64_t rows, int64_t cols) {
    begin(name, matrices_, {rows, cols});
    for (int64_t i = 0; i < rows * cols; i += block_elements(matrices_)) block();
    end();
  }

  void norm(const std::string& name, int64_t n) {
    begin(name, DType::kF32, {n});
    for (int64_t i = 0; i < n; ++i) append(1.0f + static_cast<float>(i % 5) * 0.1f);
    end();
  }

  void begin(const std::string& name, DType dtype, std::vector<int64_t> shape) {
    entries_.push_back({name, dtype, std::move(shape), "", static_cast<int64_t>(bytes_.size()), 0});
  }

  void end() {
    TensorEntry& entry = entries_.back();
    entry.nbytes = static_cast<int64_t>(bytes_.size()) - entry.offset;
  }

  TempFolder folder_;
  DType matrices_;
  uint32_t state_ = 2463534242u;
  std::string bytes_;
  std::vector<TensorEntry> entries_;
};

// Rows [begin, begin + tokens.size()) of a sequence whose blocks lie in reverse order, and in turn
// for the layers with a window, where those before it are gone; the last row is sampled greedily
// with its five best.
StepInput step_of(const std::vector<int32_t>& tokens, int begin) {
  StepInput step;
  const int count = static_cast<int>(tokens.size());
  step.token_ids = tokens;
  for (int position = begin; position < begin + count; ++position) {
    const int64_t block = kNumBlocks - 1 - position / kBlockSize;
    step.positions.push_back(position);
    step.slot_mapping.push_back(block * kBlockSize + position % kBlockSize);
  }
  for (int position = begin; position < begin + count; ++position) {
    const int64_t block = position / kBlockSize % kWindowBlocks;
    step.slot_mapping.push_back(block * kBlockSize + position % kBlockSize);
  }
  step.query_start_loc = {0, count};
  step.seq_lens = {begin + count};
  for (int i = 0; i < kNumBlocks; ++i) step.block_tables.push_back(kNumBlocks - 1 - i);
  const int first_seen = std::max(0, begin + 1 - kWindow) / kBlockSize;
  for (int i = 0; i < kNumBlocks; ++i) {
    const bool unused = i < first_seen || i * kBlockSize >= begin + count;
    step.block_tables.push_back(unused ? -1 : i % kWindowBlocks);
  }
  step.num_groups = 2;
  step.max_blocks = kNumBlocks;
  step.sample_rows = {count - 1};
  step.target_ids = {-1};
  step.temperature = {0.0f};
  step.top_k = {0};
  step.top_p = {1.0f};
  step.min_p = {0.0f};
  step.repetition_penalty = {1.0f};
  step.presence_penalty = {0.0f};
  step.frequency_penalty = {0.0f};
  step.seed = {1};
  step.draw_index = {0};
  step.num_logprobs = {5};
  step.state_slot = {-1};
  step.bias_indptr = {0, 0};
  step.needs_mask = {0};
  return step;
}

struct Result {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;  // of the five best of each token

  bool operator==(const Result&) const = default;
};

// Feeds the prompt in steps of at most `chunk` tokens, then generates one token a step.
Result generate(const TinyCheckpoint& checkpoint, int threads, int chunk) {
  const RunnerOptions options{.num_blocks = {kNumBlocks, kWindowBlocks},
                              .block_size = kBlockSize,
                              .max_num_tokens = kPrompt,
                              .max_num_seqs = 2,
                              .threads = threads};
  ModelRunner runner(tiny_config(), checkpoint.entries(), options, nullptr);
  Result result;
  int done = 0;
  while (static_cast<int>(result.tokens.size()) < kGenerated) {
    std::vector<int32_t> tokens;
    for (int i = done; i < std::min(done + chunk, kPrompt); ++i) tokens.push_back(i * 7 % 301);
    if (tokens.empty()) tokens = {result.tokens.back()};
    const StepOutput output = runner.collect(runner.launch(step_of(tokens, done)));
    done += static_cast<int>(tokens.size());
    if (done < kPrompt) continue;
    result.tokens.push_back(output.token_ids.front());
    for (const float logprob : output.top_logprobs) result.logprobs.push_back(logprob);
  }
  return result;
}

void check_sane(const Result& result) {
  CHECK_EQ(result.logprobs.size(), size_t{5 * kGenerated});
  for (const int32_t token : result.tokens) CHECK(token >= 0 && token < 301);
  for (const float logprob : result.logprobs) CHECK(std::isfinite(logprob) && logprob <= 0.0f);
}

void check_format(DType matrices) {
  const TinyCheckpoint checkpoint(tiny_config(), matrices);
  for (const cpu::KernelTable* table : cpu::usable_kernels()) {
    ::setenv("RAPSHEE_CPU_ISA", table->isa, 1);
    const Result whole = generate(checkpoint, 1, kPrompt);
    check_sane(whole);
    CHECK(generate(checkpoint, 2, kPrompt) == whole);
    CHECK(generate(checkpoint, 2, 10) == whole);
    CHECK(generate(checkpoint, 1, 1) == whole);
  }
}

TEST_CASE(f32_weights) { check_format(DType::kF32); }
TEST_CASE(f16_weights) { check_format(DType::kF16); }
TEST_CASE(bf16_weights) { check_format(DType::kBF16); }
TEST_CASE(q4_0_weights) { check_format(DType::kQ4_0); }
TEST_CASE(q4_1_weights) { check_format(DType::kQ4_1); }
TEST_CASE(q8_0_weights) { check_format(DType::kQ8_0); }

TEST_CASE(two_steps_in_flight_chain_their_samples) {
  const TinyCheckpoint checkpoint(tiny_config(), DType::kQ4_1);
  const Result expected = generate(checkpoint, 2, kPrompt);
  const RunnerOptions options{.num_blocks = {kNumBlocks, kWindowBlocks},
                              .block_size = kBlockSize,
                              .max_num_tokens = kPrompt,
                              .max_num_seqs = 2,
                              .threads = 2};
  ModelRunner runner(tiny_config(), checkpoint.entries(), options, nullptr);
  std::vector<int32_t> prompt;
  for (int i = 0; i < kPrompt; ++i) prompt.push_back(i * 7 % 301);
  uint64_t ticket = runner.launch(step_of(prompt, 0));
  std::vector<int32_t> tokens;
  for (int i = 0; i < kGenerated; ++i) {
    const uint64_t next = runner.launch(step_of({~0}, kPrompt + i));
    tokens.push_back(runner.collect(ticket).token_ids.front());
    ticket = next;
  }
  runner.close();  // with a step in flight
  CHECK(tokens == expected.tokens);
}

void check_refused(ModelRunner& runner, const StepInput& step, const std::string& expected) {
  const std::string message = MESSAGE_OF(InvalidArgument, runner.launch(step));
  CHECK(message.find(expected) != std::string::npos);
}

TEST_CASE(a_window_may_lose_the_blocks_before_it_and_no_other) {
  const TinyCheckpoint checkpoint(tiny_config(), DType::kF32);
  const RunnerOptions options{.num_blocks = {kNumBlocks, kWindowBlocks},
                              .block_size = kBlockSize,
                              .max_num_tokens = kPrompt,
                              .max_num_seqs = 2};
  ModelRunner runner(tiny_config(), checkpoint.entries(), options, nullptr);
  const StepInput step = step_of({1, 2}, 36);  // the first of them sees keys from 17 on
  CHECK_EQ(runner.collect(runner.launch(step)).token_ids.size(), size_t{1});
  StepInput gone = step;
  gone.block_tables[kNumBlocks + 1] = -1;
  check_refused(runner, gone, "block_tables[1, 0, 1]: got -1, expected 0 to 2");
  StepInput too_high = step;
  too_high.block_tables[kNumBlocks] = kWindowBlocks;
  check_refused(runner, too_high, "block_tables[1, 0, 0]: got 3, expected -1 to 2");
  StepInput full = step;
  full.block_tables[0] = -1;
  check_refused(runner, full, "block_tables[0, 0, 0]: got -1, expected 0 to 7");
  StepInput slots = step;
  slots.slot_mapping.back() += 1;
  check_refused(runner, slots, "slot_mapping[1, 1]");
  StepInput groups = step;
  groups.num_groups = 1;
  check_refused(runner, groups, "block_tables: got 1 groups");
}

TEST_CASE(each_window_has_its_number_of_blocks) {
  const TinyCheckpoint checkpoint(tiny_config(), DType::kF32);
  const RunnerOptions options{
      .num_blocks = {kNumBlocks}, .block_size = kBlockSize, .max_num_tokens = 1, .max_num_seqs = 1};
  const std::string message = MESSAGE_OF(
      InvalidArgument, ModelRunner(tiny_config(), checkpoint.entries(), options, nullptr));
  CHECK(message.find("num_blocks: got 1 numbers, expected 2") != std::string::npos);
}

TEST_CASE(weights_that_end_early_name_their_tensor) {
  TinyCheckpoint checkpoint(tiny_config(), DType::kQ4_0);
  std::vector<TensorEntry> entries = checkpoint.entries();
  entries.back().offset += 4;
  const RunnerOptions options{.num_blocks = {1, 1},
                              .block_size = kBlockSize,
                              .max_num_tokens = 1,
                              .max_num_seqs = 1,
                              .threads = 2};
  const std::string message =
      MESSAGE_OF(WeightError, ModelRunner(tiny_config(), entries, options, nullptr));
  CHECK(message.find("final_norm.weight") != std::string::npos);
  CHECK(message.find("model.bin") != std::string::npos);
}

}  // namespace
}  // namespace rapshee

TEST_MAIN()
