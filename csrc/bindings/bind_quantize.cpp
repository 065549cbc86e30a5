// Quantising the rows of a tensor, for checkpoints that are quantised as they are loaded.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "bindings/array_args.h"
#include "bindings/bindings.h"
#include "core/thread_pool.h"
#include "quant/formats.h"
#include "quant/quantize.h"

namespace rapshee::bindings {
namespace {

py::array_t<uint8_t> quantize_rows(const py::object& data_arg, const std::string& dtype,
                                   int64_t cols, const std::string& to, int threads) {
  const auto data = array_arg<uint8_t>("data", data_arg, 1);
  const DType from = parse_dtype(dtype), target = parse_dtype(to);
  RAPSHEE_CHECK(cols >= 1, "cols: got ", cols);
  RAPSHEE_CHECK(threads >= 1 && threads <= ThreadPool::kMaxThreads, "threads: got ", threads);
  const int64_t row = row_bytes(from, cols), out_row = row_bytes(target, cols);
  RAPSHEE_CHECK(data.size() % row == 0, "data: got ", data.size(),
                " bytes, expected a multiple of ", row);
  const int64_t rows = data.size() / row;
  py::array_t<uint8_t> out(rows * out_row);
  const auto* src = reinterpret_cast<const std::byte*>(data.data());
  auto* dst = reinterpret_cast<std::byte*>(out.mutable_data());
  const py::gil_scoped_release unlocked;
  const auto pool = ThreadPool::process_pool(threads);
  const auto turn = pool->lock();
  const auto tasks = static_cast<int>(std::min<int64_t>(rows, 8 * int64_t{threads}));
  pool->run(tasks, threads, [&](int task, int) {
    std::vector<float> values(static_cast<size_t>(cols));
    for (int64_t r = rows * task / tasks; r < rows * (task + 1) / tasks; ++r) {
      dequantize_row(from, src + r * row, values.data(), cols);
      quantize_row(target, values.data(), dst + r * out_row, cols);
    }
  });
  return out;
}

}  // namespace

void register_quantize(py::module_& m) {
  using py::arg;
  m.def("quantize_rows", &quantize_rows, arg("data"), arg("dtype"), arg("cols"), py::kw_only(),
        arg("to"), arg("threads"));
}

}  // namespace rapshee::bindings
