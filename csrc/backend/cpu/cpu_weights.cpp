#include "backend/cpu/cpu_weights.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "quant/formats.h"

namespace rapshee::cpu {
namespace {

// Code bytes, scale bytes and minimum bytes that one group of 32 takes in a panel.
struct GroupBytes {
  size_t codes, scales, minimums;
};

GroupBytes group_bytes(PanelFormat format) {
  constexpr size_t kHalfs = kLanes * sizeof(uint16_t);
  switch (format) {
    case PanelFormat::kQ4M:
      return {kLanes * kGroup / 2, kHalfs, kHalfs};
    case PanelFormat::kQ4Z:
      return {kLanes * kGroup / 2, kHalfs, 0};
    default:
      return {kLanes * kGroup, kHalfs, 0};
  }
}

size_t panel_bytes(PanelFormat format, int64_t cols) {
  const auto k = static_cast<size_t>(cols);
  if (format == PanelFormat::kF32) return k * kLanes * sizeof(float);
  if (format == PanelFormat::kBF16) return (k + 1) / 2 * 2 * kLanes * sizeof(uint16_t);
  const GroupBytes group = group_bytes(format);
  const size_t bytes = k / kGroup * (group.codes + group.scales + group.minimums);
  return static_cast<size_t>(round_up(static_cast<int64_t>(bytes), 64));
}

uint16_t load_u16(const std::byte* p) {
  uint16_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// One row of a low-bit matrix into its column of a panel.
void pack_low_bit_row(DType dtype, PanelFormat format, int64_t cols, const std::byte* row,
                      int column, std::byte* panel) {
  const GroupBytes bytes = group_bytes(format);
  const int64_t groups = cols / kGroup;
  auto* codes = reinterpret_cast<uint8_t*>(panel);
  auto* scales = reinterpret_cast<uint16_t*>(panel + static_cast<size_t>(groups) * bytes.codes);
  uint16_t* minimums = scales + groups * kLanes;
  const size_t block = block_bytes(dtype);
  const size_t header = dtype == DType::kQ4_1 ? 2 * sizeof(uint16_t) : sizeof(uint16_t);
  for (int64_t g = 0; g < groups; ++g) {
    const std::byte* from = row + static_cast<size_t>(g) * block;
    scales[g * kLanes + column] = load_u16(from);
    if (bytes.minimums) minimums[g * kLanes + column] = load_u16(from + sizeof(uint16_t));
    uint8_t* to = codes + static_cast<size_t>(g) * bytes.codes;
    // 4-bit blocks hold k and k + 16 in one byte, as the panel does.
    const int count = dtype == DType::kQ8_0 ? kGroup : kGroup / 2;
    for (int k = 0; k < count; ++k) {
      to[k / 4 * 64 + 4 * column + k % 4] =
          static_cast<uint8_t>(from[header + static_cast<size_t>(k)]);
    }
  }
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

void check_source(const WeightSource& source) {
  const bool packed = source.dtype <= DType::kQ4_1 || source.dtype == DType::kQ8_0;
  if (source.rows > 1 && !packed) {
    throw WeightError(concat("matrices of ", dtype_name(source.dtype), " are not supported yet"),
                      source.name);
  }
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
  switch (dtype) {
    case DType::kQ4_0:
      layout.format = PanelFormat::kQ4Z;
      break;
    case DType::kQ4_1:
      layout.format = PanelFormat::kQ4M;
      break;
    case DType::kQ8_0:
      layout.format = PanelFormat::kQ8;
      break;
    default: {
      const bool wide = compute == ComputeType::kFloat32 ||
                        (compute == ComputeType::kAuto && dtype == DType::kF32);
      layout.format = wide ? PanelFormat::kF32 : PanelFormat::kBF16;
    }
  }
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
    source.read_rows(begin, end, raw.data());
    for (int64_t r = begin; r < end; ++r) {
      const std::byte* from = raw.data() + static_cast<size_t>(r - begin) * row_size;
      std::byte* panel = panels + static_cast<size_t>(r / kLanes) * layout.panel_bytes;
      const int column = static_cast<int>(r % kLanes);
      if (floats) {
        dequantize_row(source.dtype, from, row.data(), source.cols);
        pack_float_row(layout.format, source.cols, row.data(), column, panel);
      } else {
        pack_low_bit_row(source.dtype, layout.format, source.cols, from, column, panel);
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
  const GroupBytes bytes = group_bytes(layout_.format);
  const int64_t groups = cols / kGroup;
  const auto* scales =
      reinterpret_cast<const uint16_t*>(from + static_cast<size_t>(groups) * bytes.codes);
  const uint16_t* minimums = scales + groups * kLanes;
  const bool q8 = layout_.format == PanelFormat::kQ8;
  for (int64_t g = 0; g < groups; ++g) {
    const auto* codes =
        reinterpret_cast<const uint8_t*>(from) + static_cast<size_t>(g) * bytes.codes;
    const float d = f16_to_f32(scales[g * kLanes + column]);
    const float m = bytes.minimums ? f16_to_f32(minimums[g * kLanes + column]) : 0.0f;
    for (int k = 0; k < kGroup; ++k) {
      const int low = q8 ? k : k % 16;
      const uint8_t byte = codes[low / 4 * 64 + 4 * column + low % 4];
      const int nibble = k < 16 ? byte & 15 : byte >> 4;
      const int code =
          q8 ? static_cast<int8_t>(byte) : nibble - (layout_.format == PanelFormat::kQ4Z ? 8 : 0);
      out[g * kGroup + k] = d * static_cast<float>(code) + m;
    }
  }
}

}  // namespace rapshee::cpu
