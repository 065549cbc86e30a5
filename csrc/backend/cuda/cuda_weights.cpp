#include "backend/cuda/cuda_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"
#include "quant/formats.h"

namespace rapshee::cuda {
namespace {

// Of the 16 columns that two mma pairs of a lane cover, those of lane t: 2t, 2t + 1, 2t + 8, 2t
// + 9.
constexpr int kLanesOfRow = 4;
constexpr int kLaneBytes = kChunkBytes / (kPanelRows * kLanesOfRow);

WeightFormat format_of(DType dtype, bool plain) {
  switch (dtype) {
    case DType::kQ8_0:
      return WeightFormat::kQ8;
    case DType::kQ4_0:
      return WeightFormat::kQ4Z;
    case DType::kQ4_1:
      return WeightFormat::kQ4M;
    default:
      return plain ? WeightFormat::kPlain : WeightFormat::kHalf;
  }
}

void check_matrix(const WeightSource& source) {
  constexpr int kMultiple = 8;  // 16 bytes of activations
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const auto fail = [&](const auto&... parts) { throw WeightError(concat(parts...), source.name); };
  if (source.cols <= 0 || source.cols % kMultiple != 0 || source.cols > kMost) {
    fail("rows of ", source.cols, " elements: CUDA kernels take multiples of ", kMultiple);
  }
  const WeightFormat format = format_of(source.dtype, false);
  if (is_quantized(source.dtype) && format == WeightFormat::kHalf) {
    fail("the CUDA backend has no ", dtype_name(source.dtype),
         " matrices, only q4_0, q4_1 and q8_0",
         " beside f32, f16 and bf16; the CPU has them (--device cpu)");
  }
  if (source.cols % block_elements(source.dtype) != 0) {
    fail("rows of ", source.cols, " elements do not divide into ", dtype_name(source.dtype),
         " blocks");
  }
  if (source.rows <= 0 || source.rows > kMost) {
    fail(source.rows, " rows, expected 1 to ", kMost);
  }
}

// Where one row goes: `lane` to the first of its four lanes of the panel's first chunk, `scales` to
// its scales there.
struct PackedRow {
  std::byte* lane;
  std::byte* scales;
};

// Sixteen columns of a row, `Pair` two neighbours of them: into words of its lanes.
template <class Pair>
void pack_sixteen(const Pair* pairs, std::byte* to) {
  for (int t = 0; t < kLanesOfRow; ++t) {
    const Pair both[2] = {pairs[t], pairs[t + 4]};
    std::memcpy(to + t * kLaneBytes, both, sizeof both);
  }
}

class HalfPacker {
 public:
  HalfPacker(const WeightSource& source, HalfType half)
      : source_(source), half_(half), same_(source.dtype == dtype_of(half)) {}

  void pack(int64_t row, const std::byte* from, const PackedRow& to, std::vector<float>& floats,
            std::vector<uint32_t>& pairs) const {
    const int64_t cols = source_.cols;
    pairs.assign(static_cast<size_t>((cols + 15) / 16) * 8, 0);
    convert(row, from, reinterpret_cast<std::byte*>(pairs.data()), floats);
    for (int64_t i = 0; i < (cols + 15) / 16; ++i) {
      pack_sixteen(pairs.data() + 8 * i, to.lane + i / 2 * kChunkBytes + i % 2 * 8);
    }
  }

  // The row's halves, in its order.
  void convert(int64_t row, const std::byte* from, std::byte* halves,
               std::vector<float>& floats) const {
    const int64_t cols = source_.cols;
    if (same_) {
      std::memcpy(halves, from, static_cast<size_t>(cols) * sizeof(uint16_t));
    } else {
      floats.resize(static_cast<size_t>(cols));
      dequantize_row(source_.dtype, from, floats.data(), cols);
      for (int64_t c = 0; c < cols; ++c) {
        const uint16_t bits = round(row, c, floats[static_cast<size_t>(c)]);
        std::memcpy(halves + c * int64_t{sizeof bits}, &bits, sizeof bits);
      }
    }
  }

 private:
  static DType dtype_of(HalfType half) {
    return half == HalfType::kBF16 ? DType::kBF16 : DType::kF16;
  }

  uint16_t round(int64_t row, int64_t col, float value) const {
    const bool bf16 = half_ == HalfType::kBF16;
    const uint16_t bits = bf16 ? f32_to_bf16(value) : f32_to_f16(value);
    const bool overflow = (bits & 0x7fffu) == (bf16 ? 0x7f80u : 0x7c00u);
    if (overflow && std::isfinite(value)) {
      throw WeightError(
          concat("the value ", value, " of row ", row, ", column ", col, " is beyond the range of ",
                 dtype_name(dtype_of(half_)), bf16 ? "" : "; use bf16"),
          source_.name);
    }
    return bits;
  }

  const WeightSource& source_;
  HalfType half_;
  bool same_;
};

// Two neighbours of a row of 8-bit codes.
struct BytePair {
  std::byte first, second;
};

// A block of 32 columns: its codes into the row's lanes, its scale (and minimum) where they belong.
void pack_q8(const std::byte* block, int64_t index, const PackedRow& to) {
  constexpr int kBlocks = 2;  // of a chunk
  const int64_t chunk = index / kBlocks, in_chunk = index % kBlocks;
  BytePair pairs[kQuantBlock / 2];
  std::memcpy(pairs, block + sizeof(uint16_t), sizeof pairs);
  std::byte* const lane = to.lane + chunk * kChunkBytes + in_chunk * 8;
  pack_sixteen(pairs, lane);
  pack_sixteen(pairs + 8, lane + 4);
  std::memcpy(to.scales + chunk * chunk_scale_bytes(WeightFormat::kQ8) + in_chunk * 2, block,
              sizeof(uint16_t));
}

template <WeightFormat kFormat>
void pack_q4(const std::byte* block, int64_t index, const PackedRow& to) {
  constexpr int kBlocks = 4;  // of a chunk
  constexpr int kHeader = kFormat == WeightFormat::kQ4M ? 4 : 2;
  const int64_t chunk = index / kBlocks, in_chunk = index % kBlocks;
  uint8_t q[kQuantBlock / 2];  // code i in the low half, i + 16 in the high one
  std::memcpy(q, block + kHeader, sizeof q);
  for (int t = 0; t < kLanesOfRow; ++t) {
    const uint32_t first = static_cast<uint32_t>(q[2 * t] | q[2 * t + 8] << 8);
    const uint32_t second = static_cast<uint32_t>(q[2 * t + 1] | q[2 * t + 9] << 8);
    // Nibbles 0 to 3: pairs of the low halves, then of the high ones.
    const auto spread = [](uint32_t two) {
      return (two & 0xfu) | (two >> 4 & 0xf0u) | (two << 4 & 0xf00u) | (two & 0xf000u);
    };
    const uint32_t word = spread(first) | spread(second) << 16;
    std::memcpy(to.lane + chunk * kChunkBytes + t * kLaneBytes + in_chunk * 4, &word, sizeof word);
  }
  std::memcpy(to.scales + chunk * chunk_scale_bytes(kFormat) + in_chunk * kHeader, block, kHeader);
}

using PackBlock = void (*)(const std::byte* block, int64_t index, const PackedRow& to);

PackBlock block_packer(WeightFormat format) {
  switch (format) {
    case WeightFormat::kQ8:
      return pack_q8;
    case WeightFormat::kQ4Z:
      return pack_q4<WeightFormat::kQ4Z>;
    case WeightFormat::kQ4M:
      return pack_q4<WeightFormat::kQ4M>;
    default:
      return nullptr;
  }
}

// Packs panels of one matrix.
class Packer {
 public:
  Packer(const WeightSource& source, HalfType half, const WeightView& view)
      : source_(source), view_(view), half_packer_(source, half) {}

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
    const PackBlock pack_block = block_packer(view_.format);
    std::vector<float> floats;
    std::vector<uint32_t> pairs;
    for (int64_t row = first; row < last; ++row) {
      const auto panel = static_cast<size_t>((row - first) / kPanelRows);
      const int64_t g = row % kPanelRows;
      const PackedRow to{
          codes + panel * panel_code_bytes() + g * kLanesOfRow * kLaneBytes,
          scales + panel * panel_scale_bytes() + g * chunk_scale_bytes(view_.format) / kPanelRows};
      const std::byte* const from = raw.data() + static_cast<size_t>(row - first) * row_size;
      if (view_.format == WeightFormat::kPlain) {
        half_packer_.convert(row, from, codes + (row - first) * view_.cols * 2, floats);
        continue;
      }
      if (pack_block == nullptr) {
        half_packer_.pack(row, from, to, floats, pairs);
        continue;
      }
      for (int64_t block = 0; block < source_.cols / kQuantBlock; ++block) {
        pack_block(from + block * block_bytes(source_.dtype), block, to);
      }
    }
  }

 private:
  const WeightSource& source_;
  const WeightView& view_;
  HalfPacker half_packer_;
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
      std::make_unique<CudaWeight>(format_of(source.dtype, plain), source.rows, source.cols);
  const WeightView& view = weight->view();
  if (source.random_key) {
    fill_random(view, half, *source.random_key, uploader.stream());
    uploader.wait();
    return weight;
  }
  const Packer packer(source, half, view);
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
