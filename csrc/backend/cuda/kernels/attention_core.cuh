// The inner loop that decode and prefill attention share, for 16 query rows of one KV head.
//
// Keys are walked in tiles at absolute positions, multiples of Tile::kKeys. Within a split of
// kAttentionSplit keys the maximum of the products, the sum of the weights and the output run on
// from tile to tile; each split begins anew, and splits are merged in ascending order (merge_rows).
// Both kernels call the functions below on the same operands: an element of an mma depends on its
// row of A and its column of B alone, a maximum on no order, and a tile in which a row sees nothing
// leaves that row's bits as they were. So the result of a row is a function of its query, its
// position and its keys, whatever rows it is computed with, wherever the walk begins and ends.
//
// A lane holds elements of two of the 16 rows, lane / 4 and lane / 4 + 8: index h of the pairs
// below. Products are kept as q.k (or the tanh of the soft cap); `factor` makes them exponents of
// two, so a weight is one fma and one exp2. The weights are rounded to halves before they are
// summed: numerator and denominator see the same numbers.
#pragma once

#include <cstdint>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda::attention {

inline constexpr int kRows = 16;       // of the mma A operand
inline constexpr int kChunk = 8;       // halves in 16 bytes
inline constexpr int kBlockStep = 16;  // block sizes are multiples of it: so many keys lie together
inline constexpr int kMaxHeadDim = 256;
inline constexpr uint32_t kMinusInfinityBits = 0xff800000u;

// kDim: head size, padded to 64, 128 or 256; the padding is zeros.
template <int kDim>
struct Tile {
  // Half as many keys for the largest heads: K and V then take 32 KB at most, two tiles of which
  // fit the 99 KB of shared memory that the smallest devices give to a block.
  static constexpr int kKeys = kDim > 128 ? 32 : 64;
  static constexpr int kElements = kKeys * kDim;  // of K, and of V
};

// Element of a tile in shared memory: 16-byte chunks of a row are XORed with the row, so that the
// eight rows which ldmatrix takes at a time lie in different banks.
template <int kDim>
RAPSHEE_DEVICE int swizzled(int row, int chunk) {
  return row * kDim + (chunk ^ (row % 8)) * kChunk;
}

// What turns q.k into the exponent of two of a weight.
struct ScoreScale {
  float inner = 0.0f;   // soft cap: the tanh of inner * q.k is taken; 0: none
  float factor = 0.0f;  // exponents are factor times that, above 0

  static ScoreScale of(const AttentionArgs& args) {
    constexpr float kLog2E = 1.44269504f;
    if (args.softcap == 0.0f) return {0.0f, args.scale * kLog2E};
    return {args.scale / args.softcap, args.softcap * kLog2E};
  }
};

// Keys that a query row sees: none where last < first.
struct KeyRange {
  int first = 0, last = -1;
};

RAPSHEE_DEVICE int first_visible(int position, int window) {
  return window > 0 && position >= window ? position + 1 - window : 0;
}

// ------------------------------------------------------------------------------------ the cache
// K and V of one sequence and KV head.
template <class T>
struct CachedHead {
  dev::Ptr<const T> k, v;          // of block 0
  dev::Ptr<const int32_t> blocks;  // the sequence's block table
  int length = 0;                  // keys from here on are zeros, whatever the cache holds
  int head_dim = 0;
  int block_size = 0;
  int64_t block_stride = 0;

  RAPSHEE_DEVICE CachedHead(const AttentionArgs& args, int seq, int kv_head)
      : k(static_cast<const T*>(args.cache.k)),
        v(static_cast<const T*>(args.cache.v)),
        blocks(args.block_tables),
        head_dim(args.cache.head_dim),
        block_size(args.cache.block_size),
        block_stride(args.cache.block_stride) {
    const int64_t head = static_cast<int64_t>(kv_head) * block_size * head_dim;
    k = k + head;
    v = v + head;
    const int stride = dev::Ptr<const int32_t>(args.table_stride)[0];
    blocks = blocks + static_cast<int64_t>(seq) * stride;
    length = dev::Ptr<const int32_t>(args.seq_lens)[seq];
  }
};

// Copies tiles to shared memory, the 16-byte chunks of a row by neighbouring threads. What K needs
// to find its blocks is kept for V.
template <class T, int kDim, int kThreads>
class TileCopy {
 public:
  RAPSHEE_DEVICE void find(const CachedHead<T>& head, int first_key) {
    left_ = head.length - first_key;
    RAPSHEE_UNROLL
    for (int run = 0; run < kRuns; ++run) {
      const int key = first_key + run * kRunStep + row() / kBlockStep * kBlockStep;
      offset_[run] = 0;
      if (key < head.length) {
        const auto in_block = static_cast<unsigned>(key) % static_cast<unsigned>(head.block_size);
        const auto block = static_cast<unsigned>(key) / static_cast<unsigned>(head.block_size);
        offset_[run] = head.blocks[static_cast<int>(block)] * head.block_stride +
                       static_cast<int64_t>(in_block) * head.head_dim;
      }
    }
  }
  RAPSHEE_DEVICE void copy_k(const CachedHead<T>& head, dev::SharedPtr<T> to) const {
    copy(head.k, head.head_dim, to);
  }
  RAPSHEE_DEVICE void copy_v(const CachedHead<T>& head, dev::SharedPtr<T> to) const {
    copy(head.v, head.head_dim, to);
  }

 private:
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  static constexpr int kPasses = Tile<kDim>::kKeys / kRowsAtOnce;
  // Rows of a thread that share a block for certain.
  static constexpr int kRunStep = kRowsAtOnce > kBlockStep ? kRowsAtOnce : kBlockStep;
  static constexpr int kRuns = Tile<kDim>::kKeys / kRunStep;
  static_assert(kRuns * kRunStep == Tile<kDim>::kKeys && kPasses * kRowsAtOnce == kRuns * kRunStep);

  RAPSHEE_DEVICE static int row() { return dev::thread() / kChunks; }

  RAPSHEE_DEVICE void copy(dev::Ptr<const T> from, int head_dim, dev::SharedPtr<T> to) const {
    const int chunk = dev::thread() % kChunks;
    const int64_t lane_at = row() % kBlockStep * head_dim + chunk * kChunk;
    RAPSHEE_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      constexpr int kSwizzleRows = 8;
      const int first_row = pass * kRowsAtOnce;  // of the tile; this thread's is row() below it
      const bool valid = first_row + row() < left_ && chunk * kChunk < head_dim;
      const int64_t at = offset_[first_row / kRunStep] + first_row % kRunStep * head_dim + lane_at;
      dev::cp_async16(to + swizzled<kDim>(first_row % kSwizzleRows + row(), chunk) +
                          first_row / kSwizzleRows * kSwizzleRows * kDim,
                      from + (valid ? at : 0), valid);
    }
  }

  int64_t offset_[kRuns];  // of the runs of 16 keys that this thread's rows lie in
  int left_ = 0;           // keys of the tile that the sequence has
};

// ------------------------------------------------------------------------------- one tile of keys
// The A operands of 16 query rows, in registers.
template <class T, int kDim>
class HeldQueries {
 public:
  // rows[h]: elements from q to the row, < 0: a row of zeros.
  RAPSHEE_DEVICE void load(dev::Ptr<const T> q, const int64_t (&rows)[2], int head_dim) {
    RAPSHEE_UNROLL
    for (int step = 0; step < kDim / 16; ++step) {
      RAPSHEE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int chunk = 2 * step + i / 2;
        operands_[step][i] = 0;
        if (rows[i % 2] >= 0 && chunk * kChunk < head_dim) {
          const int64_t at = rows[i % 2] + chunk * kChunk + dev::lane() % 4 * 2;
          operands_[step][i] = dev::cast<const uint32_t>(q + at)[0];
        }
      }
    }
  }
  RAPSHEE_DEVICE void get(int step, uint32_t (&operand)[4]) const {
    RAPSHEE_UNROLL
    for (int i = 0; i < 4; ++i) operand[i] = operands_[step][i];
  }

 private:
  uint32_t operands_[kDim / 16][4];
};

// The same in shared memory, rows swizzled.
template <class T, int kDim>
class SharedQueries {
 public:
  RAPSHEE_DEVICE explicit SharedQueries(dev::SharedPtr<const T> rows) : rows_(rows) {}
  RAPSHEE_DEVICE void get(int step, uint32_t (&operand)[4]) const {
    dev::ldmatrix_x4(operand,
                     rows_ + swizzled<kDim>(dev::lane() % 16, 2 * step + dev::lane() / 16));
  }

 private:
  dev::SharedPtr<const T> rows_;
};

// Products of the rows with 8 * kTiles keys of a tile, from first_key on.
template <class T, int kDim, class Queries, int kTiles>
RAPSHEE_DEVICE void score_keys(const Queries& queries, dev::SharedPtr<const T> k, int first_key,
                               float (&scores)[kTiles][4]) {
  const int row = first_key + dev::lane() % 8, chunk = dev::lane() / 8;
  RAPSHEE_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    RAPSHEE_UNROLL
    for (int i = 0; i < 4; ++i) scores[j][i] = 0.0f;
  }
  RAPSHEE_UNROLL
  for (int pair = 0; pair < kDim / 32; ++pair) {
    uint32_t even[4], odd[4];
    queries.get(2 * pair, even);
    queries.get(2 * pair + 1, odd);
    RAPSHEE_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      uint32_t keys[4];
      // Chunk 4 * pair + chunk, in a form that leaves two addresses to keep.
      dev::ldmatrix_x4(keys, k + swizzled<kDim>(row, chunk ^ pair % 2 * 4) +
                                 (8 * j * kDim + pair / 2 * 8 * kChunk));
      dev::mma<T>(scores[j], even, {keys[0], keys[1]});
      dev::mma<T>(scores[j], odd, {keys[2], keys[3]});
    }
  }
}

template <int kTiles>
RAPSHEE_DEVICE void cap_scores(float inner, float (&scores)[kTiles][4]) {
  RAPSHEE_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    RAPSHEE_UNROLL
    for (int i = 0; i < 4; ++i) scores[j][i] = dev::tanh(scores[j][i] * inner);
  }
}

// first_key: that of scores[0].
template <int kTiles>
RAPSHEE_DEVICE void mask_scores(const KeyRange (&visible)[2], int first_key,
                                float (&scores)[kTiles][4]) {
  // Of the lane's keys, so that scores are compared by constants.
  const int lane_key = first_key + dev::lane() % 4 * 2;
  const int first[2] = {visible[0].first - lane_key, visible[1].first - lane_key};
  const int last[2] = {visible[0].last - lane_key, visible[1].last - lane_key};
  RAPSHEE_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    RAPSHEE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int key = 8 * j + i % 2;
      if (key < first[i / 2] || key > last[i / 2]) {
        scores[j][i] = dev::bits_to_float(kMinusInfinityBits);
      }
    }
  }
}

// Maximum, sum and output (kTiles times 8 columns) of 16 rows over some keys.
template <int kTiles>
struct RowState {
  float max[2];
  float sum[4];  // as if V had a column of ones: [0] and [2] are those of the lane's two rows
  float out[kTiles][4];

  RAPSHEE_DEVICE void reset() {
    max[0] = max[1] = dev::bits_to_float(kMinusInfinityBits);
    RAPSHEE_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] = 0.0f;
    RAPSHEE_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      RAPSHEE_UNROLL
      for (int i = 0; i < 4; ++i) out[j][i] = 0.0f;
    }
  }
};

// Turns the products of a tile into weights, the A operands of weigh_values, and scales what the
// state holds to the new maximum.
template <class T, int kKeyTiles, int kOutTiles>
RAPSHEE_DEVICE void weigh_keys(const float (&scores)[kKeyTiles][4], float factor,
                               RowState<kOutTiles>& state, uint32_t (&weights)[kKeyTiles / 2][4]) {
  float rescale[2], offset[2];
  RAPSHEE_UNROLL
  for (int h = 0; h < 2; ++h) {
    float most = state.max[h];
    RAPSHEE_UNROLL
    for (int j = 0; j < kKeyTiles; ++j) {
      most = dev::max(most, dev::max(scores[j][2 * h], scores[j][2 * h + 1]));
    }
    most = dev::max(most, dev::shfl_xor(most, 1));
    most = dev::max(most, dev::shfl_xor(most, 2));
    // A row that has seen nothing yet: any finite number makes its weights 0.
    const float base = most == dev::bits_to_float(kMinusInfinityBits) ? 0.0f : most;
    rescale[h] = dev::exp2((state.max[h] - base) * factor);
    offset[h] = -(base * factor);
    state.max[h] = most;
  }
  RAPSHEE_UNROLL
  for (int step = 0; step < kKeyTiles / 2; ++step) {
    RAPSHEE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&s)[4] = scores[2 * step + i / 2];
      const int h = i % 2;
      weights[step][i] = dev::pack2<T>(dev::exp2(dev::fma(s[2 * h], factor, offset[h])),
                                       dev::exp2(dev::fma(s[2 * h + 1], factor, offset[h])));
    }
  }
  // Most tiles do not raise the maximum of any row; a factor of 1 would change no bit.
  if (dev::ballot(rescale[0] != 1.0f || rescale[1] != 1.0f) == 0) return;
  RAPSHEE_UNROLL
  for (int i = 0; i < 4; ++i) state.sum[i] *= rescale[i / 2];
  RAPSHEE_UNROLL
  for (int j = 0; j < kOutTiles; ++j) {
    RAPSHEE_UNROLL
    for (int i = 0; i < 4; ++i) state.out[j][i] *= rescale[i / 2];
  }
}

// Adds the weighted values of a tile, columns from first_column on (a multiple of 8 * kOutTiles),
// and the weights themselves.
template <class T, int kDim, int kOutTiles>
RAPSHEE_DEVICE void weigh_values(const uint32_t (&weights)[Tile<kDim>::kKeys / 16][4],
                                 dev::SharedPtr<const T> v, int first_column,
                                 RowState<kOutTiles>& state) {
  const uint32_t one = dev::pack2<T>(1.0f, 1.0f);
  const int row = dev::lane() % 16, chunk = first_column / kChunk + dev::lane() / 16;
  RAPSHEE_UNROLL
  for (int step = 0; step < Tile<kDim>::kKeys / 16; ++step) {
    dev::mma<T>(state.sum, weights[step], {one, one});
    RAPSHEE_UNROLL
    for (int j = 0; j < kOutTiles; j += 2) {
      uint32_t values[4];
      dev::ldmatrix_x4_trans(
          values, v + swizzled<kDim>(row, chunk ^ j % 8) + (16 * step * kDim + j / 8 * 8 * kChunk));
      dev::mma<T>(state.out[j], weights[step], {values[0], values[1]});
      dev::mma<T>(state.out[j + 1], weights[step], {values[2], values[3]});
    }
  }
}

// -------------------------------------------------------------------------------------- merging
// How a row's result so far and that of its next split become one.
struct Merge {
  bool skip;   // the row sees no key of the split
  bool first;  // it has seen none before
  float a, b;  // otherwise: factors of the two

  RAPSHEE_DEVICE float apply(float so_far, float split) const {
    return skip ? so_far : first ? split : dev::fma(so_far, a, split * b);
  }
};

// Updates the maximum and the sum of a row; its output follows by Merge::apply.
RAPSHEE_DEVICE Merge merge_rows(float& max, float& sum, float split_max, float split_sum,
                                float factor) {
  const float most = dev::max(max, split_max);
  const Merge merge{split_sum == 0.0f, sum == 0.0f, dev::exp2((max - most) * factor),
                    dev::exp2((split_max - most) * factor)};
  sum = merge.apply(sum, split_sum);
  max = merge.skip ? max : most;
  return merge;
}

template <int kTiles>
RAPSHEE_DEVICE void merge_split(RowState<kTiles>& so_far, const RowState<kTiles>& split,
                                float factor) {
  RAPSHEE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const Merge merge =
        merge_rows(so_far.max[h], so_far.sum[2 * h], split.max[h], split.sum[2 * h], factor);
    RAPSHEE_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      RAPSHEE_UNROLL
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        so_far.out[j][i] = merge.apply(so_far.out[j][i], split.out[j][i]);
      }
    }
  }
}

// Writes the rows' outputs over their sums, columns from first_column on. rows[h]: elements from
// out to the row, < 0: not written.
template <class T, int kTiles>
RAPSHEE_DEVICE void store_rows(const RowState<kTiles>& state, dev::Ptr<T> out,
                               const int64_t (&rows)[2], int first_column, int head_dim) {
  RAPSHEE_UNROLL
  for (int h = 0; h < 2; ++h) {
    if (rows[h] < 0) continue;
    const float inverse = dev::divide(1.0f, state.sum[2 * h]);
    RAPSHEE_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      if (first_column + 8 * j >= head_dim) continue;
      const int64_t at = rows[h] + first_column + 8 * j + dev::lane() % 4 * 2;
      dev::cast<uint32_t>(out + at)[0] =
          dev::pack2<T>(state.out[j][2 * h] * inverse, state.out[j][2 * h + 1] * inverse);
    }
  }
}

// ------------------------------------------------------------------------------------ launchers
inline void check(const AttentionArgs& args) {
  const KvCacheView& cache = args.cache;
  RAPSHEE_CHECK(
      cache.head_dim >= kChunk && cache.head_dim <= kMaxHeadDim && cache.head_dim % kChunk == 0,
      "head_dim: got ", cache.head_dim, ", expected a multiple of ", kChunk, " up to ",
      kMaxHeadDim);
  RAPSHEE_CHECK(
      cache.num_kv_heads > 0 && args.num_heads > 0 && args.num_heads % cache.num_kv_heads == 0,
      "num_heads: got ", args.num_heads, " over ", cache.num_kv_heads,
      " KV heads, expected a multiple");
  RAPSHEE_CHECK(cache.block_size > 0 && cache.block_size % kBlockStep == 0, "block_size: got ",
                cache.block_size, ", expected a multiple of ", kBlockStep);
  RAPSHEE_CHECK(cache.block_stride % kChunk == 0, "block_stride: got ", cache.block_stride,
                ", expected a multiple of ", kChunk);
  RAPSHEE_CHECK(args.scale > 0.0f && args.softcap >= 0.0f && args.window >= 0, "scale: got ",
                args.scale, ", softcap: ", args.softcap, ", window: ", args.window,
                ", expected a scale above 0 and none below 0");
}

// Calls body.template operator()<T, kDim>() for the type and the padded head size.
template <class Body>
void dispatch(HalfType half, int head_dim, const Body& body) {
  const auto with_type = [&]<class T>() {
    if (head_dim <= 64) return body.template operator()<T, 64>();
    if (head_dim <= 128) return body.template operator()<T, 128>();
    return body.template operator()<T, kMaxHeadDim>();
  };
  if (half == HalfType::kBF16) return with_type.template operator()<dev::Bf16>();
  return with_type.template operator()<dev::F16>();
}

}  // namespace rapshee::cuda::attention
