#include "backend/cuda/cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "core/thread_pool.h"

namespace rapshee::cuda {
namespace {

constexpr int kMaxHeadRows = 256;  // logits of so many rows at a time: 131 MB at 128k tokens

// Activations: float rows, with room for the partial sums of a product that few rows leave; or
// halves, in half of the room.
class CudaBuffer final : public Buffer {
 public:
  explicit CudaBuffer(size_t floats) : memory_(floats * sizeof(float)) {}
  template <class T>
  T* data() const {
    return memory_.data<T>();
  }

 private:
  DeviceMemory memory_;
};

template <class T>
T* data_of(const Buffer& buffer) {
  return static_cast<const CudaBuffer&>(buffer).data<T>();
}
const WeightView& view_of(const Weight& weight) {
  return static_cast<const CudaWeight&>(weight).view();
}
const float* vector_of(const Weight* weight) {
  return weight == nullptr ? nullptr : static_cast<const CudaVector&>(*weight).data();
}

// Rows that the buffers of a step are made for.
int buffer_rows(const BackendOptions& options) {
  return std::max(options.max_num_tokens,
                  padded_rows(std::min(options.max_num_tokens, options.max_num_seqs)));
}

// Float rows that a product with `k_splits` of K takes for up to `rows` rows.
int64_t partial_rows(int rows, int k_splits) {
  int64_t most = 0;
  for (int r = 1; r <= rows; ++r) {
    most = std::max(most, int64_t{r} * linear_partials(r, k_splits));
  }
  return most;
}
constexpr int kMostSplits = 8;                       // of linear_splits
constexpr size_t kRecordedSteps = size_t{64} << 20;  // of some hundred kilobytes each

int head_rows(const BackendOptions& options) {
  return std::min(kMaxHeadRows,
                  std::max(1, padded_rows(std::min(kMaxHeadRows, buffer_rows(options)))));
}

// Splits of attention that the decode kernel has room for. More are given to prefill attention,
// which computes the same bits.
int max_decode_items(const ModelConfig& config, const BackendOptions& options) {
  constexpr int64_t kMost = 16384;  // 4 million keys a step; the partial results of one take 0.3 GB
  const int64_t splits = (config.max_position + kAttentionSplit - 1) / kAttentionSplit;
  return static_cast<int>(std::min(kMost, options.max_num_seqs * splits));
}

size_t halves(int64_t rows, int64_t cols) { return static_cast<size_t>(rows * cols) * 2; }
size_t floats(int64_t rows, int64_t cols) {
  return static_cast<size_t>(rows * cols) * sizeof(float);
}

WorkspaceSizes sizes_of(const ModelConfig& config, const BackendOptions& options) {
  const int rows = buffer_rows(options), sampled = head_rows(options);
  const int out_splits = linear_splits(config.hidden_size, config.q_size());
  const int down_splits = linear_splits(config.hidden_size, config.intermediate_size);
  WorkspaceSizes sizes;
  sizes.normed = halves(std::max(rows, sampled), config.hidden_size);
  sizes.queries = halves(rows, config.q_size());
  sizes.hidden = halves(rows, config.intermediate_size);
  sizes.partials =
      floats(partial_rows(rows, std::max(out_splits, down_splits)), config.hidden_size);
  sizes.logits = floats(sampled, config.vocab_size);
  sizes.attention = decode_workspace_bytes(max_decode_items(config, options), buffer_rows(options),
                                           config.num_heads, config.head_dim);
  sizes.sampling = sample_workspace_bytes(sampled, config.vocab_size, 0);
  for (const Rope& rope : config.ropes) {
    sizes.rope_tables += 2 * floats(rows, static_cast<int64_t>(rope.inv_freq.size()));
  }
  if (!options.deterministic) sizes.gate_up = floats(rows, 2 * config.intermediate_size);
  return sizes;
}

void check_model(const ModelConfig& config) {
  constexpr int kMostHeadDim = 256, kMostHidden = 16384;  // as the kernels take them
  const auto multiple_of_8 = [](const char* field, int64_t value) {
    RAPSHEE_CHECK(value % 8 == 0, field, ": got ", value, ", expected a multiple of 8 on cuda");
  };
  multiple_of_8("hidden_size", config.hidden_size);
  multiple_of_8("intermediate_size", config.intermediate_size);
  multiple_of_8("head_dim", config.head_dim);
  RAPSHEE_CHECK(config.hidden_size <= kMostHidden, "hidden_size: got ", config.hidden_size,
                ", expected at most ", kMostHidden, " on cuda");
  RAPSHEE_CHECK(config.head_dim <= kMostHeadDim, "head_dim: got ", config.head_dim,
                ", expected at most ", kMostHeadDim, " on cuda");
}

DeviceMemory upload(const std::vector<float>& values, Stream stream) {
  const size_t bytes = values.size() * sizeof(float);
  DeviceMemory memory(bytes);
  const PinnedMemory staging(bytes);
  if (bytes == 0) return memory;
  std::memcpy(staging.data(), values.data(), bytes);
  api::copy_to_device(memory.data(), staging.data(), bytes, stream);
  api::synchronize(stream);
  return memory;
}

std::string describe(const api::DeviceInfo& info, bool deterministic) {
  return concat(api::device_kind(), " (", info.name, ", sm_", info.major, info.minor, ")",
                deterministic ? "" : ", not deterministic");
}

bool is_plain(const Linear& linear) {
  return view_of(*linear.weight).format == WeightFormat::kPlain;
}

// Into how many runs of K the products of `parts`, side by side, are cut. Those of plain weights
// are whole, and have one number of partial sums with what stands beside them.
int splits_of(std::span<const Linear* const> parts) {
  int64_t outputs = 0;
  for (const Linear* part : parts) {
    if (is_plain(*part)) return 1;
    outputs += part->weight->rows();
  }
  return linear_splits(outputs, parts[0]->weight->cols());
}

bool uses_penalties(const SamplingRows& rows, size_t r) {
  return rows.state_slot[r] >= 0 &&
         (rows.repetition_penalty[r] != 1.0f || rows.presence_penalty[r] != 0.0f ||
          rows.frequency_penalty[r] != 0.0f);
}

SamplingNeeds needs_of(const SamplingRows& rows, int top_width) {
  SamplingNeeds needs;
  needs.top_width = top_width;
  needs.rank = top_width > 0;
  for (size_t r = 0; r < static_cast<size_t>(rows.num_rows); ++r) {
    needs.process |= rows.needs_mask[r] != 0 || rows.bias_indptr[r] != rows.bias_indptr[r + 1] ||
                     uses_penalties(rows, r);
    const bool draws = rows.target_ids[r] < 0 && rows.temperature[r] > 0.0f;
    needs.draw |= draws;
    needs.filter |= draws && (rows.top_k[r] > 0 || rows.top_p[r] < 1.0f || rows.min_p[r] > 0.0f);
    needs.rank |= rows.target_ids[r] >= 0;
  }
  return needs;
}

}  // namespace

size_t block_bytes(const ModelConfig& config, int block_size) {
  return 2 * sizeof(uint16_t) * static_cast<size_t>(config.num_layers()) *
         static_cast<size_t>(config.kv_size()) * static_cast<size_t>(block_size);
}

void check_block_size(int block_size) {
  constexpr int kStep = 16, kMost = 4096;
  RAPSHEE_CHECK(block_size >= kStep && block_size <= kMost && block_size % kStep == 0,
                "block_size: got ", block_size, ", expected a multiple of ", kStep, " up to ",
                kMost, " on cuda");
}

CudaBackend::CudaBackend(int device, const BackendOptions& options)
    : device_((api::set_device(device), device)),
      options_(options),
      half_(options.compute == ComputeType::kFloat16 ? HalfType::kF16 : HalfType::kBF16),
      description_(describe(api::device_info(device), options.deterministic)),
      head_rows_(head_rows(options)),
      stream_(api::create_stream()),
      uploader_(std::make_unique<WeightUploader>(ThreadPool::process_pool(options.threads),
                                                 options.threads)) {
  if (!options.deterministic) gemm_ = make_gemm();
}

CudaBackend::~CudaBackend() {
  try {
    api::set_device(device_);
    api::synchronize(stream_.get());
  } catch (const DeviceError&) {  // a failed device runs nothing any more
  }
}

size_t CudaBackend::workspace_bytes(const ModelConfig& config, const BackendOptions& options) {
  const int rows = buffer_rows(options);
  const size_t activations = floats(partial_rows(rows, kMostSplits),
                                    config.hidden_size + config.qkv_size() + config.q_size());
  const size_t tables = static_cast<size_t>(options.max_num_seqs) *
                        static_cast<size_t>(config.max_position / options.block_size + 1) *
                        sizeof(int32_t);
  const size_t counts = floats(options.max_num_seqs, config.vocab_size);
  const size_t library = options.deterministic ? 0 : Gemm::kWorkspaceBytes;
  return sizes_of(config, options).sum() + activations + 2 * tables + counts + kRecordedSteps +
         library;
}

// ---------------------------------------------------------------------------------- weights
std::unique_ptr<Weight> CudaBackend::load_matrix(const WeightSource& source) {
  return cuda::load_matrix(source, half_, *uploader_, !options_.deterministic);
}

std::unique_ptr<Weight> CudaBackend::load_vector(const WeightSource& source) {
  return cuda::load_vector(source, *uploader_);
}

std::unique_ptr<Buffer> CudaBackend::allocate(int64_t cols) {
  api::set_device(device_);
  const int64_t rows = partial_rows(buffer_rows(options_), kMostSplits);
  return std::make_unique<CudaBuffer>(static_cast<size_t>(rows * cols));
}

DType CudaBackend::allocate_cache(const ModelConfig& config, bool) {
  api::set_device(device_);
  uploader_.reset();
  check_model(config);
  config_ = config;
  const size_t block = block_bytes(config, options_.block_size);
  const auto blocks = static_cast<size_t>(options_.num_blocks);
  if (blocks > std::numeric_limits<size_t>::max() / block) {
    throw DeviceError(concat("out of memory: cannot allocate ", blocks, " blocks of ", block,
                             " bytes for the KV cache"));
  }
  cache_ = DeviceMemory(blocks * block);

  const WorkspaceSizes sizes = sizes_of(config, options_);
  normed_ = DeviceMemory(sizes.normed);
  queries_ = DeviceMemory(sizes.queries);
  hidden_ = DeviceMemory(sizes.hidden);
  partials_ = DeviceMemory(sizes.partials);
  logits_ = DeviceMemory(sizes.logits);
  attention_workspace_ = DeviceMemory(sizes.attention);
  api::fill(attention_workspace_.data(), 0, sizes.attention, stream_.get());
  sampling_workspace_ = DeviceMemory(sizes.sampling);
  rope_tables_ = DeviceMemory(sizes.rope_tables);
  gate_up_ = DeviceMemory(sizes.gate_up);
  max_items_ = max_decode_items(config, options_);
  tile_tokens_ = prefill_tile_tokens(config.num_heads, config.num_kv_heads, config.head_dim);

  auto* table = rope_tables_.data<float>();
  for (const Rope& rope : config.ropes) {
    RopeMemory& memory = ropes_.emplace_back();
    memory.half_dim = static_cast<int>(rope.inv_freq.size());
    memory.attention_factor = rope.attention_factor;
    memory.inv_freq = upload(rope.inv_freq, stream_.get());
    const int64_t count = int64_t{buffer_rows(options_)} * memory.half_dim;
    memory.cos = table;
    memory.sin = table + count;
    table += 2 * count;
  }
  for (const LayerConfig& layer : config.layers) {
    const auto same = [&](const WindowWork& w) { return w.window == layer.window; };
    const auto found = std::find_if(windows_.begin(), windows_.end(), same);
    window_of_layer_.push_back(static_cast<size_t>(found - windows_.begin()));
    if (found == windows_.end()) windows_.emplace_back().window = layer.window;
  }
  api::synchronize(stream_.get());
  return half_ == HalfType::kF16 ? DType::kF16 : DType::kBF16;
}

// ------------------------------------------------------------------------------- a step's arrays
void CudaBackend::begin_step(const Batch& batch) {
  api::set_device(device_);
  batch_ = batch;
  const int set = set_of(batch.ticket);
  StepSet& step = sets_[static_cast<size_t>(set)];
  if (step.used) api::synchronize(step.ended.get());  // a step that failed was not finished
  step.used = false;
  api::record(step.begun.get(), stream_.get());
  pending_ = {};
  const uint8_t* needs_mask = batch.sampling.needs_mask;
  masked_ =
      std::any_of(needs_mask, needs_mask + batch.sampling.num_rows, [](uint8_t m) { return m; });
  needs_ = needs_of(batch.sampling, batch.results.top_width);
  plan_step();
  needs_.top_width = form_.top_width;  // the kernels write rows of the padded width
  step.results = batch.results;
  step.num_rows = batch.sampling.num_rows;
  step.form = form_;
  samples_ = on_device_.results.token_ids;  // the step's before
  upload_states(set);
  upload_arrays(set);
  if (samples_ == nullptr) samples_ = on_device_.results.token_ids;
}

// Whether the step is padded and recorded, and who attends in which kernel.
void CudaBackend::plan_step() {
  const int tokens = batch_.num_tokens, rows = batch_.sampling.num_rows;
  const int padded = padded_rows(tokens), width = padded_width(needs_.top_width);
  const bool only_decodes = batch_.num_seqs == tokens && rows == tokens;
  if (only_decodes && padded > 0 && width >= 0) {
    form_ = {padded, padded, padded, width, true};
    if (plan_attention(padded)) return;
  }
  form_ = {tokens, batch_.num_seqs, rows, needs_.top_width, false};
  int decodes = num_decode_seqs({batch_.query_start_loc, static_cast<size_t>(batch_.num_seqs) + 1});
  while (!plan_attention(decodes)) decodes -= decodes / 8 + 1;
}

// Plans `num_decodes` sequences for the decode kernel; false if it has no room for so many.
bool CudaBackend::plan_attention(int num_decodes) {
  lengths_.assign(batch_.seq_lens, batch_.seq_lens + std::min(num_decodes, batch_.num_seqs));
  lengths_.resize(static_cast<size_t>(num_decodes), 0);
  for (WindowWork& w : windows_) {
    plan_decode(lengths_, w.window, w.plan);
    if (w.plan.num_items() > max_items_) return false;
  }
  num_decodes_ = num_decodes;
  prefill_tiles_.clear();
  if (num_decodes < batch_.num_seqs) {
    plan_prefill({batch_.query_start_loc, static_cast<size_t>(batch_.num_seqs) + 1},
                 {batch_.positions, static_cast<size_t>(batch_.num_tokens)}, num_decodes,
                 tile_tokens_, prefill_tiles_);
  }
  return true;
}

void CudaBackend::upload_arrays(int set) {
  const auto tokens = static_cast<size_t>(batch_.num_tokens);
  const auto seqs = static_cast<size_t>(batch_.num_seqs);
  const auto all_tokens = static_cast<size_t>(form_.tokens),
             all_seqs = static_cast<size_t>(form_.seqs);
  const SamplingRows& rows = batch_.sampling;
  const auto count = static_cast<size_t>(rows.num_rows), all_rows = static_cast<size_t>(form_.rows);

  // 8 bytes at most for each element of the arrays below, and for their alignment.
  constexpr size_t kTokenArrays = 3, kSeqArrays = 2, kRowArrays = 14, kSingles = 4;
  const size_t bytes = sizeof(int64_t) * (kTokenArrays * all_tokens +
                                          (kSeqArrays + 2 * windows_.size()) * (all_seqs + 1) +
                                          kRowArrays * (all_rows + 1) + kSingles + windows_.size());
  const size_t table_size = seqs * static_cast<size_t>(batch_.max_blocks);
  const auto num_biases = static_cast<size_t>(rows.bias_indptr[count]);
  bool moved = arrays_.reserve(bytes, stream_.get());
  moved |= tables_.reserve(all_seqs * static_cast<size_t>(batch_.max_blocks) * sizeof(int32_t),
                           stream_.get());
  moved |= bias_ids_.reserve(num_biases * sizeof(int32_t), stream_.get());
  moved |= bias_values_.reserve(num_biases * sizeof(float), stream_.get());
  moved |= results_.reserve(result_bytes(form_), stream_.get());
  for (WindowWork& w : windows_) {
    moved |= w.items.reserve(w.plan.items.size() * sizeof(int32_t), stream_.get());
  }
  if (masked_) {
    moved |= masks_.reserve(static_cast<size_t>(form_.rows) * mask_words() * sizeof(uint32_t),
                            stream_.get());
  }
  const size_t sampling = sample_workspace_bytes(head_rows_, config_.vocab_size, form_.top_width);
  if (sampling > sampling_workspace_.size()) {
    api::synchronize(stream_.get());
    sampling_workspace_ = DeviceMemory();
    sampling_workspace_ = DeviceMemory(sampling);
    moved = true;
  }
  if (moved) graphs_.clear();

  ArrayPacker pack(arrays_.staging(set, bytes), arrays_.device());
  StepArrays& on = on_device_;
  on.slot_mapping = pack.put<int64_t>(batch_.slot_mapping, tokens, all_tokens, -1);
  SamplingArrays& s = on.sampling;
  s.seed = pack.put<uint64_t>(rows.seed, count, all_rows, 0);
  on.token_ids = const_cast<int32_t*>(pack.put<int32_t>(batch_.token_ids, tokens, all_tokens, 0));
  on.positions = pack.put<int32_t>(batch_.positions, tokens, all_tokens, 0);
  // Padding sequences have one row each, like those of a decode step.
  starts_.assign(batch_.query_start_loc, batch_.query_start_loc + seqs + 1);
  while (starts_.size() < all_seqs + 1) starts_.push_back(starts_.back() + 1);
  on.query_start_loc = pack.put<int32_t>(starts_.data(), all_seqs + 1, all_seqs + 1, 0);
  on.seq_lens = pack.put<int32_t>(batch_.seq_lens, seqs, all_seqs, 0);
  const int32_t stride = batch_.max_blocks;
  on.table_stride = pack.put<int32_t>(&stride, 1, 1, 0);
  on.sample_rows = pack.put<int32_t>(batch_.sample_rows, count, all_rows, 0);
  s.target_ids = pack.put<int32_t>(rows.target_ids, count, all_rows, -1);
  s.temperature = pack.put<float>(rows.temperature, count, all_rows, 0.0f);
  s.top_k = pack.put<int32_t>(rows.top_k, count, all_rows, 0);
  s.top_p = pack.put<float>(rows.top_p, count, all_rows, 1.0f);
  s.min_p = pack.put<float>(rows.min_p, count, all_rows, 0.0f);
  s.repetition_penalty = pack.put<float>(rows.repetition_penalty, count, all_rows, 1.0f);
  s.presence_penalty = pack.put<float>(rows.presence_penalty, count, all_rows, 0.0f);
  s.frequency_penalty = pack.put<float>(rows.frequency_penalty, count, all_rows, 0.0f);
  s.draw_index = pack.put<uint32_t>(rows.draw_index, count, all_rows, 0);
  s.num_logprobs = pack.put<int32_t>(rows.num_logprobs, count, all_rows, 0);
  s.state_slot = pack.put<int32_t>(rows.state_slot, count, all_rows, -1);
  s.bias_indptr = pack.put<int32_t>(rows.bias_indptr, count + 1, all_rows + 1,
                                    static_cast<int32_t>(num_biases));
  mask_index_.clear();
  int32_t next_mask = 0;
  for (size_t r = 0; r < count; ++r) mask_index_.push_back(rows.needs_mask[r] ? next_mask++ : -1);
  s.mask_index = pack.put<int32_t>(mask_index_.data(), count, all_rows, -1);
  s.bias_ids = bias_ids_.device<const int32_t>();
  s.bias_values = bias_values_.device<const float>();
  s.masks = masks_.device<const uint32_t>();
  for (WindowWork& w : windows_) {
    const DecodePlan& plan = w.plan;
    const int32_t num_items = plan.num_items();
    const size_t n = plan.first_item.size();
    w.work = {.num_items = pack.put<int32_t>(&num_items, 1, 1, 0),
              .items = w.items.device<const int32_t>(),
              .first_item = pack.put<int32_t>(plan.first_item.data(), n, n, 0),
              .num_splits = pack.put<int32_t>(plan.num_splits.data(), n, n, 0),
              .max_items = max_items_,
              .num_seqs = num_decodes_};
    send(w.items, set, plan.items.data(), plan.items.size());
  }
  arrays_.upload(set, pack.used(), stream_.get());
  send(tables_, set, batch_.block_tables, table_size);
  send(bias_ids_, set, rows.bias_ids, num_biases);
  send(bias_values_, set, rows.bias_values, num_biases);
  if (!prefill_tiles_.empty()) {
    tiles_.reserve(prefill_tiles_.size() * sizeof(int32_t), stream_.get());
    send(tiles_, set, prefill_tiles_.data(), prefill_tiles_.size());
  }
  on.results = results_in(results_.device(), form_);
}

size_t CudaBackend::result_bytes(const StepForm& form) {
  return static_cast<size_t>(form.rows) * (3 + 2 * static_cast<size_t>(form.top_width)) *
         sizeof(int32_t);
}

CudaBackend::DeviceResults CudaBackend::results_in(std::byte* memory, const StepForm& form) {
  auto* ids = reinterpret_cast<int32_t*>(memory);
  auto* numbers = reinterpret_cast<float*>(memory);
  const int64_t rows = form.rows, tops = rows * form.top_width;
  return {ids, numbers + rows, ids + 2 * rows, ids + 3 * rows, numbers + 3 * rows + tops};
}

template <class T>
void CudaBackend::send(StepMemory& memory, int set, const T* values, size_t count) {
  if (count == 0) return;
  std::memcpy(memory.staging(set, count * sizeof(T)), values, count * sizeof(T));
  memory.upload(set, count * sizeof(T), stream_.get());
}

void CudaBackend::set_state(int slot, std::span<const int32_t> token_ids,
                            int64_t num_prompt_tokens) {
  new_states_.push_back(
      {slot, {token_ids.begin(), token_ids.end()}, static_cast<int>(num_prompt_tokens)});
}

// Counts the tokens of slots that were set since the last step.
void CudaBackend::upload_states(int set) {
  const int32_t* slots = batch_.sampling.state_slot;
  const bool wanted =
      std::any_of(slots, slots + batch_.sampling.num_rows, [](int32_t s) { return s >= 0; });
  if (new_states_.empty() && !wanted) return;
  const int64_t vocab = config_.vocab_size;
  if (counts_.size() == 0) {
    counts_ = DeviceMemory(floats(options_.max_num_seqs, vocab));
    api::fill(counts_.data(), 0, counts_.size(), stream_.get());
    graphs_.clear();
  }
  std::vector<int32_t> tokens;
  for (const NewState& state : new_states_) {
    tokens.insert(tokens.end(), state.tokens.begin(), state.tokens.end());
  }
  states_.reserve(tokens.size() * sizeof(int32_t), stream_.get());
  send(states_, set, tokens.data(), tokens.size());
  const int32_t* from = states_.device<const int32_t>();
  for (const NewState& state : new_states_) {
    const auto count = static_cast<int>(state.tokens.size());
    set_token_counts({.counts = counts_.data<uint32_t>() + state.slot * vocab,
                      .vocab = vocab,
                      .tokens = from,
                      .num_tokens = count,
                      .num_prompt_tokens = state.num_prompt_tokens},
                     stream_.get());
    from += count;
  }
  new_states_.clear();
}

void CudaBackend::set_masks(std::span<const uint32_t> masks) {
  send(masks_, set_of(batch_.ticket), masks.data(), masks.size());
}

// ---------------------------------------------------------------------------------- running
void CudaBackend::run(StepPart part, const std::function<void()>& body) {
  GraphCache::Entry* entry = form_.recorded ? graphs_.find(key_of(part)) : nullptr;
  if (entry == nullptr) {
    body();
  } else {
    if (entry->graph.get() == nullptr) record(body, *entry);
    api::launch(entry->graph.get(), stream_.get());
    pending_ = entry->pending;
  }
  if (masked_ && part == StepPart::kForward) return;  // the sampling is still to come
  results_.download(set_of(batch_.ticket), result_bytes(form_), stream_.get());
}

void CudaBackend::record(const std::function<void()>& body, GraphCache::Entry& entry) {
  api::begin_capture(stream_.get());
  try {
    body();
  } catch (...) {
    try {
      GraphOwner(api::end_capture(stream_.get()));
    } catch (const DeviceError&) {  // the first error is the one to report
    }
    throw;
  }
  entry.graph = GraphOwner(api::end_capture(stream_.get()));
  entry.pending = pending_;
}

GraphKey CudaBackend::key_of(StepPart part) const {
  return {.part = part,
          .masked = masked_,
          .rows = form_.rows,
          .process = needs_.process,
          .draw = needs_.draw,
          .filter = needs_.filter,
          .rank = needs_.rank,
          .top_width = form_.top_width};
}

void CudaBackend::end_step() noexcept {
  StepSet& step = sets_[static_cast<size_t>(set_of(batch_.ticket))];
  try {
    api::record(step.ended.get(), stream_.get());
    step.used = true;
  } catch (const DeviceError&) {  // finish_step meets the same error
  }
}

int64_t CudaBackend::finish_step(uint64_t ticket) {
  api::set_device(device_);
  const int set = set_of(ticket);
  const StepSet& step = sets_[static_cast<size_t>(set)];
  api::synchronize(step.ended.get());
  const auto rows = static_cast<size_t>(step.num_rows);
  const auto width = static_cast<size_t>(step.results.top_width);
  const auto padded = static_cast<size_t>(step.form.top_width);
  const DeviceResults from = results_in(const_cast<std::byte*>(results_.staging(set)), step.form);
  if (rows > 0) {
    std::copy_n(from.token_ids, rows, step.results.token_ids);
    std::copy_n(from.logprobs, rows, step.results.logprobs);
    std::copy_n(from.ranks, rows, step.results.ranks);
  }
  for (size_t r = 0; r < rows; ++r) {
    std::copy_n(from.top_ids + r * padded, width, step.results.top_ids + r * width);
    std::copy_n(from.top_logprobs + r * padded, width, step.results.top_logprobs + r * width);
  }
  return static_cast<int64_t>(1000.0f * api::elapsed_ms(step.begun.get(), step.ended.get()));
}

// --------------------------------------------------------------------------------- operations
void CudaBackend::embed(const Weight& table, Buffer& x) {
  const int rows = form_.tokens;
  resolve_tokens({.token_ids = on_device_.token_ids, .samples = samples_, .rows = rows},
                 stream_.get());
  for (const RopeMemory& rope : ropes_) {
    rope_table({.positions = on_device_.positions,
                .inv_freq = rope.inv_freq.data<float>(),
                .half_dim = rope.half_dim,
                .attention_factor = rope.attention_factor,
                .cos = rope.cos,
                .sin = rope.sin,
                .rows = rows},
               stream_.get());
  }
  cuda::embed({.table = view_of(table),
               .half = half_,
               .token_ids = on_device_.token_ids,
               .x = data_of<float>(x),
               .rows = rows},
              stream_.get());
}

// Adds what is pending to x and leaves the norm of its rows in normed_.
void CudaBackend::add_norm(const Buffer& x, const Weight& norm) {
  add_rms_norm({.x = data_of<float>(x),
                .partials = pending_.partials,
                .splits = pending_.splits,
                .split_stride = pending_.split_stride,
                .weight = vector_of(&norm),
                .eps = config_.rms_norm_eps,
                .half = half_,
                .out = normed_.data(),
                .hidden = config_.hidden_size,
                .rows = form_.tokens},
               stream_.get());
  pending_ = {};
}

// y = the products of `parts`, side by side; neighbours of one format in one launch. `k_splits`:
// splits_of(parts), or 1.
void CudaBackend::project(std::span<const Linear* const> parts, const Input& in, int k_splits,
                          float* y, int64_t y_stride) const {
  LinearArgs args{.half = half_,
                  .x = in.rows_of_halves,
                  .x_stride = in.stride,
                  .rows = in.rows,
                  .segments = {},
                  .num_segments = 0,
                  .y = y,
                  .y_stride = y_stride,
                  .k_splits = k_splits,
                  .split_stride = in.rows * y_stride};
  int64_t column = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const WeightView& weight = view_of(*parts[i]->weight);
    args.segments[args.num_segments++] = {weight, vector_of(parts[i]->bias), column};
    column += weight.rows;
    const bool last = i + 1 == parts.size();
    if (!last && view_of(*parts[i + 1]->weight).format == weight.format) continue;
    if (weight.format != WeightFormat::kPlain) {
      cuda::linear(args, stream_.get());
    } else if (in.rows <= kGemvRows) {
      gemv(args, stream_.get());
    } else {
      product_of_library(args);
    }
    args.num_segments = 0;
  }
}

void CudaBackend::product_of_library(const LinearArgs& args) const {
  for (int s = 0; s < args.num_segments; ++s) {
    const LinearSegment& segment = args.segments[s];
    gemm_->run({.half = half_,
                .x = args.x,
                .x_stride = args.x_stride,
                .weight = segment.weight.codes,
                .bias = segment.bias,
                .y = args.y + segment.column,
                .y_stride = args.y_stride,
                .rows = args.rows,
                .outputs = segment.weight.rows,
                .cols = segment.weight.cols},
               stream_.get());
  }
}

// The product is left in partials_, for the next norm to add to the residual stream.
void CudaBackend::project_into_pending(const Linear& linear, const Input& in) {
  const int64_t hidden = config_.hidden_size;
  const std::array parts{&linear};
  const int splits = splits_of(parts);
  project(parts, in, splits, partials_.data<float>(), hidden);
  pending_ = {partials_.data<float>(), linear_partials(in.rows, splits), in.rows * hidden};
}

void CudaBackend::norm_qkv(const NormQkvArgs& args) {
  add_norm(args.x, args.norm);
  const std::array parts{&args.q, &args.k, &args.v};
  const int splits = splits_of(parts);
  project(parts, {normed_.data(), config_.hidden_size, form_.tokens}, splits,
          data_of<float>(args.qkv), config_.qkv_size());
  qkv_partials_ = linear_partials(form_.tokens, splits);
}

KvCacheView CudaBackend::cache_view(int layer) const {
  const int64_t stride = config_.kv_size() * options_.block_size;
  auto* k = cache_.data<uint16_t>() + 2 * layer * options_.num_blocks * stride;
  return {.k = k,
          .v = k + options_.num_blocks * stride,
          .block_size = options_.block_size,
          .num_kv_heads = config_.num_kv_heads,
          .head_dim = config_.head_dim,
          .block_stride = stride};
}

void CudaBackend::qk_norm_rope_cache(const rapshee::AttentionArgs& args) {
  const LayerConfig& layer = config_.layers[static_cast<size_t>(args.layer)];
  const RopeMemory& rope = ropes_[static_cast<size_t>(layer.rope)];
  cuda::qk_norm_rope_cache({.half = half_,
                            .qkv = data_of<float>(args.qkv),
                            .splits = qkv_partials_,
                            .split_stride = form_.tokens * config_.qkv_size(),
                            .q_norm = vector_of(args.q_norm),
                            .k_norm = vector_of(args.k_norm),
                            .eps = config_.rms_norm_eps,
                            .cos = rope.cos,
                            .sin = rope.sin,
                            .half_dim = rope.half_dim,
                            .slot_mapping = on_device_.slot_mapping,
                            .num_heads = config_.num_heads,
                            .q_out = queries_.data(),
                            .cache = cache_view(args.layer),
                            .rows = form_.tokens},
                           stream_.get());
}

void CudaBackend::paged_attention(const rapshee::AttentionArgs& args) {
  const auto layer = static_cast<size_t>(args.layer);
  const WindowWork& window = windows_[window_of_layer_[layer]];
  const AttentionArgs attention{.half = half_,
                                .q = queries_.data(),
                                .out = data_of<void>(args.out),
                                .num_heads = config_.num_heads,
                                .cache = cache_view(args.layer),
                                .block_tables = tables_.device<const int32_t>(),
                                .table_stride = on_device_.table_stride,
                                .seq_lens = on_device_.seq_lens,
                                .query_start_loc = on_device_.query_start_loc,
                                .positions = on_device_.positions,
                                .scale = config_.query_scale,
                                .window = window.window};
  if (num_decodes_ > 0) {
    paged_attention_decode(attention, window.work, attention_workspace_.data(), stream_.get());
  }
  if (!prefill_tiles_.empty()) {
    paged_attention_prefill(
        attention, {tiles_.device<const int32_t>(), static_cast<int>(prefill_tiles_.size() / 2)},
        stream_.get());
  }
}

void CudaBackend::out_proj(const OutProjArgs& args) {
  project_into_pending(args.out, {data_of<void>(args.attention), config_.q_size(), form_.tokens});
}

void CudaBackend::norm_gated_mlp(const GatedMlpArgs& args) {
  add_norm(args.x, args.norm);
  const int rows = form_.tokens;
  const int64_t inner = config_.intermediate_size;
  const WeightView &gate = view_of(*args.gate.weight), &up = view_of(*args.up.weight);
  const bool plain = gate.format == WeightFormat::kPlain;
  if (gate.format == up.format && (!plain || rows <= kGemvRows)) {
    const GatedLinearArgs gated{.half = half_,
                                .x = normed_.data(),
                                .x_stride = config_.hidden_size,
                                .rows = rows,
                                .gate = gate,
                                .up = up,
                                .gate_bias = vector_of(args.gate.bias),
                                .up_bias = vector_of(args.up.bias),
                                .out = hidden_.data(),
                                .out_stride = inner};
    plain ? gated_gemv(gated, stream_.get()) : gated_linear(gated, stream_.get());
  } else {
    if (gate_up_.size() == 0) gate_up_ = DeviceMemory(floats(buffer_rows(options_), 2 * inner));
    const std::array parts{&args.gate, &args.up};
    project(parts, {normed_.data(), config_.hidden_size, rows}, 1, gate_up_.data<float>(),
            2 * inner);
    gated_activation({.gate_up = gate_up_.data<float>(),
                      .half = half_,
                      .out = hidden_.data(),
                      .size = inner,
                      .rows = rows},
                     stream_.get());
  }
  project_into_pending(args.down, {hidden_.data(), inner, rows});
}

// Rows of the padded step that stand for `count` from `first` on: padding comes behind the last.
int CudaBackend::padded_count(int first, int count) const {
  return first + count == batch_.sampling.num_rows ? form_.rows - first : count;
}

void CudaBackend::head(const HeadArgs& args) {
  const int rows = padded_count(args.first_row, args.num_rows);
  add_rms_norm({.x = data_of<float>(args.x),
                .partials = pending_.partials,
                .splits = pending_.splits,
                .split_stride = pending_.split_stride,
                .row_ids = on_device_.sample_rows + args.first_row,
                .weight = vector_of(&args.norm),
                .eps = config_.rms_norm_eps,
                .half = half_,
                .out = normed_.data(),
                .hidden = config_.hidden_size,
                .rows = rows},
               stream_.get());
  const Linear linear{&args.weight, nullptr};
  const std::array parts{&linear};
  project(parts, {normed_.data(), config_.hidden_size, rows}, 1, logits_.data<float>(),
          config_.vocab_size);
}

void CudaBackend::process_and_sample(int first_row, int num_rows) {
  const DeviceResults& results = on_device_.results;
  sample({.logits = logits_.data<float>(),
          .vocab = config_.vocab_size,
          .first_row = first_row,
          .rows = padded_count(first_row, num_rows),
          .arrays = on_device_.sampling,
          .needs = needs_,
          .counts = counts_.data<uint32_t>(),
          .token_ids = results.token_ids,
          .logprobs = results.logprobs,
          .ranks = results.ranks,
          .top_ids = results.top_ids,
          .top_logprobs = results.top_logprobs,
          .workspace = sampling_workspace_.data()},
         stream_.get());
}

}  // namespace rapshee::cuda
