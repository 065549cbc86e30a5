// Single operations of the CPU kernels on numpy arrays, for tests and benchmarks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>

#include "backend/cpu/cache_layout.h"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_features.h"
#include "backend/cpu/cpu_weights.h"
#include "bindings/array_args.h"
#include "bindings/bindings.h"

namespace rapshee::bindings {
namespace {

using cpu::ActRows;
using cpu::KernelTable;
using cpu::PanelFormat;
using FloatArray = py::array_t<float>;

FloatArray zeros(py::ssize_t rows, py::ssize_t cols) {
  FloatArray out({rows, cols});
  std::fill_n(out.mutable_data(), out.size(), 0.0f);
  return out;
}

// A repacked matrix, to be multiplied many times.
class PackedMatrix {
 public:
  PackedMatrix(const py::object& data, const std::string& dtype, int64_t rows, int64_t cols,
               const std::string& compute)
      : compute_(parse_compute(compute)) {
    const auto bytes = array_arg<uint8_t>("data", data, 1);
    RAPSHEE_CHECK(rows >= 1 && cols >= 1, "shape: got [", rows, ", ", cols, "]");
    const DType type = parse_dtype(dtype);
    const int64_t row = row_bytes(type, cols);
    RAPSHEE_CHECK(bytes.size() == rows * row, "data: got ", bytes.size(), " bytes, expected ",
                  rows * row);
    const uint8_t* from = bytes.data();
    const WeightSource source{
        "matrix", type, rows, cols, [=](int64_t begin, int64_t end, std::byte* to) {
          std::memcpy(to, from + begin * row, static_cast<size_t>((end - begin) * row));
        }};
    ThreadPool pool(1);
    const auto turn = pool.lock();
    weight_ = cpu::pack_matrix(source, compute_, arena_, pool, 1);
  }

  size_t bytes() const { return weight_->bytes(); }

  FloatArray row(int64_t index) const {
    RAPSHEE_CHECK(index >= 0 && index < weight_->rows(), "row: got ", index);
    FloatArray out(weight_->cols());
    weight_->copy_row(index, out.mutable_data());
    return out;
  }

  // x [rows, cols] times the transpose, with `threads` threads.
  FloatArray multiply(const py::object& x_arg, const std::string& isa, bool float_acts, bool fine,
                      int threads) const {
    const auto x = array_arg<float>("x", x_arg, 2);
    const cpu::PanelLayout& layout = weight_->layout();
    RAPSHEE_CHECK(x.shape(1) == layout.cols, "x: got ", x.shape(1), " columns, expected ",
                  layout.cols);
    FloatArray y = zeros(x.shape(0), layout.rows);
    if (x.shape(0) == 0) return y;
    const KernelTable& kernels = cpu::select_kernels(isa);
    run(kernels, x.data(), x.shape(0), float_acts, fine, threads, y.mutable_data());
    return y;
  }

 private:
  void run(const KernelTable& kernels, const float* x, int64_t rows, bool float_acts, bool fine,
           int threads, float* y) const {
    const cpu::PanelLayout& layout = weight_->layout();
    const py::gil_scoped_release unlocked;
    const auto pool = ThreadPool::process_pool(threads);
    const auto turn = pool->lock();
    const cpu::ActMemory memory(rows, layout.cols);
    const ActRows acts = memory.rows_of(layout.cols, fine);
    const uint8_t forms = cpu::kActF32 | cpu::kActBF16 | (fine ? cpu::kActQ8Fine : cpu::kActQ8);
    for (int64_t r = 0; r < rows; ++r) {
      kernels.prepare_row(x + r * layout.cols, layout.cols, nullptr, 0.0f, forms, acts.at(r));
    }
    std::vector<AlignedBuffer> scratch;
    for (int w = 0; w < threads; ++w) {
      scratch.emplace_back(cpu::linear_scratch_bytes(layout.cols));
    }
    pool->run(static_cast<int>(layout.num_panels()), threads, [&](int panel, int worker) {
      const int64_t column = int64_t{panel} * cpu::kLanes;
      const cpu::LinearOut out{
          .y = y + column,
          .stride = layout.rows,
          .columns = static_cast<int>(std::min<int64_t>(cpu::kLanes, layout.rows - column))};
      kernels.linear_panel(layout, weight_->panel(panel), acts, rows, float_acts,
                           scratch[static_cast<size_t>(worker)].data(), out);
    });
  }

  ComputeType compute_;
  cpu::WeightArena arena_;
  std::unique_ptr<cpu::PanelWeight> weight_;
};

FloatArray rms_norm(const py::object& x_arg, const py::object& weight_arg, float eps,
                    const std::string& isa) {
  const auto x = array_arg<float>("x", x_arg, 2);
  const auto weight = array_arg<float>("weight", weight_arg, 1);
  const int64_t n = x.shape(1);
  RAPSHEE_CHECK(weight.size() == n && n >= 1, "weight: got ", weight.size(), ", expected ", n);
  FloatArray y({x.shape(0), x.shape(1)});
  const cpu::ActMemory memory(1, n);
  const ActRows row = memory.rows_of(n);
  for (int64_t r = 0; r < x.shape(0); ++r) {
    cpu::select_kernels(isa).prepare_row(x.data() + r * n, n, weight.data(), eps, cpu::kActF32,
                                         row.at(0));
    std::copy(row.f32, row.f32 + n, y.mutable_data() + r * n);
  }
  return y;
}

FloatArray copy_of(const FloatArray& from) {
  FloatArray out(std::vector<py::ssize_t>(from.shape(), from.shape() + from.ndim()));
  std::copy(from.data(), from.data() + from.size(), out.mutable_data());
  return out;
}

using GatedMul = void (*KernelTable::*)(float* gate, const float* up, int64_t n);

template <GatedMul kOp>
FloatArray gated_mul(const py::object& gate_arg, const py::object& up_arg, const std::string& isa) {
  const auto gate = array_arg<float>("gate", gate_arg, 1);
  const auto up = array_arg<float>("up", up_arg, 1);
  RAPSHEE_CHECK(gate.size() == up.size(), "up: got ", up.size(), ", expected ", gate.size());
  FloatArray out = copy_of(gate);
  (cpu::select_kernels(isa).*kOp)(out.mutable_data(), up.data(), up.size());
  return out;
}

// Each row of x plus factor times the normalised row of y.
FloatArray add_normed(const py::object& x_arg, const py::object& y_arg,
                      const py::object& weight_arg, float eps, float factor,
                      const std::string& isa) {
  const auto x = array_arg<float>("x", x_arg, 2), y = array_arg<float>("y", y_arg, 2);
  const auto weight = array_arg<float>("weight", weight_arg, 1);
  const int64_t n = x.shape(1);
  RAPSHEE_CHECK(y.shape(0) == x.shape(0) && y.shape(1) == n, "y: expected [", x.shape(0), ", ", n,
                "]");
  RAPSHEE_CHECK(weight.size() == n && n >= 1, "weight: got ", weight.size(), ", expected ", n);
  FloatArray out = copy_of(x);
  for (int64_t r = 0; r < x.shape(0); ++r) {
    cpu::select_kernels(isa).add_normed(out.mutable_data() + r * n, y.data() + r * n, n,
                                        weight.data(), eps, factor);
  }
  return out;
}

FloatArray soft_cap(const py::object& x_arg, float scale, float cap, const std::string& isa) {
  FloatArray out = copy_of(array_arg<float>("x", x_arg, 1));
  cpu::select_kernels(isa).soft_cap(out.mutable_data(), out.size(), scale, cap);
  return out;
}

// heads [n, head_dim] rotated by cos and sin [half].
FloatArray rope(const py::object& heads_arg, const py::object& cos_arg, const py::object& sin_arg,
                const std::string& isa) {
  const auto heads = array_arg<float>("heads", heads_arg, 2);
  const auto cos = array_arg<float>("cos", cos_arg, 1), sin = array_arg<float>("sin", sin_arg, 1);
  RAPSHEE_CHECK(cos.size() == sin.size() && 2 * cos.size() <= heads.shape(1), "cos: got ",
                cos.size(), " angles for heads of ", heads.shape(1));
  FloatArray out = copy_of(heads);
  for (py::ssize_t h = 0; h < heads.shape(0); ++h) {
    cpu::select_kernels(isa).rope(out.mutable_data() + h * heads.shape(1), cos.data(), sin.data(),
                                  static_cast<int>(cos.size()));
  }
  return out;
}

// Keys and values of one KV head in a paged cache, to be attended to many times.
class PagedCache {
 public:
  PagedCache(const py::object& k_arg, const py::object& v_arg, const py::object& table_arg,
             int block_size, const std::string& dtype, const std::string& isa)
      : kernels_(cpu::select_kernels(isa)) {
    const auto k = array_arg<float>("k", k_arg, 2), v = array_arg<float>("v", v_arg, 2);
    const auto table = array_arg<int32_t>("block_table", table_arg, 1);
    const auto dim = static_cast<int>(k.shape(1));
    const int64_t blocks = table.size();
    length_ = k.shape(0);
    RAPSHEE_CHECK(v.shape(0) == length_ && v.shape(1) == dim && dim >= 2 && dim % 2 == 0,
                  "v: expected [", length_, ", ", dim, "] as k has, and an even head size");
    RAPSHEE_CHECK(block_size >= 16 && block_size % 16 == 0 && blocks * block_size >= length_,
                  "block_table: ", blocks, " blocks of ", block_size, " for ", length_, " keys");
    for (int32_t b : span_of(table)) RAPSHEE_CHECK(b >= 0 && b < blocks, "block_table: got ", b);
    const DType type = dtype == "int8" ? DType::kI8 : parse_dtype(dtype);
    RAPSHEE_CHECK(type == DType::kF32 || type == DType::kBF16 || type == DType::kI8, "dtype: got ",
                  dtype);
    table_.assign(table.data(), table.data() + blocks);
    layout_ = {type, dim, block_size};
    cache_ = AlignedBuffer(layout_.head_bytes() * static_cast<size_t>(blocks));
    // What an earlier owner left behind: not a number wherever the cache lets it be.
    std::fill_n(cache_.data(), cache_.size(), std::byte{0xff});
    for (int64_t i = 0; i < length_; ++i) {
      const auto block = static_cast<size_t>(table_[static_cast<size_t>(i / block_size)]);
      kernels_.cache_write(type, k.data() + i * dim, v.data() + i * dim, dim,
                           static_cast<int>(i % block_size), i + 1 == length_,
                           cache_.data() + block * layout_.head_bytes());
    }
  }

  // q [T, group, d] at positions [T], all in one tile.
  FloatArray attend(const py::object& q_arg, const py::object& positions_arg, float scale,
                    int window, float softcap) const {
    const auto q = array_arg<float>("q", q_arg, 3);
    const auto positions = array_arg<int32_t>("positions", positions_arg, 1);
    const auto tokens = static_cast<int>(q.shape(0)), group = static_cast<int>(q.shape(1));
    RAPSHEE_CHECK(tokens >= 1 && group >= 1 && q.shape(2) == layout_.head_dim, "q: got [", tokens,
                  ", ", group, ", ", q.shape(2), "], expected [T, group, ", layout_.head_dim, "]");
    RAPSHEE_CHECK(positions.size() == tokens, "positions: got ", positions.size(), ", expected ",
                  tokens);
    for (int32_t p : span_of(positions)) {
      RAPSHEE_CHECK(p >= 0 && p < length_, "positions: got ", p, ", expected 0 to ", length_ - 1);
    }
    FloatArray out({q.shape(0), q.shape(1), q.shape(2)});
    const int64_t stride = int64_t{group} * layout_.head_dim;
    const cpu::AttentionTile tile{.q = q.data(),
                                  .q_token_stride = stride,
                                  .out = out.mutable_data(),
                                  .out_token_stride = stride,
                                  .positions = positions.data(),
                                  .num_tokens = tokens,
                                  .group = group,
                                  .head_dim = layout_.head_dim,
                                  .scale = scale,
                                  .softcap = softcap,
                                  .window = window,
                                  .cache = cache_.data(),
                                  .block_stride = static_cast<int64_t>(layout_.head_bytes()),
                                  .block_table = table_.data(),
                                  .block_size = layout_.block_size};
    const py::gil_scoped_release unlocked;
    AlignedBuffer scratch(cpu::attention_scratch_bytes(tokens * group, layout_.head_dim));
    kernels_.attention(layout_.dtype, tile, scratch.data());
    return out;
  }

 private:
  const KernelTable& kernels_;
  cpu::CacheLayout layout_;
  int64_t length_ = 0;
  std::vector<int32_t> table_;
  AlignedBuffer cache_;
};

}  // namespace

void register_ops(py::module_& m) {
  using py::arg;
  py::class_<PackedMatrix>(m, "PackedMatrix")
      .def(py::init<const py::object&, const std::string&, int64_t, int64_t, const std::string&>(),
           arg("data"), arg("dtype"), arg("rows"), arg("cols"), py::kw_only(),
           arg("compute") = "auto")
      .def_property_readonly("nbytes", &PackedMatrix::bytes)
      .def("row", &PackedMatrix::row, arg("index"))
      .def("multiply", &PackedMatrix::multiply, arg("x"), py::kw_only(), arg("isa") = "",
           arg("float_acts") = false, arg("fine") = false, arg("threads") = 1);
  m.def("op_rms_norm", &rms_norm, arg("x"), arg("weight"), arg("eps"), py::kw_only(),
        arg("isa") = "");
  m.def("op_silu_mul", &gated_mul<&KernelTable::silu_mul>, arg("gate"), arg("up"), py::kw_only(),
        arg("isa") = "");
  m.def("op_gelu_mul", &gated_mul<&KernelTable::gelu_mul>, arg("gate"), arg("up"), py::kw_only(),
        arg("isa") = "");
  m.def("op_add_normed", &add_normed, arg("x"), arg("y"), arg("weight"), arg("eps"), arg("factor"),
        py::kw_only(), arg("isa") = "");
  m.def("op_soft_cap", &soft_cap, arg("x"), arg("scale"), arg("cap"), py::kw_only(),
        arg("isa") = "");
  m.def("op_rope", &rope, arg("heads"), arg("cos"), arg("sin"), py::kw_only(), arg("isa") = "");
  py::class_<PagedCache>(m, "PagedCache")
      .def(py::init<const py::object&, const py::object&, const py::object&, int,
                    const std::string&, const std::string&>(),
           arg("k"), arg("v"), arg("block_table"), py::kw_only(), arg("block_size") = 16,
           arg("dtype") = "f32", arg("isa") = "")
      .def("attend", &PagedCache::attend, arg("q"), arg("positions"), py::kw_only(), arg("scale"),
           arg("window") = 0, arg("softcap") = 0.0f);
}

}  // namespace rapshee::bindings
