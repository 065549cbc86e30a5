#include "runner/model_runner.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "core/error.h"
#include "core/thread_pool.h"

namespace rapshee {
namespace {

void check_options(const RunnerOptions& options) {
  const auto check = [](const char* field, int value, int most) {
    RAPSHEE_CHECK(value >= 1 && value <= most, field, ": got ", value, ", expected 1 to ", most);
  };
  check("num_blocks", options.num_blocks, std::numeric_limits<int>::max() / 2);
  check("block_size", options.block_size, 4096);
  check("max_num_tokens", options.max_num_tokens, 1 << 20);
  check("max_num_seqs", options.max_num_seqs, 1 << 16);
  check("threads", options.threads, 1024);
}

// Greedy rows without anything that changes or lists logits need only their arg-max.
bool wants_logits(const StepInput& in, size_t r) {
  return in.target_ids[r] >= 0 || in.temperature[r] != 0.0f || in.num_logprobs[r] > 0 ||
         in.state_slot[r] >= 0 || in.bias_indptr[r] != in.bias_indptr[r + 1] || in.needs_mask[r];
}

}  // namespace

ModelRunner::ModelRunner(ModelConfig config, const std::vector<TensorEntry>& entries,
                         const RunnerOptions& options, const Progress& progress)
    : config_(std::move(config)), options_(options), owner_(::getpid()) {
  config_.validate();
  check_options(options);
  limits_ = {config_.vocab_size, config_.max_position,   options.block_size,
             options.num_blocks, options.max_num_tokens, options.max_num_seqs};
  backend_ = make_backend(options.device, {.block_size = options.block_size,
                                           .num_blocks = options.num_blocks,
                                           .max_num_tokens = options.max_num_tokens,
                                           .max_num_seqs = options.max_num_seqs,
                                           .threads = options.threads,
                                           .compute = options.compute});
  weights_ = load_weights(config_, entries, *backend_, progress);
  const bool f32 = options.compute == ComputeType::kFloat32 ||
                   (options.compute == ComputeType::kAuto && weights_.all_f32);
  kv_dtype_ = f32 ? DType::kF32 : DType::kBF16;
  backend_->allocate_cache(config_, kv_dtype_);
  decoder_ = std::make_unique<Decoder>(config_, weights_, *backend_);
  checksum_ = weights_.checksum;
  weight_bytes_ = weights_.bytes;
  description_ = backend_->description();
  const SignalsBlocked blocked;
  thread_ = std::thread([this] { serve(); });
}

ModelRunner::~ModelRunner() { close(); }

bool ModelRunner::is_ours() const { return ::getpid() == owner_; }

void ModelRunner::check_open() const {
  if (!is_ours()) {
    throw DeviceError("the runner belongs to the process that made it; make one after fork");
  }
  if (!thread_.joinable()) throw DeviceError("the runner is closed");
}

bool ModelRunner::alive() const {
  if (!is_ours()) return false;
  const std::lock_guard lock(sync_->mutex);
  return alive_ && thread_.joinable();
}

uint64_t ModelRunner::launch(StepInput input) {
  check_open();
  validate_step(input, limits_, previous_rows_);
  const std::lock_guard lock(sync_->mutex);
  if (!alive_) throw DeviceError("the device failed in an earlier step");
  RAPSHEE_CHECK(steps_.size() < kMaxOutstanding, "launch: ", kMaxOutstanding,
                " steps are outstanding, collect the oldest first");
  auto step = std::make_unique<Step>();
  step->ticket = next_ticket_++;
  step->masked_rows = static_cast<size_t>(
      std::count_if(input.needs_mask.begin(), input.needs_mask.end(), [](uint8_t m) { return m; }));
  step->masks_ready = step->masked_rows == 0;
  step->input = std::move(input);
  previous_rows_ = step->input.num_rows();
  work_.push_back([this, s = step.get()] { run(*s); });
  steps_.push_back(std::move(step));
  sync_->work_ready.notify_all();
  return steps_.back()->ticket;
}

ModelRunner::Step& ModelRunner::outstanding(uint64_t ticket) {
  for (const auto& step : steps_) {
    if (step->ticket == ticket) return *step;
  }
  RAPSHEE_CHECK(false, "ticket: ", ticket, " is not outstanding");
}

void ModelRunner::set_masks(uint64_t ticket, std::span<const uint32_t> masks) {
  check_open();
  const std::lock_guard lock(sync_->mutex);
  Step& step = outstanding(ticket);
  const size_t expected = step.masked_rows * static_cast<size_t>(mask_words());
  RAPSHEE_CHECK(masks.size() == expected, "masks: got ", masks.size(), " words, expected ",
                expected);
  RAPSHEE_CHECK(!step.masks_ready, "masks: ticket ", ticket, " needs none, or has them");
  step.masks.assign(masks.begin(), masks.end());
  step.masks_ready = true;
  sync_->work_ready.notify_all();
}

StepOutput ModelRunner::collect(uint64_t ticket) {
  check_open();
  std::unique_lock lock(sync_->mutex);
  Step& step = outstanding(ticket);
  RAPSHEE_CHECK(&step == steps_.front().get(), "collect: ticket ", ticket, " is not the oldest");
  RAPSHEE_CHECK(step.masks_ready, "collect: ticket ", ticket, " waits for set_masks");
  sync_->step_done.wait(lock, [&] { return step.done; });
  const std::unique_ptr<Step> finished = std::move(steps_.front());
  steps_.pop_front();
  if (finished->error) std::rethrow_exception(finished->error);
  return std::move(finished->output);
}

void ModelRunner::set_state(int slot, std::vector<int32_t> token_ids, int64_t num_prompt_tokens) {
  check_open();
  RAPSHEE_CHECK(slot >= 0 && slot < options_.max_num_seqs, "slot: got ", slot, ", expected 0 to ",
                options_.max_num_seqs - 1);
  RAPSHEE_CHECK(
      num_prompt_tokens >= 0 && num_prompt_tokens <= static_cast<int64_t>(token_ids.size()),
      "num_prompt_tokens: got ", num_prompt_tokens, " of ", token_ids.size(), " tokens");
  for (int32_t id : token_ids) {
    RAPSHEE_CHECK(id >= 0 && id < config_.vocab_size, "token_ids: got ", id, ", expected 0 to ",
                  config_.vocab_size - 1);
  }
  const std::lock_guard lock(sync_->mutex);
  work_.push_back([this, slot, ids = std::move(token_ids), num_prompt_tokens] {
    try {
      backend_->set_state(slot, ids, num_prompt_tokens);
    } catch (...) {  // memory: the step that would have used the state fails
      state_error_ = std::current_exception();
    }
  });
  sync_->work_ready.notify_all();
}

void ModelRunner::close() {
  if (!thread_.joinable()) return;
  if (!is_ours()) return abandon();
  {
    const std::lock_guard lock(sync_->mutex);
    closing_ = true;
    sync_->work_ready.notify_all();
  }
  thread_.join();
  steps_.clear();
  decoder_.reset();
  weights_ = {};
  backend_.reset();
}

// Memory of the backend, its pool and what they wait on stays the parent's, as fork copied it: to
// free it would be to join threads that do not exist here.
void ModelRunner::abandon() {
  thread_.detach();
  static_cast<void>(sync_.release());
  static_cast<void>(backend_.release());
}

// The step thread: work in the order in which it came.
void ModelRunner::serve() {
  std::unique_lock lock(sync_->mutex);
  for (;;) {
    sync_->work_ready.wait(lock, [this] { return closing_ || !work_.empty(); });
    if (work_.empty()) return;
    const std::function<void()> next = std::move(work_.front());
    work_.pop_front();
    lock.unlock();
    next();
    lock.lock();
  }
}

void ModelRunner::run(Step& step) noexcept {
  std::exception_ptr error;
  bool device_failed = false;
  try {
    forward(step);
  } catch (const DeviceError&) {
    error = std::current_exception();
    device_failed = true;
  } catch (...) {
    error = std::current_exception();
  }
  backend_->end_step();
  previous_failed_ = error != nullptr;
  const std::lock_guard lock(sync_->mutex);
  step.error = error;
  step.done = true;
  alive_ = alive_ && !device_failed;
  sync_->step_done.notify_all();
}

void ModelRunner::forward(Step& step) {
  const StepInput& in = step.input;
  if (state_error_) std::rethrow_exception(std::exchange(state_error_, nullptr));
  if (previous_failed_ &&
      std::any_of(in.token_ids.begin(), in.token_ids.end(), [](int32_t id) { return id < 0; })) {
    throw Error("the step before, whose samples this one continues, has failed");
  }
  const auto start = std::chrono::steady_clock::now();
  Batch batch;
  batch.num_tokens = in.num_tokens();
  batch.num_seqs = in.num_seqs();
  batch.max_blocks = static_cast<int>(in.max_blocks);
  batch.token_ids = in.token_ids.data();
  batch.positions = in.positions.data();
  batch.slot_mapping = in.slot_mapping.data();
  batch.query_start_loc = in.query_start_loc.data();
  batch.seq_lens = in.seq_lens.data();
  batch.block_tables = in.block_tables.data();
  backend_->begin_step(batch);
  decoder_->forward();
  sample(step);
  step.output.timing_us = std::chrono::duration_cast<std::chrono::microseconds>(
                              std::chrono::steady_clock::now() - start)
                              .count();
}

void ModelRunner::wait_for_masks(Step& step) {
  std::unique_lock lock(sync_->mutex);
  const bool ready = step.masks_ready;
  if (!ready) backend_->suspend();
  sync_->work_ready.wait(lock, [&] { return closing_ || step.masks_ready; });
  if (!step.masks_ready) throw Error("the runner was closed before the masks of a step came");
  lock.unlock();
  if (!ready) backend_->resume();
}

// Head and sampling in slices of rows that the backend has logits for.
void ModelRunner::sample(Step& step) {
  const StepInput& in = step.input;
  StepOutput& out = step.output;
  const auto rows = static_cast<size_t>(in.num_rows());
  const int32_t width =
      rows ? *std::max_element(in.num_logprobs.begin(), in.num_logprobs.end()) : 0;
  out.top_width = width;
  out.token_ids.assign(rows, -1);
  out.logprobs.assign(rows, 0.0f);
  out.ranks.assign(rows, 0);
  out.top_ids.assign(rows * static_cast<size_t>(width), -1);
  out.top_logprobs.assign(out.top_ids.size(), -std::numeric_limits<float>::infinity());
  std::vector<uint8_t> wanted(rows);
  std::vector<const uint32_t*> masks(rows);
  for (size_t r = 0; r < rows; ++r) wanted[r] = wants_logits(in, r);

  const auto slice = static_cast<size_t>(backend_->max_head_rows());
  size_t masked = 0;
  for (size_t begin = 0; begin < rows; begin += slice) {
    const size_t count = std::min(slice, rows - begin);
    backend_->head({decoder_->x(), *weights_.final_norm, weights_.head(),
                    std::span(in.sample_rows).subspan(begin, count),
                    std::span(wanted).subspan(begin, count)});
    if (begin == 0) wait_for_masks(step);
    for (size_t r = begin; r < begin + count; ++r) {
      if (!in.needs_mask[r]) continue;
      masks[r] = step.masks.data() + masked++ * static_cast<size_t>(mask_words());
    }
    const SamplingRows sampling{
        .num_rows = static_cast<int>(count),
        .target_ids = in.target_ids.data() + begin,
        .temperature = in.temperature.data() + begin,
        .top_k = in.top_k.data() + begin,
        .top_p = in.top_p.data() + begin,
        .min_p = in.min_p.data() + begin,
        .repetition_penalty = in.repetition_penalty.data() + begin,
        .presence_penalty = in.presence_penalty.data() + begin,
        .frequency_penalty = in.frequency_penalty.data() + begin,
        .seed = in.seed.data() + begin,
        .draw_index = in.draw_index.data() + begin,
        .num_logprobs = in.num_logprobs.data() + begin,
        .state_slot = in.state_slot.data() + begin,
        .bias_indptr = in.bias_indptr.data() + begin,
        .bias_ids = in.bias_ids.data(),
        .bias_values = in.bias_values.data(),
        .masks = masks.data() + begin,
    };
    backend_->process_and_sample(
        sampling, {.token_ids = out.token_ids.data() + begin,
                   .logprobs = out.logprobs.data() + begin,
                   .ranks = out.ranks.data() + begin,
                   .top_ids = out.top_ids.data() + begin * static_cast<size_t>(width),
                   .top_logprobs = out.top_logprobs.data() + begin * static_cast<size_t>(width),
                   .top_width = width});
  }
}

}  // namespace rapshee
