#include "backend/cpu/cpu_weights.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/error.h"
#include "quant/formats.h"

namespace rapshee::cpu {
namespace {

size_t panel_bytes(PanelFormat format, int64_t cols) {
  const auto k = static_cast<size_t>(cols);
  if (format == PanelFormat::kF32) return k * kLanes * sizeof(float);
  if (format == PanelFormat::kBF16) return (k + 1) / 2 * 2 * kLanes * sizeof(uint16_t);
  return static_cast<size_t>(round_up(low_bit_format(format).bytes(cols), 64));
}

uint16_t load_u16(const std::byte* p) {
  uint16_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

constexpr uint32_t in_each_byte(uint32_t x) { return x * 0x01010101u; }

// The parts of one row of a low-bit matrix.
struct LowBitRow {
  explicit LowBitRow(int64_t cols)
      : codes(static_cast<size_t>(cols)),
        scales(static_cast<size_t>(cols) / kHalf),
        minimums(scales.size()) {}

  std::vector<int8_t> codes;
  std::vector<float> scales, minimums;
};

// The 32 codes of one column of a group, as bytes, into its planes, which are zero there.
void put_codes(const int8_t* codes, int bits, int column, std::byte* group) {
  for (int j = 0; j < kGroup / 4; ++j) {
    uint32_t four;
    std::memcpy(&four, codes + 4 * j, sizeof four);
    std::byte* plane = group + 4 * column;
    const auto add = [](std::byte* at, uint32_t more) {
      uint32_t word;
      std::memcpy(&word, at, sizeof word);
      word |= more;
      std::memcpy(at, &word, sizeof word);
    };
    if (bits == 8) add(plane + 64 * j, four);
    for (int w = 4; bits < 8 && w > 0; w /= 2) {
      if (!(bits & w)) continue;
      const uint32_t low = in_each_byte((1u << w) - 1);
      add(plane + j % w * 64, (four & low) << (w * (j / w)));
      four = (four & ~low) >> w;
      plane += w * 64;
    }
  }
}

// The reverse.
void get_codes(const std::byte* group, int bits, int column, int8_t* codes) {
  for (int j = 0; j < kGroup / 4; ++j) {
    const std::byte* plane = group + 4 * column;
    uint32_t four = 0;
    if (bits == 8) std::memcpy(&four, plane + 64 * j, sizeof four);
    for (int w = 4, done = 0; bits < 8 && w > 0; w /= 2) {
      if (!(bits & w)) continue;
      uint32_t word;
      std::memcpy(&word, plane + j % w * 64, sizeof word);
      four |= (word >> (w * (j / w)) & in_each_byte((1u << w) - 1)) << done;
      done += w;
      plane += w * 64;
    }
    std::memcpy(codes + 4 * j, &four, sizeof four);
  }
}

// Writes element `column` of each of `n` vectors of 16.
template <class T, class Get>
void put_column(std::byte* vectors, int64_t n, int column, Get get) {
  auto* to = reinterpret_cast<T*>(vectors) + column;
  for (int64_t i = 0; i < n; ++i) to[i * kLanes] = get(i);
}

// The scales of a row whose blocks have 32 elements, which begin with them, and its minimums.
void put_scales(const LowBitFormat& low, DType dtype, int64_t cols, const std::byte* row,
                int column, std::byte* scales) {
  const int64_t n = cols / kGroup, size = block_bytes(dtype);
  put_column<uint16_t>(scales, n, column, [&](int64_t i) { return load_u16(row + i * size); });
  if (!low.minimums) return;
  put_column<uint16_t>(scales + low.scale_bytes(cols), n, column,
                       [&](int64_t i) { return load_u16(row + i * size + sizeof(uint16_t)); });
}

// The same of a row of super-blocks.
void put_super_scales(const LowBitFormat& low, DType dtype, int64_t cols, const std::byte* row,
                      int column, std::byte* scales) {
  const int64_t groups = kSuper / low.group;
  std::byte* minimums = scales + low.scale_bytes(cols);
  const int64_t supers = cols / low.group * kLanes;  // where those of super-blocks begin
  for (int64_t b = 0; b < cols / kSuper; ++b, row += block_bytes(dtype)) {
    const SuperScales block = super_scales(dtype, row);
    const int64_t at = b * groups * kLanes, super_at = supers + b * kLanes * 2;
    put_column<int8_t>(scales + at, groups, column, [&](size_t g) { return block.s[g]; });
    put_column<uint16_t>(scales + super_at, 1, column, [&](int64_t) { return block.d; });
    if (!low.minimums) continue;
    const auto negative = static_cast<uint16_t>(block.m ^ 0x8000u);
    put_column<int8_t>(minimums + at, groups, column, [&](size_t g) { return block.t[g]; });
    put_column<uint16_t>(minimums + super_at, 1, column, [&](int64_t) { return negative; });
  }
}

// One row of a low-bit matrix into its column of a panel.
void pack_low_bit_row(DType dtype, PanelFormat format, int64_t cols, const std::byte* row,
                      int column, LowBitRow& parts, std::byte* panel) {
  const LowBitFormat low = low_bit_format(format);
  unpack_row(dtype, row, cols, parts.codes.data(), parts.scales.data(), parts.minimums.data());
  for (int8_t& code : parts.codes) code = static_cast<int8_t>(code + low.zero);
  for (int64_t k = 0; k < cols; k += kGroup) {
    put_codes(parts.codes.data() + k, low.bits, column, panel + low.code_bytes(k));
  }
  const auto put = low.super_blocks ? put_super_scales : put_scales;
  put(low, dtype, cols, row, column, panel + low.code_bytes(cols));
}

// Number i of a column of scales or minimums.
float get_scale(const LowBitFormat& low, int64_t cols, const std::byte* scales, int64_t i,
                int column) {
  const auto half = [&](const std::byte* vectors, int64_t at) {
    return f16_to_f32(load_u16(vectors + (at * kLanes + column) * 2));
  };
  if (!low.super_blocks) return half(scales, i);
  const auto integer = static_cast<int8_t>(scales[i * kLanes + column]);
  const std::byte* supers = scales + cols / low.group * kLanes;
  return half(supers, i / (kSuper / low.group)) * static_cast<float>(integer);
}

void pack_float_row(PanelFormat format, int64_t cols, const float* row, int column,
                    std::byte* panel) {
  if (format == PanelFormat::kF32) {
    auto* to = reinterpret_cast<float*>(panel);
    for (int64_t k = 0; k < cols; ++k) to[k * kLanes + column] = row[k];
    return;
  }
  auto* to = reinterpret_cast<uint16_t*>(panel);
  for (int64_t k = 0; k < cols; ++k) {
    to[k / 2 * 2 * kLanes + 2 * column + k % 2] = f32_to_bf16(row[k]);
  }
}

PanelFormat panel_format(DType dtype, ComputeType compute) {
  switch (dtype) {
    case DType::kQ2K:
      return PanelFormat::kQ2K;
    case DType::kQ3K:
      return PanelFormat::kQ3K;
    case DType::kQ4_0:
      return PanelFormat::kQ4Z;
    case DType::kQ4_1:
      return PanelFormat::kQ4M;
    case DType::kQ4K:
      return PanelFormat::kQ4K;
    case DType::kQ5_0:
      return PanelFormat::kQ5Z;
    case DType::kQ5_1:
      return PanelFormat::kQ5M;
    case DType::kQ5K:
      return PanelFormat::kQ5K;
    case DType::kQ6K:
      return PanelFormat::kQ6K;
    case DType::kQ8_0:
      return PanelFormat::kQ8;
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
    case DType::kI8:
      break;
  }
  const bool wide =
      compute == ComputeType::kFloat32 || (compute == ComputeType::kAuto && dtype == DType::kF32);
  return wide ? PanelFormat::kF32 : PanelFormat::kBF16;
}

void check_source(const WeightSource& source) {
  if (source.cols % block_elements(source.dtype) != 0) {
    throw WeightError("rows of " + std::to_string(source.cols) + " elements do not divide into " +
                          std::string(dtype_name(source.dtype)) + " blocks",
                      source.name);
  }
}

}  // namespace

std::byte* WeightArena::allocate(size_t bytes) {
  if (slabs_.empty() || slabs_.back().size() - used_ < bytes) {
    slabs_.emplace_back(std::max(bytes, kSlabBytes));
    used_ = 0;
  }
  std::byte* at = slabs_.back().data() + used_;
  used_ += static_cast<size_t>(round_up(static_cast<int64_t>(bytes), 64));
  used_ = std::min(used_, slabs_.back().size());
  return at;
}

PanelLayout panel_layout(DType dtype, ComputeType compute, int64_t rows, int64_t cols) {
  PanelLayout layout;
  layout.rows = rows;
  layout.cols = cols;
  layout.format = panel_format(dtype, compute);
  layout.panel_bytes = panel_bytes(layout.format, cols);
  return layout;
}

std::unique_ptr<PanelWeight> pack_matrix(const WeightSource& source, ComputeType compute,
                                         WeightArena& arena, ThreadPool& pool, int threads) {
  check_source(source);
  const PanelLayout layout = panel_layout(source.dtype, compute, source.rows, source.cols);
  std::byte* panels = arena.allocate(layout.bytes());
  const size_t row_size = row_bytes(source.dtype, source.cols);
  const bool floats = layout.format == PanelFormat::kF32 || layout.format == PanelFormat::kBF16;
  // One task a panel would read a few kilobytes at a time; 8 panels make reads of 40 KB and more.
  constexpr int64_t kPanelsPerTask = 8;
  const auto tasks = static_cast<int>(ceil_div(layout.num_panels(), kPanelsPerTask));
  pool.run(tasks, threads, [&](int task, int) {
    const int64_t begin = task * kPanelsPerTask * kLanes;
    const int64_t end = std::min(source.rows, begin + kPanelsPerTask * kLanes);
    std::vector<std::byte> raw(static_cast<size_t>(end - begin) * row_size);
    std::vector<float> row(floats ? static_cast<size_t>(source.cols) : 0);
    LowBitRow parts(floats ? 0 : source.cols);
    source.read_rows(begin, end, raw.data());
    for (int64_t r = begin; r < end; ++r) {
      const std::byte* from = raw.data() + static_cast<size_t>(r - begin) * row_size;
      std::byte* panel = panels + static_cast<size_t>(r / kLanes) * layout.panel_bytes;
      const int column = static_cast<int>(r % kLanes);
      if (floats) {
        dequantize_row(source.dtype, from, row.data(), source.cols);
        pack_float_row(layout.format, source.cols, row.data(), column, panel);
      } else {
        pack_low_bit_row(source.dtype, layout.format, source.cols, from, column, parts, panel);
      }
    }
  });
  return std::make_unique<PanelWeight>(layout, panels);
}

std::unique_ptr<VectorWeight> read_vector(const WeightSource& source) {
  check_source(source);
  std::vector<std::byte> raw(row_bytes(source.dtype, source.cols));
  source.read_rows(0, 1, raw.data());
  std::vector<float> values(static_cast<size_t>(source.cols));
  dequantize_row(source.dtype, raw.data(), values.data(), source.cols);
  return std::make_unique<VectorWeight>(std::move(values));
}

void PanelWeight::copy_row(int64_t row, float* out) const {
  const std::byte* from = panel(row / kLanes);
  const auto column = static_cast<int>(row % kLanes);
  const int64_t cols = layout_.cols;
  if (layout_.format == PanelFormat::kF32) {
    const auto* w = reinterpret_cast<const float*>(from);
    for (int64_t k = 0; k < cols; ++k) out[k] = w[k * kLanes + column];
    return;
  }
  if (layout_.format == PanelFormat::kBF16) {
    const auto* w = reinterpret_cast<const uint16_t*>(from);
    for (int64_t k = 0; k < cols; ++k) {
      out[k] = bf16_to_f32(w[k / 2 * 2 * kLanes + 2 * column + k % 2]);
    }
    return;
  }
  copy_low_bit_row(from, column, out);
}

void PanelWeight::copy_low_bit_row(const std::byte* panel, int column, float* out) const {
  const LowBitFormat low = low_bit_format(layout_.format);
  const int64_t cols = layout_.cols;
  const std::byte* scales = panel + low.code_bytes(cols);
  const std::byte* minimums = scales + low.scale_bytes(cols);
  std::array<int8_t, kGroup> codes;
  for (int64_t k = 0; k < cols; k += low.group) {
    const auto first = static_cast<size_t>(k % kGroup);
    if (first == 0) get_codes(panel + low.code_bytes(k), low.bits, column, codes.data());
    const float d = get_scale(low, cols, scales, k / low.group, column);
    const float m = low.minimums ? get_scale(low, cols, minimums, k / low.group, column) : 0.0f;
    for (size_t i = 0; i < static_cast<size_t>(low.group); ++i) {
      out[k + static_cast<int64_t>(i)] = d * static_cast<float>(codes[first + i] - low.zero) + m;
    }
  }
}

}  // namespace rapshee::cpu
