#include "backend/cuda/cuda_weights.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "backend/cuda/row_packer.h"
#include "core/dtype.h"
#include "core/error.h"
#include "quant/formats.h"

namespace rapshee::cuda {
namespace {

void check_matrix(const WeightSource& source) {
  constexpr int kMultiple = 8;  // 16 bytes of activations
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const auto fail = [&](const auto&... parts) { throw WeightError(concat(parts...), source.name); };
  if (source.cols <= 0 || source.cols % kMultiple != 0 || source.cols > kMost) {
    fail("rows of ", source.cols, " elements: CUDA kernels take multiples of ", kMultiple);
  }
  if (source.cols % block_elements(source.dtype) != 0) {
    fail("rows of ", source.cols, " elements do not divide into ", dtype_name(source.dtype),
         " blocks");
  }
  if (source.rows <= 0 || source.rows > kMost) {
    fail(source.rows, " rows, expected 1 to ", kMost);
  }
}

// Packs panels of one matrix.
class PanelPacker {
 public:
  PanelPacker(const WeightSource& source, HalfType half, const WeightView& view)
      : source_(source), view_(view), rows_(make_row_packer(source, half, view.format)) {}

  size_t panel_code_bytes() const { return view_.panel_code_bytes(); }
  size_t panel_scale_bytes() const {
    return static_cast<size_t>(view_.num_chunks() * chunk_scale_bytes(view_.format));
  }

  // Panels [begin, end), to `codes` and `scales`.
  void pack(int64_t begin, int64_t end, std::byte* codes, std::byte* scales) const {
    const auto count = static_cast<size_t>(end - begin);
    std::memset(codes, 0, count * panel_code_bytes());
    std::memset(scales, 0, count * panel_scale_bytes());
    const int64_t first = begin * kPanelRows, last = std::min(end * kPanelRows, source_.rows);
    const auto row_size = static_cast<size_t>(row_bytes(source_.dtype, source_.cols));
    std::vector<std::byte> raw(static_cast<size_t>(last - first) * row_size);
    source_.read_rows(first, last, raw.data());
    const int64_t stride = packed_row_stride(view_);
    const int64_t scale_stride = chunk_scale_bytes(view_.format) / kPanelRows;
    RowScratch scratch;
    for (int64_t row = first; row < last; ++row) {
      const auto panel = static_cast<size_t>((row - first) / kPanelRows);
      const int64_t g = row % kPanelRows;
      const PackedRow to{codes + panel * panel_code_bytes() + g * stride,
                         scales + panel * panel_scale_bytes() + g * scale_stride};
      rows_->pack(row, raw.data() + static_cast<size_t>(row - first) * row_size, to, scratch);
    }
  }

 private:
  const WeightSource& source_;
  const WeightView& view_;
  std::unique_ptr<RowPacker> rows_;
};

}  // namespace

CudaWeight::CudaWeight(WeightFormat format, int64_t rows, int64_t cols) {
  view_.format = format;
  view_.rows = rows;
  view_.cols = cols;
  codes_ = DeviceMemory(view_.code_bytes());
  scales_ = DeviceMemory(view_.scale_bytes());
  view_.codes = codes_.data();
  view_.scales = scales_.data();
}

WeightUploader::WeightUploader(std::shared_ptr<ThreadPool> pool, int threads, size_t slice_bytes)
    : pool_(std::move(pool)), threads_(threads), slice_bytes_(slice_bytes) {
  stream_ = StreamOwner(api::create_stream());
  for (Slice& slice : slices_) {
    slice.memory = PinnedMemory(slice_bytes);
    slice.copied = EventOwner(api::create_event());
  }
}

WeightUploader::~WeightUploader() {
  try {
    wait();  // the slices are read until then
  } catch (const DeviceError&) {
    // The device has failed, and reads nothing any more.
  }
}

void WeightUploader::send(std::span<const Part> parts,
                          const std::function<void(std::byte* slice)>& make) {
  Slice& slice = slices_[next_];
  next_ = 1 - next_;
  api::synchronize(slice.copied.get());
  const size_t bytes =
      std::accumulate(parts.begin(), parts.end(), size_t{0},
                      [](size_t sum, const Part& part) { return sum + part.bytes; });
  if (bytes > slice.memory.size()) slice.memory = PinnedMemory(bytes);
  make(slice.memory.data());
  const std::byte* from = slice.memory.data();
  for (const Part& part : parts) {
    if (part.bytes > 0) api::copy_to_device(part.to, from, part.bytes, stream());
    from += part.bytes;
  }
  api::record(slice.copied.get(), stream());
}

void WeightUploader::run(int count, const std::function<void(int)>& task) {
  const ThreadPool::StepGuard turn = pool_->lock();
  pool_->run(count, threads_, [&](int index, int) { task(index); });
}

std::unique_ptr<CudaWeight> load_matrix(const WeightSource& source, HalfType half,
                                        WeightUploader& uploader, bool plain) {
  check_matrix(source);
  auto weight =
      std::make_unique<CudaWeight>(packed_format(source.dtype, plain), source.rows, source.cols);
  const WeightView& view = weight->view();
  if (source.random_key) {
    fill_random(view, half, *source.random_key, uploader.stream());
    uploader.wait();
    return weight;
  }
  const PanelPacker packer(source, half, view);
  const size_t code_bytes = packer.panel_code_bytes(), scale_bytes = packer.panel_scale_bytes();
  const auto panels_of_slice = static_cast<int64_t>(
      std::max<size_t>(uploader.slice_bytes() / (code_bytes + scale_bytes), 1));
  // One task a panel would read a few kilobytes at a time; 8 panels make reads of 100 KB and more.
  constexpr int64_t kPanelsPerTask = 8;
  for (int64_t begin = 0; begin < view.num_panels(); begin += panels_of_slice) {
    const int64_t end = std::min(begin + panels_of_slice, view.num_panels());
    const auto count = static_cast<size_t>(end - begin), at = static_cast<size_t>(begin);
    const WeightUploader::Part parts[] = {
        {weight->codes() + at * code_bytes, count * code_bytes},
        {weight->scales() + at * scale_bytes, count * scale_bytes}};
    uploader.send(parts, [&](std::byte* codes) {
      std::byte* const scales = codes + parts[0].bytes;
      const auto tasks = static_cast<int>((end - begin + kPanelsPerTask - 1) / kPanelsPerTask);
      uploader.run(tasks, [&](int task) {
        const int64_t first = begin + task * kPanelsPerTask;
        const auto skipped = static_cast<size_t>(first - begin);
        packer.pack(first, std::min(first + kPanelsPerTask, end), codes + skipped * code_bytes,
                    scales + skipped * scale_bytes);
      });
    });
  }
  uploader.wait();
  return weight;
}

std::unique_ptr<CudaVector> load_vector(const WeightSource& source, WeightUploader& uploader) {
  if (source.rows != 1 || source.cols <= 0 || source.cols % block_elements(source.dtype) != 0) {
    throw WeightError(concat("got ", source.rows, " x ", source.cols, " elements, expected 1 x a ",
                             "multiple of ", block_elements(source.dtype), " above 0"),
                      source.name);
  }
  std::vector<std::byte> raw(static_cast<size_t>(row_bytes(source.dtype, source.cols)));
  source.read_rows(0, 1, raw.data());
  std::vector<float> values(static_cast<size_t>(source.cols));
  dequantize_row(source.dtype, raw.data(), values.data(), source.cols);
  auto vector = std::make_unique<CudaVector>(source.cols);
  const WeightUploader::Part part{reinterpret_cast<std::byte*>(vector->data()), vector->bytes()};
  uploader.send({&part, 1},
                [&](std::byte* slice) { std::memcpy(slice, values.data(), part.bytes); });
  uploader.wait();
  return vector;
}

}  // namespace rapshee::cuda
