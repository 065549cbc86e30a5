// Products of 1 to 8 rows with plain weights, without tensor cores: y = W x + b, and the gated pair
// out = act(G x + g) * (U x + u).
//
// Grid: 4 warps a CTA, each with its own 2 (of more than 4 rows: 4) outputs and all rows of x; the
// gated form takes half as many outputs, of both matrices. A lane reads 16 bytes of each weight
// row, 8 loads in flight, and the same columns of x, which stay in the first-level cache. The first
// loads of weights are asked for before the kernel before has ended.
// Bytes: each weight once, 2 a weight; x from the cache, once for the outputs of a warp.
// Operations: 2 rows a weight. Bound: memory; with 8 rows 64 multiplications and 24 conversions
// for 16 bytes of weights also nearly fill an SM of an H200, whose share of 4.8 TB/s is 20 bytes a
// clock. Estimates, not measurements.
// Registers: 56 to 127, ptxas's for sm_80 and sm_90a, without spills.
//
// Determinism: lane l sums columns 8 (l + 32 i) to 8 (l + 32 i) + 7 in ascending order with one
// accumulator for each (row, output), then the lanes are added pairwise: the same for any number of
// rows, but another order than linear's.
#include "backend/cuda/kernels/activation.cuh"
#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kLaneCols = 8;  // 16 bytes
constexpr int kStepCols = 32 * kLaneCols;
constexpr int kMaxMatrices = 3;

struct Matrix {
  const void* weight = nullptr;
  const float* bias = nullptr;
  int rows = 0;
  int64_t column = 0;  // of y
};

struct Params {
  const void* x = nullptr;
  int64_t x_stride = 0;
  int rows = 0, cols = 0;
  Matrix matrices[kMaxMatrices];  // side by side; gate and up
  int num_matrices = 0;
  GatedActivation activation = GatedActivation::kSilu;
  void* y = nullptr;
  int64_t y_stride = 0;
};

template <int kRows>
struct Form {
  static constexpr int kDots = kRows > 4 ? 4 : 2;   // weight rows of a warp
  static constexpr int kSteps = kRows > 4 ? 2 : 4;  // of each, loaded ahead
};

// Products of kDots weight rows with up to kRows rows of x. All lanes get all of them.
template <class T, int kRows>
class Dots {
  static constexpr int kDots = Form<kRows>::kDots;
  static constexpr int kSteps = Form<kRows>::kSteps;

 public:
  RAPSHEE_DEVICE Dots(const Params& params, const dev::Ptr<const T> (&weights)[kDots])
      : params_(params), weights_(weights), first_(dev::lane() * kLaneCols) {
    load();
  }

  // After pdl_wait.
  RAPSHEE_DEVICE void run() {
    while (first_ < params_.cols + dev::lane() * kLaneCols) {
      RAPSHEE_UNROLL
      for (int step = 0; step < kSteps; ++step) multiply(step);
      first_ += kSteps * kStepCols;
      load();
    }
    RAPSHEE_UNROLL
    for (int dot = 0; dot < kDots; ++dot) {
      RAPSHEE_UNROLL
      for (int row = 0; row < kRows; ++row) {
        RAPSHEE_UNROLL
        for (int mask = 16; mask > 0; mask /= 2) {
          sums_[dot][row] += dev::shfl_xor(sums_[dot][row], mask);
        }
      }
    }
  }

  RAPSHEE_DEVICE float sum(int dot, int row) const { return sums_[dot][row]; }

 private:
  RAPSHEE_DEVICE void load() {
    RAPSHEE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int col = first_ + step * kStepCols;
      RAPSHEE_UNROLL
      for (int dot = 0; dot < kDots; ++dot) {
        loaded_[step][dot] = dev::Vec16{{0, 0, 0, 0}};
        if (col < params_.cols) loaded_[step][dot] = dev::load16_stream(weights_[dot] + col);
      }
    }
  }

  RAPSHEE_DEVICE void multiply(int step) {
    const int col = first_ + step * kStepCols;
    if (col >= params_.cols) return;
    float w[kDots][kLaneCols];
    RAPSHEE_UNROLL
    for (int dot = 0; dot < kDots; ++dot) unpack(loaded_[step][dot], w[dot]);
    RAPSHEE_UNROLL
    for (int row = 0; row < kRows; ++row) {
      if (row >= params_.rows) continue;
      float x[kLaneCols];
      unpack(dev::load16(dev::Ptr<const T>(static_cast<const T*>(params_.x)) +
                         (row * params_.x_stride + col)),
             x);
      RAPSHEE_UNROLL
      for (int dot = 0; dot < kDots; ++dot) {
        RAPSHEE_UNROLL
        for (int c = 0; c < kLaneCols; ++c) {
          sums_[dot][row] = dev::fma(w[dot][c], x[c], sums_[dot][row]);
        }
      }
    }
  }

  RAPSHEE_DEVICE static void unpack(const dev::Vec16& halves, float (&to)[kLaneCols]) {
    RAPSHEE_UNROLL
    for (int pair = 0; pair < kLaneCols / 2; ++pair) {
      const dev::Float2 two = dev::unpack2<T>(halves.word[pair]);
      to[2 * pair] = two.x;
      to[2 * pair + 1] = two.y;
    }
  }

  const Params& params_;
  const dev::Ptr<const T> (&weights_)[kDots];
  int first_;  // of the lane's columns in the steps that are loaded
  dev::Vec16 loaded_[kSteps][kDots];
  float sums_[kDots][kRows] = {};
};

RAPSHEE_DEVICE int64_t warp_of_grid() { return int64_t{dev::block().x} * kWarps + dev::warp(); }

// Plain weights have rows up to a multiple of 8: a warp's last ones may lie behind the matrix.
template <class T>
RAPSHEE_DEVICE dev::Ptr<const T> row_of(const Params& params, const Matrix& matrix, int64_t row) {
  return dev::Ptr<const T>(static_cast<const T*>(matrix.weight)) + row * params.cols;
}

RAPSHEE_DEVICE float bias_of(const Matrix& matrix, int64_t row) {
  return matrix.bias == nullptr ? 0.0f : dev::Ptr<const float>(matrix.bias)[row];
}

template <class T, int kRows>
RAPSHEE_KERNEL(kThreads, 3)
gemv_kernel(RAPSHEE_PARAM Params params) {
  constexpr int kDots = Form<kRows>::kDots;
  int64_t first = warp_of_grid() * kDots;
  int m = 0;
  while (m < params.num_matrices && first >= params.matrices[m].rows) {
    first -= (params.matrices[m++].rows + kDots - 1) / kDots * kDots;
  }
  if (m == params.num_matrices) return;
  const Matrix& matrix = params.matrices[m];
  dev::Ptr<const T> weights[kDots];
  RAPSHEE_UNROLL
  for (int dot = 0; dot < kDots; ++dot) weights[dot] = row_of<T>(params, matrix, first + dot);
  Dots<T, kRows> dots(params, weights);
  dev::pdl_wait();
  dev::pdl_trigger();
  dots.run();
  const dev::Ptr<float> y(static_cast<float*>(params.y));
  RAPSHEE_UNROLL
  for (int dot = 0; dot < kDots; ++dot) {
    RAPSHEE_UNROLL
    for (int row = 0; row < kRows; ++row) {
      if (dev::lane() != dot * kRows + row) continue;
      const int64_t output = first + dot;
      if (row >= params.rows || output >= matrix.rows) continue;
      y[row * params.y_stride + matrix.column + output] =
          dots.sum(dot, row) + bias_of(matrix, output);
    }
  }
}

template <class T, int kRows>
RAPSHEE_KERNEL(kThreads, 3)
gated_gemv_kernel(RAPSHEE_PARAM Params params) {
  constexpr int kDots = Form<kRows>::kDots, kOutputs = kDots / 2;
  const Matrix &gates = params.matrices[0], &ups = params.matrices[1];
  const int64_t first = warp_of_grid() * kOutputs;
  if (first >= gates.rows) return;
  dev::Ptr<const T> weights[kDots];
  RAPSHEE_UNROLL
  for (int i = 0; i < kOutputs; ++i) {
    weights[i] = row_of<T>(params, gates, first + i);
    weights[kOutputs + i] = row_of<T>(params, ups, first + i);
  }
  Dots<T, kRows> dots(params, weights);
  dev::pdl_wait();
  dev::pdl_trigger();
  dots.run();
  const dev::Ptr<T> out(static_cast<T*>(params.y));
  RAPSHEE_UNROLL
  for (int i = 0; i < kOutputs; ++i) {
    RAPSHEE_UNROLL
    for (int row = 0; row < kRows; ++row) {
      if (dev::lane() != i * kRows + row) continue;
      const int64_t output = first + i;
      if (row >= params.rows || output >= gates.rows) continue;
      const float g = dots.sum(i, row) + bias_of(gates, output);
      const float u = dots.sum(kOutputs + i, row) + bias_of(ups, output);
      out[row * params.y_stride + output] = dev::from_float<T>(gate(params.activation, g) * u);
    }
  }
}

template <class T, int kRows>
void launch_form(const Params& params, bool gated, Stream stream) {
  constexpr int kDots = Form<kRows>::kDots;
  int64_t warps = 0;
  for (int m = 0; m < (gated ? 1 : params.num_matrices); ++m) {
    const int of_warp = gated ? kDots / 2 : kDots;
    warps += (params.matrices[m].rows + of_warp - 1) / of_warp;
  }
  const dev::Launch config{.grid = {static_cast<unsigned>((warps + kWarps - 1) / kWarps)},
                           .threads = kThreads,
                           .stream = stream};
  dev::launch(gated ? gated_gemv_kernel<T, kRows> : gemv_kernel<T, kRows>, config, params);
}

template <class T>
void launch(const Params& params, bool gated, Stream stream) {
  if (params.rows == 1) {
    launch_form<T, 1>(params, gated, stream);
  } else if (params.rows == 2) {
    launch_form<T, 2>(params, gated, stream);
  } else if (params.rows <= 4) {
    launch_form<T, 4>(params, gated, stream);
  } else {
    launch_form<T, 8>(params, gated, stream);
  }
}

void launch(const Params& params, HalfType half, bool gated, Stream stream) {
  if (params.rows == 0) return;
  if (half == HalfType::kBF16) {
    launch<dev::Bf16>(params, gated, stream);
  } else {
    launch<dev::F16>(params, gated, stream);
  }
}

Params params_of(const void* x, int64_t x_stride, int rows, int64_t cols) {
  RAPSHEE_CHECK(rows <= kGemvRows, "gemv: got ", rows, " rows, expected at most ", kGemvRows);
  RAPSHEE_CHECK(reinterpret_cast<uintptr_t>(x) % 16 == 0 && x_stride % 8 == 0 && cols % 8 == 0,
                "gemv: rows of x of ", cols, " columns, ", x_stride,
                " apart, expected multiples of 8");
  Params params;
  params.x = x;
  params.x_stride = x_stride;
  params.rows = rows;
  params.cols = static_cast<int>(cols);
  return params;
}

void add_matrix(Params& params, const WeightView& weight, const float* bias, int64_t column) {
  RAPSHEE_CHECK(weight.format == WeightFormat::kPlain && weight.cols == params.cols,
                "gemv: expected plain weights of ", params.cols, " columns");
  params.matrices[params.num_matrices++] = {weight.codes, bias, static_cast<int>(weight.rows),
                                            column};
}

}  // namespace

void gemv(const LinearArgs& args, Stream stream) {
  RAPSHEE_CHECK(args.num_segments >= 1 && args.num_segments <= kMaxMatrices, "gemv: got ",
                args.num_segments, " segments, expected 1 to ", kMaxMatrices);
  RAPSHEE_CHECK(args.k_splits == 1, "gemv: got ", args.k_splits, " splits, expected 1");
  Params params = params_of(args.x, args.x_stride, args.rows, args.segments[0].weight.cols);
  for (int s = 0; s < args.num_segments; ++s) {
    const LinearSegment& segment = args.segments[s];
    add_matrix(params, segment.weight, segment.bias, segment.column);
  }
  params.y = args.y;
  params.y_stride = args.y_stride;
  launch(params, args.half, false, stream);
}

void gated_gemv(const GatedLinearArgs& args, Stream stream) {
  RAPSHEE_CHECK(args.gate.rows == args.up.rows, "gated_gemv: gate and up differ in rows");
  Params params = params_of(args.x, args.x_stride, args.rows, args.gate.cols);
  add_matrix(params, args.gate, args.gate_bias, 0);
  add_matrix(params, args.up, args.up_bias, 0);
  params.activation = args.activation;
  params.y = args.out;
  params.y_stride = args.out_stride;
  launch(params, args.half, true, stream);
}

}  // namespace rapshee::cuda
