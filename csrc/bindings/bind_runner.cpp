// ModelRunner and StepOutput. The GIL is released around everything that takes time.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdio>

#include "bindings/array_args.h"
#include "bindings/bindings.h"
#include "core/error.h"
#include "runner/model_runner.h"

namespace rapshee::bindings {
namespace {

CacheType parse_cache(const std::string& name) {
  if (name == "auto") return CacheType::kAuto;
  if (name == "bf16") return CacheType::kBFloat16;
  RAPSHEE_CHECK(name == "int8", "kv_dtype: got '", name, "', expected auto, bf16 or int8");
  return CacheType::kInt8;
}

std::unique_ptr<ModelRunner> make_runner(const ModelConfig& config,
                                         const std::vector<TensorEntry>& entries,
                                         const std::string& device, const std::string& dtype,
                                         const std::string& kv_dtype, std::vector<int> num_blocks,
                                         int block_size, int max_num_tokens, int max_num_seqs,
                                         int threads, bool deterministic,
                                         const py::object& progress) {
  const RunnerOptions options{.device = device,
                              .compute = parse_compute(dtype),
                              .cache = parse_cache(kv_dtype),
                              .num_blocks = std::move(num_blocks),
                              .block_size = block_size,
                              .max_num_tokens = max_num_tokens,
                              .max_num_seqs = max_num_seqs,
                              .threads = threads,
                              .deterministic = deterministic};
  Progress report;
  if (!progress.is_none()) {
    report = [&progress](uint64_t done, uint64_t total) {
      const py::gil_scoped_acquire gil;
      progress(done, total);
    };
  }
  const py::gil_scoped_release unlocked;
  return std::make_unique<ModelRunner>(config, entries, options, report);
}

// Keyword arguments of launch as a StepInput; they must be exactly its fields.
StepInput parse_step(const py::kwargs& arrays) {
  StepInput step;
  size_t used = 0;
  const auto get = [&](const char* name) -> py::object {
    RAPSHEE_CHECK(arrays.contains(name), name, ": missing");
    ++used;
    return arrays[name];
  };
  const auto copy = [&](const char* name, auto& to) { copy_arg(name, get(name), to); };
  copy("token_ids", step.token_ids);
  copy("positions", step.positions);
  const auto slots = array_arg<int64_t>("slot_mapping", get("slot_mapping"), 2);
  step.slot_mapping.assign(slots.data(), slots.data() + slots.size());
  copy("query_start_loc", step.query_start_loc);
  copy("seq_lens", step.seq_lens);
  const auto tables = array_arg<int32_t>("block_tables", get("block_tables"), 3);
  step.block_tables.assign(tables.data(), tables.data() + tables.size());
  step.num_groups = tables.shape(0);
  step.max_blocks = tables.shape(2);
  RAPSHEE_CHECK(slots.shape(0) == step.num_groups, "slot_mapping: got ", slots.shape(0),
                " groups of layers, expected ", step.num_groups, " as in block_tables");
  copy("sample_rows", step.sample_rows);
  copy("target_ids", step.target_ids);
  copy("temperature", step.temperature);
  copy("top_k", step.top_k);
  copy("top_p", step.top_p);
  copy("min_p", step.min_p);
  copy("repetition_penalty", step.repetition_penalty);
  copy("presence_penalty", step.presence_penalty);
  copy("frequency_penalty", step.frequency_penalty);
  copy("seed", step.seed);
  copy("draw_index", step.draw_index);
  copy("num_logprobs", step.num_logprobs);
  copy("state_slot", step.state_slot);
  copy("bias_indptr", step.bias_indptr);
  copy("bias_ids", step.bias_ids);
  copy("bias_values", step.bias_values);
  copy("needs_mask", step.needs_mask);
  RAPSHEE_CHECK(used == arrays.size(), "launch: got ", arrays.size(), " arrays, expected ", used);
  return step;
}

struct StepArrays {
  py::array_t<int32_t> token_ids;
  py::array_t<float> logprobs;
  py::array_t<int32_t> ranks, top_ids;
  py::array_t<float> top_logprobs;
  int64_t timing_us;
};

StepArrays to_arrays(StepOutput out) {
  const auto rows = static_cast<py::ssize_t>(out.token_ids.size());
  const auto width = static_cast<py::ssize_t>(out.top_width);
  return {to_array(std::move(out.token_ids), {rows}),
          to_array(std::move(out.logprobs), {rows}),
          to_array(std::move(out.ranks), {rows}),
          to_array(std::move(out.top_ids), {rows, width}),
          to_array(std::move(out.top_logprobs), {rows, width}),
          out.timing_us};
}

StepArrays collect(ModelRunner& runner, uint64_t ticket) {
  StepOutput out;
  {
    const py::gil_scoped_release unlocked;
    out = runner.collect(ticket);
  }
  return to_arrays(std::move(out));
}

void set_masks(ModelRunner& runner, uint64_t ticket, const py::object& masks) {
  const auto array = array_arg<uint32_t>("masks", masks, 2);
  RAPSHEE_CHECK(array.shape(1) == runner.mask_words(), "masks: got ", array.shape(1),
                " words a row, expected ", runner.mask_words());
  runner.set_masks(ticket, span_of(array));
}

void set_state(ModelRunner& runner, int slot, const py::object& token_ids,
               int64_t num_prompt_tokens) {
  std::vector<int32_t> ids;
  copy_arg("token_ids", token_ids, ids);
  runner.set_state(slot, std::move(ids), num_prompt_tokens);
}

std::string hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016lx", static_cast<unsigned long>(value));
  return text;
}

const char* kv_dtype_name(DType dtype) {
  if (dtype == DType::kF32) return "float32";
  if (dtype == DType::kI8) return "int8";
  return dtype == DType::kF16 ? "float16" : "bfloat16";
}

void register_step_output(py::module_& m) {
  py::class_<StepArrays>(m, "StepOutput")
      .def_readonly("token_ids", &StepArrays::token_ids)
      .def_readonly("logprobs", &StepArrays::logprobs)
      .def_readonly("ranks", &StepArrays::ranks)
      .def_readonly("top_ids", &StepArrays::top_ids)
      .def_readonly("top_logprobs", &StepArrays::top_logprobs)
      .def_readonly("timing_us", &StepArrays::timing_us);
}

}  // namespace

ComputeType parse_compute(const std::string& name) {
  if (name == "auto") return ComputeType::kAuto;
  if (name == "bfloat16") return ComputeType::kBFloat16;
  if (name == "float16") return ComputeType::kFloat16;
  RAPSHEE_CHECK(name == "float32", "dtype: got '", name,
                "', expected auto, bfloat16, float16 or float32");
  return ComputeType::kFloat32;
}

void register_runner(py::module_& m) {
  using py::arg;
  register_step_output(m);
  py::class_<ModelRunner>(m, "ModelRunner")
      .def(py::init(&make_runner), arg("config"), arg("entries"), py::kw_only(),
           arg("device") = "cpu", arg("dtype") = "auto", arg("kv_dtype") = "auto",
           arg("num_blocks"), arg("block_size"), arg("max_num_tokens"), arg("max_num_seqs"),
           arg("threads"), arg("deterministic") = true, arg("progress") = py::none())
      .def("launch", [](ModelRunner& runner,
                        const py::kwargs& arrays) { return runner.launch(parse_step(arrays)); })
      .def("set_masks", &set_masks, arg("ticket"), arg("masks"))
      .def("collect", &collect, arg("ticket"))
      .def("set_state", &set_state, arg("slot"), arg("token_ids"), arg("num_prompt_tokens"))
      .def("close", &ModelRunner::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("alive", &ModelRunner::alive)
      .def_property_readonly("vocab_size",
                             [](const ModelRunner& r) { return r.config().vocab_size; })
      .def_property_readonly("block_size",
                             [](const ModelRunner& r) { return r.options().block_size; })
      .def_property_readonly("num_blocks",
                             [](const ModelRunner& r) { return r.options().num_blocks; })
      .def_property_readonly("kv_windows", &ModelRunner::kv_windows)
      .def_property_readonly("weights_checksum",
                             [](const ModelRunner& r) { return hex(r.weights_checksum()); })
      .def_property_readonly("weight_bytes", &ModelRunner::weight_bytes)
      .def_property_readonly("kv_dtype",
                             [](const ModelRunner& r) { return kv_dtype_name(r.kv_dtype()); })
      .def_property_readonly("description", &ModelRunner::description);
}

}  // namespace rapshee::bindings
