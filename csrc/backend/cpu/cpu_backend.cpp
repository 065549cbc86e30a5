#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "backend/cpu/cpu_features.h"
#include "core/error.h"

namespace rapshee::cpu {
namespace {

// Up to so many rows each worker prepares (norm, quantisation) all rows for itself: a few hundred
// nanoseconds a row, less than a barrier. Beyond, the rows are shared out first.
constexpr int64_t kPrepareAlone = 8;
// Tasks per thread of a region: enough for a thread that lost its core to lose little, few enough
// that each streams a long run of weights.
constexpr int kTasksPerThread = 8;
// Query rows of an attention tile: their scores of a split (32 KB) stay in the L1 cache.
constexpr int kTileRows = 32;
// Rows that go through gate and up together: their 2 x 32 columns (16 KB) stay in the L1 cache.
constexpr int64_t kGateRows = 64;
// Tokens of a task of the row-wise operations.
constexpr int kRowsPerTask = 16;

const PanelWeight& panels(const Weight& w) { return static_cast<const PanelWeight&>(w); }
const float* vector_data(const Weight* w) {
  return w ? static_cast<const VectorWeight*>(w)->data() : nullptr;
}
CpuBuffer& cpu(Buffer& b) { return static_cast<CpuBuffer&>(b); }
const CpuBuffer& cpu(const Buffer& b) { return static_cast<const CpuBuffer&>(b); }

// Part `task` of `n` things cut into `num_tasks` runs.
std::pair<int64_t, int64_t> run_of(int64_t n, int task, int num_tasks) {
  return {n * task / num_tasks, n * (task + 1) / num_tasks};
}

int tasks_for(int64_t n, int threads) {
  return static_cast<int>(std::min<int64_t>(n, int64_t{threads} * kTasksPerThread));
}

DType cache_dtype(const BackendOptions& options, bool all_f32) {
  if (options.cache == CacheType::kInt8) return DType::kI8;
  const bool wide = options.compute == ComputeType::kFloat32 ||
                    (options.compute == ComputeType::kAuto && all_f32);
  return wide && options.cache == CacheType::kAuto ? DType::kF32 : DType::kBF16;
}

}  // namespace

ActMemory::ActMemory(int64_t rows, int64_t cols) {
  const auto n = static_cast<size_t>(rows * round_up(cols, kGroup));
  f32_ = AlignedBuffer(n * sizeof(float));
  bf16_ = AlignedBuffer(n * sizeof(uint16_t));
  q8_ = AlignedBuffer(n);
  scale_ = AlignedBuffer(n / kHalf * sizeof(float));
  sum_ = AlignedBuffer(n / kHalf * sizeof(int32_t));
  total_ = AlignedBuffer(n / kGroup * sizeof(float));
}

ActRows ActMemory::rows_of(int64_t cols, bool fine) const {
  const auto at = [](const AlignedBuffer& b) { return const_cast<std::byte*>(b.data()); };
  return {.stride = round_up(cols, kGroup),
          .f32 = reinterpret_cast<float*>(at(f32_)),
          .bf16 = reinterpret_cast<uint16_t*>(at(bf16_)),
          .q8 = reinterpret_cast<int8_t*>(at(q8_)),
          .q8_scale = reinterpret_cast<float*>(at(scale_)),
          .q8_sum = reinterpret_cast<int32_t*>(at(sum_)),
          .q8_total = reinterpret_cast<float*>(at(total_)),
          .fine = fine};
}

void check_block_size(int block_size) {
  constexpr int kMost = 4096;  // keeps the bytes of a block inside size_t
  RAPSHEE_CHECK(block_size >= kLanes && block_size <= kMost && block_size % kLanes == 0,
                "block_size: got ", block_size, ", expected a multiple of ", kLanes, " up to ",
                kMost, " on cpu");
}

CpuBackend::CpuBackend(const BackendOptions& options)
    : options_(options),
      kernels_(select_kernels()),
      float_acts_(float_activations()),
      pool_(ThreadPool::process_pool(options.threads)) {
  check_block_size(options.block_size);
  RAPSHEE_CHECK(options.compute != ComputeType::kFloat16,
                "dtype: got float16, expected auto, bfloat16 or float32 on cpu");
}

std::string CpuBackend::description() const {
  return std::string("cpu (") + kernels_.isa + (float_acts_ ? ", float activations)" : ")");
}

std::unique_ptr<Weight> CpuBackend::load_matrix(const WeightSource& source) {
  const auto turn = pool_->lock();
  return pack_matrix(source, options_.compute, weights_, *pool_, options_.threads);
}

std::unique_ptr<Weight> CpuBackend::load_vector(const WeightSource& source) {
  return read_vector(source);
}

std::unique_ptr<Buffer> CpuBackend::allocate(int64_t cols) {
  return std::make_unique<CpuBuffer>(options_.max_num_tokens, cols);
}

DType CpuBackend::allocate_cache(const ModelConfig& config, bool all_f32) {
  config_ = config;
  const DType kv_dtype = cache_dtype(options_, all_f32);
  layout_ = {kv_dtype, config.head_dim, options_.block_size};
  const size_t block = kv_block_bytes("cpu", config, kv_dtype, options_.block_size);
  kv_groups_ = config.kv_groups();
  first_kv_block_ = config.first_kv_blocks(options_.num_blocks);
  const auto blocks = static_cast<size_t>(first_kv_block_.back());
  if (blocks > std::numeric_limits<size_t>::max() / block) {
    throw DeviceError(concat("out of memory: cannot allocate ", blocks, " blocks of ", block,
                             " bytes for the KV cache"));
  }
  cache_ = AlignedBuffer(blocks * block);
  const int64_t tokens = options_.max_num_tokens;
  const int64_t widest = std::max(config.hidden_size, config.q_size());
  const int64_t deepest = std::max(widest, config.intermediate_size);
  acts_ = ActMemory(std::max<int64_t>(tokens, kMaxHeadRows), widest);
  hidden_ = ActMemory(tokens, config.intermediate_size);
  if (config.post_norm) product_ = std::make_unique<CpuBuffer>(tokens, config.hidden_size);
  const size_t bytes =
      std::max({linear_scratch_bytes(deepest) + 2 * kGateRows * kGroup * sizeof(float),
                linear_scratch_bytes(deepest) + kMaxHeadRows * kVocabChunk * sizeof(float),
                attention_scratch_bytes(std::max(kTileRows, config.group()), config.head_dim)});
  prepared_.resize(static_cast<size_t>(options_.threads));
  for (int w = 0; w < options_.threads; ++w) {
    worker_acts_.emplace_back(kPrepareAlone, widest);
    scratch_.emplace_back(bytes);
    sampler_scratch_.emplace_back(config.vocab_size);
  }
  sampler_ = std::make_unique<Sampler>(config.vocab_size, options_.max_num_seqs);
  logits_ = AlignedBuffer(static_cast<size_t>(kMaxHeadRows * config.vocab_size) * sizeof(float));
  chunk_stats_.resize(static_cast<size_t>(kMaxHeadRows * ceil_div(config.vocab_size, kVocabChunk)));
  cos_.resize(config.ropes.size());
  sin_.resize(config.ropes.size());
  return kv_dtype;
}

template <class F>
void CpuBackend::parallel(int num_tasks, F&& task) {
  pool_->run(num_tasks, options_.threads, task);
}

void CpuBackend::suspend() noexcept { turn_.reset(); }

void CpuBackend::resume() { turn_ = std::make_unique<ThreadPool::StepGuard>(*pool_); }

void CpuBackend::begin_step(const Batch& batch) {
  resume();
  start_ = std::chrono::steady_clock::now();
  batch_ = batch;
  masks_.clear();
  std::swap(samples_, previous_samples_);
  samples_.clear();
  plan_tiles();
  rope_tables();
}

void CpuBackend::end_step() noexcept {
  const auto elapsed = std::chrono::steady_clock::now() - start_;
  microseconds_[batch_.ticket % microseconds_.size()] =
      std::chrono::duration_cast<std::chrono::microseconds>(elapsed).count();
  turn_.reset();
}

// The results were written as they came.
int64_t CpuBackend::finish_step(uint64_t ticket) {
  return microseconds_[ticket % microseconds_.size()];
}

void CpuBackend::set_masks(std::span<const uint32_t> masks) {
  masks_.assign(static_cast<size_t>(batch_.sampling.num_rows), nullptr);
  const uint32_t* next = masks.data();
  for (size_t r = 0; r < masks_.size(); ++r) {
    if (!batch_.sampling.needs_mask[r]) continue;
    masks_[r] = next;
    next += ceil_div(config_.vocab_size, 32);
  }
}

void CpuBackend::plan_tiles() {
  tiles_.clear();
  last_of_seq_.assign(static_cast<size_t>(batch_.num_tokens), 0);
  const int tokens_per_tile = std::max(1, kTileRows / config_.group());
  for (int s = 0; s < batch_.num_seqs; ++s) {
    const int end = batch_.query_start_loc[s + 1];
    for (int t = batch_.query_start_loc[s]; t < end; t += tokens_per_tile) {
      tiles_.push_back({s, t, std::min(end, t + tokens_per_tile)});
    }
    last_of_seq_[static_cast<size_t>(end - 1)] = 1;
  }
}

// The angle is computed in single precision, as the reference implementations do: at large
// positions its rounding shows in the logits.
void CpuBackend::rope_tables() {
  for (size_t i = 0; i < config_.ropes.size(); ++i) {
    const Rope& rope = config_.ropes[i];
    const size_t half = rope.inv_freq.size();
    cos_[i].resize(static_cast<size_t>(batch_.num_tokens) * half);
    sin_[i].resize(cos_[i].size());
    parallel(static_cast<int>(ceil_div(batch_.num_tokens, kRowsPerTask)), [&](int task, int) {
      const int end = std::min(batch_.num_tokens, (task + 1) * kRowsPerTask);
      for (int t = task * kRowsPerTask; t < end; ++t) {
        for (size_t d = 0; d < half; ++d) {
          const double angle = static_cast<float>(batch_.positions[t]) * rope.inv_freq[d];
          const size_t at = static_cast<size_t>(t) * half + d;
          cos_[i][at] = static_cast<float>(std::cos(angle)) * rope.attention_factor;
          sin_[i][at] = static_cast<float>(std::sin(angle)) * rope.attention_factor;
        }
      }
    });
  }
}

void CpuBackend::embed(const Weight& table, Buffer& x) {
  parallel(static_cast<int>(ceil_div(batch_.num_tokens, kRowsPerTask)), [&](int task, int) {
    const int end = std::min(batch_.num_tokens, (task + 1) * kRowsPerTask);
    for (int t = task * kRowsPerTask; t < end; ++t) {
      int32_t id = batch_.token_ids[t];
      if (id < 0) id = previous_samples_[static_cast<size_t>(~id)];
      // A row that could not be sampled has token -1; its request has failed already.
      float* row = cpu(x).row(t);
      panels(table).copy_row(std::max(id, 0), row);
      if (config_.embed_scale == 1.0f) continue;
      for (int64_t i = 0; i < config_.hidden_size; ++i) row[i] *= config_.embed_scale;
    }
  });
}

uint8_t CpuBackend::form_of(const PanelWeight& weight, bool fine) const {
  if (float_acts_ || weight.layout().format == PanelFormat::kF32) return kActF32;
  if (weight.layout().format == PanelFormat::kBF16) return kActBF16;
  return fine ? kActQ8Fine : kActQ8;
}

ActRow CpuBackend::prepare(const Input& in, int64_t row, uint8_t forms, const ActRows& out) const {
  const int64_t from = in.rows.empty() ? row : in.rows[static_cast<size_t>(row)];
  const ActRow to = out.at(row);
  kernels_.prepare_row(in.x.row(from), in.x.cols(), vector_data(in.norm), config_.rms_norm_eps,
                       forms, to);
  return to;
}

template <class Body>
void CpuBackend::with_prepared(const Input& in, uint8_t forms, int num_tasks, Body body) {
  const int64_t rows = in.rows.empty() ? batch_.num_tokens : static_cast<int64_t>(in.rows.size());
  if (rows <= kPrepareAlone) {
    for (Flag& flag : prepared_) flag.set = false;
    parallel(num_tasks, [&](int task, int worker) {
      const ActRows x = worker_acts_[static_cast<size_t>(worker)].rows_of(in.x.cols(), in.fine);
      bool& prepared = prepared_[static_cast<size_t>(worker)].set;
      if (!prepared) {
        for (int64_t r = 0; r < rows; ++r) prepare(in, r, forms, x);
        prepared = true;
      }
      body(x, task, worker);
    });
    return;
  }
  const ActRows x = acts_.rows_of(in.x.cols(), in.fine);
  parallel(static_cast<int>(ceil_div(rows, kRowsPerTask)), [&](int task, int) {
    const int64_t end = std::min<int64_t>(rows, (task + 1) * kRowsPerTask);
    for (int64_t r = task * kRowsPerTask; r < end; ++r) prepare(in, r, forms, x);
  });
  parallel(num_tasks, [&](int task, int worker) { body(x, task, worker); });
}

void CpuBackend::multiply(const ActRows& x, int64_t rows, const Product& product, int64_t panel,
                          int worker) {
  const PanelLayout& layout = product.weight.layout();
  const int64_t column = panel * kLanes;
  const LinearOut out{
      .y = product.y + (panel - product.first_panel) * kLanes,
      .stride = product.stride,
      .columns = static_cast<int>(std::min<int64_t>(kLanes, layout.rows - column)),
      .bias = product.bias ? product.bias + column : nullptr,
      .add = product.add,
      .scale = config_.residual_scale,
  };
  kernels_.linear_panel(layout, product.weight.panel(panel), x, rows, float_acts_, scratch(worker),
                        out);
}

// Task `task` of the panels of all products, taken as one long row.
void CpuBackend::multiply_all(const ActRows& x, int64_t rows, std::span<const Product> products,
                              int task, int num_tasks, int worker) {
  int64_t total = 0;
  for (const Product& p : products) total += p.weight.layout().num_panels();
  auto [begin, end] = run_of(total, task, num_tasks);
  for (const Product& p : products) {
    const int64_t n = p.weight.layout().num_panels();
    for (int64_t panel = std::max<int64_t>(begin, 0); panel < std::min(end, n); ++panel) {
      multiply(x, rows, p, panel, worker);
    }
    begin -= n;
    end -= n;
  }
}

void CpuBackend::linear(const Input& in, std::span<const Product> products) {
  uint8_t forms = 0;
  int64_t panels = 0;
  for (const Product& p : products) {
    forms |= form_of(p.weight, in.fine);
    panels += p.weight.layout().num_panels();
  }
  const int num_tasks = tasks_for(panels, options_.threads);
  with_prepared(in, forms, num_tasks, [&](const ActRows& x, int task, int worker) {
    multiply_all(x, batch_.num_tokens, products, task, num_tasks, worker);
  });
}

// The product is added to x; one with a norm is kept apart until add_post_norm.
CpuBackend::Product CpuBackend::add_to(Buffer& x, const Linear& linear, const Weight* post_norm) {
  CpuBuffer& y = post_norm ? *product_ : cpu(x);
  return {panels(*linear.weight), vector_data(linear.bias), y.row(0), y.cols(), !post_norm};
}

void CpuBackend::add_post_norm(Buffer& x, const Weight* post_norm) {
  if (post_norm == nullptr) return;
  parallel(static_cast<int>(ceil_div(batch_.num_tokens, kRowsPerTask)), [&](int task, int) {
    const int end = std::min(batch_.num_tokens, (task + 1) * kRowsPerTask);
    for (int t = task * kRowsPerTask; t < end; ++t) {
      kernels_.add_normed(cpu(x).row(t), product_->row(t), config_.hidden_size,
                          vector_data(post_norm), config_.rms_norm_eps, config_.residual_scale);
    }
  });
}

void CpuBackend::norm_qkv(const NormQkvArgs& args) {
  CpuBuffer& qkv = cpu(args.qkv);
  const int64_t q = config_.q_size(), kv = config_.kv_size();
  const auto to = [&](const Linear& linear, int64_t column) {
    return Product{panels(*linear.weight), vector_data(linear.bias), qkv.row(0) + column,
                   qkv.cols()};
  };
  const std::array products = {to(args.q, 0), to(args.k, q), to(args.v, q + kv)};
  // Outlier channels are largest here: with one scale per 32, this input alone makes 40 % of the
  // squared error of all quantised activations (SmolLM2-135M); with one per 16, half of that.
  linear({.x = cpu(args.x), .norm = args.norm, .fine = true}, products);
}

void CpuBackend::out_proj(const OutProjArgs& args) {
  const std::array products = {add_to(args.x, args.out, args.post_norm)};
  linear({cpu(args.attention)}, products);
  add_post_norm(args.x, args.post_norm);
}

std::byte* CpuBackend::cache(int layer, int64_t block, int kv_head) {
  const int64_t head =
      (first_kv_block_[static_cast<size_t>(layer)] + block) * config_.num_kv_heads + kv_head;
  return cache_.data() + static_cast<size_t>(head) * layout_.head_bytes();
}

// Heads [0, count) of a token: each normalised alone or all together, as the weight is long.
void CpuBackend::normalize_heads(const Weight* norm, float* heads, int count) const {
  if (norm == nullptr) return;
  const int64_t n = norm->cols();
  for (int64_t i = 0; i < int64_t{count} * config_.head_dim; i += n) {
    kernels_.norm_in_place(heads + i, n, vector_data(norm), config_.rms_norm_eps);
  }
}

void CpuBackend::rotate_heads(int rope, int token, float* heads, int count) const {
  if (rope < 0) return;
  const auto r = static_cast<size_t>(rope);
  const int half = static_cast<int>(config_.ropes[r].inv_freq.size());
  const int64_t at = int64_t{token} * half;
  for (int h = 0; h < count; ++h) {
    kernels_.rope(heads + h * config_.head_dim, cos_[r].data() + at, sin_[r].data() + at, half);
  }
}

void CpuBackend::rotate_and_cache(const AttentionArgs& args, int token) {
  const int rope = config_.layers[static_cast<size_t>(args.layer)].rope;
  float* q = cpu(args.qkv).row(token);
  float* k = q + config_.q_size();
  float* v = k + config_.kv_size();
  const int dim = config_.head_dim;
  normalize_heads(args.q_norm, q, config_.num_heads);
  normalize_heads(args.k_norm, k, config_.num_kv_heads);
  rotate_heads(rope, token, q, config_.num_heads);
  rotate_heads(rope, token, k, config_.num_kv_heads);
  const size_t row = group_of(args.layer) * static_cast<size_t>(batch_.num_tokens);
  const int64_t slot = batch_.slot_mapping[row + static_cast<size_t>(token)];
  if (slot < 0) return;
  const auto offset = static_cast<int>(slot % options_.block_size);
  for (int h = 0; h < config_.num_kv_heads; ++h) {
    kernels_.cache_write(layout_.dtype, k + h * dim, v + h * dim, dim, offset,
                         last_of_seq_[static_cast<size_t>(token)],
                         cache(args.layer, slot / options_.block_size, h));
  }
}

void CpuBackend::qk_norm_rope_cache(const AttentionArgs& args) {
  parallel(static_cast<int>(ceil_div(batch_.num_tokens, kRowsPerTask)), [&](int task, int) {
    const int end = std::min(batch_.num_tokens, (task + 1) * kRowsPerTask);
    for (int t = task * kRowsPerTask; t < end; ++t) rotate_and_cache(args, t);
  });
}

void CpuBackend::paged_attention(const AttentionArgs& args) {
  const CpuBuffer& qkv = cpu(args.qkv);
  CpuBuffer& out = cpu(args.out);
  const int heads = config_.num_kv_heads;
  const int64_t table = static_cast<int64_t>(group_of(args.layer)) * batch_.num_seqs;
  const int num_tasks = static_cast<int>(tiles_.size()) * heads;
  // The last tiles of a prompt see the most keys: they come first, the short ones fill the end.
  parallel(num_tasks, [&](int task, int worker) {
    const int reversed = num_tasks - 1 - task;
    const Tile& tile = tiles_[static_cast<size_t>(reversed / heads)];
    const int head = reversed % heads;
    const int64_t column = int64_t{head} * config_.group() * config_.head_dim;
    const AttentionTile t{
        .q = qkv.row(tile.begin) + column,
        .q_token_stride = qkv.cols(),
        .out = out.row(tile.begin) + column,
        .out_token_stride = out.cols(),
        .positions = batch_.positions + tile.begin,
        .num_tokens = tile.end - tile.begin,
        .group = config_.group(),
        .head_dim = config_.head_dim,
        .scale = config_.query_scale,
        .softcap = config_.attn_softcap,
        .window = config_.layers[static_cast<size_t>(args.layer)].window,
        .cache = cache(args.layer, 0, head),
        .block_stride = static_cast<int64_t>(layout_.head_bytes()) * heads,
        .block_table = batch_.block_tables + (table + tile.seq) * batch_.max_blocks,
        .block_size = options_.block_size,
    };
    kernels_.attention(layout_.dtype, t, scratch(worker));
  });
}

// Columns [32 group, 32 group + 32) of the gated hidden rows, prepared for the down projection.
void CpuBackend::gate_up(const ActRows& x, const GatedMlpArgs& args, const ActRows& hidden,
                         uint8_t forms, int64_t group, int worker) {
  const auto gated_mul =
      config_.activation == Activation::kGeluTanh ? kernels_.gelu_mul : kernels_.silu_mul;
  const size_t unpacked = linear_scratch_bytes(config_.hidden_size);
  auto* gate = reinterpret_cast<float*>(scratch(worker) + unpacked);
  float* up = gate + kGateRows * kGroup;
  const int64_t columns = std::min<int64_t>(kGroup, config_.intermediate_size - group * kGroup);
  for (int64_t begin = 0; begin < batch_.num_tokens; begin += kGateRows) {
    const int64_t end = std::min<int64_t>(batch_.num_tokens, begin + kGateRows);
    const Product to_gate{
        panels(*args.gate.weight), vector_data(args.gate.bias), gate, kGroup, false, 2 * group};
    const Product to_up{
        panels(*args.up.weight), vector_data(args.up.bias), up, kGroup, false, 2 * group};
    for (int64_t panel = 2 * group; panel * kLanes < group * kGroup + columns; ++panel) {
      multiply(x.from(begin), end - begin, to_gate, panel, worker);
      multiply(x.from(begin), end - begin, to_up, panel, worker);
    }
    for (int64_t r = begin; r < end; ++r) {
      float* row = gate + (r - begin) * kGroup;
      gated_mul(row, up + (r - begin) * kGroup, columns);
      kernels_.prepare_row(row, columns, nullptr, 0.0f, forms, hidden.at(r, group * kGroup));
    }
  }
}

void CpuBackend::norm_gated_mlp(const GatedMlpArgs& args) {
  const ActRows hidden = hidden_.rows_of(config_.intermediate_size);
  const uint8_t in_forms = form_of(panels(*args.gate.weight)) | form_of(panels(*args.up.weight));
  const uint8_t hidden_forms = form_of(panels(*args.down.weight));
  const int64_t groups = ceil_div(config_.intermediate_size, kGroup);
  const int up_tasks = tasks_for(groups, options_.threads);
  with_prepared({cpu(args.x), args.norm}, in_forms, up_tasks,
                [&](const ActRows& x, int task, int worker) {
                  const auto [begin, end] = run_of(groups, task, up_tasks);
                  for (int64_t g = begin; g < end; ++g) {
                    gate_up(x, args, hidden, hidden_forms, g, worker);
                  }
                });
  const std::array products = {add_to(args.x, args.down, args.post_norm)};
  const int down_tasks = tasks_for(products[0].weight.layout().num_panels(), options_.threads);
  parallel(down_tasks, [&](int task, int worker) {
    multiply_all(hidden, batch_.num_tokens, products, task, down_tasks, worker);
  });
  add_post_norm(args.x, args.post_norm);
}

void CpuBackend::head(const HeadArgs& args) {
  const PanelWeight& weight = panels(args.weight);
  const int64_t vocab = config_.vocab_size;
  const int64_t chunks = ceil_div(vocab, kVocabChunk);
  const bool scaled = config_.logit_scale != 1.0f || config_.final_softcap != 0.0f;
  auto* logits = reinterpret_cast<float*>(logits_.data());
  const std::span rows(batch_.sample_rows + args.first_row, static_cast<size_t>(args.num_rows));
  const Input in{cpu(args.x), &args.norm, rows};
  with_prepared(
      in, form_of(weight), static_cast<int>(chunks), [&](const ActRows& x, int chunk, int worker) {
        const int64_t first = int64_t{chunk} * kVocabChunk;
        const int64_t count = std::min<int64_t>(kVocabChunk, vocab - first);
        auto* part =
            reinterpret_cast<float*>(scratch(worker) + linear_scratch_bytes(weight.cols()));
        const Product to_part{weight, nullptr, part, kVocabChunk, false, first / kLanes};
        for (int64_t panel = first / kLanes; panel * kLanes < first + count; ++panel) {
          multiply(x, args.num_rows, to_part, panel, worker);
        }
        for (int r = 0; r < args.num_rows; ++r) {
          float* row = part + r * kVocabChunk;
          if (scaled) kernels_.soft_cap(row, count, config_.logit_scale, config_.final_softcap);
          chunk_stats_[static_cast<size_t>(r * chunks + chunk)] = kernels_.chunk_stats(row, count);
          if (wants_logits(args.first_row + r)) {
            std::copy(row, row + count, logits + r * vocab + first);
          }
        }
      });
}

// Of greedy rows without anything that changes or lists logits, arg-max and log-sum-exp are all
// that is kept.
bool CpuBackend::wants_logits(int row) const { return Sampler::needs_logits(batch_.sampling, row); }

void CpuBackend::process_and_sample(int first_row, int num_rows) {
  const int64_t vocab = config_.vocab_size;
  const auto chunks = static_cast<size_t>(ceil_div(vocab, kVocabChunk));
  const auto* logits = reinterpret_cast<const float*>(logits_.data());
  parallel(num_rows, [&](int i, int worker) {
    const int r = first_row + i;
    const std::span<const ChunkStats> stats(chunk_stats_.data() + static_cast<size_t>(i) * chunks,
                                            chunks);
    sampler_->sample_row(kernels_, batch_.sampling, r,
                         masks_.empty() ? nullptr : masks_[static_cast<size_t>(r)],
                         wants_logits(r) ? logits + i * vocab : nullptr, merge_stats(stats),
                         sampler_scratch_[static_cast<size_t>(worker)], batch_.results);
  });
  const int32_t* tokens = batch_.results.token_ids + first_row;
  samples_.insert(samples_.end(), tokens, tokens + num_rows);
}

void CpuBackend::set_state(int slot, std::span<const int32_t> token_ids,
                           int64_t num_prompt_tokens) {
  sampler_->set_state(slot, token_ids, num_prompt_tokens);
}

}  // namespace rapshee::cpu
