// The seam between the model and the hardware.
//
// A backend is given one ragged batch after the other: begin_step, the operations in the decoder's
// order, end_step; then, perhaps after the next step was begun, finish_step. What lies between may
// be asynchronous: results are there after finish_step. Operations are fused ones, at the grain at
// which hardware is fast; every backend composes them from kernels of its own. The layout of
// buffers, repacked weights and KV blocks belongs to the backend: nobody else looks inside.
//
// Determinism: what an operation computes for a row depends on that row's data alone, never on
// the other rows of the batch, the number of threads or how a prompt was cut into steps. Without
// BackendOptions::deterministic it may depend on how many they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "model/config.h"

namespace rapshee {

// Which dtype unquantised matrices are computed in. kAuto: f32 for F32, bf16 for BF16 and F16; bf16
// for all on a device without f32. Low-bit matrices always stay low-bit.
enum class ComputeType : uint8_t { kAuto, kBFloat16, kFloat16, kFloat32 };

// Elements of the KV cache. kAuto: f32 where the matrices are computed in f32, else the half type
// of the device's computations. kInt8: with a scale for each token and KV head, of K and of V.
enum class CacheType : uint8_t { kAuto, kBFloat16, kInt8 };

// A tensor to be repacked: `rows` x `cols`, row-major in `dtype` blocks.
struct WeightSource {
  std::string name;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  // Copies rows [begin, end) to `dst` ((end - begin) * row_bytes(dtype, cols) bytes).
  // Called from several threads at once.
  std::function<void(int64_t begin, int64_t end, std::byte* dst)> read_rows;
  // The rows are uniform random numbers with the variance 1 / cols, made from this key and each
  // element's index (model/random_weights.h): a backend may make them where it wants them.
  std::optional<uint64_t> random_key = {};
};

// A repacked weight on the device.
class Weight {
 public:
  virtual ~Weight() = default;
  virtual int64_t rows() const = 0;
  virtual int64_t cols() const = 0;
  virtual size_t bytes() const = 0;
};

// Activations of one step: [max_num_tokens, cols].
class Buffer {
 public:
  virtual ~Buffer() = default;
};

// How to sample the R rows of a step, structure of arrays.
struct SamplingRows {
  int num_rows = 0;                     // R
  const int32_t* target_ids = nullptr;  // -1: draw; >= 0: score that token
  const float* temperature = nullptr;   // 0: greedy
  const int32_t* top_k = nullptr;       // 0: off
  const float* top_p = nullptr;
  const float* min_p = nullptr;
  const float* repetition_penalty = nullptr;
  const float* presence_penalty = nullptr;
  const float* frequency_penalty = nullptr;
  const uint64_t* seed = nullptr;
  const uint32_t* draw_index = nullptr;
  const int32_t* num_logprobs = nullptr;
  const int32_t* state_slot = nullptr;   // -1: no penalties
  const int32_t* bias_indptr = nullptr;  // [R + 1], into bias_ids and bias_values
  const int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  const uint8_t* needs_mask = nullptr;  // its allowed tokens come by set_masks, before sampling
};

// Where the results of those rows go. top_* have top_width columns (the largest num_logprobs);
// unused cells stay untouched.
struct SampleResults {
  int32_t* token_ids = nullptr;
  float* logprobs = nullptr;
  int32_t* ranks = nullptr;
  int32_t* top_ids = nullptr;
  float* top_logprobs = nullptr;
  int top_width = 0;
};

// One ragged batch; G groups of layers with tables of their own (ModelConfig::kv_groups). Host
// arrays, already range-checked: what is read is alive until end_step, the results until
// finish_step.
struct Batch {
  uint64_t ticket = 0;                       // counts up by one from batch to batch
  int num_tokens = 0;                        // T
  int num_seqs = 0;                          // S
  int max_blocks = 0;                        // M
  const int32_t* token_ids = nullptr;        // [T] < 0: row ~id of the previous step's samples
  const int32_t* positions = nullptr;        // [T]
  const int64_t* slot_mapping = nullptr;     // [G, T] block * block_size + offset; -1: not written
  const int32_t* query_start_loc = nullptr;  // [S + 1]
  const int32_t* seq_lens = nullptr;         // [S]
  const int32_t* block_tables = nullptr;     // [G, S, M] -1: before all windows, or unused
  const int32_t* sample_rows = nullptr;      // [R] rows of T whose logits are wanted
  SamplingRows sampling;
  SampleResults results;
};

// A linear layer: y = W x + bias. `bias` may be null.
struct Linear {
  const Weight* weight = nullptr;
  const Weight* bias = nullptr;
};

struct NormQkvArgs {
  const Buffer& x;               // [T, hidden] residual stream
  const Weight* norm = nullptr;  // [hidden] or null: x is projected as it is
  Linear q, k, v;
  Buffer& qkv;  // [T, q_size + 2 * kv_size]
};

struct AttentionArgs {
  int layer = 0;
  Buffer& qkv;  // normalised and rotated in place by qk_norm_rope_cache
  Buffer& out;  // [T, q_size]
  // RMSNorm before the rotation: [head_dim] of each head, or of a whole row [q_size] and [kv_size],
  // as ModelConfig::qk_norm says; or null.
  const Weight* q_norm = nullptr;
  const Weight* k_norm = nullptr;
};

struct OutProjArgs {
  const Buffer& attention;  // [T, q_size]
  Linear out;
  const Weight* post_norm = nullptr;  // [hidden] or null: RMSNorm of the result
  Buffer& x;                          // [T, hidden]; the result, times residual_scale, is added
};

struct GatedMlpArgs {
  const Weight* norm = nullptr;  // [hidden] or null: x is projected as it is
  Linear gate, up, down;
  const Weight* post_norm = nullptr;  // [hidden] or null: RMSNorm of the result
  Buffer& x;  // [T, hidden]; read, then the result, times residual_scale, is added
};

struct HeadArgs {
  const Buffer& x;       // [T, hidden]
  const Weight& norm;    // [hidden]
  const Weight& weight;  // [vocab, hidden]
  int first_row = 0;     // of the batch's sample_rows
  int num_rows = 0;      // at most Backend::max_head_rows()
};

// What a step consists of: its layers, its first head and, unless rows wait for masks, all of its
// sampling; then what is left.
enum class StepPart : uint8_t { kForward, kMasked };

struct BackendOptions {
  int block_size = 0;
  std::vector<int> num_blocks = {};  // of each group of layers (ModelConfig::kv_windows)
  int max_num_tokens = 0;
  int max_num_seqs = 0;
  int threads = 1;
  ComputeType compute = ComputeType::kAuto;
  CacheType cache = CacheType::kAuto;
  bool deterministic = true;  // false: products may round as is fastest for their number of rows
};

class Backend {
 public:
  virtual ~Backend() = default;

  // Device, instruction set and kernel set, e.g. "cpu (avx512)".
  virtual std::string description() const = 0;
  virtual int max_head_rows() const = 0;

  // Reading and repacking. Throw WeightError naming the tensor, DeviceError when memory is short.
  virtual std::unique_ptr<Weight> load_matrix(const WeightSource& source) = 0;
  virtual std::unique_ptr<Weight> load_vector(const WeightSource& source) = 0;  // rows == 1
  virtual std::unique_ptr<Buffer> allocate(int64_t cols) = 0;
  // Called once, after the weights: allocates the KV blocks and the workspace of a step. `all_f32`:
  // the checkpoint's matrices are. Returns the dtype of the cache.
  virtual DType allocate_cache(const ModelConfig& config, bool all_f32) = 0;

  virtual void begin_step(const Batch& batch) = 0;
  // Calls `body`, which runs operations of the step. A backend may record them, and replay the
  // recording instead of calling `body` for a later batch of the same form.
  virtual void run(StepPart part, const std::function<void()>& body) = 0;
  virtual void embed(const Weight& table, Buffer& x) = 0;
  virtual void norm_qkv(const NormQkvArgs& args) = 0;
  virtual void qk_norm_rope_cache(const AttentionArgs& args) = 0;
  virtual void paged_attention(const AttentionArgs& args) = 0;
  virtual void out_proj(const OutProjArgs& args) = 0;
  virtual void norm_gated_mlp(const GatedMlpArgs& args) = 0;
  // Final norm and projection of some of the sampled rows, then their sampling. A step may call
  // the pair several times, for consecutive rows. Samples stay known to the next step, whose token
  // ids may refer to them.
  virtual void head(const HeadArgs& args) = 0;
  virtual void process_and_sample(int first_row, int num_rows) = 0;
  // Allowed tokens of the rows with needs_mask, in their order: [n, ceil(V / 32)] words, alive
  // until end_step.
  virtual void set_masks(std::span<const uint32_t> masks) = 0;
  // Around a wait for the host in mid-step: what the step shares with other models is theirs
  // meanwhile. resume() waits until it is free again.
  virtual void suspend() noexcept = 0;
  virtual void resume() = 0;
  // Everything of the step has been asked for. Also after an exception in between.
  virtual void end_step() noexcept = 0;
  // Waits for a step that was ended without an exception and writes its results; the microseconds
  // that it took. Steps are finished in order, two begun ones wait at most; another thread may call
  // it while the next step is begun.
  virtual int64_t finish_step(uint64_t ticket) = 0;

  // Replaces the token counts of a slot: the first num_prompt_tokens are the prompt's.
  virtual void set_state(int slot, std::span<const int32_t> token_ids,
                         int64_t num_prompt_tokens) = 0;
};

// Static facts of a device, before anything is loaded. `device`: one of list_devices(), or "cuda"
// for the first of its kind. All throw DeviceError listing what is available; a block size that the
// device cannot have is an InvalidArgument.
std::unique_ptr<Backend> make_backend(const std::string& device, const BackendOptions& options);
int default_block_size(const std::string& device);
// Values of the option dtype besides "auto".
std::vector<std::string> device_dtypes(const std::string& device);
// Bytes of a KV block of one layer.
size_t kv_block_bytes(const std::string& device, const ModelConfig& config, DType kv_dtype,
                      int block_size);
// Memory that a model takes besides its weights and KV blocks, where it is scarce: 0 on CPU.
size_t workspace_bytes(const std::string& device, const ModelConfig& config,
                       const BackendOptions& options);
size_t available_memory(const std::string& device);

// The usable devices of this build and machine, e.g. {"cpu", "cuda:0"}.
std::vector<std::string> list_devices();

struct CudaInfo {
  bool built = false;
  std::string kind;                 // "cuda", or "cuda-emu" where an emulator stands for the device
  std::vector<std::string> models;  // of the devices, e.g. "NVIDIA H200 (sm_90, 139 GiB)"
  std::string unavailable;          // why there is no device; empty where there is one
};
CudaInfo cuda_info();

}  // namespace rapshee
