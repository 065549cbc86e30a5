// Rows of a packed table as float, times a scale: the residual stream's beginning.
//
// Grid: (row, parts of a row); a thread unpacks what one lane of the packing has of a chunk: 8, 16
// or 32 elements. Bytes: the row's codes and scales once, 4 bytes an element written. A step reads
// a few rows of a table; the launch costs more than the bytes. Every element is computed alone.
#include "backend/cuda/kernels/packed_weight.cuh"

namespace rapshee::cuda {
namespace {

constexpr int kThreads = 128;

// The same of codes in planes.
RAPSHEE_DEVICE void embed_planes(const EmbedArgs& args, const FormatInfo& info, int64_t row,
                                 int64_t chunk, int t, const dev::Ptr<float>& x) {
  const WeightView& w = args.table;
  const packed::PlaneLane lane(w, info, row, chunk, t);
  const packed::Slot slot{row, chunk * info.chunk_cols, t};
  const dev::Ptr<const dev::F16> scales = packed::scales_at(w, row, chunk);
  for (int pair = 0; pair < info.chunk_cols / 8; ++pair) {
    const int64_t col = slot.column(pair);
    if (col >= w.cols) return;
    const int group = pair * 8 / info.group;
    const float scale = dev::to_float(scales[info.minimum ? 2 * group : group]);
    const float minimum = info.minimum ? dev::to_float(scales[2 * group + 1]) : 0.0f;
    for (int i = 0; i < 2; ++i) {
      const auto code = static_cast<float>(lane.code(pair, i) - info.zero);
      x[col + i] = dev::fma(scale, code, minimum) * args.scale;
    }
  }
}

template <class T, bool kPlain>
RAPSHEE_KERNEL(kThreads, 1)
embed_kernel(RAPSHEE_PARAM EmbedArgs args) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const WeightView& w = args.table;
  const int64_t chunk = (int64_t{dev::block().y} * kThreads + dev::thread()) / 4;
  const int t = dev::thread() % 4;
  if (chunk >= w.num_chunks()) return;
  // The last chunk of a plain row ends with the row.
  const int64_t plain_slot = 4 * chunk + t, plain_slots = w.cols / packed::kPlainSlotCols;
  if (kPlain && plain_slot >= plain_slots) return;
  const int64_t r = dev::block().x;
  const int64_t row = dev::Ptr<const int32_t>(args.token_ids)[r];
  const dev::Ptr<float> x = dev::Ptr<float>(args.x) + r * w.cols;
  if constexpr (!kPlain) {
    if (const FormatInfo info = format_info(w.format); info.has_planes()) {
      return embed_planes(args, info, row, chunk, t, x);
    }
  }
  const int64_t index =
      kPlain ? row * plain_slots + plain_slot : packed::slot_index(w, row, chunk, t);
  const auto slot = packed::slot_of<kPlain>(w, index);
  const dev::Vec16 codes =
      dev::load16(dev::Ptr<const std::byte>(w.codes) + index * int64_t{sizeof(dev::Vec16)});
  const auto store = [&](int pair, float first, float second) {
    const int64_t col = slot.column(pair);
    if (col < w.cols) x[col] = first * args.scale;
    if (col + 1 < w.cols) x[col + 1] = second * args.scale;
  };
  if (kPlain || w.format == WeightFormat::kHalf) {
    RAPSHEE_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      const dev::Float2 v = dev::unpack2<T>(codes.word[pair]);
      store(pair, v.x, v.y);
    }
    return;
  }
  const dev::Ptr<const dev::F16> scales = packed::scales_at(w, row, chunk);
  if (w.format == WeightFormat::kQ8) {
    RAPSHEE_UNROLL
    for (int pair = 0; pair < 8; ++pair) {
      const uint32_t bytes = codes.word[pair / 2] >> (pair % 2 * 16);
      const float scale = dev::to_float(scales[pair / 4]);
      store(pair, scale * static_cast<float>(static_cast<int8_t>(bytes & 0xff)),
            scale * static_cast<float>(static_cast<int8_t>(bytes >> 8 & 0xff)));
    }
    return;
  }
  const bool has_minimum = w.format == WeightFormat::kQ4M;
  RAPSHEE_UNROLL
  for (int group = 0; group < 4; ++group) {
    const float scale = dev::to_float(scales[has_minimum ? 2 * group : group]);
    const float minimum = has_minimum ? dev::to_float(scales[2 * group + 1]) : 0.0f;
    const int zero = has_minimum ? 0 : 8;
    RAPSHEE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int first = static_cast<int>(codes.word[group] >> (4 * j) & 15) - zero;
      const int second = static_cast<int>(codes.word[group] >> (4 * j + 16) & 15) - zero;
      store(4 * group + j, dev::fma(scale, static_cast<float>(first), minimum),
            dev::fma(scale, static_cast<float>(second), minimum));
    }
  }
}

}  // namespace

void embed(const EmbedArgs& args, Stream stream) {
  if (args.rows == 0) return;
  constexpr int64_t kChunksPerBlock = kThreads / 4;
  const dev::Launch config{
      .grid = {static_cast<unsigned>(args.rows),
               static_cast<unsigned>((args.table.num_chunks() + kChunksPerBlock - 1) /
                                     kChunksPerBlock)},
      .threads = kThreads,
      .stream = stream};
  const bool plain = args.table.format == WeightFormat::kPlain;
  if (args.half == HalfType::kBF16) {
    dev::launch(plain ? embed_kernel<dev::Bf16, true> : embed_kernel<dev::Bf16, false>, config,
                args);
  } else {
    dev::launch(plain ? embed_kernel<dev::F16, true> : embed_kernel<dev::F16, false>, config, args);
  }
}

}  // namespace rapshee::cuda
