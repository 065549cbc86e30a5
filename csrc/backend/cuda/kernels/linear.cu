// Linear layers: y = W x + b, and the gated pair out = act(G x + g) * (U x + u). What is common to
// all weight formats; the kernel is linear_core.cuh's, compiled in linear_*.cu.
//
// Bytes: each weight once a CTA column of tokens (once in all up to 64 rows), x and y. Operations:
// 2 rows outputs cols. Up to about 200 rows of bf16 a layer is bound by the bytes of its weights on
// an H200 (206 FLOP a byte), beyond by the tensor cores. Estimates, not measurements: mma.sync is
// said to reach about 60 % of what wgmma does.
//
// Grid: (tiles of tokens, tiles of weight rows, splits of K); 4 warps, each with its own weight
// rows (16, or 32 for many tokens), all with the same tokens. Weights and x pass through shared
// memory, copied up to 7 stages of 64 or 128 columns ahead; the weights of the first stages are
// asked for before the kernel before has ended.
//
//   tokens  weight rows  registers  shared memory  weights in flight on an SM: half, q8, q4 (CTAs)
//   8       64           66-84      52-72 KB       144, 128, 95 KB (3)
//   64      64           157-186    82-98 KB       80, 60, 27 KB (2)
//   128     128          255        82-98 KB       64, 51, 18 KB (2)
// Registers are ptxas's for sm_80 and sm_90a, without spills; CTAs those of compute capability 9.0.
// An SM of an H200 needs about 25 KB in flight: its share of 4.8 TB/s for 700 ns.
//
// Codes in planes are put together from shared memory for each 32 columns; where 16 share a scale,
// the products are scaled after one mma instead of two.
//
// Determinism: an output is summed by one warp in the order of K, whatever the form. Where K is
// split (a function of the layer's shape, linear_splits), few rows leave their splits to the
// reader, who adds them in order; many rows go through the splits one after the other and add each
// to what stands in y: the same additions.
#include <algorithm>

#include "backend/cuda/kernels/linear_core.cuh"

namespace rapshee::cuda {
namespace {

using linear_core::kMaxMatrices;
using linear_core::kUnitCols;
using linear_core::Matrix;
using linear_core::Params;

// Rows from which on the splits of K are merged by the kernel: the partial sums would cost more
// than what more CTAs gain.
constexpr int kMergeAbove = 64;

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

Matrix matrix_of(const WeightView& w, const float* bias, int64_t column) {
  return {.codes = w.codes,
          .scales = w.scales,
          .bias = bias,
          .rows = static_cast<int>(w.rows),
          .num_panels = static_cast<int>(w.num_panels()),
          .column = column};
}

Params params_of(const void* x, int64_t x_stride, int rows, int64_t cols) {
  RAPSHEE_CHECK(reinterpret_cast<uintptr_t>(x) % 16 == 0 && x_stride % 8 == 0 && cols % 8 == 0,
                "linear: rows of x of ", cols, " columns, ", x_stride,
                " apart, expected multiples of 8");
  Params params;
  params.x = x;
  params.x_stride = x_stride;
  params.rows = rows;
  params.cols = static_cast<int>(cols);
  return params;
}

void launch(WeightFormat format, const Params& params, HalfType half, Stream stream) {
  switch (format) {
    case WeightFormat::kHalf:
      return linear_core::launch_half(params, half, stream);
    case WeightFormat::kQ8:
      return linear_core::launch_q8(params, half, stream);
    case WeightFormat::kQ4Z:
      return linear_core::launch_q4z(params, half, stream);
    case WeightFormat::kQ4M:
      return linear_core::launch_q4m(params, half, stream);
    case WeightFormat::kQ2M:
      return linear_core::launch_q2m(params, half, stream);
    case WeightFormat::kQ3:
      return linear_core::launch_q3(params, half, stream);
    case WeightFormat::kQ5M:
      return linear_core::launch_q5m(params, half, stream);
    case WeightFormat::kQ6:
      return linear_core::launch_q6(params, half, stream);
    case WeightFormat::kPlain:
      RAPSHEE_CHECK(false, "linear: got a plain weight, expected one in panels");
  }
}

}  // namespace

int linear_splits(int64_t outputs, int64_t cols) {
  // Enough CTAs of 64 rows for the 132 multiprocessors of an H200, but 256 columns a split.
  constexpr int64_t kEnough = 128, kLeastCols = 256;
  constexpr int64_t kRows = linear_core::Form<1>::kRows;
  int splits = 1;
  while (splits < 8 && ceil_div(outputs, kRows) * splits < kEnough &&
         cols >= 2 * splits * kLeastCols) {
    splits *= 2;
  }
  return splits;
}

int linear_partials(int rows, int k_splits) { return rows > kMergeAbove ? 1 : k_splits; }

void linear(const LinearArgs& args, Stream stream) {
  RAPSHEE_CHECK(args.num_segments >= 1 && args.num_segments <= kMaxMatrices, "linear: got ",
                args.num_segments, " segments, expected 1 to ", kMaxMatrices);
  const WeightView& first = args.segments[0].weight;
  Params params = params_of(args.x, args.x_stride, args.rows, first.cols);
  RAPSHEE_CHECK(
      args.k_splits >= 1 && args.k_splits <= std::max<int64_t>(ceil_div(first.cols, kUnitCols), 1),
      "linear: got ", args.k_splits, " splits of ", first.cols, " columns, expected 1 to ",
      ceil_div(first.cols, kUnitCols));
  for (int s = 0; s < args.num_segments; ++s) {
    const LinearSegment& segment = args.segments[s];
    RAPSHEE_CHECK(segment.weight.format == first.format && segment.weight.cols == first.cols,
                  "linear: segments differ in format or columns");
    params.matrices[s] = matrix_of(segment.weight, segment.bias, segment.column);
  }
  params.num_matrices = args.num_segments;
  params.y = args.y;
  params.y_stride = args.y_stride;
  params.splits = args.k_splits;
  params.split_stride = args.split_stride;
  if (args.rows > 0) launch(first.format, params, args.half, stream);
}

void gated_linear(const GatedLinearArgs& args, Stream stream) {
  RAPSHEE_CHECK(args.gate.format == args.up.format && args.gate.rows == args.up.rows &&
                    args.gate.cols == args.up.cols,
                "gated_linear: gate and up differ in format or shape");
  Params params = params_of(args.x, args.x_stride, args.rows, args.gate.cols);
  params.matrices[0] = matrix_of(args.gate, args.gate_bias, 0);
  params.matrices[1] = matrix_of(args.up, args.up_bias, 0);
  params.num_matrices = 2;
  params.gated = true;
  params.activation = args.activation;
  params.y = args.out;
  params.y_stride = args.out_stride;
  if (args.rows > 0) launch(args.gate.format, params, args.half, stream);
}

}  // namespace rapshee::cuda
