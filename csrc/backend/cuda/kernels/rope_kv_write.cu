// What lies between the QKV projection and attention: the sum of the projection's splits, RMSNorm
// of the heads of q and k, rotation, rounding to halves, and the writes to q and to the cache.
// Where the norms are of whole rows, a kernel in front leaves the factors of q and k of each row.
//
// Grid: one warp for each (row, head of q, k or v), 8 to a block. A lane holds 4 columns of every
// 128; the normalised head passes through the warp's 1 KB of shared memory, as the other half of a
// rotated pair may be in any lane.
//
// Bytes: splits * 4 read and 2 written for each element of q, k and v, all by 16- and 8-byte
// accesses of neighbouring lanes, cosines and sines once a head (from L2). Operations: about 10 an
// element. Expected bound: memory; at small batches, launch latency.
//
// Registers: 8 elements a lane; 64, for four blocks an SM. Shared memory: 8 KB a block.
//
// Determinism: a head is computed by one warp from its own row, in an order that its size fixes; so
// are the squares of a whole row, by one block.
#include "backend/cuda/kernels/block_sum.cuh"
#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kColumns = 4;  // of a lane at a time: 16 bytes of floats
constexpr int kMaxHeadDim = 256;
constexpr int kVectors = kMaxHeadDim / (32 * kColumns);  // of a lane

// First column of a lane's vector i.
RAPSHEE_DEVICE int column_of(int i) { return (i * 32 + dev::lane()) * kColumns; }

struct Head {
  float x[kVectors][kColumns];
};

// The sum of the splits, in order; zeros beyond the head.
RAPSHEE_DEVICE Head load_head(const QkNormRopeCacheArgs& args, int64_t first, int head_dim) {
  const dev::Ptr<const float> qkv(args.qkv);
  Head head;
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    RAPSHEE_UNROLL
    for (int c = 0; c < kColumns; ++c) head.x[i][c] = 0.0f;
    if (column_of(i) >= head_dim) continue;
    for (int split = 0; split < args.splits; ++split) {
      const dev::Vec16 v = dev::load16(qkv + (split * args.split_stride + first + column_of(i)));
      RAPSHEE_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const float x = dev::bits_to_float(v.word[c]);
        head.x[i][c] = split == 0 ? x : head.x[i][c] + x;
      }
    }
  }
  return head;
}

// What an RMSNorm over the head multiplies it by.
RAPSHEE_DEVICE float factor_of(const Head& head, float eps, int head_dim) {
  float squares = 0.0f;
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    RAPSHEE_UNROLL
    for (int c = 0; c < kColumns; ++c) squares = dev::fma(head.x[i][c], head.x[i][c], squares);
  }
  for (int mask = 16; mask > 0; mask /= 2) squares += dev::shfl_xor(squares, mask);
  return inverse_rms(squares, head_dim, eps);
}

// weight: of the head's columns.
RAPSHEE_DEVICE void normalize(Head& head, dev::Ptr<const float> weight, float scale, int head_dim) {
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    if (column_of(i) >= head_dim) continue;
    RAPSHEE_UNROLL
    for (int c = 0; c < kColumns; ++c) head.x[i][c] *= scale * weight[column_of(i) + c];
  }
}

// Dimension i turns with i + half_dim, for i < half_dim; the rest stays.
RAPSHEE_DEVICE void rotate(const QkNormRopeCacheArgs& args, int64_t row, int head_dim, Head& head) {
  const int half = args.half_dim;
  const dev::Ptr<const float> cos(args.cos), sin(args.sin);
  const auto all = dev::shared<float>() + dev::warp() * kMaxHeadDim;
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    if (column_of(i) >= head_dim) continue;
    RAPSHEE_UNROLL
    for (int c = 0; c < kColumns; ++c) all[column_of(i) + c] = head.x[i][c];
  }
  dev::sync_warp();
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    RAPSHEE_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int column = column_of(i) + c;
      if (column >= 2 * half) continue;
      const bool first = column < half;
      const int pair = first ? column : column - half;
      const int64_t angle = row * half + pair;
      const float other = all[first ? column + half : pair];
      const float turned = other * (first ? -sin[angle] : sin[angle]);
      head.x[i][c] = dev::fma(head.x[i][c], cos[angle], turned);
    }
  }
}

template <class T>
RAPSHEE_DEVICE void store_head(const Head& head, dev::Ptr<T> to, int head_dim) {
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    if (column_of(i) >= head_dim) continue;
    dev::store8(to + column_of(i), dev::Vec8{{dev::pack2<T>(head.x[i][0], head.x[i][1]),
                                              dev::pack2<T>(head.x[i][2], head.x[i][3])}});
  }
}

// The factors of norms over whole rows. Grid: (row, q or k).
RAPSHEE_KERNEL(kThreads, 4)
row_factors_kernel(RAPSHEE_PARAM QkNormRopeCacheArgs args) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const int64_t q_size = int64_t{args.num_heads} * args.cache.head_dim;
  const int64_t kv_size = int64_t{args.cache.num_kv_heads} * args.cache.head_dim;
  const int64_t row = dev::block().x;
  const bool is_k = dev::block().y == 1;
  const int64_t size = is_k ? kv_size : q_size;
  const dev::Ptr<const float> from =
      dev::Ptr<const float>(args.qkv) + (row * (q_size + 2 * kv_size) + (is_k ? q_size : 0));
  float squares = 0.0f;
  for (int64_t column = dev::thread() * kColumns; column < size; column += kThreads * kColumns) {
    float x[kColumns] = {};
    for (int split = 0; split < args.splits; ++split) {
      const dev::Vec16 v = dev::load16(from + (split * args.split_stride + column));
      RAPSHEE_UNROLL
      for (int c = 0; c < kColumns; ++c) x[c] += dev::bits_to_float(v.word[c]);
    }
    RAPSHEE_UNROLL
    for (int c = 0; c < kColumns; ++c) squares = dev::fma(x[c], x[c], squares);
  }
  const float total = block_sum(squares);
  if (dev::thread() != 0) return;
  dev::Ptr<float>(args.row_factors)[2 * row + is_k] = inverse_rms(total, size, args.eps);
}

template <class T>
RAPSHEE_KERNEL(kThreads, 4)
qk_norm_rope_cache_kernel(RAPSHEE_PARAM QkNormRopeCacheArgs args) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const KvCacheView& cache = args.cache;
  const int head_dim = cache.head_dim;
  const int num_heads = args.num_heads + 2 * cache.num_kv_heads;  // of q, k, v
  const int64_t task = static_cast<int64_t>(dev::block().x) * kWarps + dev::warp();
  const int64_t row = task / num_heads;
  const auto index = static_cast<int>(task % num_heads);
  if (row >= args.rows) return;

  const bool is_q = index < args.num_heads;
  const bool is_v = index >= args.num_heads + cache.num_kv_heads;
  const int64_t slot = dev::Ptr<const int64_t>(args.slot_mapping)[row];
  if (!is_q && slot < 0) return;

  Head head = load_head(args, task * head_dim, head_dim);
  if (!is_v) {
    const dev::Ptr<const float> weight(is_q ? args.q_norm : args.k_norm);
    if (args.row_factors != nullptr) {
      const float factor = dev::Ptr<const float>(args.row_factors)[2 * row + !is_q];
      const int in_row = is_q ? index : index - args.num_heads;
      normalize(head, weight + in_row * head_dim, factor, head_dim);
    } else if (args.q_norm != nullptr) {
      normalize(head, weight, factor_of(head, args.eps, head_dim), head_dim);
    }
    rotate(args, row, head_dim, head);
  }
  if (is_q) {
    const int64_t at = (row * args.num_heads + index) * head_dim;
    store_head(head, dev::Ptr<T>(static_cast<T*>(args.q_out)) + at, head_dim);
    return;
  }
  const int kv_head = (index - args.num_heads) % cache.num_kv_heads;
  const int64_t at =
      slot / cache.block_size * cache.block_stride +
      (kv_head * static_cast<int64_t>(cache.block_size) + slot % cache.block_size) * head_dim;
  store_head(head, dev::Ptr<T>(static_cast<T*>(is_v ? cache.v : cache.k)) + at, head_dim);
}

}  // namespace

void qk_norm_rope_cache(const QkNormRopeCacheArgs& args, Stream stream) {
  const KvCacheView& cache = args.cache;
  RAPSHEE_CHECK(cache.head_dim > 0 && cache.head_dim <= kMaxHeadDim && cache.head_dim % 8 == 0,
                "head_dim: got ", cache.head_dim, ", expected a multiple of 8 up to ", kMaxHeadDim);
  RAPSHEE_CHECK(args.half_dim >= 0 && 2 * args.half_dim <= cache.head_dim, "half_dim: got ",
                args.half_dim, ", expected at most half of head_dim, ", cache.head_dim);
  RAPSHEE_CHECK(args.splits >= 1 && args.split_stride % kColumns == 0, "splits: got ", args.splits,
                " at a stride of ", args.split_stride, ", expected 1 or more and a multiple of ",
                kColumns);
  RAPSHEE_CHECK(cache.block_size > 0, "block_size: got ", cache.block_size, ", expected above 0");
  RAPSHEE_CHECK((args.q_norm == nullptr) == (args.k_norm == nullptr) &&
                    (args.row_factors == nullptr || args.q_norm != nullptr),
                "q_norm, k_norm: expected both or none, and both for norms of whole rows");
  if (args.rows == 0) return;
  if (args.row_factors != nullptr) {
    const dev::Grid row_grid{static_cast<unsigned>(args.rows), 2};
    dev::launch(row_factors_kernel, {row_grid, kThreads, kMaxBlockWarps * sizeof(float), stream},
                args);
  }
  const int64_t tasks = int64_t{args.rows} * (args.num_heads + 2 * cache.num_kv_heads);
  const dev::Grid grid{static_cast<unsigned>((tasks + kWarps - 1) / kWarps)};
  constexpr size_t kSharedBytes = size_t{kWarps} * kMaxHeadDim * sizeof(float);
  const dev::Launch config{grid, kThreads, kSharedBytes, stream};
  if (args.half == HalfType::kBF16) {
    dev::launch(qk_norm_rope_cache_kernel<dev::Bf16>, config, args);
  } else {
    dev::launch(qk_norm_rope_cache_kernel<dev::F16>, config, args);
  }
}

}  // namespace rapshee::cuda
