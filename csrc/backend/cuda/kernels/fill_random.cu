// Random weights made where they are used: element (row, col) is a function of the seed and its
// index in the matrix, the one of model/random_weights.h for halves. Codes of low-bit formats are
// uniform, their scales give the same variance, 1 / cols; those in planes are keyed by their place
// there.
//
// Grid: one thread for each 16 bytes of codes. Bytes: the weight, written once; bound by the
// integer arithmetic of the generator. For benchmarks without a checkpoint.
#include "backend/cuda/kernels/packed_weight.cuh"

namespace rapshee::cuda {
namespace {

constexpr int kThreads = 256;

struct FillParams {
  WeightView weight;
  uint64_t seed;
  int64_t slots;  // of 16 bytes of codes
};

RAPSHEE_DEVICE uint64_t counter_bits(uint64_t key, uint64_t counter) {
  uint64_t z = key + counter * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// 16 bytes of planes, all of whose bits are random; and where they begin a row of scales, those.
RAPSHEE_DEVICE void fill_planes(const FillParams& params, int64_t index) {
  const WeightView& w = params.weight;
  const uint64_t low = counter_bits(params.seed, static_cast<uint64_t>(2 * index));
  const uint64_t high = counter_bits(params.seed, static_cast<uint64_t>(2 * index + 1));
  const dev::Ptr<std::byte> codes(const_cast<std::byte*>(w.codes));
  dev::store16(codes + index * int64_t{sizeof(dev::Vec16)},
               dev::Vec16{{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                           static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)}});
  const FormatInfo info = format_info(w.format);
  const int slots = info.chunk_bytes / static_cast<int>(sizeof(dev::Vec16));
  const auto in_chunk = static_cast<int>(index % slots);
  if (in_chunk >= kPanelRows) return;
  const int64_t chunk_of_all = index / slots, row = chunk_of_all / w.num_chunks() * kPanelRows;
  const bool exists = row + in_chunk < w.rows;
  const auto codes_of = static_cast<float>(1 << (info.low_bits + info.high_bits));
  const float scale =
      dev::divide(dev::sqrt(dev::divide(12.0f, static_cast<float>(w.cols))), codes_of);
  const int count = chunk_scales(w.format);
  const dev::Ptr<dev::F16> to(const_cast<dev::F16*>(reinterpret_cast<const dev::F16*>(w.scales)));
  for (int i = 0; i < count; ++i) {
    const bool minimum = info.minimum && i % 2 == 1;
    const float value = minimum ? -0.5f * (codes_of - 1.0f) * scale : scale;
    to[(chunk_of_all * kPanelRows + in_chunk) * count + i] =
        dev::from_float<dev::F16>(exists ? value : 0.0f);
  }
}

template <class T, bool kPlain>
RAPSHEE_KERNEL(kThreads, 1)
fill_kernel(RAPSHEE_PARAM FillParams params) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const WeightView& w = params.weight;
  const int64_t index = int64_t{dev::block().x} * kThreads + dev::thread();
  if (index >= params.slots) return;
  if constexpr (!kPlain) {
    if (format_info(w.format).has_planes()) return fill_planes(params, index);
  }
  const auto slot = packed::slot_of<kPlain>(w, index);
  const auto bits = [&](int64_t col) {
    const bool exists = slot.row < w.rows && col < w.cols;
    return exists ? counter_bits(params.seed, static_cast<uint64_t>(slot.row * w.cols + col)) : 0;
  };
  const float deviation = dev::sqrt(dev::divide(1.0f, static_cast<float>(w.cols)));
  dev::Vec16 codes{{0, 0, 0, 0}};
  if (kPlain || w.format == WeightFormat::kHalf) {
    const float most = dev::sqrt(dev::divide(3.0f, static_cast<float>(w.cols)));
    const auto value = [&](int64_t col) {
      if (slot.row >= w.rows || col >= w.cols) return 0.0f;
      return most * (static_cast<float>(bits(col) >> 40) * 0x1p-23f - 1.0f);
    };
    RAPSHEE_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      const int64_t col = slot.column(pair);
      codes.word[pair] = dev::pack2<T>(value(col), value(col + 1));
    }
  } else if (w.format == WeightFormat::kQ8) {
    RAPSHEE_UNROLL
    for (int pair = 0; pair < 8; ++pair) {
      const int64_t col = slot.column(pair);
      const auto two = static_cast<uint32_t>(bits(col) >> 56 | bits(col + 1) >> 56 << 8);
      codes.word[pair / 2] |= two << (pair % 2 * 16);
    }
  } else {
    RAPSHEE_UNROLL
    for (int pair = 0; pair < 16; ++pair) {
      const int64_t col = slot.column(pair);
      const auto two = static_cast<uint32_t>(bits(col) >> 60 | bits(col + 1) >> 60 << 16);
      codes.word[pair / 4] |= two << (pair % 4 * 4);
    }
  }
  dev::store16(
      dev::Ptr<std::byte>(const_cast<std::byte*>(w.codes)) + index * int64_t{sizeof(dev::Vec16)},
      codes);
  if constexpr (!kPlain) {
    // Standard deviation of the codes: of 8 bits 2^8 / sqrt(12), of 4 bits 2^4 / sqrt(12).
    const int scales = chunk_scale_bytes(w.format) / kPanelRows / 2;
    if (slot.t != 0 || scales == 0) return;
    const float scale =
        deviation * (w.format == WeightFormat::kQ8 ? 3.46410162f / 256.0f : 3.46410162f / 16.0f);
    const dev::Ptr<dev::F16> to(const_cast<dev::F16*>(reinterpret_cast<const dev::F16*>(
        w.scales + (index / 32 * kPanelRows + slot.row % kPanelRows) * scales * 2)));
    for (int i = 0; i < scales; ++i) {
      const bool minimum = w.format == WeightFormat::kQ4M && i % 2 == 1;
      to[i] =
          dev::from_float<dev::F16>(slot.row < w.rows ? (minimum ? -7.5f * scale : scale) : 0.0f);
    }
  }
}

}  // namespace

void fill_random(const WeightView& weight, HalfType half, uint64_t seed, Stream stream) {
  const auto slots = static_cast<int64_t>(weight.code_bytes() / sizeof(dev::Vec16));
  if (slots == 0) return;
  const dev::Launch config{.grid = {static_cast<unsigned>((slots + kThreads - 1) / kThreads)},
                           .threads = kThreads,
                           .stream = stream};
  const FillParams params{weight, seed, slots};
  const bool plain = weight.format == WeightFormat::kPlain;
  if (half == HalfType::kBF16) {
    dev::launch(plain ? fill_kernel<dev::Bf16, true> : fill_kernel<dev::Bf16, false>, config,
                params);
  } else {
    dev::launch(plain ? fill_kernel<dev::F16, true> : fill_kernel<dev::F16, false>, config, params);
  }
}

}  // namespace rapshee::cuda
