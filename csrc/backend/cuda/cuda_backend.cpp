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
  if (config.qk_norm == QkNorm::kRow) sizes.row_factors = floats(rows, 2);
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

GatedActivation gated(Activation activation) {
  return activation == Activation::kSilu ? GatedActivation::kSilu : GatedActivation::kGeluTanh;
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

}  // namespace

size_t block_bytes(const ModelConfig& config, int block_size) {
  return 2 * sizeof(uint16_t) * static_cast<size_t>(config.kv_size()) *
         static_cast<size_t>(block_size);
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
                        config.kv_windows().size() * sizeof(int32_t);
  size_t zero_blocks = 0;
  for (const LayerConfig& layer : config.layers) {
    if (layer.window > 0) zero_blocks += block_bytes(config, options.block_size);
  }
  const size_t counts = floats(options.max_num_seqs, config.vocab_size);
  const size_t library = options.deterministic ? 0 : Gemm::kWorkspaceBytes;
  return sizes_of(config, options).sum() + activations + 2 * tables + zero_blocks + counts +
         kRecordedSteps + library;
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
  allocate_blocks();
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
  row_factors_ = DeviceMemory(sizes.row_factors);
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
  api::synchronize(stream_.get());
  return half_ == HalfType::kF16 ? DType::kF16 : DType::kBF16;
}

// The KV cache. Layers with a window have a block of zeros behind their others.
void CudaBackend::allocate_blocks() {
  const std::vector<int> windows = config_.kv_windows();
  std::vector<int> num_blocks = options_.num_blocks;
  for (size_t group = 0; group < windows.size(); ++group) {
    WindowWork& work = windows_.emplace_back();
    work.window = windows[group];
    if (work.window > 0) work.zero_block = num_blocks[group]++;
  }
  window_of_layer_ = config_.kv_groups();
  first_block_ = config_.first_kv_blocks(num_blocks);
  const size_t block = block_bytes(config_, options_.block_size);
  const auto blocks = static_cast<size_t>(first_block_.back());
  if (blocks > std::numeric_limits<size_t>::max() / block) {
    throw DeviceError(concat("out of memory: cannot allocate ", blocks, " blocks of ", block,
                             " bytes for the KV cache"));
  }
  cache_ = DeviceMemory(blocks * block);
  for (int layer = 0; layer < config_.num_layers(); ++layer) {
    const int zero_block = window_of(layer).zero_block;
    if (zero_block < 0) continue;
    const KvCacheView view = cache_view(layer);
    for (void* half : {view.k, view.v}) {
      auto* first = static_cast<uint16_t*>(half) + zero_block * view.block_stride;
      api::fill(first, 0, block / 2, stream_.get());
    }
  }
}

// ------------------------------------------------------------------------------- operations
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
               .scale = config_.embed_scale,
               .x = data_of<float>(x),
               .rows = rows},
              stream_.get());
}

// How what is pending is added to x; the halves go to normed_.
AddNormArgs CudaBackend::pending_sum(const Buffer& x) const {
  return {.x = data_of<float>(x),
          .partials = pending_.partials,
          .splits = pending_.splits,
          .split_stride = pending_.split_stride,
          .post_weight = pending_.post_weight,
          .residual_scale = config_.residual_scale,
          .eps = config_.rms_norm_eps,
          .half = half_,
          .out = normed_.data(),
          .hidden = config_.hidden_size};
}

// Adds what is pending to x and leaves its rows, normalised unless `norm` is null, in normed_.
void CudaBackend::add_norm(const Buffer& x, const Weight* norm) {
  AddNormArgs args = pending_sum(x);
  args.weight = vector_of(norm);
  args.rows = form_.tokens;
  add_rms_norm(args, stream_.get());
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
void CudaBackend::project_into_pending(const Linear& linear, const Input& in,
                                       const Weight* post_norm) {
  const int64_t hidden = config_.hidden_size;
  const std::array parts{&linear};
  const int splits = splits_of(parts);
  project(parts, in, splits, partials_.data<float>(), hidden);
  pending_ = {partials_.data<float>(), linear_partials(in.rows, splits), in.rows * hidden,
              vector_of(post_norm)};
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
  const auto index = static_cast<size_t>(layer);
  const int64_t first = first_block_[index], blocks = first_block_[index + 1] - first;
  auto* k = cache_.data<uint16_t>() + 2 * first * stride;
  return {.k = k,
          .v = k + blocks * stride,
          .block_size = options_.block_size,
          .num_kv_heads = config_.num_kv_heads,
          .head_dim = config_.head_dim,
          .block_stride = stride};
}

void CudaBackend::qk_norm_rope_cache(const rapshee::AttentionArgs& args) {
  const LayerConfig& layer = config_.layers[static_cast<size_t>(args.layer)];
  const RopeMemory none;
  const RopeMemory& rope = layer.rope < 0 ? none : ropes_[static_cast<size_t>(layer.rope)];
  cuda::qk_norm_rope_cache({.half = half_,
                            .qkv = data_of<float>(args.qkv),
                            .splits = qkv_partials_,
                            .split_stride = form_.tokens * config_.qkv_size(),
                            .q_norm = vector_of(args.q_norm),
                            .k_norm = vector_of(args.k_norm),
                            .eps = config_.rms_norm_eps,
                            .row_factors = row_factors_.data<float>(),
                            .cos = rope.cos,
                            .sin = rope.sin,
                            .half_dim = rope.half_dim,
                            .slot_mapping = window_of(args.layer).slot_mapping,
                            .num_heads = config_.num_heads,
                            .q_out = queries_.data(),
                            .cache = cache_view(args.layer),
                            .rows = form_.tokens},
                           stream_.get());
}

void CudaBackend::paged_attention(const rapshee::AttentionArgs& args) {
  const WindowWork& window = window_of(args.layer);
  const AttentionArgs attention{.half = half_,
                                .q = queries_.data(),
                                .out = data_of<void>(args.out),
                                .num_heads = config_.num_heads,
                                .cache = cache_view(args.layer),
                                .block_tables = window.tables.device<const int32_t>(),
                                .table_stride = on_device_.table_stride,
                                .seq_lens = on_device_.seq_lens,
                                .query_start_loc = on_device_.query_start_loc,
                                .positions = on_device_.positions,
                                .scale = config_.query_scale,
                                .window = window.window,
                                .softcap = config_.attn_softcap};
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
  project_into_pending(args.out, {data_of<void>(args.attention), config_.q_size(), form_.tokens},
                       args.post_norm);
}

void CudaBackend::norm_gated_mlp(const GatedMlpArgs& args) {
  add_norm(args.x, args.norm);
  const int rows = form_.tokens;
  const int64_t inner = config_.intermediate_size;
  const WeightView &gate = view_of(*args.gate.weight), &up = view_of(*args.up.weight);
  const bool plain = gate.format == WeightFormat::kPlain;
  if (gate.format == up.format && (!plain || rows <= kGemvRows)) {
    const GatedLinearArgs pair{.half = half_,
                               .x = normed_.data(),
                               .x_stride = config_.hidden_size,
                               .rows = rows,
                               .gate = gate,
                               .up = up,
                               .gate_bias = vector_of(args.gate.bias),
                               .up_bias = vector_of(args.up.bias),
                               .activation = gated(config_.activation),
                               .out = hidden_.data(),
                               .out_stride = inner};
    plain ? gated_gemv(pair, stream_.get()) : gated_linear(pair, stream_.get());
  } else {
    if (gate_up_.size() == 0) gate_up_ = DeviceMemory(floats(buffer_rows(options_), 2 * inner));
    const std::array parts{&args.gate, &args.up};
    project(parts, {normed_.data(), config_.hidden_size, rows}, 1, gate_up_.data<float>(),
            2 * inner);
    gated_activation({.gate_up = gate_up_.data<float>(),
                      .activation = gated(config_.activation),
                      .half = half_,
                      .out = hidden_.data(),
                      .size = inner,
                      .rows = rows},
                     stream_.get());
  }
  project_into_pending(args.down, {hidden_.data(), inner, rows}, args.post_norm);
}

// Rows of the padded step that stand for `count` from `first` on: padding comes behind the last.
int CudaBackend::padded_count(int first, int count) const {
  return first + count == batch_.sampling.num_rows ? form_.rows - first : count;
}

void CudaBackend::head(const HeadArgs& args) {
  const int rows = padded_count(args.first_row, args.num_rows);
  AddNormArgs norm = pending_sum(args.x);
  norm.row_ids = on_device_.sample_rows + args.first_row;
  norm.weight = vector_of(&args.norm);
  norm.rows = rows;
  add_rms_norm(norm, stream_.get());
  const Linear linear{&args.weight, nullptr};
  const std::array parts{&linear};
  project(parts, {normed_.data(), config_.hidden_size, rows}, 1, logits_.data<float>(),
          config_.vocab_size);
  if (config_.logit_scale == 1.0f && config_.final_softcap == 0.0f) return;
  scale_logits({.logits = logits_.data<float>(),
                .count = rows * config_.vocab_size,
                .scale = config_.logit_scale,
                .softcap = config_.final_softcap},
               stream_.get());
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
