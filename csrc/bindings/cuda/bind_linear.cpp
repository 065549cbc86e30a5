// Linear layers and the packing of their weights, on numpy arrays.
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "backend/cuda/cuda_weights.h"
#include "backend/cuda/gemm.h"
#include "backend/cuda/kernels/launchers.h"
#include "bindings/array_args.h"
#include "bindings/cuda/cuda_bindings.h"
#include "bindings/cuda/device_array.h"
#include "core/dtype.h"

namespace rapshee::bindings {
namespace {

using cuda::DeviceMemory;
using cuda::HalfType;
using FloatArray = py::array_t<float>;
using ByteArray = py::array_t<uint8_t>;

constexpr uint8_t kStale = 0xff;  // bytes of floats and halves that are not numbers

HalfType parse_half(const std::string& half) {
  RAPSHEE_CHECK(half == "bf16" || half == "f16", "half: got '", half, "', expected bf16 or f16");
  return half == "bf16" ? HalfType::kBF16 : HalfType::kF16;
}

const char* format_name(cuda::WeightFormat format) {
  constexpr const char* kNames[] = {"half", "q8", "q4z", "q4m", "q2m", "q3", "q5m", "q6", "plain"};
  return kNames[static_cast<size_t>(format)];
}

// A tensor's bytes in memory. What is missing at its end is found when it is read.
WeightSource source_of(const ByteArray& data, const std::string& dtype, int64_t rows,
                       int64_t cols) {
  WeightSource source{"test.weight", parse_dtype(dtype), rows, cols, {}};
  source.read_rows = [name = source.name, bytes = span_of(data), type = source.dtype, cols](
                         int64_t begin, int64_t end, std::byte* dst) {
    const auto size = static_cast<size_t>(row_bytes(type, cols));
    const size_t from = static_cast<size_t>(begin) * size, to = static_cast<size_t>(end) * size;
    if (to > bytes.size()) {
      throw WeightError(
          concat("rows ", begin, " to ", end, " end at byte ", to, " of ", bytes.size()), name);
    }
    std::copy_n(reinterpret_cast<const std::byte*>(bytes.data()) + from, to - from, dst);
  };
  return source;
}

cuda::WeightUploader make_uploader(int threads, size_t slice_bytes) {
  cuda::api::set_device(0);
  return {ThreadPool::process_pool(threads), threads, slice_bytes};
}

// A matrix on the device.
class PackedWeight {
 public:
  PackedWeight(const py::object& data_arg, const std::string& dtype, int64_t rows, int64_t cols,
               const std::string& half, int threads, size_t slice_bytes, bool plain)
      : half_(parse_half(half)) {
    const auto data = array_arg<uint8_t>("data", data_arg, 1);
    auto uploader = make_uploader(threads, slice_bytes);
    weight_ = cuda::load_matrix(source_of(data, dtype, rows, cols), half_, uploader, plain);
  }
  PackedWeight(uint64_t key, const std::string& dtype, int64_t rows, int64_t cols,
               const std::string& half, bool plain)
      : half_(parse_half(half)) {
    WeightSource source{"test.weight", parse_dtype(dtype), rows, cols, {}};
    source.random_key = key;
    auto uploader = make_uploader(1, 1);
    weight_ = cuda::load_matrix(source, half_, uploader, plain);
  }

  const cuda::WeightView& view() const { return weight_->view(); }
  const cuda::CudaWeight& weight() const { return *weight_; }
  HalfType half() const { return half_; }

  // Codes u8 [panels, chunks, bytes] and scales u8 [panels, chunks, bytes]; of plain weights codes
  // u8 [panels, 8, bytes of a row].
  py::tuple read() const {
    const CallStream stream;
    const auto download = [&](const std::byte* from, int64_t middle, int64_t last) {
      ByteArray array({view().num_panels(), middle, last});
      const auto bytes = static_cast<size_t>(array.size());
      const cuda::PinnedMemory staging(std::max<size_t>(bytes, 1));
      if (bytes > 0) cuda::api::copy_to_host(staging.data(), from, bytes, stream.get());
      stream.synchronize();
      std::copy_n(staging.data<uint8_t>(), bytes, array.mutable_data());
      return array;
    };
    const bool plain = view().format == cuda::WeightFormat::kPlain;
    return py::make_tuple(
        plain ? download(view().codes, cuda::kPanelRows, view().cols * int64_t{sizeof(uint16_t)})
              : download(view().codes, view().num_chunks(), cuda::chunk_bytes(view().format)),
        download(view().scales, view().num_chunks(), cuda::chunk_scale_bytes(view().format)));
  }

 private:
  HalfType half_;
  std::unique_ptr<cuda::CudaWeight> weight_;
};

FloatArray read_vector(const py::object& data_arg, const std::string& dtype, int64_t cols) {
  const auto data = array_arg<uint8_t>("data", data_arg, 1);
  auto uploader = make_uploader(1, 1);
  const auto vector = cuda::load_vector(source_of(data, dtype, 1, cols), uploader);
  const CallStream stream;
  FloatArray values({static_cast<py::ssize_t>(vector->cols())});
  const cuda::PinnedMemory staging(vector->bytes());
  cuda::api::copy_to_host(staging.data(), vector->data(), vector->bytes(), stream.get());
  stream.synchronize();
  std::copy_n(staging.data<float>(), values.size(), values.mutable_data());
  return values;
}

// What both kinds of layers share.
struct Call {
  Call(const py::object& x_arg, const PackedWeight& first, int64_t stride, int timed)
      : half(first.half()), repeats(timed) {
    const auto array = array_arg<float>("x", x_arg, 2);
    const int64_t cols = first.view().cols;
    RAPSHEE_CHECK(array.shape(1) == cols, "x: got ", array.shape(1), " columns, expected ", cols);
    RAPSHEE_CHECK(stride == 0 || stride >= cols, "x_stride: got ", stride, ", expected 0 or at ",
                  "least ", cols);
    rows = static_cast<int>(array.shape(0));
    x_stride = stride == 0 ? cols : stride;
    std::vector<uint16_t> halves(static_cast<size_t>(rows * x_stride), uint16_t{0xffff});
    for (int64_t r = 0; r < rows; ++r) {
      std::transform(
          array.data() + r * cols, array.data() + (r + 1) * cols, halves.data() + r * x_stride,
          [&](float v) { return half == HalfType::kBF16 ? f32_to_bf16(v) : f32_to_f16(v); });
    }
    x = stream.upload(halves.data(), halves.size());
  }

  // Bias of a matrix on the device, or null; kept until the call ends.
  const float* bias(const char* name, const py::object& value, const PackedWeight& weight) {
    if (value.is_none()) return nullptr;
    const auto array = array_arg<float>(name, value, 1);
    RAPSHEE_CHECK(array.size() == weight.view().rows, name, ": got ", array.size(),
                  " elements, expected ", weight.view().rows);
    biases.push_back(stream.upload(array));
    return biases.back().data<float>();
  }

  // Runs `body`, which fills `out`, and takes the time of `repeats` more runs.
  std::vector<float> run(const DeviceMemory& out, const std::function<void()>& body) const {
    std::vector<float> microseconds;
    if (repeats > 0) microseconds = stream.time(repeats, body);
    cuda::api::fill(out.data(), kStale, out.size(), stream.get());
    body();
    return microseconds;
  }

  py::object to_python(FloatArray out, std::vector<float> microseconds) const {
    if (repeats == 0) return out;
    return py::make_tuple(std::move(out), to_array(std::move(microseconds), {repeats}));
  }

  CallStream stream;
  HalfType half;
  int repeats, rows = 0;
  int64_t x_stride = 0;
  DeviceMemory x;
  std::vector<DeviceMemory> biases;
};

// The partial sums [partials, rows, outputs] of matrices side by side. `plain`: by gemv.
py::object linear(const py::object& x, const std::vector<const PackedWeight*>& weights,
                  const std::optional<std::vector<py::object>>& biases, int splits,
                  int64_t x_stride, int repeats, bool plain) {
  RAPSHEE_CHECK(!weights.empty() && weights.size() <= 3, "weights: got ", weights.size(),
                ", expected 1 to 3");
  RAPSHEE_CHECK(!biases || biases->size() == weights.size(), "biases: expected one a weight");
  Call call(x, *weights[0], x_stride, repeats);
  cuda::LinearArgs args;
  args.half = call.half;
  args.x = call.x.data();
  args.x_stride = call.x_stride;
  args.rows = call.rows;
  args.num_segments = static_cast<int>(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    args.segments[i].weight = weights[i]->view();
    if (biases) args.segments[i].bias = call.bias("biases", (*biases)[i], *weights[i]);
    args.segments[i].column = args.y_stride;
    args.y_stride += weights[i]->view().rows;
  }
  args.k_splits = splits;
  args.split_stride = call.rows * args.y_stride;
  const int partials = cuda::linear_partials(call.rows, splits);
  const size_t count = static_cast<size_t>(std::max(partials, 0) * args.split_stride);
  const DeviceMemory y(std::max<size_t>(count * sizeof(float), 1));
  args.y = y.data<float>();
  auto microseconds = call.run(y, [&] {
    plain ? cuda::gemv(args, call.stream.get()) : cuda::linear(args, call.stream.get());
  });
  return call.to_python(call.stream.download<float>(y, {partials, call.rows, args.y_stride}),
                        std::move(microseconds));
}

// act(gate x) * up x [rows, outputs]. `plain`: by gemv.
py::object gated_linear(const py::object& x, const PackedWeight& gate, const PackedWeight& up,
                        const std::string& activation, const py::object& gate_bias,
                        const py::object& up_bias, int64_t x_stride, int repeats, bool plain) {
  RAPSHEE_CHECK(activation == "silu" || activation == "gelu_tanh", "activation: got '", activation,
                "', expected silu or gelu_tanh");
  Call call(x, gate, x_stride, repeats);
  cuda::GatedLinearArgs args;
  args.half = call.half;
  args.x = call.x.data();
  args.x_stride = call.x_stride;
  args.rows = call.rows;
  args.gate = gate.view();
  args.up = up.view();
  args.gate_bias = call.bias("gate_bias", gate_bias, gate);
  args.up_bias = call.bias("up_bias", up_bias, up);
  args.activation =
      activation == "silu" ? cuda::GatedActivation::kSilu : cuda::GatedActivation::kGeluTanh;
  args.out_stride = gate.view().rows;
  const size_t count = static_cast<size_t>(call.rows * args.out_stride);
  const DeviceMemory out(std::max<size_t>(count * sizeof(uint16_t), 1));
  args.out = out.data();
  auto microseconds = call.run(out, [&] {
    plain ? cuda::gated_gemv(args, call.stream.get()) : cuda::gated_linear(args, call.stream.get());
  });
  std::vector<uint16_t> halves(count);
  call.stream.download(out, halves.data(), count);
  FloatArray values({py::ssize_t{call.rows}, static_cast<py::ssize_t>(args.out_stride)});
  std::transform(halves.begin(), halves.end(), values.mutable_data(), [&](uint16_t v) {
    return call.half == HalfType::kBF16 ? bf16_to_f32(v) : f16_to_f32(v);
  });
  return call.to_python(std::move(values), std::move(microseconds));
}

// x W^T + bias [rows, y_stride] by the library, columns behind the outputs NaN. `recorded`: as a
// captured stream replays it.
py::object gemm(const py::object& x, const PackedWeight& weight, const py::object& bias,
                int64_t x_stride, int64_t y_stride, bool recorded, int repeats) {
  Call call(x, weight, x_stride, repeats);
  RAPSHEE_CHECK(weight.view().format == cuda::WeightFormat::kPlain, "weight: expected a plain one");
  RAPSHEE_CHECK(y_stride == 0 || y_stride >= weight.view().rows, "y_stride: got ", y_stride,
                ", expected 0 or at least ", weight.view().rows);
  cuda::GemmArgs args{.half = call.half,
                      .x = call.x.data(),
                      .x_stride = call.x_stride,
                      .weight = weight.view().codes,
                      .bias = call.bias("bias", bias, weight),
                      .y = nullptr,
                      .y_stride = y_stride == 0 ? weight.view().rows : y_stride,
                      .rows = call.rows,
                      .outputs = weight.view().rows,
                      .cols = weight.view().cols};
  const auto count = static_cast<size_t>(call.rows * args.y_stride);
  const DeviceMemory y(std::max<size_t>(count * sizeof(float), 1));
  args.y = y.data<float>();
  const auto library = cuda::make_gemm();
  cuda::GraphOwner graph;
  const auto run = [&] { library->run(args, call.stream.get()); };
  if (recorded) {
    cuda::api::begin_capture(call.stream.get());
    run();
    graph = cuda::GraphOwner(cuda::api::end_capture(call.stream.get()));
  }
  auto microseconds =
      call.run(y, [&] { recorded ? cuda::api::launch(graph.get(), call.stream.get()) : run(); });
  return call.to_python(call.stream.download<float>(y, {call.rows, args.y_stride}),
                        std::move(microseconds));
}

}  // namespace

void register_cuda_linear(py::module_& m) {
  using py::arg;
  py::class_<PackedWeight>(m, "PackedWeight")
      .def(py::init<const py::object&, const std::string&, int64_t, int64_t, const std::string&,
                    int, size_t, bool>(),
           arg("data"), arg("dtype"), arg("rows"), arg("cols"), py::kw_only(), arg("half") = "bf16",
           arg("threads") = 1, arg("slice_bytes") = size_t{1} << 16, arg("plain") = false)
      .def_static(
          "random",
          [](uint64_t key, const std::string& dtype, int64_t rows, int64_t cols,
             const std::string& half, bool plain) {
            return std::make_unique<PackedWeight>(key, dtype, rows, cols, half, plain);
          },
          arg("key"), arg("dtype"), arg("rows"), arg("cols"), py::kw_only(), arg("half") = "bf16",
          arg("plain") = false)
      .def_property_readonly("format",
                             [](const PackedWeight& w) { return format_name(w.view().format); })
      .def_property_readonly(
          "shape",
          [](const PackedWeight& w) { return std::pair(w.weight().rows(), w.weight().cols()); })
      .def_property_readonly("nbytes", [](const PackedWeight& w) { return w.weight().bytes(); })
      .def("read", &PackedWeight::read);
  m.def("read_vector", &read_vector, arg("data"), arg("dtype"), arg("cols"));
  m.def("free_memory", [] {
    cuda::api::set_device(0);
    return cuda::api::memory_info().free;
  });
  m.def("linear", &linear, arg("x"), arg("weights"), arg("biases") = py::none(), py::kw_only(),
        arg("splits") = 1, arg("x_stride") = 0, arg("repeats") = 0, arg("plain") = false);
  m.def("gated_linear", &gated_linear, arg("x"), arg("gate"), arg("up"), py::kw_only(),
        arg("activation") = "silu", arg("gate_bias") = py::none(), arg("up_bias") = py::none(),
        arg("x_stride") = 0, arg("repeats") = 0, arg("plain") = false);
  m.def("gemm", &gemm, arg("x"), arg("weight"), arg("bias") = py::none(), py::kw_only(),
        arg("x_stride") = 0, arg("y_stride") = 0, arg("recorded") = false, arg("repeats") = 0);
  m.def("linear_splits", &cuda::linear_splits, arg("outputs"), arg("cols"));
  m.def("linear_partials", &cuda::linear_partials, arg("rows"), arg("splits"));
}

}  // namespace rapshee::bindings
