#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/error.h"
#include "runner/step.h"

namespace rapshee {
namespace {

template <class T>
void check_size(const char* field, const std::vector<T>& values, size_t expected) {
  RAPSHEE_CHECK(values.size() == expected, field, ": got ", values.size(), " elements, expected ",
                expected);
}

template <class T>
void check_each(const char* field, const std::vector<T>& values, const char* expected, auto valid) {
  for (size_t i = 0; i < values.size(); ++i) {
    RAPSHEE_CHECK(valid(values[i]), field, "[", i, "]: got ", values[i], ", expected ", expected);
  }
}

void check_sizes(const StepInput& step, size_t groups) {
  const size_t tokens = step.token_ids.size(), seqs = step.seq_lens.size();
  const size_t rows = step.sample_rows.size();
  check_size("positions", step.positions, tokens);
  RAPSHEE_CHECK(step.num_groups == static_cast<int64_t>(groups), "block_tables: got ",
                step.num_groups, " groups of layers, expected ", groups);
  check_size("slot_mapping", step.slot_mapping, groups * tokens);
  check_size("query_start_loc", step.query_start_loc, seqs + 1);
  RAPSHEE_CHECK(step.max_blocks >= 0 && step.max_blocks <= std::numeric_limits<int>::max(),
                "block_tables: got ", step.max_blocks, " columns");
  check_size("block_tables", step.block_tables,
             groups * seqs * static_cast<size_t>(step.max_blocks));
  check_size("target_ids", step.target_ids, rows);
  check_size("temperature", step.temperature, rows);
  check_size("top_k", step.top_k, rows);
  check_size("top_p", step.top_p, rows);
  check_size("min_p", step.min_p, rows);
  check_size("repetition_penalty", step.repetition_penalty, rows);
  check_size("presence_penalty", step.presence_penalty, rows);
  check_size("frequency_penalty", step.frequency_penalty, rows);
  check_size("seed", step.seed, rows);
  check_size("draw_index", step.draw_index, rows);
  check_size("num_logprobs", step.num_logprobs, rows);
  check_size("state_slot", step.state_slot, rows);
  check_size("bias_indptr", step.bias_indptr, rows + 1);
  check_size("bias_values", step.bias_values, step.bias_ids.size());
  check_size("needs_mask", step.needs_mask, rows);
}

void check_batch(const StepInput& step, const StepLimits& limits) {
  RAPSHEE_CHECK(step.num_tokens() >= 1 && step.num_tokens() <= limits.max_num_tokens,
                "token_ids: got ", step.num_tokens(), " tokens, expected 1 to ",
                limits.max_num_tokens);
  RAPSHEE_CHECK(step.num_seqs() >= 1 && step.num_seqs() <= limits.max_num_seqs, "seq_lens: got ",
                step.num_seqs(), " sequences, expected 1 to ", limits.max_num_seqs);
  RAPSHEE_CHECK(
      step.query_start_loc.front() == 0 && step.query_start_loc.back() == step.num_tokens(),
      "query_start_loc: got ", step.query_start_loc.front(), " ... ", step.query_start_loc.back(),
      ", expected 0 ... ", step.num_tokens());
  int previous = 1;
  for (int s = 0; s < step.num_seqs(); ++s) {
    const int queries = step.query_start_loc[static_cast<size_t>(s) + 1] -
                        step.query_start_loc[static_cast<size_t>(s)];
    RAPSHEE_CHECK(queries >= 1, "query_start_loc: sequence ", s, " has ", queries, " tokens");
    RAPSHEE_CHECK(queries > 1 || previous == 1, "query_start_loc: sequence ", s,
                  " of one token comes after a longer one");
    previous = queries;
  }
}

// A group's slots of query tokens [begin, end) are those that its block table gives; what the
// window of the first one sees is there.
void check_blocks(const StepInput& step, const StepLimits& limits, size_t group, int s) {
  const auto [num_blocks, window] = limits.groups[group];
  const auto seq = static_cast<size_t>(s);
  const int begin = step.query_start_loc[seq], end = step.query_start_loc[seq + 1];
  const int length = step.seq_lens[seq], size = limits.block_size;
  const size_t row = group * step.seq_lens.size() + seq;
  const int32_t* table = step.block_tables.data() + row * static_cast<size_t>(step.max_blocks);
  const int first_key = window > 0 ? std::max(0, length - (end - begin) + 1 - window) : 0;
  for (int b = 0; b * size < length; ++b) {
    const bool seen = (b + 1) * int64_t{size} > first_key;
    RAPSHEE_CHECK(table[b] >= (seen ? 0 : -1) && table[b] < num_blocks, "block_tables[", group,
                  ", ", s, ", ", b, "]: got ", table[b], ", expected ", seen ? 0 : -1, " to ",
                  num_blocks - 1);
  }
  for (int t = begin; t < end; ++t) {
    const int position = length - (end - t);
    const int64_t slot = int64_t{table[position / size]} * size + position % size;
    const int64_t got = step.slot_mapping[group * step.token_ids.size() + static_cast<size_t>(t)];
    RAPSHEE_CHECK(got == slot || got == -1, "slot_mapping[", group, ", ", t, "]: got ", got,
                  ", expected ", slot, " or -1");
  }
}

// A sequence's query tokens are its last.
void check_sequence(const StepInput& step, const StepLimits& limits, int s) {
  const auto seq = static_cast<size_t>(s);
  const int begin = step.query_start_loc[seq], end = step.query_start_loc[seq + 1];
  const int length = step.seq_lens[seq];
  RAPSHEE_CHECK(length >= end - begin && length <= limits.max_position &&
                    length <= step.max_blocks * limits.block_size,
                "seq_lens[", s, "]: got ", length, ", expected ", end - begin, " to ",
                std::min(limits.max_position, step.max_blocks * limits.block_size));
  for (int t = begin; t < end; ++t) {
    const int position = length - (end - t);
    const auto at = static_cast<size_t>(t);
    RAPSHEE_CHECK(step.positions[at] == position, "positions[", t, "]: got ", step.positions[at],
                  ", expected ", position);
  }
  for (size_t group = 0; group < limits.groups.size(); ++group)
    check_blocks(step, limits, group, s);
}

void check_state_slots(const StepInput& step, const StepLimits& limits) {
  std::vector<bool> drawn(static_cast<size_t>(limits.max_num_seqs));
  for (size_t r = 0; r < step.state_slot.size(); ++r) {
    const int slot = step.state_slot[r];
    RAPSHEE_CHECK(slot >= -1 && slot < limits.max_num_seqs, "state_slot[", r, "]: got ", slot,
                  ", expected -1 to ", limits.max_num_seqs - 1);
    if (slot < 0 || step.target_ids[r] >= 0) continue;
    RAPSHEE_CHECK(!drawn[static_cast<size_t>(slot)], "state_slot[", r, "]: slot ", slot,
                  " draws twice in one step");
    drawn[static_cast<size_t>(slot)] = true;
  }
}

void check_sampling(const StepInput& step, const StepLimits& limits) {
  const int64_t vocab = limits.vocab_size;
  const auto in_vocab = [vocab](int32_t id) { return id >= 0 && id < vocab; };
  const auto unit = [](float x) { return x >= 0.0f && x <= 1.0f; };
  const auto finite = [](float x) { return std::isfinite(x); };
  check_each("sample_rows", step.sample_rows, "a row of the step",
             [&](int32_t r) { return r >= 0 && r < step.num_tokens(); });
  check_each("target_ids", step.target_ids, "-1 or a token id",
             [&](int32_t id) { return id == -1 || in_vocab(id); });
  check_each("temperature", step.temperature, "a finite number from 0",
             [&](float x) { return finite(x) && x >= 0.0f; });
  check_each("top_k", step.top_k, "0 or more", [](int32_t k) { return k >= 0; });
  check_each("top_p", step.top_p, "above 0, at most 1",
             [&](float p) { return unit(p) && p > 0.0f; });
  check_each("min_p", step.min_p, "0 to 1", unit);
  check_each("repetition_penalty", step.repetition_penalty, "a finite number above 0",
             [&](float x) { return finite(x) && x > 0.0f; });
  check_each("presence_penalty", step.presence_penalty, "a finite number", finite);
  check_each("frequency_penalty", step.frequency_penalty, "a finite number", finite);
  check_each("num_logprobs", step.num_logprobs, "0 to the vocabulary",
             [&](int32_t n) { return n >= 0 && n <= vocab; });
  check_each("bias_ids", step.bias_ids, "a token id", in_vocab);
  check_each("bias_values", step.bias_values, "a finite number", finite);
  int32_t previous = 0;
  for (size_t i = 0; i < step.bias_indptr.size(); ++i) {
    RAPSHEE_CHECK(step.bias_indptr[i] >= previous && (i > 0 || step.bias_indptr[i] == 0),
                  "bias_indptr[", i, "]: got ", step.bias_indptr[i],
                  ", expected to start at 0 and ", "never to fall");
    previous = step.bias_indptr[i];
  }
  RAPSHEE_CHECK(static_cast<size_t>(previous) == step.bias_ids.size(), "bias_indptr: ends at ",
                previous, ", expected ", step.bias_ids.size());
  check_state_slots(step, limits);
}

}  // namespace

void validate_step(const StepInput& step, const StepLimits& limits, int previous_rows) {
  check_sizes(step, limits.groups.size());
  check_batch(step, limits);
  for (int s = 0; s < step.num_seqs(); ++s) check_sequence(step, limits, s);
  check_each("token_ids", step.token_ids, "a token id, or ~row of the step before",
             [&](int32_t id) { return id < 0 ? ~id < previous_rows : id < limits.vocab_size; });
  check_sampling(step, limits);
}

}  // namespace rapshee
