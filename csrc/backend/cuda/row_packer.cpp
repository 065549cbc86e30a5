#include "backend/cuda/row_packer.h"

#include <cmath>
#include <cstring>

#include "core/dtype.h"
#include "core/error.h"
#include "quant/formats.h"

namespace rapshee::cuda {
namespace {

// Of the 16 columns that two mma pairs of a lane cover, those of lane t: 2t, 2t + 1, 2t + 8, 2t
// + 9.
constexpr int kLanesOfRow = 4;
constexpr int kLaneBytes = 16;  // of a lane in a chunk without planes

// Sixteen columns of a row, `Pair` two neighbours of them: into words of its lanes.
template <class Pair>
void pack_sixteen(const Pair* pairs, std::byte* to) {
  for (int t = 0; t < kLanesOfRow; ++t) {
    const Pair both[2] = {pairs[t], pairs[t + 4]};
    std::memcpy(to + t * kLaneBytes, both, sizeof both);
  }
}

// To halves, in panels or as they were.
class HalfPacker final : public RowPacker {
 public:
  HalfPacker(const WeightSource& source, HalfType half, WeightFormat format)
      : source_(source),
        half_(half),
        same_(source.dtype == dtype_of(half)),
        plain_(format == WeightFormat::kPlain) {}

  void pack(int64_t row, const std::byte* from, const PackedRow& to,
            RowScratch& scratch) const override {
    if (plain_) return convert(row, from, to.lane, scratch.floats);
    const int64_t cols = source_.cols;
    std::vector<uint32_t>& pairs = scratch.pairs;
    pairs.assign(static_cast<size_t>((cols + 15) / 16) * 8, 0);
    convert(row, from, reinterpret_cast<std::byte*>(pairs.data()), scratch.floats);
    for (int64_t i = 0; i < (cols + 15) / 16; ++i) {
      pack_sixteen(pairs.data() + 8 * i,
                   to.lane + i / 2 * chunk_bytes(WeightFormat::kHalf) + i % 2 * 8);
    }
  }

 private:
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
  bool same_, plain_;
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
  std::byte* const lane = to.lane + chunk * chunk_bytes(WeightFormat::kQ8) + in_chunk * 8;
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
    std::memcpy(to.lane + chunk * chunk_bytes(kFormat) + t * kLaneBytes + in_chunk * 4, &word,
                sizeof word);
  }
  std::memcpy(to.scales + chunk * chunk_scale_bytes(kFormat) + in_chunk * kHeader, block, kHeader);
}

using PackBlock = void (*)(const std::byte* block, int64_t index, const PackedRow& to);

// Of the blocks whose scales are fp16 already; null for others.
PackBlock block_packer(DType dtype) {
  switch (dtype) {
    case DType::kQ8_0:
      return pack_q8;
    case DType::kQ4_0:
      return pack_q4<WeightFormat::kQ4Z>;
    case DType::kQ4_1:
      return pack_q4<WeightFormat::kQ4M>;
    default:
      return nullptr;
  }
}

// Bits [from, from + bits) of the codes of lane t's four pairs among 32 columns, as a word of a
// plane begins with them.
uint32_t lane_word(const int8_t* codes, int lowest, int t, int from, int bits) {
  uint32_t word = 0;
  for (int pair = 0; pair < 4; ++pair) {
    const int8_t* two = codes + pair / 2 * 16 + pair % 2 * 8 + 2 * t;
    for (int i = 0; i < 2; ++i) {
      const auto code = static_cast<uint32_t>(two[i] - lowest) >> from & ((1u << bits) - 1);
      word |= code << (bits * pair + 16 * i);
    }
  }
  return word;
}

// Blocks of 32 whose scales (and minimums) are fp16 already.
class BlockPacker final : public RowPacker {
 public:
  BlockPacker(const WeightSource& source, PackBlock pack_block)
      : source_(source), pack_block_(pack_block) {}

  void pack(int64_t, const std::byte* from, const PackedRow& to, RowScratch&) const override {
    for (int64_t block = 0; block < source_.cols / kQuantBlock; ++block) {
      pack_block_(from + block * block_bytes(source_.dtype), block, to);
    }
  }

 private:
  const WeightSource& source_;
  PackBlock pack_block_;
};

// Packs rows of all other low-bit blocks. Their scales, products of two numbers, become fp16.
class CodePacker final : public RowPacker {
 public:
  CodePacker(const WeightSource& source, WeightFormat format)
      : source_(source), format_(format), from_(code_format(source.dtype)) {}

  void pack(int64_t row, const std::byte* from, const PackedRow& to, RowScratch& s) const override {
    const int64_t cols = source_.cols;
    const auto groups = static_cast<size_t>(cols / from_.group);
    s.codes.resize(static_cast<size_t>(cols));
    s.scales.resize(groups);
    s.minimums.resize(groups);
    unpack_row(source_.dtype, from, cols, s.codes.data(), s.scales.data(), s.minimums.data());
    const int64_t in_chunk = info_.chunk_cols / kGroup;
    for (int64_t i = 0; i < cols / kGroup; ++i) {
      std::byte* const chunk = to.lane + i / in_chunk * info_.chunk_bytes;
      pack_codes(s.codes.data() + i * kGroup, static_cast<int>(i % in_chunk), chunk);
    }
    for (size_t i = 0; i < groups; ++i) {
      // A code's zero in planes is its lowest value; else the minimum makes up for it.
      const float minimum = from_.minimums ? s.minimums[i] : s.scales[i] * from_.lowest;
      pack_scale(row, static_cast<int64_t>(i), s.scales[i], minimum, to);
    }
  }

 private:
  static constexpr int kGroup = 32;

  void pack_codes(const int8_t* codes, int group, std::byte* chunk) const {
    for (int t = 0; t < kLanesOfRow; ++t) {
      if (!info_.has_planes()) {
        const uint32_t word = lane_word(codes, from_.lowest, t, 0, 4);
        std::memcpy(chunk + t * kLaneBytes + group * 4, &word, sizeof word);
        continue;
      }
      add_to_plane(codes, group, t, 0, info_.low_bits, chunk);
      if (info_.high_bits > 0) {
        add_to_plane(codes, group, t, info_.low_bits, info_.high_bits, chunk);
      }
    }
  }

  // The plane of the bits from `first` on, which as many words of each lane lie in front of.
  void add_to_plane(const int8_t* codes, int group, int t, int first, int bits,
                    std::byte* chunk) const {
    constexpr int kWordBytes = 4 * kPanelRows * kLanesOfRow;  // of all lanes
    std::byte* const at = chunk + (first + group * bits / 4) * kWordBytes + t * 4;
    uint32_t word;
    std::memcpy(&word, at, sizeof word);
    word |= lane_word(codes, from_.lowest, t, first, bits) << (4 * bits * group % 16);
    std::memcpy(at, &word, sizeof word);
  }

  void pack_scale(int64_t row, int64_t group, float scale, float minimum,
                  const PackedRow& to) const {
    const int64_t in_chunk = info_.chunk_cols / info_.group;
    const int count = info_.minimum ? 2 : 1;
    std::byte* const at = to.scales + group / in_chunk * chunk_scale_bytes(format_) +
                          group % in_chunk * count * int64_t{sizeof(uint16_t)};
    const uint16_t halves[] = {round(row, scale), info_.minimum ? round(row, minimum) : uint16_t{}};
    std::memcpy(at, halves, static_cast<size_t>(count) * sizeof(uint16_t));
  }

  uint16_t round(int64_t row, float value) const {
    const uint16_t bits = f32_to_f16(value);
    if ((bits & 0x7fffu) == 0x7c00u && std::isfinite(value)) {
      throw WeightError(concat("the scale ", value, " of row ", row, " is beyond the range of f16"),
                        source_.name);
    }
    return bits;
  }

  const WeightSource& source_;
  WeightFormat format_;
  CodeFormat from_;
  FormatInfo info_ = format_info(format_);
};

}  // namespace

WeightFormat packed_format(DType dtype, bool plain) {
  switch (dtype) {
    case DType::kQ8_0:
      return WeightFormat::kQ8;
    case DType::kQ4_0:
      return WeightFormat::kQ4Z;
    case DType::kQ4_1:
    case DType::kQ4K:
      return WeightFormat::kQ4M;
    case DType::kQ5_0:
    case DType::kQ5_1:
    case DType::kQ5K:
      return WeightFormat::kQ5M;
    case DType::kQ2K:
      return WeightFormat::kQ2M;
    case DType::kQ3K:
      return WeightFormat::kQ3;
    case DType::kQ6K:
      return WeightFormat::kQ6;
    default:
      return plain ? WeightFormat::kPlain : WeightFormat::kHalf;
  }
}

int64_t packed_row_stride(const WeightView& view) {
  if (view.format == WeightFormat::kPlain) return view.cols * int64_t{sizeof(uint16_t)};
  return kLanesOfRow * (format_info(view.format).has_planes() ? 4 : kLaneBytes);
}

std::unique_ptr<RowPacker> make_row_packer(const WeightSource& source, HalfType half,
                                           WeightFormat format) {
  if (!is_quantized(source.dtype)) return std::make_unique<HalfPacker>(source, half, format);
  if (const PackBlock pack_block = block_packer(source.dtype)) {
    return std::make_unique<BlockPacker>(source, pack_block);
  }
  return std::make_unique<CodePacker>(source, format);
}

}  // namespace rapshee::cuda
