// Sampling and its token counts, on numpy arrays.
#include <algorithm>
#include <vector>

#include "backend/cuda/kernels/launchers.h"
#include "bindings/array_args.h"
#include "bindings/cuda/cuda_bindings.h"
#include "bindings/cuda/device_array.h"

namespace rapshee::bindings {
namespace {

using cuda::DeviceMemory;

// The options of the rows on the device: one-dimensional arrays by name, each to be taken once.
class Columns {
 public:
  Columns(const CallStream& stream, const py::kwargs& arrays) : stream_(stream), arrays_(arrays) {}

  // Values on the host; those on the device live as long as this object.
  template <class T>
  std::vector<T> take(const char* name, int64_t size, const T*& on_device) {
    RAPSHEE_CHECK(arrays_.contains(name), name, " is missing");
    const auto array = array_arg<T>(name, arrays_[name], 1);
    RAPSHEE_CHECK(array.size() == size, name, ": got ", array.size(), " elements, expected ", size);
    memory_.push_back(stream_.upload(array));
    on_device = memory_.back().template data<T>();
    return {array.data(), array.data() + size};
  }

  void check_all_taken() const {
    RAPSHEE_CHECK(memory_.size() == arrays_.size(), "got ", arrays_.size(), " columns, expected ",
                  memory_.size());
  }

 private:
  const CallStream& stream_;
  const py::kwargs& arrays_;
  std::vector<DeviceMemory> memory_;
};

void check_range(const char* name, const std::vector<int32_t>& values, int64_t low, int64_t high) {
  for (size_t i = 0; i < values.size(); ++i) {
    RAPSHEE_CHECK(values[i] >= low && values[i] <= high, name, "[", i, "]: got ", values[i],
                  ", expected ", low, " to ", high);
  }
}

bool any_differs(const std::vector<float>& values, float neutral) {
  return std::any_of(values.begin(), values.end(), [&](float v) { return v != neutral; });
}

struct Extents {
  int64_t rows, vocab, num_slots, num_masks;
};

cuda::SamplingArrays take_arrays(Columns& columns, const Extents& extents,
                                 cuda::SamplingNeeds& needs) {
  cuda::SamplingArrays arrays;
  const int64_t rows = extents.rows;
  const auto targets = columns.take<int32_t>("target_ids", rows, arrays.target_ids);
  const auto temperature = columns.take<float>("temperature", rows, arrays.temperature);
  const auto top_k = columns.take<int32_t>("top_k", rows, arrays.top_k);
  const auto top_p = columns.take<float>("top_p", rows, arrays.top_p);
  const auto min_p = columns.take<float>("min_p", rows, arrays.min_p);
  const auto repetition =
      columns.take<float>("repetition_penalty", rows, arrays.repetition_penalty);
  const auto presence = columns.take<float>("presence_penalty", rows, arrays.presence_penalty);
  const auto frequency = columns.take<float>("frequency_penalty", rows, arrays.frequency_penalty);
  columns.take<uint64_t>("seed", rows, arrays.seed);
  columns.take<uint32_t>("draw_index", rows, arrays.draw_index);
  const auto num_logprobs = columns.take<int32_t>("num_logprobs", rows, arrays.num_logprobs);
  const auto slots = columns.take<int32_t>("state_slot", rows, arrays.state_slot);
  const auto indptr = columns.take<int32_t>("bias_indptr", rows + 1, arrays.bias_indptr);
  RAPSHEE_CHECK(indptr.front() == 0 && std::is_sorted(indptr.begin(), indptr.end()),
                "bias_indptr must rise from 0");
  const auto ids = columns.take<int32_t>("bias_ids", indptr.back(), arrays.bias_ids);
  columns.take<float>("bias_values", indptr.back(), arrays.bias_values);
  const auto mask_index = columns.take<int32_t>("mask_index", rows, arrays.mask_index);
  check_range("target_ids", targets, -1, extents.vocab - 1);
  check_range("num_logprobs", num_logprobs, 0, extents.vocab);
  check_range("state_slot", slots, -1, extents.num_slots - 1);
  check_range("bias_ids", ids, 0, extents.vocab - 1);
  check_range("mask_index", mask_index, -1, extents.num_masks - 1);

  const auto any_above = [](const auto& values, auto low) {
    return std::any_of(values.begin(), values.end(), [&](auto v) { return v > low; });
  };
  needs.process = any_above(mask_index, -1) || indptr.back() > 0 || any_differs(repetition, 1.0f) ||
                  any_differs(presence, 0.0f) || any_differs(frequency, 0.0f);
  needs.draw = any_above(temperature, 0.0f);
  needs.filter = any_above(top_k, 0) || any_differs(top_p, 1.0f) || any_above(min_p, 0.0f);
  needs.rank = any_above(targets, -1) || any_above(num_logprobs, 0);
  needs.top_width = rows == 0 ? 0 : *std::max_element(num_logprobs.begin(), num_logprobs.end());
  return arrays;
}

// Stale bytes are in all results and in the workspace before the launch.
DeviceMemory stale(const CallStream& stream, size_t bytes) {
  constexpr uint8_t kStale = 0xa5;
  DeviceMemory memory(std::max<size_t>(bytes, 1));
  cuda::api::fill(memory.data(), kStale, bytes, stream.get());
  return memory;
}

py::tuple sample(const py::object& logits_arg, const py::object& masks_arg,
                 const py::object& counts_arg, int rows_per_launch, int repeats,
                 const py::kwargs& options) {
  const auto logits = array_arg<float>("logits", logits_arg, 2);
  const auto masks = array_arg<uint32_t>("masks", masks_arg, 2);
  const auto counts = array_arg<uint32_t>("counts", counts_arg, 2);
  const Extents extents{logits.shape(0), logits.shape(1), counts.shape(0), masks.shape(0)};
  const auto [rows, vocab, num_slots, num_masks] = extents;
  RAPSHEE_CHECK(vocab > 0, "logits: got no columns");
  RAPSHEE_CHECK(num_masks == 0 || masks.shape(1) == (vocab + 31) / 32, "masks: got ",
                masks.shape(1), " words, expected ", (vocab + 31) / 32);
  RAPSHEE_CHECK(num_slots == 0 || counts.shape(1) == vocab, "counts: got ", counts.shape(1),
                " columns, expected ", vocab);
  RAPSHEE_CHECK(rows_per_launch >= 0, "rows_per_launch: got ", rows_per_launch,
                ", expected 0 (all) or more");

  const CallStream stream;
  Columns columns(stream, options);
  cuda::SampleArgs args;
  args.arrays = take_arrays(columns, extents, args.needs);
  columns.check_all_taken();
  const DeviceMemory logits_on = stream.upload(logits), masks_on = stream.upload(masks);
  const DeviceMemory counts_on = stream.upload(counts);
  const int step = rows_per_launch == 0 ? static_cast<int>(rows) : rows_per_launch;
  const size_t row_bytes = static_cast<size_t>(rows) * sizeof(int32_t);
  const auto width = static_cast<size_t>(args.needs.top_width);
  const DeviceMemory token_ids = stale(stream, row_bytes), logprobs = stale(stream, row_bytes);
  const DeviceMemory ranks = stale(stream, row_bytes), top_ids = stale(stream, row_bytes * width);
  const DeviceMemory top_logprobs = stale(stream, row_bytes * width);
  const DeviceMemory workspace =
      stale(stream, cuda::sample_workspace_bytes(step, vocab, args.needs.top_width));
  args.vocab = vocab;
  args.arrays.masks = masks_on.data<uint32_t>();
  args.counts = counts_on.data<uint32_t>();
  args.token_ids = token_ids.data<int32_t>();
  args.logprobs = logprobs.data<float>();
  args.ranks = ranks.data<int32_t>();
  args.top_ids = top_ids.data<int32_t>();
  args.top_logprobs = top_logprobs.data<float>();
  args.workspace = workspace.data();
  const auto launch = [&] {
    for (int64_t first = 0; first < rows; first += step) {
      args.logits = logits_on.data<float>() + first * vocab;
      args.first_row = static_cast<int>(first);
      args.rows = static_cast<int>(std::min<int64_t>(step, rows - first));
      cuda::sample(args, stream.get());
    }
  };
  launch();
  const auto updated = stream.download<uint32_t>(counts_on, {num_slots, vocab});
  std::vector<float> microseconds;
  if (repeats > 0) microseconds = stream.time(repeats, launch);
  const auto columns_of_top = static_cast<py::ssize_t>(width);
  const auto timed = static_cast<py::ssize_t>(microseconds.size());
  return py::make_tuple(stream.download<int32_t>(token_ids, {rows}),
                        stream.download<float>(logprobs, {rows}),
                        stream.download<int32_t>(ranks, {rows}),
                        stream.download<int32_t>(top_ids, {rows, columns_of_top}),
                        stream.download<float>(top_logprobs, {rows, columns_of_top}), updated,
                        to_array(std::move(microseconds), {timed}));
}

py::array_t<uint32_t> set_token_counts(const py::object& tokens_arg, int num_prompt_tokens,
                                       int64_t vocab) {
  const auto tokens = array_arg<int32_t>("tokens", tokens_arg, 1);
  RAPSHEE_CHECK(vocab >= 0, "vocab: got ", vocab, ", expected 0 or more");
  check_range("tokens", {tokens.data(), tokens.data() + tokens.size()}, 0, vocab - 1);
  const CallStream stream;
  const DeviceMemory tokens_on = stream.upload(tokens);
  const DeviceMemory counts = stale(stream, static_cast<size_t>(vocab) * sizeof(uint32_t));
  cuda::SetStateArgs args;
  args.counts = counts.data<uint32_t>();
  args.vocab = vocab;
  args.tokens = tokens_on.data<int32_t>();
  args.num_tokens = static_cast<int>(tokens.size());
  args.num_prompt_tokens = num_prompt_tokens;
  cuda::set_token_counts(args, stream.get());
  return stream.download<uint32_t>(counts, {vocab});
}

}  // namespace

void register_cuda_sampling(py::module_& m) {
  using py::arg;
  m.def(
      "sample", &sample, arg("logits"), py::kw_only(), arg("masks"), arg("counts"),
      arg("rows_per_launch") = 0, arg("repeats") = 0,
      "Sample rows of logits f32 [R, V] with the columns of SamplingArrays that say how; masks\n"
      "u32 [M, ceil(V / 32)], counts u32 [slots, V]. The rows of a launch are sampled at once.\n"
      "Returns token_ids, logprobs, ranks, top_ids, top_logprobs, the counts thereafter, and the\n"
      "microseconds of each repeat.");
  m.def("set_token_counts", &set_token_counts, arg("tokens"), py::kw_only(),
        arg("num_prompt_tokens"), arg("vocab"),
        "The counts of a slot: bit 31 in the prompt, below it times in the output.");
}

}  // namespace rapshee::bindings
