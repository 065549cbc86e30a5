// Weights, KV cache and forward pass of one model on one device.
//
// Threads: one thread calls the public methods. Steps are given to the backend in launch order by a
// thread of the runner's own, so that the caller can prepare step n + 1 while step n runs; the
// results of a backend that works asynchronously are waited for by the caller, in collect.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"
#include "model/decoder.h"
#include "model/weights.h"
#include "runner/step.h"

namespace rapshee {

struct RunnerOptions {
  std::string device = "cpu";
  ComputeType compute = ComputeType::kAuto;
  CacheType cache = CacheType::kAuto;
  std::vector<int> num_blocks = {};  // of each group of ModelConfig::kv_windows
  int block_size = 0;
  int max_num_tokens = 0;
  int max_num_seqs = 0;
  int threads = 1;
  bool deterministic = true;  // as in BackendOptions
};

class ModelRunner {
 public:
  static constexpr int kMaxOutstanding = 2;  // tickets

  // Reads and repacks all weights. Throws InvalidArgument, WeightError, DeviceError.
  ModelRunner(ModelConfig config, const std::vector<TensorEntry>& entries,
              const RunnerOptions& options, const Progress& progress);
  ~ModelRunner();
  ModelRunner(const ModelRunner&) = delete;
  ModelRunner& operator=(const ModelRunner&) = delete;

  // Checks the step and starts it; nothing has happened where it throws InvalidArgument.
  uint64_t launch(StepInput step);
  // Allowed tokens of the rows with needs_mask, in their order: [n, ceil(V / 32)].
  void set_masks(uint64_t ticket, std::span<const uint32_t> masks);
  // Waits for the oldest outstanding step and rethrows what it threw.
  StepOutput collect(uint64_t ticket);
  void set_state(int slot, std::vector<int32_t> token_ids, int64_t num_prompt_tokens);
  // Waits for outstanding steps, gives all memory back. Idempotent. A forked child, which has no
  // copy of the threads, lets go of everything without touching it.
  void close();

  bool alive() const;
  const ModelConfig& config() const { return config_; }
  const RunnerOptions& options() const { return options_; }
  uint64_t weights_checksum() const { return checksum_; }
  size_t weight_bytes() const { return weight_bytes_; }
  DType kv_dtype() const { return kv_dtype_; }
  std::vector<int> kv_windows() const { return config_.kv_windows(); }
  const std::string& description() const { return description_; }
  int64_t mask_words() const { return (config_.vocab_size + 31) / 32; }

 private:
  struct Step {
    uint64_t ticket = 0;
    StepInput input;
    std::vector<uint32_t> masks;
    size_t masked_rows = 0;
    bool masks_ready = false;
    bool ended = false;  // the backend has it, or it failed
    StepOutput output;
    std::exception_ptr error;
  };

  void check_open() const;
  bool is_ours() const;
  void abandon();
  Step& outstanding(uint64_t ticket);
  void serve();
  void run(Step& step) noexcept;
  void forward(Step& step);
  void wait_for_masks(Step& step);

  ModelConfig config_;
  RunnerOptions options_;
  StepLimits limits_;
  std::unique_ptr<Backend> backend_;
  ModelWeights weights_;
  std::unique_ptr<Decoder> decoder_;
  uint64_t checksum_ = 0;
  size_t weight_bytes_ = 0;
  DType kv_dtype_ = DType::kF32;
  std::string description_;

  // Of the caller.
  const pid_t owner_;  // the process whose threads these are
  uint64_t next_ticket_ = 1;
  int previous_rows_ = 0;

  // Of the step thread.
  bool previous_failed_ = false;
  std::exception_ptr state_error_;  // of a set_state, for the next step

  // Shared, under sync_->mutex. Apart from the runner, as a forked child must not destroy what
  // threads of its parent wait on.
  struct Sync {
    std::mutex mutex;
    std::condition_variable work_ready, step_ended;
  };
  std::unique_ptr<Sync> sync_ = std::make_unique<Sync>();
  std::deque<std::function<void()>> work_;
  std::deque<std::unique_ptr<Step>> steps_;  // outstanding, oldest first
  bool closing_ = false;
  bool alive_ = true;
  std::thread thread_;
};

}  // namespace rapshee
