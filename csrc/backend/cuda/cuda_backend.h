// Backend on one CUDA device: a stream, fixed buffers, recorded steps.
//
// A step's arrays go to the device in a few copies from page-locked memory; everything after that
// is kernels on one stream, which order themselves. Decode steps are padded to few sizes and
// replayed as CUDA graphs. Nothing waits for the device before finish_step.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/attention_plan.h"
#include "backend/cuda/cuda_api.h"
#include "backend/cuda/cuda_weights.h"
#include "backend/cuda/gemm.h"
#include "backend/cuda/graph_cache.h"
#include "backend/cuda/kernels/launchers.h"
#include "backend/cuda/step_memory.h"

namespace rapshee::cuda {

// Bytes of the fixed buffers of a step.
struct WorkspaceSizes {
  size_t normed = 0;    // halves, of x or of the sampled rows
  size_t queries = 0;   // halves
  size_t hidden = 0;    // halves, of the MLP
  size_t partials = 0;  // float, what out and down projections leave to be added
  size_t logits = 0;    // float
  size_t attention = 0;
  size_t sampling = 0;
  size_t rope_tables = 0;
  size_t gate_up = 0;      // float, products of the MLP that the library leaves
  size_t row_factors = 0;  // float, of norms over rows of q and k

  size_t sum() const {
    return normed + queries + hidden + partials + logits + attention + sampling + rope_tables +
           gate_up + row_factors;
  }
};

// Bytes of a KV block of one layer; InvalidArgument for a size that the kernels cannot take.
size_t block_bytes(const ModelConfig& config, int block_size);
void check_block_size(int block_size);

class CudaBackend final : public Backend {
 public:
  CudaBackend(int device, const BackendOptions& options);
  ~CudaBackend() override;

  std::string description() const override { return description_; }
  int max_head_rows() const override { return head_rows_; }

  std::unique_ptr<Weight> load_matrix(const WeightSource& source) override;
  std::unique_ptr<Weight> load_vector(const WeightSource& source) override;
  std::unique_ptr<Buffer> allocate(int64_t cols) override;
  DType allocate_cache(const ModelConfig& config, bool all_f32) override;

  void begin_step(const Batch& batch) override;
  void run(StepPart part, const std::function<void()>& body) override;
  void embed(const Weight& table, Buffer& x) override;
  void norm_qkv(const NormQkvArgs& args) override;
  void qk_norm_rope_cache(const rapshee::AttentionArgs& args) override;
  void paged_attention(const rapshee::AttentionArgs& args) override;
  void out_proj(const OutProjArgs& args) override;
  void norm_gated_mlp(const GatedMlpArgs& args) override;
  void head(const HeadArgs& args) override;
  void process_and_sample(int first_row, int num_rows) override;
  void set_masks(std::span<const uint32_t> masks) override;
  void suspend() noexcept override {}  // the device is not held while the host waits
  void resume() override {}
  void end_step() noexcept override;
  int64_t finish_step(uint64_t ticket) override;
  void set_state(int slot, std::span<const int32_t> token_ids, int64_t num_prompt_tokens) override;

  static size_t workspace_bytes(const ModelConfig& config, const BackendOptions& options);

 private:
  // Sizes that the launches of the step at hand see: those of the batch, or padded.
  struct StepForm {
    int tokens = 0, seqs = 0, rows = 0, top_width = 0;
    bool recorded = false;
  };
  // Results [rows] and [rows, top_width] of a form in one piece of memory. The token ids come
  // first: at the same address for every form.
  struct DeviceResults {
    int32_t* token_ids = nullptr;
    float* logprobs = nullptr;
    int32_t* ranks = nullptr;
    int32_t* top_ids = nullptr;
    float* top_logprobs = nullptr;
  };
  // What steps of one parity own until they are finished.
  struct StepSet {
    EventOwner begun{api::create_event(true)}, ended{api::create_event(true)};
    bool used = false;  // `ended` was recorded
    SampleResults results;
    int num_rows = 0;
    StepForm form;
  };
  // The step's arrays on the device.
  struct StepArrays {
    int32_t* token_ids = nullptr;  // resolved in place
    const int32_t *positions = nullptr, *query_start_loc = nullptr, *seq_lens = nullptr;
    const int32_t *table_stride = nullptr, *sample_rows = nullptr;
    SamplingArrays sampling;
    DeviceResults results;
  };
  // What the layers with one sliding window (a group of ModelConfig::kv_windows) share: the step's
  // slots and block tables, and decode work.
  struct WindowWork {
    int window = 0;
    // Stands in the tables for blocks that are gone: zeros, as attention reads whole tiles of keys,
    // also where they begin before the window. -1 where every block is there.
    int zero_block = -1;
    const int64_t* slot_mapping = nullptr;
    StepMemory tables;
    DecodePlan plan;
    StepMemory items;
    DecodeWork work;
  };
  struct RopeMemory {
    DeviceMemory inv_freq;
    float *cos = nullptr, *sin = nullptr;  // [rows, half_dim]
    int half_dim = 0;
    float attention_factor = 1.0f;
  };
  // Tokens that a slot's counts become before the next step.
  struct NewState {
    int slot = 0;
    std::vector<int32_t> tokens;
    int num_prompt_tokens = 0;
  };
  // Rows of halves that a product reads.
  struct Input {
    const void* rows_of_halves = nullptr;
    int64_t stride = 0;
    int rows = 0;
  };

  void plan_step();
  bool plan_attention(int num_decodes);
  void upload_states(int set);
  void upload_arrays(int set);
  void upload_tables(int set);
  template <class T>
  void send(StepMemory& memory, int set, const T* values, size_t count);
  static size_t result_bytes(const StepForm& form);
  static DeviceResults results_in(std::byte* memory, const StepForm& form);

  GraphKey key_of(StepPart part) const;
  void record(const std::function<void()>& body, GraphCache::Entry& entry);

  AddNormArgs pending_sum(const Buffer& x) const;
  void add_norm(const Buffer& x, const Weight* norm);
  void project(std::span<const Linear* const> parts, const Input& in, int k_splits, float* y,
               int64_t y_stride) const;
  void project_into_pending(const Linear& linear, const Input& in, const Weight* post_norm);
  void product_of_library(const LinearArgs& args) const;
  void allocate_blocks();
  KvCacheView cache_view(int layer) const;
  int padded_count(int first, int count) const;
  const WindowWork& window_of(int layer) const {
    const int window = window_of_layer_[static_cast<size_t>(layer)];
    return windows_[static_cast<size_t>(window)];
  }
  int64_t mask_words() const { return (config_.vocab_size + 31) / 32; }

  int device_;
  BackendOptions options_;
  HalfType half_;
  std::string description_;
  int head_rows_;
  StreamOwner stream_;
  std::unique_ptr<WeightUploader> uploader_;  // until the weights are there

  ModelConfig config_;
  DeviceMemory cache_;
  std::vector<int64_t> first_block_;  // [layers + 1] of each layer in the cache
  DeviceMemory normed_, queries_, hidden_, partials_, logits_;
  DeviceMemory gate_up_;  // at the latest from the first layer on whose gate and up differ
  DeviceMemory counts_;   // [max_num_seqs, vocab], from the first use of penalties on
  DeviceMemory attention_workspace_, sampling_workspace_, rope_tables_, row_factors_;
  std::vector<RopeMemory> ropes_;
  std::vector<WindowWork> windows_;
  std::vector<int> window_of_layer_;
  int max_items_ = 0;
  int tile_tokens_ = 0;
  std::unique_ptr<Gemm> gemm_;  // unless the backend is deterministic

  std::array<StepSet, kStepSets> sets_;
  StepMemory arrays_, tiles_, bias_ids_, bias_values_, masks_, states_, results_;
  GraphCache graphs_;
  std::vector<NewState> new_states_;

  // The step in progress.
  Batch batch_;
  StepForm form_;
  SamplingNeeds needs_;
  StepArrays on_device_;
  const int32_t* samples_ = nullptr;  // token ids of the step before
  PendingSum pending_;
  int qkv_partials_ = 1;  // that the last norm_qkv left
  bool masked_ = false;
  int num_decodes_ = 0;  // sequences that decode attention takes
  std::vector<int32_t> prefill_tiles_, lengths_, starts_, mask_index_;
};

}  // namespace rapshee::cuda
