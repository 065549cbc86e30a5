// The sampler by itself, for tests and benchmarks: the rows of one call are sampled in order.
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "backend/cpu/cpu_features.h"
#include "backend/cpu/sampling.h"
#include "bindings/array_args.h"
#include "bindings/bindings.h"

namespace rapshee::bindings {
namespace {

namespace py = pybind11;
using bindings::array_arg;

using States = std::vector<std::pair<py::object, int64_t>>;  // token_ids i32, num_prompt_tokens

// The options of the rows: one-dimensional arrays by name, which the caller keeps alive. Each is to
// be taken once.
class Columns {
 public:
  explicit Columns(const py::kwargs& arrays) : arrays_(arrays) {}

  template <typename T>
  const T* take(const char* name, py::ssize_t size) {
    RAPSHEE_CHECK(arrays_.contains(name), name, " is missing");
    const auto array = array_arg<T>(name, arrays_[name], 1);
    RAPSHEE_CHECK(array.size() == size, name, ": got ", array.size(), " elements, expected ", size);
    ++taken_;
    return array.data();
  }

  void check_all_taken() const {
    RAPSHEE_CHECK(taken_ == arrays_.size(), "got ", arrays_.size(), " columns, expected ", taken_);
  }

 private:
  const py::kwargs& arrays_;
  size_t taken_ = 0;
};

void check_range(const char* name, const int32_t* values, int64_t count, int64_t low,
                 int64_t high) {
  for (int64_t i = 0; i < count; ++i) {
    RAPSHEE_CHECK(values[i] >= low && values[i] <= high, name, "[", i, "]: got ", values[i],
                  ", expected ", low, " to ", high);
  }
}

// One pointer per row: the next of `masks` [n, words] where the row needs one, else null. The
// caller keeps the array alive.
std::vector<const uint32_t*> spread_masks(const uint8_t* needs_mask, int num_rows,
                                          const py::object& masks, int64_t vocab) {
  const int64_t needed =
      std::count_if(needs_mask, needs_mask + num_rows, [](uint8_t needs) { return needs != 0; });
  std::vector<const uint32_t*> pointers(num_rows, nullptr);
  if (needed == 0) return pointers;
  const int64_t words = cpu::ceil_div(vocab, 32);
  const auto array = array_arg<uint32_t>("masks", masks, 2);
  RAPSHEE_CHECK(array.shape(0) == needed && array.shape(1) == words, "masks: got [", array.shape(0),
                ", ", array.shape(1), "], expected [", needed, ", ", words, "]");
  const uint32_t* next = array.data();
  for (int r = 0; r < num_rows; ++r) {
    if (needs_mask[r] == 0) continue;
    pointers[r] = next;
    next += words;
  }
  return pointers;
}

cpu::RowStats stats_of(const cpu::KernelTable& kernels, const float* logits, int64_t vocab) {
  std::vector<cpu::ChunkStats> chunks;
  for (int64_t begin = 0; begin < vocab; begin += cpu::kVocabChunk) {
    chunks.push_back(
        kernels.chunk_stats(logits + begin, std::min<int64_t>(cpu::kVocabChunk, vocab - begin)));
  }
  return cpu::merge_stats(chunks);
}

// The sampler sees only statistics of the rows that need no more, as after a step.
void sample_rows(const cpu::KernelTable& kernels, const SamplingRows& rows,
                 const std::vector<const uint32_t*>& masks, const float* logits, int64_t vocab,
                 cpu::Sampler& sampler, const SampleResults& results) {
  cpu::Sampler::Scratch scratch(vocab);
  for (int r = 0; r < rows.num_rows; ++r) {
    const float* row = logits + r * vocab;
    const bool needs_logits = cpu::Sampler::needs_logits(rows, r);
    sampler.sample_row(kernels, rows, r, masks[r], needs_logits ? row : nullptr,
                       stats_of(kernels, row, vocab), scratch, results);
  }
}

SamplingRows take_rows(Columns& columns, int num_rows, int64_t vocab, int64_t num_slots) {
  SamplingRows rows;
  rows.num_rows = num_rows;
  rows.target_ids = columns.take<int32_t>("target_ids", num_rows);
  rows.temperature = columns.take<float>("temperature", num_rows);
  rows.top_k = columns.take<int32_t>("top_k", num_rows);
  rows.top_p = columns.take<float>("top_p", num_rows);
  rows.min_p = columns.take<float>("min_p", num_rows);
  rows.repetition_penalty = columns.take<float>("repetition_penalty", num_rows);
  rows.presence_penalty = columns.take<float>("presence_penalty", num_rows);
  rows.frequency_penalty = columns.take<float>("frequency_penalty", num_rows);
  rows.seed = columns.take<uint64_t>("seed", num_rows);
  rows.draw_index = columns.take<uint32_t>("draw_index", num_rows);
  rows.num_logprobs = columns.take<int32_t>("num_logprobs", num_rows);
  rows.state_slot = columns.take<int32_t>("state_slot", num_rows);
  rows.bias_indptr = columns.take<int32_t>("bias_indptr", num_rows + 1);
  RAPSHEE_CHECK(
      rows.bias_indptr[0] == 0 && std::is_sorted(rows.bias_indptr, rows.bias_indptr + num_rows + 1),
      "bias_indptr must rise from 0");
  const int32_t num_biases = rows.bias_indptr[num_rows];
  rows.bias_ids = columns.take<int32_t>("bias_ids", num_biases);
  rows.bias_values = columns.take<float>("bias_values", num_biases);
  check_range("target_ids", rows.target_ids, num_rows, -1, vocab - 1);
  check_range("num_logprobs", rows.num_logprobs, num_rows, 0, vocab);
  check_range("state_slot", rows.state_slot, num_rows, -1, num_slots - 1);
  check_range("bias_ids", rows.bias_ids, num_biases, 0, vocab - 1);
  return rows;
}

cpu::Sampler make_sampler(int64_t vocab, const States& states) {
  cpu::Sampler sampler(vocab, static_cast<int>(states.size()));
  for (size_t slot = 0; slot < states.size(); ++slot) {
    const auto token_ids = array_arg<int32_t>("states", states[slot].first, 1);
    sampler.set_state(static_cast<int>(slot), bindings::span_of(token_ids), states[slot].second);
  }
  return sampler;
}

template <typename T>
py::array_t<T> filled(std::vector<py::ssize_t> shape, T value) {
  py::array_t<T> array(std::move(shape));
  std::fill_n(array.mutable_data(), array.size(), value);
  return array;
}

py::tuple sample(const py::object& logits_object, const py::object& masks, const States& states,
                 const std::string& isa, const py::kwargs& arrays) {
  const auto logits = array_arg<float>("logits", logits_object, 2);
  RAPSHEE_CHECK(logits.shape(1) > 0, "logits: got no columns");
  const int num_rows = static_cast<int>(logits.shape(0));
  const int64_t vocab = logits.shape(1);
  const cpu::KernelTable& kernels = cpu::select_kernels(isa);

  Columns columns(arrays);
  SamplingRows rows = take_rows(columns, num_rows, vocab, std::ssize(states));
  rows.needs_mask = columns.take<uint8_t>("needs_mask", num_rows);
  const std::vector<const uint32_t*> row_masks =
      spread_masks(rows.needs_mask, num_rows, masks, vocab);
  columns.check_all_taken();
  cpu::Sampler sampler = make_sampler(vocab, states);

  const int top_width =
      num_rows == 0 ? 0 : *std::max_element(rows.num_logprobs, rows.num_logprobs + num_rows);
  auto token_ids = filled<int32_t>({num_rows}, -1);
  auto logprobs = filled<float>({num_rows}, 0.0f);
  auto ranks = filled<int32_t>({num_rows}, 0);
  auto top_ids = filled<int32_t>({num_rows, top_width}, -1);
  auto top_logprobs = filled<float>({num_rows, top_width}, -std::numeric_limits<float>::infinity());
  const SampleResults results{.token_ids = token_ids.mutable_data(),
                              .logprobs = logprobs.mutable_data(),
                              .ranks = ranks.mutable_data(),
                              .top_ids = top_ids.mutable_data(),
                              .top_logprobs = top_logprobs.mutable_data(),
                              .top_width = top_width};
  {
    const py::gil_scoped_release release;
    sample_rows(kernels, rows, row_masks, logits.data(), vocab, sampler, results);
  }
  return py::make_tuple(token_ids, logprobs, ranks, top_ids, top_logprobs);
}

}  // namespace

void register_sampling_ops(py::module_& m) {
  m.def("sample", &sample, py::arg("logits"), py::kw_only(), py::arg("masks") = py::none(),
        py::arg("states") = py::tuple(), py::arg("isa") = "",
        "Sample rows of logits f32 [R, V], in order, with the columns of ModelRunner.launch that\n"
        "say how. states[i] = (token_ids, num_prompt_tokens) fills state slot i; isa names the\n"
        "kernels, empty: the default. Returns token_ids, logprobs, ranks, top_ids and\n"
        "top_logprobs as in StepOutput.");
}

}  // namespace rapshee::bindings
