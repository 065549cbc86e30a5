// How a step gets to the device, runs there, recorded or not, and comes back.
#include <algorithm>
#include <cstring>

#include "backend/cuda/cuda_backend.h"
#include "core/error.h"

namespace rapshee::cuda {
namespace {

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
  constexpr size_t kTokenArrays = 2, kSeqArrays = 2, kRowArrays = 14, kSingles = 4;
  const size_t bytes = sizeof(int64_t) * ((kTokenArrays + windows_.size()) * all_tokens +
                                          (kSeqArrays + 2 * windows_.size()) * (all_seqs + 1) +
                                          kRowArrays * (all_rows + 1) + kSingles + windows_.size());
  const auto num_biases = static_cast<size_t>(rows.bias_indptr[count]);
  bool moved = arrays_.reserve(bytes, stream_.get());
  moved |= bias_ids_.reserve(num_biases * sizeof(int32_t), stream_.get());
  moved |= bias_values_.reserve(num_biases * sizeof(float), stream_.get());
  moved |= results_.reserve(result_bytes(form_), stream_.get());
  const size_t table_bytes = all_seqs * static_cast<size_t>(batch_.max_blocks) * sizeof(int32_t);
  for (WindowWork& w : windows_) {
    moved |= w.tables.reserve(table_bytes, stream_.get());
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
  const int64_t* slots = batch_.slot_mapping;
  for (WindowWork& w : windows_) {
    w.slot_mapping = pack.put<int64_t>(slots, tokens, all_tokens, -1);
    slots += tokens;
  }
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
  upload_tables(set);
  send(bias_ids_, set, rows.bias_ids, num_biases);
  send(bias_values_, set, rows.bias_values, num_biases);
  if (!prefill_tiles_.empty()) {
    tiles_.reserve(prefill_tiles_.size() * sizeof(int32_t), stream_.get());
    send(tiles_, set, prefill_tiles_.data(), prefill_tiles_.size());
  }
  on.results = results_in(results_.device(), form_);
}

void CudaBackend::upload_tables(int set) {
  const size_t size = static_cast<size_t>(batch_.num_seqs) * static_cast<size_t>(batch_.max_blocks);
  const int32_t* table = batch_.block_tables;
  for (WindowWork& w : windows_) {
    auto* to = reinterpret_cast<int32_t*>(w.tables.staging(set, size * sizeof(int32_t)));
    std::replace_copy(table, table + size, to, -1, w.zero_block);
    w.tables.upload(set, size * sizeof(int32_t), stream_.get());
    table += size;
  }
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
    counts_ = DeviceMemory(static_cast<size_t>(options_.max_num_seqs * vocab) * sizeof(uint32_t));
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

}  // namespace rapshee::cuda
