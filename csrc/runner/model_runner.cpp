#include "runner/model_runner.h"

#include <unistd.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "core/error.h"
#include "core/memory.h"
#include "core/thread_pool.h"

namespace rapshee {
namespace {

void check_options(const RunnerOptions& options) {
  const auto check = [](const char* field, int value, int most) {
    RAPSHEE_CHECK(value >= 1 && value <= most, field, ": got ", value, ", expected 1 to ", most);
  };
  for (const int blocks : options.num_blocks) {
    check("num_blocks", blocks, std::numeric_limits<int>::max() / 2);
  }
  check("block_size", options.block_size, 4096);
  check("max_num_tokens", options.max_num_tokens, 1 << 20);
  check("max_num_seqs", options.max_num_seqs, 1 << 16);
  check("threads", options.threads, 1024);
}

StepLimits limits_of(const ModelConfig& config, const RunnerOptions& options) {
  StepLimits limits{config.vocab_size, config.max_position, options.block_size,
                    options.max_num_tokens, options.max_num_seqs};
  const std::vector<int> windows = config.kv_windows();
  RAPSHEE_CHECK(options.num_blocks.size() == windows.size(), "num_blocks: got ",
                options.num_blocks.size(), " numbers, expected ", windows.size(),
                ", one for each window of the layers");
  for (size_t g = 0; g < windows.size(); ++g) {
    limits.groups.push_back({options.num_blocks[g], windows[g]});
  }
  return limits;
}

// Sizes `out` for the rows of `in`; where the backend writes to it.
SampleResults results_of(const StepInput& in, StepOutput& out) {
  const auto rows = static_cast<size_t>(in.num_rows());
  const int32_t width =
      rows ? *std::max_element(in.num_logprobs.begin(), in.num_logprobs.end()) : 0;
  out.top_width = width;
  out.token_ids.assign(rows, -1);
  out.logprobs.assign(rows, 0.0f);
  out.ranks.assign(rows, 0);
  out.top_ids.assign(rows * static_cast<size_t>(width), -1);
  out.top_logprobs.assign(out.top_ids.size(), -std::numeric_limits<float>::infinity());
  return {out.token_ids.data(), out.logprobs.data(),     out.ranks.data(),
          out.top_ids.data(),   out.top_logprobs.data(), width};
}

Batch batch_of(uint64_t ticket, const StepInput& in, StepOutput& out) {
  return {.ticket = ticket,
          .num_tokens = in.num_tokens(),
          .num_seqs = in.num_seqs(),
          .max_blocks = static_cast<int>(in.max_blocks),
          .token_ids = in.token_ids.data(),
          .positions = in.positions.data(),
          .slot_mapping = in.slot_mapping.data(),
          .query_start_loc = in.query_start_loc.data(),
          .seq_lens = in.seq_lens.data(),
          .block_tables = in.block_tables.data(),
          .sample_rows = in.sample_rows.data(),
          .sampling = {.num_rows = in.num_rows(),
                       .target_ids = in.target_ids.data(),
                       .temperature = in.temperature.data(),
                       .top_k = in.top_k.data(),
                       .top_p = in.top_p.data(),
                       .min_p = in.min_p.data(),
                       .repetition_penalty = in.repetition_penalty.data(),
                       .presence_penalty = in.presence_penalty.data(),
                       .frequency_penalty = in.frequency_penalty.data(),
                       .seed = in.seed.data(),
                       .draw_index = in.draw_index.data(),
                       .num_logprobs = in.num_logprobs.data(),
                       .state_slot = in.state_slot.data(),
                       .bias_indptr = in.bias_indptr.data(),
                       .bias_ids = in.bias_ids.data(),
                       .bias_values = in.bias_values.data(),
                       .needs_mask = in.needs_mask.data()},
          .results = results_of(in, out)};
}

}  // namespace

ModelRunner::ModelRunner(ModelConfig config, const std::vector<TensorEntry>& entries,
                         const RunnerOptions& options, const Progress& progress)
    : config_(std::move(config)), options_(options), owner_(::getpid()) {
  config_.validate();
  check_options(options);
  limits_ = limits_of(config_, options);
  backend_ = make_backend(options.device, {.block_size = options.block_size,
                                           .num_blocks = options.num_blocks,
                                           .max_num_tokens = options.max_num_tokens,
                                           .max_num_seqs = options.max_num_seqs,
                                           .threads = options.threads,
                                           .compute = options.compute,
                                           .cache = options.cache,
                                           .deterministic = options.deterministic});
  weights_ = load_weights(config_, entries, *backend_, progress);
  kv_dtype_ = backend_->allocate_cache(config_, weights_.all_f32);
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
  sync_->step_ended.wait(lock, [&] { return step.ended; });
  const std::unique_ptr<Step> ended = std::move(steps_.front());
  steps_.pop_front();
  if (ended->error) std::rethrow_exception(ended->error);
  lock.unlock();
  try {
    ended->output.timing_us = backend_->finish_step(ticket);
  } catch (const DeviceError&) {
    lock.lock();
    alive_ = false;
    throw;
  }
  return std::move(ended->output);
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
  return_unused_memory();  // glibc would keep tens of megabytes for a next model
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
  step.ended = true;
  alive_ = alive_ && !device_failed;
  sync_->step_ended.notify_all();
}

void ModelRunner::forward(Step& step) {
  const StepInput& in = step.input;
  if (state_error_) std::rethrow_exception(std::exchange(state_error_, nullptr));
  if (previous_failed_ &&
      std::any_of(in.token_ids.begin(), in.token_ids.end(), [](int32_t id) { return id < 0; })) {
    throw Error("the step before, whose samples this one continues, has failed");
  }
  backend_->begin_step(batch_of(step.ticket, in, step.output));
  // The sampled rows come in slices that the backend has logits for.
  const int slice = backend_->max_head_rows();
  const auto head = [&](int first) {
    const int count = std::min(slice, in.num_rows() - first);
    if (count > 0) {
      backend_->head({decoder_->x(), *weights_.final_norm, weights_.head(), first, count});
    }
  };
  const auto sample = [&] {
    for (int first = 0; first < in.num_rows(); first += slice) {
      if (first > 0) head(first);
      backend_->process_and_sample(first, std::min(slice, in.num_rows() - first));
    }
  };
  const bool masked = step.masked_rows > 0;
  backend_->run(StepPart::kForward, [&] {
    decoder_->forward();
    head(0);
    if (!masked) sample();
  });
  if (!masked) return;
  wait_for_masks(step);
  backend_->set_masks(step.masks);
  backend_->run(StepPart::kMasked, sample);
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

}  // namespace rapshee
