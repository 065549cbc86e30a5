// The one linear layer: y = W x with mma m16n8k16, weights as the 16-row A operand, tokens as the
// 8-column B side, K ascending in units of 128 columns. Every number of rows, every weight format
// and the gated pair go through linear_kernel; its forms differ in how many tokens and weight rows
// travel together, never in what one output adds up:
//   unquantised  one accumulator an output, an mma for each 16 columns
//   low-bit      the integer codes are exact in both half types: one or two mma sum a group of
//                columns, then acc = fma(scale, sum, acc), and with a minimum acc = fma(minimum,
//                sum of x, acc), where the sum of x is an mma with a row of ones
// Past the end of K, weights and x are zeros up to a whole unit.
#pragma once

#include <type_traits>

#include "backend/cuda/kernels/activation.cuh"
#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"
#include "backend/cuda/kernels/linear_operands.cuh"

namespace rapshee::cuda::linear_core {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kMaxMatrices = 3;
inline constexpr int kUnitCols = 128;  // splits of K begin at multiples of it

// What a kernel gets: one layer of up to three matrices side by side, or gate and up.
struct Matrix {
  const std::byte* codes = nullptr;
  const std::byte* scales = nullptr;
  const float* bias = nullptr;
  int rows = 0, num_panels = 0;
  int64_t column = 0;  // of y
  int first_tile = 0;  // of weight rows; set by the launch
};
struct Params {
  const void* x = nullptr;
  int64_t x_stride = 0;
  int rows = 0, cols = 0;  // of x
  Matrix matrices[kMaxMatrices];
  int num_matrices = 0;
  bool gated = false;  // matrices: gate, up; y: halves
  GatedActivation activation = GatedActivation::kSilu;
  void* y = nullptr;
  int64_t y_stride = 0;
  int splits = 1;  // of K
  int64_t split_stride = 0;
};

// One for each weight format, in a file of its own: launches the form for params.rows.
void launch_half(const Params& params, HalfType half, Stream stream);
void launch_q8(const Params& params, HalfType half, Stream stream);
void launch_q4z(const Params& params, HalfType half, Stream stream);
void launch_q4m(const Params& params, HalfType half, Stream stream);
void launch_q2m(const Params& params, HalfType half, Stream stream);
void launch_q3(const Params& params, HalfType half, Stream stream);
void launch_q5m(const Params& params, HalfType half, Stream stream);
void launch_q6(const Params& params, HalfType half, Stream stream);

// How a CTA's work is cut. Tokens are columns of B that share every weight load.
//   8 tokens    bound by the bytes of the weights: shared memory is for those in flight
//   64 tokens   the same, up to where x in shared memory is read as often as weights come
//   128 tokens  bound by arithmetic: two 16-row tiles a warp halve the reads of x for each mma, 128
//               tokens the reads of weights from the L2 cache
template <int kTokenTiles>
struct Form {
  static constexpr int kTiles = kTokenTiles;                   // of 8 tokens
  static constexpr int kTokens = 8 * kTokenTiles;              // of a CTA
  static constexpr int kTogether = kTiles < 4 ? kTiles : 4;    // tiles computed without a branch
  static constexpr int kRowTiles = kTokenTiles == 16 ? 2 : 1;  // 16-row tiles of a warp
  static constexpr int kPanels = 2 * kRowTiles;                // of a warp
  static constexpr int kRows = 16 * kRowTiles * kWarps;        // weight rows of a CTA
  static constexpr int kBlocks = kTokenTiles == 1 ? 3 : 2;     // CTAs an SM
};

// A stage of the pipeline: some columns of x for all tokens, and of the CTA's weights. As many as
// fit: three CTAs share the 227 KB of an SM of compute capability 9.0 in the form of 8 tokens; in
// the others two do, and one fits the 99 KB of capability 8.6 and 8.9. Eight cover any latency.
template <class F, WeightFormat kFormat>
struct Stage {
  static constexpr int kChunkCols = chunk_cols(kFormat);
  static constexpr int kCols = F::kTiles == 1 || kChunkCols > 64 ? kUnitCols : 64;
  static constexpr int kChunks = kCols / kChunkCols;
  static constexpr int kUnits = kCols / 8;  // of 16 bytes in a row of x
  static constexpr int kXBytes = F::kTokens * kCols * 2;
  static constexpr int kPanelBytes = kChunks * chunk_bytes(kFormat);
  static constexpr int kCodeBytes = kWarps * F::kPanels * kPanelBytes;
  static constexpr int kPanelScaleBytes = kChunks * chunk_scale_bytes(kFormat);
  static constexpr int kScaleBytes = kWarps * F::kPanels * kPanelScaleBytes;
  static constexpr int kBytes = kXBytes + kCodeBytes + kScaleBytes;
  static constexpr int kRoom = F::kTiles == 1 ? 72 << 10 : 99 << 10;
  static constexpr int kStages = kRoom / kBytes < 8 ? kRoom / kBytes : 8;
  static constexpr size_t kSharedBytes = size_t{kStages} * kBytes;
  static_assert(kStages >= 2);
};

// --------------------------------------------------------------------------------- shared memory
// The x of a CTA: rows [first, first + F::kTokens) of x. Units of 16 bytes are swizzled by their
// row, so that the eight rows of an ldmatrix lie in different banks.
template <class F, class S, class T>
struct TokenTile {
  dev::Ptr<const T> x;
  int64_t x_stride;
  int first, rows, cols;
  int tiles;  // with rows of x, in whole kTogether

  RAPSHEE_DEVICE TokenTile(const Params& params, int first_token)
      : x(static_cast<const T*>(params.x)),
        x_stride(params.x_stride),
        first(first_token),
        rows(params.rows),
        cols(params.cols) {
    constexpr int kRun = 8 * F::kTogether;
    const int runs = (rows - first + kRun - 1) / kRun;
    tiles = F::kTogether * runs < F::kTiles ? F::kTogether * runs : F::kTiles;
  }

  RAPSHEE_DEVICE static dev::SharedPtr<T> unit(int slot, int token, int index) {
    const int swizzled = index ^ (token % 8);
    return dev::shared<T>(static_cast<size_t>(slot) * S::kBytes) +
           (token * S::kCols + 8 * swizzled);
  }

  // Copies columns [kCols * stage, + kCols): asynchronously, or at once.
  template <bool kNow>
  RAPSHEE_DEVICE void load(int slot, int stage) const {
    static_assert(F::kTokens * S::kUnits % kThreads == 0);
    RAPSHEE_UNROLL
    for (int i = 0; i < F::kTokens * S::kUnits / kThreads; ++i) {
      const int at = i * kThreads + dev::thread(), token = at / S::kUnits, index = at % S::kUnits;
      if (token >= 8 * tiles) continue;
      const int column = stage * S::kCols + 8 * index;
      const bool valid = first + token < rows && column < cols;
      const dev::Ptr<const T> from = x + (valid ? (first + token) * x_stride + column : 0);
      if constexpr (kNow) {
        dev::store16(unit(slot, token, index),
                     valid ? dev::load16(from) : dev::Vec16{{0, 0, 0, 0}});
      } else {
        dev::cp_async16(unit(slot, token, index), from, valid);
      }
    }
  }

  // Operand B of tokens 8 * tile .. and columns [32 * group, +32) of the stage: two k16 steps.
  RAPSHEE_DEVICE static void fragment(int slot, int tile, int group, uint32_t (&b)[4]) {
    const int lane = dev::lane();
    dev::ldmatrix_x4(b, unit(slot, 8 * tile + lane % 8, 4 * group + lane / 8));
  }
};

// The panels of 8 weight rows of a warp, F::kPanels of them, two to a 16-row tile: neighbours of
// one matrix, or one of gate and the same of up. Panels past the end are the last: nobody stores
// them.
template <class F, class S, WeightFormat kFormat>
struct PanelTile {
  static constexpr int kChunkBytes = chunk_bytes(kFormat);
  static constexpr int kScaleUnits = S::kPanelScaleBytes / 16;  // of a panel in a stage
  static constexpr int kScaleRounds = (F::kPanels * kScaleUnits + 31) / 32;  // of 16 bytes a lane

  const Params& params;
  int matrix;  // of linear layers
  int first_panel;
  int num_chunks;
  dev::Ptr<const std::byte> codes[F::kPanels];  // this lane's 16 bytes of the first chunk
  dev::Ptr<const std::byte> scales;             // this lane's 16 bytes of the first stage

  RAPSHEE_DEVICE PanelTile(const Params& p, int row_tile)
      : params(p), matrix(0), num_chunks((p.cols + S::kChunkCols - 1) / S::kChunkCols) {
    while (!p.gated && matrix + 1 < p.num_matrices &&
           row_tile >= p.matrices[matrix + 1].first_tile) {
      ++matrix;
    }
    const int panels = p.gated ? F::kRowTiles : F::kPanels;  // of each matrix
    first_panel = ((row_tile - p.matrices[matrix].first_tile) * kWarps + dev::warp()) * panels;
    RAPSHEE_UNROLL
    for (int i = 0; i < F::kPanels; ++i) {
      codes[i] = dev::Ptr<const std::byte>(of(i).codes) + index(i) * kChunkBytes + 16 * dev::lane();
    }
    if constexpr (kScaleRounds == 1) scales = scales_of(dev::lane());
  }

  // The 16 bytes `unit` of the scales of the warp's panels in the first stage.
  RAPSHEE_DEVICE dev::Ptr<const std::byte> scales_of(int unit) const {
    const int i = unit / kScaleUnits % F::kPanels;
    return dev::Ptr<const std::byte>(of(i).scales) + index(i) * chunk_scale_bytes(kFormat) +
           16 * (unit % kScaleUnits);
  }

  // Of panel i of the warp: its matrix, its place there, and that of its first chunk.
  RAPSHEE_DEVICE const Matrix& of(int i) const {
    return params.matrices[params.gated ? i % 2 : matrix];
  }
  RAPSHEE_DEVICE int panel(int i) const { return first_panel + (params.gated ? i / 2 : i); }
  RAPSHEE_DEVICE int64_t index(int i) const {
    const int last = of(i).num_panels - 1;
    return int64_t{panel(i) < last ? panel(i) : last} * num_chunks;
  }
  // The row of its matrix that this lane has of panel i.
  RAPSHEE_DEVICE int row(int i) const { return panel(i) * kPanelRows + dev::lane() / 4; }

  RAPSHEE_DEVICE static dev::SharedPtr<std::byte> chunk_at(int slot, int i, int chunk) {
    const int at = (dev::warp() * F::kPanels + i) * S::kPanelBytes + chunk * kChunkBytes;
    return dev::shared<std::byte>(static_cast<size_t>(slot) * S::kBytes) + (S::kXBytes + at);
  }
  RAPSHEE_DEVICE static dev::SharedPtr<std::byte> scales_at(int slot, int byte) {
    const int at = dev::warp() * F::kPanels * S::kPanelScaleBytes + byte;
    return dev::shared<std::byte>(static_cast<size_t>(slot) * S::kBytes) +
           (S::kXBytes + S::kCodeBytes + at);
  }

  // Starts the copy of the warp's weights of a stage. Allowed before pdl_wait().
  RAPSHEE_DEVICE void load(int slot, int stage) const {
    const int64_t first = int64_t{stage} * S::kChunks;
    RAPSHEE_UNROLL
    for (int i = 0; i < F::kPanels; ++i) {
      RAPSHEE_UNROLL
      for (int c = 0; c < S::kChunks; ++c) {
        const bool valid = first + c < num_chunks;
        RAPSHEE_UNROLL
        for (int at = 0; at < kChunkBytes; at += 32 * 16) {
          if (at + 16 * dev::lane() >= kChunkBytes) continue;
          dev::cp_async16_stream(chunk_at(slot, i, c) + (at + 16 * dev::lane()),
                                 codes[i] + (valid ? (first + c) * kChunkBytes + at : 0), valid);
        }
      }
    }
    if constexpr (kScaleUnits > 0) {
      RAPSHEE_UNROLL
      for (int round = 0; round < kScaleRounds; ++round) {
        constexpr int kBytes = chunk_scale_bytes(kFormat);
        const int unit = 32 * round + dev::lane();
        if (unit >= F::kPanels * kScaleUnits) continue;
        const bool valid = first + 16 * (unit % kScaleUnits) / kBytes < num_chunks;
        // Of several rounds, the pointers would take too many registers.
        const auto from = kScaleRounds == 1 ? scales : scales_of(unit);
        dev::cp_async16_stream(scales_at(slot, 16 * unit), from + (valid ? first * kBytes : 0),
                               valid);
      }
    }
  }

  // The lane's scales (and minimums) of panel i, a chunk of the stage and 32 columns of the chunk.
  RAPSHEE_DEVICE static void load_scales(int slot, int i, int chunk, int group,
                                         GroupScales<kFormat>& to) {
    constexpr int kRowBytes = chunk_scale_bytes(kFormat) / kPanelRows;
    to.load(scales_at(slot, i * S::kPanelScaleBytes + chunk * chunk_scale_bytes(kFormat) +
                                dev::lane() / 4 * kRowBytes +
                                group * GroupScales<kFormat>::kBytes));
  }
};

// ----------------------------------------------------------------------------------------- kernel
// One group of 32 columns: adds the products of the warp's rows with a run of token tiles.
template <class T, WeightFormat kFormat, class F>
RAPSHEE_DEVICE void multiply_group(const uint32_t (&a)[F::kRowTiles][2][4], const uint32_t (&b)[4],
                                   const GroupScales<kFormat> (&scales)[F::kPanels],
                                   float (&acc)[F::kRowTiles][F::kTiles][4], int tile) {
  const uint32_t steps[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
  if constexpr (kFormat == WeightFormat::kHalf) {
    RAPSHEE_UNROLL
    for (int mt = 0; mt < F::kRowTiles; ++mt) {
      dev::mma<T>(acc[mt][tile], a[mt][0], steps[0]);
      dev::mma<T>(acc[mt][tile], a[mt][1], steps[1]);
    }
  } else {
    constexpr bool kMinimum = format_info(kFormat).minimum;
    constexpr int kCount = GroupScales<kFormat>::kCount, kSteps = 2 / kCount;  // of one scale
    RAPSHEE_UNROLL
    for (int part = 0; part < kCount; ++part) {
      [[maybe_unused]] float x_sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if constexpr (kMinimum) {
        const uint32_t ones[4] = {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>};
        RAPSHEE_UNROLL
        for (int s = 0; s < kSteps; ++s) dev::mma<T>(x_sum, ones, steps[part + s]);
      }
      RAPSHEE_UNROLL
      for (int mt = 0; mt < F::kRowTiles; ++mt) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        RAPSHEE_UNROLL
        for (int s = 0; s < kSteps; ++s) dev::mma<T>(sum, a[mt][part + s], steps[part + s]);
        RAPSHEE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const GroupScales<kFormat>& of = scales[2 * mt + i / 2];
          float& y = acc[mt][tile][i];
          y = dev::fma(of.scale[part], sum[i], y);
          if constexpr (kMinimum) y = dev::fma(of.minimum[part], x_sum[i % 2], y);
        }
      }
    }
  }
}

// The operands A of one group after the other of a chunk.
template <class T, WeightFormat kFormat, class F, class S>
class ChunkCodes {
  using Panels = PanelTile<F, S, kFormat>;
  static constexpr bool kPlanes = format_info(kFormat).has_planes();

 public:
  RAPSHEE_DEVICE ChunkCodes(int slot, int chunk) : slot_(slot), chunk_(chunk) {
    if constexpr (!kPlanes) {
      RAPSHEE_UNROLL
      for (int i = 0; i < F::kPanels; ++i) {
        codes_[i] = dev::load16(Panels::chunk_at(slot, i, chunk) + 16 * dev::lane());
      }
    }
  }

  RAPSHEE_DEVICE void next(int group, uint32_t (&a)[F::kRowTiles][2][4]) {
    if constexpr (kPlanes) {
      RAPSHEE_UNROLL
      for (int i = 0; i < F::kPanels; ++i) {
        codes_[i] = plane_words<kFormat>(Panels::chunk_at(slot_, i, chunk_), group);
      }
    }
    RAPSHEE_UNROLL
    for (int mt = 0; mt < F::kRowTiles; ++mt) {
      fragment<T, kFormat>(codes_[2 * mt], codes_[2 * mt + 1], 0, a[mt][0]);
      fragment<T, kFormat>(codes_[2 * mt], codes_[2 * mt + 1], 1, a[mt][1]);
    }
    if constexpr (!kPlanes) {
      RAPSHEE_UNROLL
      for (int i = 0; i < F::kPanels; ++i) next_group<kFormat>(codes_[i]);
    }
  }

 private:
  int slot_, chunk_;
  std::conditional_t<kPlanes, PlaneWords, dev::Vec16> codes_[F::kPanels];
};

// Adds the products of a stage.
template <class T, WeightFormat kFormat, class F, class S>
RAPSHEE_DEVICE void multiply_stage(const TokenTile<F, S, T>& tokens, int slot,
                                   float (&acc)[F::kRowTiles][F::kTiles][4]) {
  using Panels = PanelTile<F, S, kFormat>;
  constexpr int kGroups = S::kChunkCols / kGroupCols;  // of a chunk
  RAPSHEE_UNROLL
  for (int chunk = 0; chunk < S::kChunks; ++chunk) {
    ChunkCodes<T, kFormat, F, S> codes(slot, chunk);
    RAPSHEE_UNROLL_BY(F::kTiles == 1 ? kGroups : 1)
    for (int group = 0; group < kGroups; ++group) {
      uint32_t a[F::kRowTiles][2][4];
      codes.next(group, a);
      GroupScales<kFormat> scales[F::kPanels];
      if constexpr (kFormat != WeightFormat::kHalf) {
        RAPSHEE_UNROLL
        for (int i = 0; i < F::kPanels; ++i) Panels::load_scales(slot, i, chunk, group, scales[i]);
      }
      RAPSHEE_UNROLL
      for (int run = 0; run < F::kTiles; run += F::kTogether) {
        if (run >= tokens.tiles) continue;
        uint32_t b[F::kTogether][4];
        RAPSHEE_UNROLL
        for (int i = 0; i < F::kTogether; ++i) {
          tokens.fragment(slot, run + i, chunk * kGroups + group, b[i]);
        }
        RAPSHEE_UNROLL
        for (int i = 0; i < F::kTogether; ++i) {
          multiply_group<T, kFormat, F>(a, b[i], scales, acc, run + i);
        }
      }
    }
  }
}

// Writes the sums of split `split` of K, or adds them to those of the splits before.
template <class T, class F, class Panels>
RAPSHEE_DEVICE void store_linear(const Params& params, const Panels& panels, int first_token,
                                 int split, bool merge,
                                 const float (&acc)[F::kRowTiles][F::kTiles][4]) {
  const Matrix& matrix = params.matrices[panels.matrix];
  const dev::Ptr<float> y(static_cast<float*>(params.y) +
                          (merge ? 0 : split * params.split_stride));
  const dev::Ptr<const float> bias(matrix.bias);
  RAPSHEE_UNROLL
  for (int i = 0; i < F::kPanels; ++i) {
    const int row = panels.row(i);
    if (row >= matrix.rows) continue;
    const float offset = split == 0 && matrix.bias != nullptr ? bias[row] : 0.0f;
    RAPSHEE_UNROLL
    for (int nt = 0; nt < F::kTiles; ++nt) {
      RAPSHEE_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int token = first_token + 8 * nt + 2 * (dev::lane() % 4) + c;
        if (token >= params.rows) continue;
        const int64_t at = token * params.y_stride + matrix.column + row;
        const float sum = acc[i / 2][nt][i % 2 * 2 + c];
        y[at] = split == 0 ? sum + offset : merge ? y[at] + sum : sum;
      }
    }
  }
}

// d[0], d[1] of a thread are gate's, d[2], d[3] up's, of the same outputs.
template <class T, class F, class Panels>
RAPSHEE_DEVICE void store_gated(const Params& params, const Panels& panels, int first_token,
                                const float (&acc)[F::kRowTiles][F::kTiles][4]) {
  const Matrix &gate_matrix = params.matrices[0], &up_matrix = params.matrices[1];
  const dev::Ptr<T> out(static_cast<T*>(params.y));
  const dev::Ptr<const float> gate_bias(gate_matrix.bias), up_bias(up_matrix.bias);
  RAPSHEE_UNROLL
  for (int mt = 0; mt < F::kRowTiles; ++mt) {
    const int row = panels.row(2 * mt);
    if (row >= gate_matrix.rows) continue;
    const float gate_offset = gate_matrix.bias != nullptr ? gate_bias[row] : 0.0f;
    const float up_offset = up_matrix.bias != nullptr ? up_bias[row] : 0.0f;
    RAPSHEE_UNROLL
    for (int nt = 0; nt < F::kTiles; ++nt) {
      RAPSHEE_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int token = first_token + 8 * nt + 2 * (dev::lane() % 4) + c;
        if (token >= params.rows) continue;
        const float value = gate(params.activation, acc[mt][nt][c] + gate_offset) *
                            (acc[mt][nt][2 + c] + up_offset);
        out[token * params.y_stride + row] = dev::from_float<T>(value);
      }
    }
  }
}

template <class T, WeightFormat kFormat, int kTokenTiles>
RAPSHEE_KERNEL(kThreads, Form<kTokenTiles>::kBlocks)
linear_kernel(RAPSHEE_PARAM Params params) {
  using F = Form<kTokenTiles>;
  using S = Stage<F, kFormat>;
  constexpr int kAhead = S::kStages - 1, kStagesPerUnit = kUnitCols / S::kCols;
  const int first_token = static_cast<int>(dev::block().x) * F::kTokens;
  const PanelTile<F, S, kFormat> panels(params, static_cast<int>(dev::block().y));
  const TokenTile<F, S, T> tokens(params, first_token);

  const bool merge = static_cast<int>(dev::grid().z) < params.splits;
  const int first_split = static_cast<int>(dev::block().z);
  const int end_split = merge ? params.splits : first_split + 1;
  const int units = (params.cols + kUnitCols - 1) / kUnitCols;
  const auto first_stage_of = [&](int split) {
    return static_cast<int>(int64_t{units} * split / params.splits) * kStagesPerUnit;
  };
  int stage = first_stage_of(first_split);
  const int end = first_stage_of(end_split);

  // Weights are nobody's output: they may come before the kernel before has ended.
  for (int s = 0; s < kAhead; ++s) {
    if (stage + s < end) panels.load(s, stage + s);
    dev::cp_async_commit();
  }
  dev::pdl_wait();
  dev::pdl_trigger();
  for (int s = 0; s < kAhead; ++s) {
    if (stage + s < end) tokens.template load<true>(s, stage + s);
  }

  int slot = 0, next_slot = kAhead;
  for (int split = first_split; split < end_split; ++split) {
    float acc[F::kRowTiles][F::kTiles][4];
    RAPSHEE_UNROLL
    for (int i = 0; i < F::kRowTiles * F::kTiles * 4; ++i)
      acc[i / 4 / F::kTiles][i / 4 % F::kTiles][i % 4] = 0.0f;
    for (const int split_end = first_stage_of(split + 1); stage < split_end; ++stage) {
      dev::cp_async_wait<kAhead - 1>();
      dev::sync();  // the stage is there for all; the one before it is free
      if (stage + kAhead < end) {
        panels.load(next_slot, stage + kAhead);
        tokens.template load<false>(next_slot, stage + kAhead);
      }
      dev::cp_async_commit();
      multiply_stage<T, kFormat>(tokens, slot, acc);
      slot = slot + 1 == S::kStages ? 0 : slot + 1;
      next_slot = next_slot + 1 == S::kStages ? 0 : next_slot + 1;
    }
    if (params.gated) {
      store_gated<T, F>(params, panels, first_token, acc);
    } else {
      store_linear<T, F>(params, panels, first_token, split, merge, acc);
    }
  }
}

// ----------------------------------------------------------------------------------------- launch
template <class T, WeightFormat kFormat, int kTokenTiles>
void launch_form(Params params, Stream stream) {
  using F = Form<kTokenTiles>;
  const auto tiles = [](int n, int of) { return (n + of - 1) / of; };
  int row_tiles = 0;
  if (params.gated) {
    row_tiles = tiles(params.matrices[0].rows, F::kRows / 2);
  } else {
    for (int i = 0; i < params.num_matrices; ++i) {
      params.matrices[i].first_tile = row_tiles;
      row_tiles += tiles(params.matrices[i].rows, F::kRows);
    }
  }
  // All tokens come first for one tile of weight rows, then the next: the CTAs that run together
  // share their weights in the L2 cache.
  const dev::Launch config{
      .grid = {static_cast<unsigned>(tiles(params.rows, F::kTokens)),
               static_cast<unsigned>(row_tiles),
               static_cast<unsigned>(linear_partials(params.rows, params.splits))},
      .threads = kThreads,
      .shared_bytes = Stage<F, kFormat>::kSharedBytes,
      .stream = stream};
  dev::launch(linear_kernel<T, kFormat, kTokenTiles>, config, params);
}

template <class T, WeightFormat kFormat>
void launch_rows(const Params& params, Stream stream) {
  if (params.rows <= 8) return launch_form<T, kFormat, 1>(params, stream);
  if (params.rows <= 64) return launch_form<T, kFormat, 8>(params, stream);
  launch_form<T, kFormat, 16>(params, stream);
}

template <WeightFormat kFormat>
void launch_format(const Params& params, HalfType half, Stream stream) {
  if (half == HalfType::kBF16) return launch_rows<dev::Bf16, kFormat>(params, stream);
  launch_rows<dev::F16, kFormat>(params, stream);
}

}  // namespace rapshee::cuda::linear_core
