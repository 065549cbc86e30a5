// Kernels that work on single rows and elements, and the weights they read, on numpy arrays.
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/kernels/launchers.h"
#include "bindings/cuda/cuda_bindings.h"
#include "bindings/cuda/device_array.h"
#include "bindings/cuda/device_weight.h"

namespace rapshee::bindings {
namespace {

using cuda::DeviceMemory;

constexpr uint8_t kStale = 0xff;  // what no kernel wrote is not a number

// Memory for `count` elements of `bytes` each, stale.
DeviceMemory output(const CallStream& stream, int64_t count, size_t bytes) {
  DeviceMemory memory(std::max<size_t>(static_cast<size_t>(count) * bytes, 1));
  cuda::api::fill(memory.data(), kStale, memory.size(), stream.get());
  return memory;
}

// The results, and with repeats the microseconds of each.
py::object with_times(py::tuple results, std::vector<float> microseconds, int repeats) {
  if (repeats > 0) {
    const auto count = static_cast<py::ssize_t>(microseconds.size());
    results = results + py::make_tuple(to_array(std::move(microseconds), {count}));
  }
  if (results.size() == 1) return results[0];
  return results;
}

std::vector<float> times_of(const CallStream& stream, int repeats,
                            const std::function<void()>& body) {
  return repeats > 0 ? stream.time(repeats, body) : std::vector<float>();
}

py::object embed(const DeviceWeight& table, const py::object& ids_arg, float scale, int repeats) {
  const auto ids = array_arg<int32_t>("token_ids", ids_arg, 1);
  for (int32_t id : span_of(ids)) {
    RAPSHEE_CHECK(id >= 0 && id < table.view().rows, "token_ids: got ", id, ", expected 0 to ",
                  table.view().rows - 1);
  }
  const CallStream stream;
  const DeviceMemory ids_on = stream.upload(ids);
  const DeviceMemory x = output(stream, ids.size() * table.view().cols, sizeof(float));
  cuda::EmbedArgs args;
  args.table = table.view();
  args.half = table.half();
  args.token_ids = ids_on.data<int32_t>();
  args.scale = scale;
  args.x = x.data<float>();
  args.rows = static_cast<int>(ids.size());
  auto times = times_of(stream, repeats, [&] { cuda::embed(args, stream.get()); });
  cuda::embed(args, stream.get());
  return with_times(py::make_tuple(stream.download<float>(x, {ids.size(), table.view().cols})),
                    std::move(times), repeats);
}

// out [rows, hidden], and x as it is afterwards. partials: [splits, rows of x or more, hidden].
py::object add_rms_norm(const py::object& x_arg, const py::object& partials_arg,
                        const py::object& weight_arg, float eps, const py::object& post_weight_arg,
                        float residual_scale, const std::string& half,
                        const py::object& row_ids_arg, int repeats) {
  const auto x = array_arg<float>("x", x_arg, 2);
  const CallStream stream;
  const auto norm = [&](const char* name, const py::object& value) {
    if (value.is_none()) return DeviceMemory();
    const auto weight = array_arg<float>(name, value, 1);
    RAPSHEE_CHECK(weight.size() == x.shape(1), name, ": got ", weight.size(), ", expected ",
                  x.shape(1));
    return stream.upload(weight);
  };
  const DeviceMemory weight_on = norm("weight", weight_arg);
  const DeviceMemory post_weight_on = norm("post_weight", post_weight_arg);
  cuda::AddNormArgs args;
  DeviceMemory partials_on, row_ids_on;
  if (!partials_arg.is_none()) {
    const auto partials = array_arg<float>("partials", partials_arg, 3);
    RAPSHEE_CHECK(partials.shape(0) >= 1 && partials.shape(1) >= x.shape(0) &&
                      partials.shape(2) == x.shape(1),
                  "partials: got [", partials.shape(0), ", ", partials.shape(1), ", ",
                  partials.shape(2), "], expected [splits, at least ", x.shape(0), ", ", x.shape(1),
                  "]");
    partials_on = stream.upload(partials);
    args.splits = static_cast<int>(partials.shape(0));
    args.split_stride = partials.shape(1) * partials.shape(2);
  }
  args.rows = static_cast<int>(x.shape(0));
  if (!row_ids_arg.is_none()) {
    const auto row_ids = array_arg<int32_t>("row_ids", row_ids_arg, 1);
    for (int32_t row : span_of(row_ids)) {
      RAPSHEE_CHECK(row >= 0 && row < x.shape(0), "row_ids: got ", row, ", expected 0 to ",
                    x.shape(0) - 1);
    }
    row_ids_on = stream.upload(row_ids);
    args.rows = static_cast<int>(row_ids.size());
  }
  const DeviceMemory out = output(stream, args.rows * x.shape(1), sizeof(uint16_t));
  args.partials = partials_on.data<float>();
  args.post_weight = post_weight_on.data<float>();
  args.residual_scale = residual_scale;
  args.row_ids = row_ids_on.data<int32_t>();
  args.weight = weight_on.data<float>();
  args.eps = eps;
  args.half = half_arg(half);
  args.out = out.data();
  args.hidden = x.shape(1);
  const auto launch = [&](const DeviceMemory& x_on) {
    args.x = x_on.data<float>();
    cuda::add_rms_norm(args, stream.get());
  };
  const DeviceMemory timed = stream.upload(x), x_on = stream.upload(x);
  auto times = times_of(stream, repeats, [&] { launch(timed); });
  launch(x_on);
  return with_times(py::make_tuple(download_halves(stream, out, args.half, {args.rows, x.shape(1)}),
                                   stream.download<float>(x_on, {x.shape(0), x.shape(1)})),
                    std::move(times), repeats);
}

cuda::GatedActivation activation_arg(const std::string& activation) {
  if (activation == "silu") return cuda::GatedActivation::kSilu;
  RAPSHEE_CHECK(activation == "gelu_tanh", "activation: got '", activation,
                "', expected silu or gelu_tanh");
  return cuda::GatedActivation::kGeluTanh;
}

py::object gated_activation(const py::object& gate_up_arg, const std::string& activation,
                            const std::string& half, int repeats) {
  const auto gate_up = array_arg<float>("gate_up", gate_up_arg, 2);
  RAPSHEE_CHECK(gate_up.shape(1) % 2 == 0, "gate_up: got ", gate_up.shape(1),
                " columns, expected an even number");
  const int64_t size = gate_up.shape(1) / 2;
  const CallStream stream;
  const DeviceMemory gate_up_on = stream.upload(gate_up);
  const DeviceMemory out = output(stream, gate_up.shape(0) * size, sizeof(uint16_t));
  cuda::GatedActivationArgs args;
  args.gate_up = gate_up_on.data<float>();
  args.activation = activation_arg(activation);
  args.half = half_arg(half);
  args.out = out.data();
  args.size = size;
  args.rows = static_cast<int>(gate_up.shape(0));
  auto times = times_of(stream, repeats, [&] { cuda::gated_activation(args, stream.get()); });
  cuda::gated_activation(args, stream.get());
  return with_times(
      py::make_tuple(download_halves(stream, out, args.half, {gate_up.shape(0), size})),
      std::move(times), repeats);
}

// Logits [rows, vocab] scaled and capped, and with repeats the microseconds of each.
py::object scale_logits(const py::object& logits_arg, float scale, float softcap, int repeats) {
  const auto logits = array_arg<float>("logits", logits_arg, 2);
  const CallStream stream;
  const auto launch = [&](const DeviceMemory& memory) {
    cuda::scale_logits({memory.data<float>(), logits.size(), scale, softcap}, stream.get());
  };
  const DeviceMemory timed = stream.upload(logits), on = stream.upload(logits);
  auto times = times_of(stream, repeats, [&] { launch(timed); });
  launch(on);
  return with_times(py::make_tuple(stream.download<float>(on, {logits.shape(0), logits.shape(1)})),
                    std::move(times), repeats);
}

py::array_t<int32_t> resolve_tokens(const py::object& ids_arg, const py::object& samples_arg) {
  const auto ids = array_arg<int32_t>("token_ids", ids_arg, 1);
  const auto samples = array_arg<int32_t>("samples", samples_arg, 1);
  for (int32_t id : span_of(ids)) {
    RAPSHEE_CHECK(id >= 0 || ~id < samples.size(), "token_ids: got ", id, ", expected ",
                  -samples.size(), " or above");
  }
  const CallStream stream;
  const DeviceMemory ids_on = stream.upload(ids), samples_on = stream.upload(samples);
  cuda::ResolveArgs args;
  args.token_ids = ids_on.data<int32_t>();
  args.samples = samples_on.data<int32_t>();
  args.rows = static_cast<int>(ids.size());
  cuda::resolve_tokens(args, stream.get());
  return stream.download<int32_t>(ids_on, {ids.size()});
}

// Cosines and sines [rows, half_dim].
py::tuple rope_table(const py::object& positions_arg, const py::object& inv_freq_arg,
                     float attention_factor) {
  const auto positions = array_arg<int32_t>("positions", positions_arg, 1);
  const auto inv_freq = array_arg<float>("inv_freq", inv_freq_arg, 1);
  const CallStream stream;
  const DeviceMemory positions_on = stream.upload(positions);
  const DeviceMemory inv_freq_on = stream.upload(inv_freq);
  const int64_t count = positions.size() * inv_freq.size();
  const DeviceMemory cos = output(stream, count, sizeof(float));
  const DeviceMemory sin = output(stream, count, sizeof(float));
  cuda::RopeTableArgs args;
  args.positions = positions_on.data<int32_t>();
  args.inv_freq = inv_freq_on.data<float>();
  args.half_dim = static_cast<int>(inv_freq.size());
  args.attention_factor = attention_factor;
  args.cos = cos.data<float>();
  args.sin = sin.data<float>();
  args.rows = static_cast<int>(positions.size());
  cuda::rope_table(args, stream.get());
  const std::vector<py::ssize_t> shape{positions.size(), inv_freq.size()};
  return py::make_tuple(stream.download<float>(cos, shape), stream.download<float>(sin, shape));
}

}  // namespace

void register_cuda_elementwise(py::module_& m) {
  using py::arg;
  py::class_<DeviceWeight>(m, "Weight")
      .def(py::init<const std::string&, const std::string&, int64_t, int64_t>(), arg("format"),
           arg("half"), arg("rows"), arg("cols"))
      .def("write", &DeviceWeight::write, arg("codes"), arg("scales"))
      .def("read", &DeviceWeight::read)
      .def("fill_random", &DeviceWeight::fill_random, arg("seed"));
  m.def("embed", &embed, arg("table"), arg("token_ids"), py::kw_only(), arg("scale") = 1.0f,
        arg("repeats") = 0);
  m.def("add_rms_norm", &add_rms_norm, arg("x"), arg("partials"), arg("weight"), py::kw_only(),
        arg("eps"), arg("post_weight") = py::none(), arg("residual_scale") = 1.0f,
        arg("half") = "bf16", arg("row_ids") = py::none(), arg("repeats") = 0);
  m.def("gated_activation", &gated_activation, arg("gate_up"), py::kw_only(), arg("activation"),
        arg("half") = "bf16", arg("repeats") = 0);
  m.def("scale_logits", &scale_logits, arg("logits"), py::kw_only(), arg("scale") = 1.0f,
        arg("softcap") = 0.0f, arg("repeats") = 0);
  m.def("resolve_tokens", &resolve_tokens, arg("token_ids"), arg("samples"));
  m.def("rope_table", &rope_table, arg("positions"), arg("inv_freq"), py::kw_only(),
        arg("attention_factor") = 1.0f);
}

}  // namespace rapshee::bindings
