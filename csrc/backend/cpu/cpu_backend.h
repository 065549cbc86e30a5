// Backend on host memory and the process's worker pool.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/cache_layout.h"
#include "backend/cpu/cpu_weights.h"
#include "backend/cpu/kernel_table.h"
#include "backend/cpu/sampling.h"
#include "core/memory.h"
#include "core/thread_pool.h"

namespace rapshee::cpu {

class CpuBuffer final : public Buffer {
 public:
  CpuBuffer(int64_t rows, int64_t cols)
      : cols_(cols), memory_(static_cast<size_t>(rows * cols) * sizeof(float)) {}
  int64_t cols() const { return cols_; }
  float* row(int64_t r) { return data() + r * cols_; }
  const float* row(int64_t r) const { return const_cast<CpuBuffer*>(this)->row(r); }

 private:
  float* data() { return reinterpret_cast<float*>(memory_.data()); }
  int64_t cols_;
  AlignedBuffer memory_;
};

// Activation rows with their memory: all forms; pages of a form that is not used are never
// touched, so never resident.
class ActMemory {
 public:
  ActMemory() = default;
  ActMemory(int64_t rows, int64_t cols);
  // The same memory as rows of `cols` elements (at most those it was made for).
  ActRows rows_of(int64_t cols, bool fine = false) const;

 private:
  AlignedBuffer f32_, bf16_, q8_, scale_, sum_, total_;
};

// Throws InvalidArgument for a block size that the cache's layout cannot have.
void check_block_size(int block_size);

class CpuBackend final : public Backend {
 public:
  // `isa` empty: the fastest, or RAPSHEE_CPU_ISA.
  explicit CpuBackend(const BackendOptions& options);

  std::string description() const override;
  int max_head_rows() const override { return kMaxHeadRows; }

  std::unique_ptr<Weight> load_matrix(const WeightSource& source) override;
  std::unique_ptr<Weight> load_vector(const WeightSource& source) override;
  std::unique_ptr<Buffer> allocate(int64_t cols) override;
  DType allocate_cache(const ModelConfig& config, bool all_f32) override;

  void begin_step(const Batch& batch) override;
  void run(StepPart, const std::function<void()>& body) override { body(); }
  void embed(const Weight& table, Buffer& x) override;
  void norm_qkv(const NormQkvArgs& args) override;
  void qk_norm_rope_cache(const AttentionArgs& args) override;
  void paged_attention(const AttentionArgs& args) override;
  void out_proj(const OutProjArgs& args) override;
  void norm_gated_mlp(const GatedMlpArgs& args) override;
  void head(const HeadArgs& args) override;
  void process_and_sample(int first_row, int num_rows) override;
  void set_masks(std::span<const uint32_t> masks) override;
  void suspend() noexcept override;
  void resume() override;
  void end_step() noexcept override;
  int64_t finish_step(uint64_t ticket) override;
  void set_state(int slot, std::span<const int32_t> token_ids, int64_t num_prompt_tokens) override;

 private:
  static constexpr int kMaxHeadRows = 64;

  // Rows that a linear layer reads: x, or its RMSNorm where `norm` is given. `rows` picks rows of
  // x; empty: all of the batch.
  struct Input {
    const CpuBuffer& x;
    const Weight* norm = nullptr;
    std::span<const int32_t> rows = {};
    bool fine = false;  // quantised with a scale per 16 elements instead of 32
  };
  // One weight of a fused linear operation, and where its product goes.
  struct Product {
    const PanelWeight& weight;
    const float* bias;
    float* y;  // first row, first column of panel `first_panel`
    int64_t stride;
    bool add = false;
    int64_t first_panel = 0;
  };
  // Of one worker: on a cache line of its own.
  struct alignas(64) Flag {
    bool set = false;
  };
  // Query tokens [begin, end) of one sequence that are attended together.
  struct Tile {
    int seq, begin, end;
  };

  uint8_t form_of(const PanelWeight& weight, bool fine = false) const;
  ActRow prepare(const Input& in, int64_t row, uint8_t forms, const ActRows& out) const;
  // Calls body(rows, task, worker) for each task, with the input prepared in `forms`.
  template <class Body>
  void with_prepared(const Input& in, uint8_t forms, int num_tasks, Body body);
  void multiply(const ActRows& x, int64_t rows, const Product& product, int64_t panel, int worker);
  void multiply_all(const ActRows& x, int64_t rows, std::span<const Product> products, int task,
                    int num_tasks, int worker);
  void linear(const Input& in, std::span<const Product> products);
  Product add_to(Buffer& x, const Linear& linear, const Weight* post_norm);
  void add_post_norm(Buffer& x, const Weight* post_norm);
  void gate_up(const ActRows& x, const GatedMlpArgs& args, const ActRows& hidden, uint8_t forms,
               int64_t group, int worker);
  void rope_tables();
  void plan_tiles();
  void normalize_heads(const Weight* norm, float* heads, int count) const;
  void rotate_heads(int rope, int token, float* heads, int count) const;
  void rotate_and_cache(const AttentionArgs& args, int token);
  bool wants_logits(int row) const;
  std::byte* cache(int layer, int64_t block, int kv_head);
  size_t group_of(int layer) const {
    return static_cast<size_t>(kv_groups_[static_cast<size_t>(layer)]);
  }
  template <class F>
  void parallel(int num_tasks, F&& task);
  std::byte* scratch(int worker) { return scratch_[static_cast<size_t>(worker)].data(); }

  BackendOptions options_;
  const KernelTable& kernels_;
  bool float_acts_;
  std::shared_ptr<ThreadPool> pool_;
  WeightArena weights_;

  ModelConfig config_;
  CacheLayout layout_;
  std::vector<int> kv_groups_;           // [layers] which block tables and slots are a layer's
  std::vector<int64_t> first_kv_block_;  // [layers + 1]
  AlignedBuffer cache_;
  ActMemory acts_;                      // prepared inputs of large batches
  ActMemory hidden_;                    // gated hidden rows of the MLP
  std::unique_ptr<CpuBuffer> product_;  // what is normalised before it is added, or null
  std::vector<ActMemory> worker_acts_;  // [threads] prepared inputs of small batches
  std::vector<Flag> prepared_;          // [threads] whether worker_acts_ hold the input at hand
  std::vector<AlignedBuffer> scratch_;  // [threads]
  std::unique_ptr<Sampler> sampler_;
  std::vector<Sampler::Scratch> sampler_scratch_;  // [threads]

  // The step in progress.
  std::unique_ptr<ThreadPool::StepGuard> turn_;
  Batch batch_;
  std::vector<Tile> tiles_;
  std::vector<uint8_t> last_of_seq_;           // [T]
  std::vector<std::vector<float>> cos_, sin_;  // per rope: [T, inv_freq.size()]
  std::vector<const uint32_t*> masks_;         // [R] or empty
  AlignedBuffer logits_;                       // [kMaxHeadRows, vocab]
  std::vector<ChunkStats> chunk_stats_;        // [kMaxHeadRows, chunks]
  std::vector<int32_t> samples_, previous_samples_;
  std::chrono::steady_clock::time_point start_;
  // By ticket, as finish_step is another thread's.
  std::array<std::atomic<int64_t>, 2> microseconds_{};
};

}  // namespace rapshee::cpu
