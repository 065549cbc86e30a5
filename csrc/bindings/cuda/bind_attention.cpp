// Attention kernels and what feeds them, on numpy arrays.
#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "backend/cuda/attention_plan.h"
#include "backend/cuda/kernels/launchers.h"
#include "bindings/array_args.h"
#include "bindings/cuda/cuda_bindings.h"
#include "bindings/cuda/device_array.h"
#include "bindings/cuda/device_weight.h"

namespace rapshee::bindings {
namespace {

using cuda::DeviceMemory;
using FloatArray = py::array_t<float>;
using IntArray = py::array_t<int32_t>;

constexpr uint8_t kStale = 0xff;  // bytes of halves that are not numbers

struct AttentionOptions {
  float scale;
  int window;
  float softcap;
  int repeats;
};

// Outputs, and with repeats the microseconds of each.
struct Attended {
  FloatArray out;
  std::vector<float> microseconds;
};

py::object to_python(Attended attended, int repeats) {
  if (repeats == 0) return std::move(attended.out);
  const auto count = static_cast<py::ssize_t>(attended.microseconds.size());
  return py::make_tuple(attended.out, to_array(std::move(attended.microseconds), {count}));
}

// A paged cache of one layer on the device. Arrays of halves come and go as floats.
class PagedCache {
 public:
  PagedCache(int num_blocks, int block_size, int num_kv_heads, int head_dim,
             const std::string& half)
      : half_(half_arg(half)), num_blocks_(num_blocks) {
    RAPSHEE_CHECK(num_blocks > 0 && block_size > 0 && num_kv_heads > 0 && head_dim > 0,
                  "sizes of the cache: got ", num_blocks, " x ", block_size, " x ", num_kv_heads,
                  " x ", head_dim, ", expected all above 0");
    const int64_t block = int64_t{block_size} * num_kv_heads * head_dim;
    const size_t bytes = static_cast<size_t>(num_blocks * block) * sizeof(uint16_t);
    k_ = DeviceMemory(bytes);
    v_ = DeviceMemory(bytes);
    for (const DeviceMemory* memory : {&k_, &v_}) {
      cuda::api::fill(memory->data(), kStale, bytes, stream_.get());
    }
    stream_.synchronize();
    view_ = {k_.data(), v_.data(), block_size, num_kv_heads, head_dim, block};
  }

  // Queries [rows, num_heads, head_dim] as attention gets them; K and V go to the cache. row_norm:
  // norms are over whole rows of q and k.
  py::object write(const py::object& qkv_arg, const py::object& slots_arg,
                   const py::object& cos_arg, const py::object& sin_arg,
                   const py::object& q_norm_arg, const py::object& k_norm_arg, float eps,
                   bool row_norm, int repeats) {
    const auto qkv = array_arg<float>("qkv", qkv_arg, 3);
    const auto slots = array_arg<int64_t>("slots", slots_arg, 1);
    const auto cos = array_arg<float>("cos", cos_arg, 2), sin = array_arg<float>("sin", sin_arg, 2);
    const auto rows = static_cast<int>(qkv.shape(1));
    const int64_t heads = qkv.shape(2) / view_.head_dim;
    RAPSHEE_CHECK(qkv.shape(0) >= 1 && qkv.shape(2) == heads * view_.head_dim &&
                      heads >= 2 * view_.num_kv_heads,
                  "qkv: got [", qkv.shape(0), ", ", rows, ", ", qkv.shape(2),
                  "], expected [splits, rows, (heads + 2 * ", view_.num_kv_heads, ") * ",
                  view_.head_dim, "]");
    RAPSHEE_CHECK(slots.size() == rows, "slots: got ", slots.size(), ", expected ", rows);
    for (int64_t slot : span_of(slots)) {
      RAPSHEE_CHECK(slot >= -1 && slot < int64_t{num_blocks_} * view_.block_size, "slots: got ",
                    slot, ", expected -1 to ", int64_t{num_blocks_} * view_.block_size - 1);
    }
    RAPSHEE_CHECK(cos.shape(0) == rows && sin.shape(0) == rows && cos.shape(1) == sin.shape(1),
                  "cos, sin: got [", cos.shape(0), ", ", cos.shape(1), "] and [", sin.shape(0),
                  ", ", sin.shape(1), "], expected [", rows, ", half_dim]");
    const int64_t num_heads = heads - 2 * view_.num_kv_heads;
    const auto norm = [&](const char* name, const py::object& value, int64_t of_heads) {
      if (value.is_none()) return DeviceMemory();
      const auto weight = array_arg<float>(name, value, 1);
      const int64_t size = (row_norm ? of_heads : 1) * view_.head_dim;
      RAPSHEE_CHECK(weight.size() == size, name, ": got ", weight.size(), ", expected ", size);
      return stream_.upload(weight);
    };
    const DeviceMemory q_norm = norm("q_norm", q_norm_arg, num_heads);
    const DeviceMemory k_norm = norm("k_norm", k_norm_arg, view_.num_kv_heads);
    const DeviceMemory factors(row_norm ? static_cast<size_t>(rows) * 2 * sizeof(float) : 0);
    const DeviceMemory qkv_on = stream_.upload(qkv), slots_on = stream_.upload(slots);
    const DeviceMemory cos_on = stream_.upload(cos), sin_on = stream_.upload(sin);
    const size_t count = static_cast<size_t>(rows * num_heads * view_.head_dim);
    const DeviceMemory q_out(std::max<size_t>(count * sizeof(uint16_t), 1));
    cuda::QkNormRopeCacheArgs args;
    args.half = half_;
    args.qkv = qkv_on.data<float>();
    args.splits = static_cast<int>(qkv.shape(0));
    args.split_stride = qkv.shape(1) * qkv.shape(2);
    args.q_norm = q_norm.data<float>();
    args.k_norm = k_norm.data<float>();
    args.eps = eps;
    args.row_factors = factors.data<float>();
    args.cos = cos_on.data<float>();
    args.sin = sin_on.data<float>();
    args.half_dim = static_cast<int>(cos.shape(1));
    args.slot_mapping = slots_on.data<int64_t>();
    args.num_heads = static_cast<int>(num_heads);
    args.q_out = q_out.data();
    args.cache = view_;
    args.rows = rows;
    const auto launch = [&] { cuda::qk_norm_rope_cache(args, stream_.get()); };
    Attended written;
    if (repeats > 0) written.microseconds = stream_.time(repeats, launch);
    launch();
    written.out = download(q_out, {rows, num_heads, view_.head_dim});
    return to_python(std::move(written), repeats);
  }

  // Random keys and values in every slot, uniform with a standard deviation of 0.18: for benchmarks
  // of caches that are too large to be written from the host.
  void fill_random(uint64_t seed) {
    RAPSHEE_CHECK(k_.size() % cuda::chunk_bytes(cuda::WeightFormat::kHalf) == 0,
                  "fill_random: got ", k_.size(), " bytes of keys, expected a multiple of ",
                  cuda::chunk_bytes(cuda::WeightFormat::kHalf));
    constexpr int kCols = cuda::chunk_cols(cuda::WeightFormat::kHalf);
    const auto rows = static_cast<int64_t>(k_.size() / (kCols * sizeof(uint16_t)));
    for (const DeviceMemory* memory : {&k_, &v_}) {
      // A matrix of one chunk a panel is packed into exactly its own halves.
      cuda::fill_random({cuda::WeightFormat::kHalf, rows, kCols, memory->data(), nullptr}, half_,
                        seed++, stream_.get());
    }
    stream_.synchronize();
  }

  // The cache's contents: k, v [num_blocks, num_kv_heads, block_size, head_dim].
  py::tuple read() const {
    const std::vector<py::ssize_t> shape{num_blocks_, view_.num_kv_heads, view_.block_size,
                                         view_.head_dim};
    return py::make_tuple(download(k_, shape), download(v_, shape));
  }

  // One query for each sequence, at its last position: q [S, num_heads, head_dim]. Sequences of
  // length 0 are padding. room: items that the workspace is for, 0: as many as there are.
  py::object decode(const py::object& q, const py::object& seq_lens_arg, const py::object& tables,
                    const AttentionOptions& options, int room) {
    const auto seq_lens = array_arg<int32_t>("seq_lens", seq_lens_arg, 1);
    const auto num_seqs = static_cast<int>(seq_lens.size());
    std::vector<int32_t> starts, positions;
    for (int s = 0; s <= num_seqs; ++s) starts.push_back(s);
    for (int32_t length : span_of(seq_lens)) positions.push_back(std::max(length, 1) - 1);
    cuda::DecodePlan plan;
    cuda::plan_decode(span_of(seq_lens), options.window, plan);
    const int max_items = std::max({room, plan.num_items(), 1});
    const DeviceMemory items = upload(plan.items), first_item = upload(plan.first_item);
    const DeviceMemory num_splits = upload(plan.num_splits);
    const DeviceMemory num_items = upload<int32_t>({plan.num_items()});
    const cuda::DecodeWork work{num_items.data<int32_t>(),
                                items.data<int32_t>(),
                                first_item.data<int32_t>(),
                                num_splits.data<int32_t>(),
                                max_items,
                                num_seqs};
    const auto heads = static_cast<int>(array_arg<float>("q", q, 3).shape(1));
    const DeviceMemory workspace(
        cuda::decode_workspace_bytes(max_items, num_seqs, heads, view_.head_dim));
    cuda::api::fill(workspace.data(), 0, workspace.size(), stream_.get());
    const std::vector<int32_t> lengths(seq_lens.data(), seq_lens.data() + num_seqs);
    return to_python(attend(q, starts, positions, lengths, tables, options,
                            [&](const cuda::AttentionArgs& args) {
                              cuda::paged_attention_decode(args, work, workspace.data(),
                                                           stream_.get());
                            }),
                     options.repeats);
  }

  // Sequences of query_start_loc[s + 1] - query_start_loc[s] queries each, at ascending positions:
  // q [T, num_heads, head_dim]. seq_lens: keys that are there, None: up to the last position.
  py::object prefill(const py::object& q, const py::object& starts_arg,
                     const py::object& positions_arg, const py::object& tables,
                     const AttentionOptions& options, const py::object& seq_lens_arg) {
    std::vector<int32_t> starts, positions, seq_lens;
    copy_arg("query_start_loc", starts_arg, starts);
    copy_arg("positions", positions_arg, positions);
    RAPSHEE_CHECK(!starts.empty() && starts.front() == 0 &&
                      std::is_sorted(starts.begin(), starts.end()) &&
                      starts.back() == static_cast<int32_t>(positions.size()),
                  "query_start_loc: expected 0 up to ", positions.size(), " in ascending order");
    if (!seq_lens_arg.is_none()) {
      copy_arg("seq_lens", seq_lens_arg, seq_lens);
    } else {
      for (size_t s = 0; s + 1 < starts.size(); ++s) {
        const bool empty = starts[s + 1] == starts[s];
        seq_lens.push_back(empty ? 0 : positions[static_cast<size_t>(starts[s + 1]) - 1] + 1);
      }
    }
    const auto heads = static_cast<int>(array_arg<float>("q", q, 3).shape(1));
    RAPSHEE_CHECK(heads % view_.num_kv_heads == 0, "q: got ", heads, " heads, expected a multiple ",
                  "of ", view_.num_kv_heads);
    std::vector<int32_t> tiles;
    cuda::plan_prefill(starts, positions, 0,
                       cuda::prefill_tile_tokens(heads, view_.num_kv_heads, view_.head_dim), tiles);
    const DeviceMemory tiles_on = upload(tiles);
    const cuda::PrefillWork work{tiles_on.data<int32_t>(), static_cast<int>(tiles.size() / 2)};
    return to_python(attend(q, starts, positions, seq_lens, tables, options,
                            [&](const cuda::AttentionArgs& args) {
                              cuda::paged_attention_prefill(args, work, stream_.get());
                            }),
                     options.repeats);
  }

 private:
  template <class T>
  DeviceMemory upload(const std::vector<T>& values) const {
    return stream_.upload(values.data(), values.size());
  }

  FloatArray download(const DeviceMemory& memory, std::vector<py::ssize_t> shape) const {
    return download_halves(stream_, memory, half_, std::move(shape));
  }

  void check_tables(const IntArray& tables, const std::vector<int32_t>& starts,
                    const std::vector<int32_t>& positions,
                    const std::vector<int32_t>& seq_lens) const {
    const size_t num_seqs = starts.size() - 1;
    RAPSHEE_CHECK(static_cast<size_t>(tables.shape(0)) == num_seqs && seq_lens.size() == num_seqs,
                  "block_tables, seq_lens: got ", tables.shape(0), " and ", seq_lens.size(),
                  " sequences, expected ", num_seqs);
    for (size_t s = 0; s < num_seqs; ++s) {
      RAPSHEE_CHECK(seq_lens[s] >= 0 && seq_lens[s] <= tables.shape(1) * view_.block_size,
                    "seq_lens: got ", seq_lens[s], ", expected 0 to ",
                    tables.shape(1) * view_.block_size);
      for (int i = 0; i * view_.block_size < seq_lens[s]; ++i) {
        const int32_t block = tables.at(static_cast<py::ssize_t>(s), i);
        RAPSHEE_CHECK(block >= 0 && block < num_blocks_, "block_tables: got ", block,
                      ", expected 0 to ", num_blocks_ - 1);
      }
      for (int32_t i = starts[s]; i < starts[s + 1]; ++i) {
        const int32_t position = positions[static_cast<size_t>(i)];
        RAPSHEE_CHECK(position >= 0 && position < std::max(seq_lens[s], 1), "positions: got ",
                      position, ", expected 0 to ", seq_lens[s] - 1);
      }
    }
  }

  Attended attend(const py::object& q_arg, const std::vector<int32_t>& starts,
                  const std::vector<int32_t>& positions, const std::vector<int32_t>& seq_lens,
                  const py::object& tables_arg, const AttentionOptions& options,
                  const std::function<void(const cuda::AttentionArgs&)>& launch) const {
    const auto q = array_arg<float>("q", q_arg, 3);
    const auto tables = array_arg<int32_t>("block_tables", tables_arg, 2);
    RAPSHEE_CHECK(
        q.shape(0) == static_cast<py::ssize_t>(positions.size()) && q.shape(2) == view_.head_dim,
        "q: got [", q.shape(0), ", ", q.shape(1), ", ", q.shape(2), "], expected [",
        positions.size(), ", heads, ", view_.head_dim, "]");
    check_tables(tables, starts, positions, seq_lens);
    const DeviceMemory q_on = upload_halves(stream_, q, half_), tables_on = stream_.upload(tables);
    const DeviceMemory starts_on = upload(starts), positions_on = upload(positions);
    const DeviceMemory seq_lens_on = upload(seq_lens);
    const DeviceMemory stride_on = upload<int32_t>({static_cast<int32_t>(tables.shape(1))});
    const DeviceMemory out(q_on.size());
    cuda::AttentionArgs args;
    args.half = half_;
    args.q = q_on.data();
    args.out = out.data();
    args.num_heads = static_cast<int>(q.shape(1));
    args.cache = view_;
    args.block_tables = tables_on.data<int32_t>();
    args.table_stride = stride_on.data<int32_t>();
    args.seq_lens = seq_lens_on.data<int32_t>();
    args.query_start_loc = starts_on.data<int32_t>();
    args.positions = positions_on.data<int32_t>();
    args.scale = options.scale;
    args.window = options.window;
    args.softcap = options.softcap;
    Attended attended;
    if (options.repeats > 0) {
      attended.microseconds = stream_.time(options.repeats, [&] { launch(args); });
    }
    cuda::api::fill(out.data(), kStale, out.size(), stream_.get());
    launch(args);
    attended.out = download(out, {q.shape(0), q.shape(1), q.shape(2)});
    return attended;
  }

  CallStream stream_;
  cuda::HalfType half_;
  int num_blocks_;
  DeviceMemory k_, v_;
  cuda::KvCacheView view_;
};

}  // namespace

void register_cuda_attention(py::module_& m) {
  using py::arg;
  py::class_<PagedCache>(m, "PagedCache")
      .def(py::init<int, int, int, int, const std::string&>(), arg("num_blocks"), arg("block_size"),
           arg("num_kv_heads"), arg("head_dim"), arg("half") = "bf16")
      .def("write", &PagedCache::write, arg("qkv"), arg("slots"), arg("cos"), arg("sin"),
           py::kw_only(), arg("q_norm") = py::none(), arg("k_norm") = py::none(), arg("eps") = 0.0f,
           arg("row_norm") = false, arg("repeats") = 0)
      .def("fill_random", &PagedCache::fill_random, arg("seed"))
      .def("read", &PagedCache::read)
      .def(
          "decode",
          [](PagedCache& self, const py::object& q, const py::object& seq_lens,
             const py::object& tables, float scale, int window, float softcap, int room,
             int repeats) {
            return self.decode(q, seq_lens, tables, {scale, window, softcap, repeats}, room);
          },
          arg("q"), arg("seq_lens"), arg("block_tables"), py::kw_only(), arg("scale"),
          arg("window") = 0, arg("softcap") = 0.0f, arg("room") = 0, arg("repeats") = 0)
      .def(
          "prefill",
          [](PagedCache& self, const py::object& q, const py::object& starts,
             const py::object& positions, const py::object& tables, float scale, int window,
             float softcap, const py::object& seq_lens, int repeats) {
            return self.prefill(q, starts, positions, tables, {scale, window, softcap, repeats},
                                seq_lens);
          },
          arg("q"), arg("query_start_loc"), arg("positions"), arg("block_tables"), py::kw_only(),
          arg("scale"), arg("window") = 0, arg("softcap") = 0.0f, arg("seq_lens") = py::none(),
          arg("repeats") = 0);
  m.def(
      "plan_decode",
      [](const py::object& seq_lens, int window) {
        cuda::DecodePlan plan;
        cuda::plan_decode(span_of(array_arg<int32_t>("seq_lens", seq_lens, 1)), window, plan);
        const py::ssize_t items = plan.num_items();
        const auto seqs = static_cast<py::ssize_t>(plan.num_splits.size());
        return py::make_tuple(to_array(std::move(plan.items), {items, 2}),
                              to_array(std::move(plan.first_item), {seqs}),
                              to_array(std::move(plan.num_splits), {seqs}));
      },
      arg("seq_lens"), py::kw_only(), arg("window") = 0);
  m.def(
      "plan_prefill",
      [](const py::object& starts, const py::object& positions, int first_seq, int tile_tokens) {
        std::vector<int32_t> tiles;
        cuda::plan_prefill(span_of(array_arg<int32_t>("query_start_loc", starts, 1)),
                           span_of(array_arg<int32_t>("positions", positions, 1)), first_seq,
                           tile_tokens, tiles);
        const auto count = static_cast<py::ssize_t>(tiles.size() / 2);
        return to_array(std::move(tiles), {count, 2});
      },
      arg("query_start_loc"), arg("positions"), py::kw_only(), arg("first_seq"),
      arg("tile_tokens"));
  m.def(
      "num_decode_seqs",
      [](const py::object& starts) {
        return cuda::num_decode_seqs(span_of(array_arg<int32_t>("query_start_loc", starts, 1)));
      },
      arg("query_start_loc"));
  m.def("prefill_tile_tokens", &cuda::prefill_tile_tokens, arg("num_heads"), arg("num_kv_heads"),
        arg("head_dim"));
}

}  // namespace rapshee::bindings
