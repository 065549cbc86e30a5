// The residual addition and the RMSNorm behind it: x += the partial sums of the layer before, in
// some families normalised themselves and scaled, and the halves that the next layer multiplies.
//
// Grid: one block of up to 512 threads for each row of the output, a thread with 1, 2, 4 or 8
// vectors of 4 columns in registers, as the row's size asks for. Loads of x and of several splits
// (8 for the smallest rows, whose projections are split most) are in flight together.
//
// Bytes of an element: 4 of x and 4 of each split read, 4 of x and 2 of the output written; the
// weight is asked for before the kernel in front has ended. Operations: about 5 an element.
// Expected bound: memory; at small batches, the latency of the launch, the loads and the sum over
// the block.
//
// Registers: values, sums, weights and splits in flight, 62 (2 vectors, two blocks an SM of rows of
// 4096) to 128 (8 vectors). Shared memory: two floats a warp, one for each norm.
//
// Determinism: a row's squares are added within a thread, a warp and the block in an order that the
// row's size alone fixes. The splits are added to each other in order and then to x: whether a
// linear layer leaves its splits or their sum, x has the same bits.
#include "backend/cuda/kernels/block_sum.cuh"
#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda {
namespace {

constexpr int kColumns = 4;  // of a vector: 16 bytes of floats
constexpr int kMaxThreads = 512;
constexpr int kMaxVectors = 8;  // of a thread
constexpr int64_t kMaxHidden = int64_t{kMaxVectors} * kMaxThreads * kColumns;

// Of a thread's columns, zeros beyond the row.
template <int kVectors>
RAPSHEE_DEVICE float sum_of_squares(const float (&v)[kVectors][kColumns]) {
  float squares = 0.0f;
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    RAPSHEE_UNROLL
    for (int c = 0; c < kColumns; ++c) squares = dev::fma(v[i][c], v[i][c], squares);
  }
  return squares;
}

template <class T, int kVectors>
RAPSHEE_KERNEL(kMaxThreads, kVectors == 2 ? 2 : 1)
add_rms_norm_kernel(RAPSHEE_PARAM AddNormArgs args) {
  const int64_t hidden = args.hidden;
  // Vectors of a thread lie 128 columns apart: those of a warp are a run of the row.
  const auto column_of = [](int i) {
    return ((dev::warp() * kVectors + i) * 32 + dev::lane()) * kColumns;
  };
  const dev::Ptr<const float> weight(args.weight);
  dev::Vec16 weights[kVectors];
  const auto load_weights = [&] {
    RAPSHEE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const bool there = args.weight != nullptr && column_of(i) < hidden;
      if (there) weights[i] = dev::load16_stream(weight + column_of(i));
    }
  };
  constexpr bool kEarly = kVectors <= 4;  // where registers allow it
  if constexpr (kEarly) load_weights();
  dev::pdl_wait();
  dev::pdl_trigger();

  const int64_t out_row = dev::block().x;
  const bool gathered = args.row_ids != nullptr;
  const int64_t row = gathered ? dev::Ptr<const int32_t>(args.row_ids)[out_row] : out_row;
  const dev::Ptr<float> x = dev::Ptr<float>(args.x) + row * hidden;
  float v[kVectors][kColumns];
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    dev::Vec16 from{{0, 0, 0, 0}};  // adds nothing beyond the row
    if (column_of(i) < hidden) from = dev::load16(x + column_of(i));
    RAPSHEE_UNROLL
    for (int c = 0; c < kColumns; ++c) v[i][c] = dev::bits_to_float(from.word[c]);
  }
  if (args.splits > 0) {
    // Splits that are loaded before the first of them is added.
    constexpr int kInFlight = kVectors == 1 ? 8 : kVectors == 2 ? 2 : 1;
    const dev::Ptr<const float> partials = dev::Ptr<const float>(args.partials) + row * hidden;
    float sum[kVectors][kColumns] = {};
    for (int first = 0; first < args.splits; first += kInFlight) {
      dev::Vec16 part[kInFlight][kVectors];
      RAPSHEE_UNROLL
      for (int s = 0; s < kInFlight; ++s) {
        RAPSHEE_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          if (first + s >= args.splits || column_of(i) >= hidden) continue;
          part[s][i] = dev::load16(partials + ((first + s) * args.split_stride + column_of(i)));
        }
      }
      RAPSHEE_UNROLL
      for (int s = 0; s < kInFlight; ++s) {
        RAPSHEE_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          if (first + s >= args.splits || column_of(i) >= hidden) continue;
          RAPSHEE_UNROLL
          for (int c = 0; c < kColumns; ++c) {
            const float p = dev::bits_to_float(part[s][i].word[c]);
            sum[i][c] = first + s == 0 ? p : sum[i][c] + p;
          }
        }
      }
    }
    if (args.post_weight != nullptr) {
      const float scale = inverse_rms(block_sum(sum_of_squares(sum)), hidden, args.eps);
      const dev::Ptr<const float> post_weight(args.post_weight);
      RAPSHEE_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        if (column_of(i) >= hidden) continue;
        const dev::Vec16 w = dev::load16_stream(post_weight + column_of(i));
        RAPSHEE_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          sum[i][c] = sum[i][c] * scale * dev::bits_to_float(w.word[c]);
        }
      }
    }
    RAPSHEE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      if (column_of(i) >= hidden) continue;
      dev::Vec16 to;
      RAPSHEE_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        v[i][c] += args.residual_scale * sum[i][c];
        to.word[c] = dev::float_to_bits(v[i][c]);
      }
      if (!gathered) dev::store16(x + column_of(i), to);
    }
  }
  if constexpr (!kEarly) load_weights();
  const bool norm = args.weight != nullptr;
  const float scale =
      norm ? inverse_rms(block_sum(sum_of_squares(v), kMaxBlockWarps), hidden, args.eps) : 1.0f;
  const dev::Ptr<T> out = dev::Ptr<T>(static_cast<T*>(args.out)) + out_row * hidden;
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    if (column_of(i) >= hidden) continue;
    float to[kColumns];
    RAPSHEE_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      to[c] = norm ? v[i][c] * scale * dev::bits_to_float(weights[i].word[c]) : v[i][c];
    }
    dev::store8(out + column_of(i),
                dev::Vec8{{dev::pack2<T>(to[0], to[1]), dev::pack2<T>(to[2], to[3])}});
  }
}

template <class T, int kVectors>
void launch(const AddNormArgs& args, Stream stream) {
  // Whole warps that cover the row with kVectors vectors a thread.
  const int64_t vectors = args.hidden / kColumns;
  const int64_t warps = (vectors + int64_t{32} * kVectors - 1) / (int64_t{32} * kVectors);
  const dev::Launch config{.grid = {static_cast<unsigned>(args.rows)},
                           .threads = static_cast<int>(32 * warps),
                           .shared_bytes = 2 * kMaxBlockWarps * sizeof(float),
                           .stream = stream};
  dev::launch(add_rms_norm_kernel<T, kVectors>, config, args);
}

template <class T>
void launch_form(const AddNormArgs& args, Stream stream) {
  constexpr int64_t kColumnsOfBlock = int64_t{kMaxThreads} * kColumns;
  if (args.hidden <= kColumnsOfBlock) return launch<T, 1>(args, stream);
  if (args.hidden <= 2 * kColumnsOfBlock) return launch<T, 2>(args, stream);
  if (args.hidden <= 4 * kColumnsOfBlock) return launch<T, 4>(args, stream);
  launch<T, kMaxVectors>(args, stream);
}

}  // namespace

void add_rms_norm(const AddNormArgs& args, Stream stream) {
  RAPSHEE_CHECK(args.hidden > 0 && args.hidden <= kMaxHidden && args.hidden % kColumns == 0,
                "hidden: got ", args.hidden, ", expected a multiple of ", kColumns, " up to ",
                kMaxHidden);
  RAPSHEE_CHECK(args.splits >= 0 && (args.splits == 0) == (args.partials == nullptr) &&
                    args.split_stride % kColumns == 0,
                "splits: got ", args.splits, " at a stride of ", args.split_stride,
                ", expected 1 or more and a multiple of ", kColumns, ", or none");
  if (args.rows == 0) return;
  if (args.half == HalfType::kBF16) return launch_form<dev::Bf16>(args, stream);
  launch_form<dev::F16>(args, stream);
}

}  // namespace rapshee::cuda
