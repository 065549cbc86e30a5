// Attention of sequences with any number of query tokens over the paged cache.
//
// Grid: one block for each (tile of query tokens, KV head), tile-major, so that the tiles which the
// host lists first (those with the most keys) start first; y: blocks of rows where a group of heads
// has more rows than a block holds. A block packs (token, head of the group) into its rows, 16 for
// each of its warps; for heads above 128, two warps share 16 rows and take half of the columns of V
// each.
//
// The block walks the tiles of keys from the first one that its rows see to its last position. K
// and V of the next tile are copied while this one is computed; one barrier a tile. A warp passes
// over tiles that none of its rows sees, and masks only those that a row sees in part.
//
// Operations: 4 * head_dim for each (row, key). Bytes: K and V of the visible keys once a block,
// from L2: with 128 rows, 128 operations a byte. Expected bound: the tensor cores and the shared
// memory that feeds them: a warp reads the whole tile for its 16 rows, 36 KB of operands for half a
// MFLOP at head size 128. Estimate for an H200: 250 to 300 TFLOP/s at 8k tokens.
//
// Registers: the split's output and the output so far of the rows, and a tile's scores, take 160 of
// the 255 that one block of 256 threads an SM leaves to a thread at head size 128 (up to 253 are
// used: queries in registers as well would spill, so they are read from shared memory). Shared
// memory: the queries and two tiles, 96 KB at head sizes 128 and 256, 48 KB at 64.
//
// Determinism: attention_core.cuh; what a row gets does not depend on its place in a tile.
#include "backend/cuda/kernels/attention_core.cuh"

namespace rapshee::cuda {
namespace {

using attention::CachedHead;
using attention::KeyRange;
using attention::RowState;
using attention::Tile;
using attention::TileCopy;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 2;

// Warps that share 16 rows.
template <int kDim>
constexpr int kParts = kDim > 128 ? 2 : 1;
template <int kDim>
constexpr int kBlockRows = kWarps / kParts<kDim> * attention::kRows;

struct PrefillArgs {
  AttentionArgs attention;
  const int32_t* tiles = nullptr;
  attention::ScoreScale score;
  int tile_tokens = 0;
};

// The rows of a block: (token, head of the group) in order.
struct BlockRows {
  int first_token;  // row of T
  int group;
  int first, count;  // packed rows: the block's first, and all of the tile

  RAPSHEE_DEVICE int token(int row) const { return first_token + row / group; }
  // Elements from q, and from out, to a row.
  RAPSHEE_DEVICE int64_t at(int row, int kv_head, const AttentionArgs& args) const {
    const int64_t head = kv_head * group + row % group;
    return (static_cast<int64_t>(token(row)) * args.num_heads + head) * args.cache.head_dim;
  }
};

// Lowest and highest position of the packed rows [first, first + count): lowest > highest for none.
struct Positions {
  int lowest = 0, highest = -1;

  RAPSHEE_DEVICE Positions(dev::Ptr<const int32_t> positions, const BlockRows& rows, int first,
                           int count) {
    const int last = (first + count < rows.count ? first + count : rows.count) - 1;
    if (last < first) return;
    lowest = positions[rows.token(first)];
    highest = positions[rows.token(last)];
  }
};

// The block's query rows to shared memory, zeros where there are none.
template <class T, int kDim>
RAPSHEE_DEVICE void copy_queries(const AttentionArgs& args, const BlockRows& rows, int kv_head,
                                 dev::SharedPtr<T> to) {
  constexpr int kChunks = kDim / attention::kChunk;
  const dev::Ptr<const T> q(static_cast<const T*>(args.q));
  const int head_dim = args.cache.head_dim;
  for (int i = dev::thread(); i < kBlockRows<kDim> * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool valid = rows.first + row < rows.count && chunk * attention::kChunk < head_dim;
    const int64_t at = rows.at(rows.first + row, kv_head, args) + chunk * attention::kChunk;
    dev::cp_async16(to + attention::swizzled<kDim>(row, chunk), q + (valid ? at : 0), valid);
  }
}

template <class T, int kDim>
RAPSHEE_KERNEL(kThreads, 1)
prefill_kernel(RAPSHEE_PARAM PrefillArgs args) {
  dev::pdl_wait();
  dev::pdl_trigger();
  constexpr int kKeys = Tile<kDim>::kKeys;
  constexpr int kOutTiles = kDim / kParts<kDim> / 8;

  const AttentionArgs& a = args.attention;
  const dev::Ptr<const int32_t> tiles(args.tiles), starts(a.query_start_loc);
  const dev::Ptr<const int32_t> positions(a.positions);
  const int num_kv_heads = a.cache.num_kv_heads;
  const auto tile = static_cast<int>(dev::block().x) / num_kv_heads;
  const int kv_head = static_cast<int>(dev::block().x) % num_kv_heads;
  const int seq = tiles[2 * tile], first_token = tiles[2 * tile + 1];
  const int tokens_left = starts[seq + 1] - first_token;
  const int tokens = tokens_left < args.tile_tokens ? tokens_left : args.tile_tokens;
  const int group = a.num_heads / num_kv_heads;
  const BlockRows rows{first_token, group, static_cast<int>(dev::block().y) * kBlockRows<kDim>,
                       tokens * group};
  if (rows.first >= rows.count) return;

  // This warp's rows, and what they see.
  const int warp_row = rows.first + dev::warp() / kParts<kDim> * attention::kRows;
  const int first_column = dev::warp() % kParts<kDim> * (kDim / kParts<kDim>);
  const Positions own(positions, rows, warp_row, attention::kRows);
  KeyRange visible[2];
  RAPSHEE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = warp_row + dev::lane() / 4 + 8 * h;
    if (row >= rows.count) continue;
    visible[h].last = positions[rows.token(row)];
    visible[h].first = attention::first_visible(visible[h].last, a.window);
  }
  const int own_first = attention::first_visible(own.lowest, a.window);
  const int masked_before = attention::first_visible(own.highest, a.window);

  const CachedHead<T> head(a, seq, kv_head);
  const Positions all(positions, rows, rows.first, kBlockRows<kDim>);
  const int begin = attention::first_visible(all.lowest, a.window) / kKeys * kKeys;
  const int end = all.highest + 1;
  TileCopy<T, kDim, kThreads> copy;
  const auto fetch = [&](int key) {  // K, then V
    if (key < end) {
      const int stage = key / kKeys % kStages;
      const auto to = dev::shared<T>() + stage * 2 * Tile<kDim>::kElements;
      copy.find(head, key);
      copy.copy_k(head, to);
      copy.copy_v(head, to + Tile<kDim>::kElements);
    }
    dev::cp_async_commit();
  };
  const auto shared_queries = dev::shared<T>() + kStages * 2 * Tile<kDim>::kElements;
  const int own_rows = warp_row - rows.first;
  copy_queries<T, kDim>(a, rows, kv_head, shared_queries);
  fetch(begin);  // commits both

  const attention::SharedQueries<T, kDim> queries(shared_queries + own_rows * kDim);
  RowState<kOutTiles> so_far, split;
  so_far.reset();
  split.reset();
  for (int key = begin; key < end; key += kKeys) {
    dev::cp_async_wait<0>();
    dev::sync();  // the tile is there for all, and nobody reads the one before any more
    fetch(key + kKeys);
    if (key <= own.highest && key + kKeys > own_first) {
      const dev::SharedPtr<const T> k =
          dev::shared<T>() + key / kKeys % kStages * 2 * Tile<kDim>::kElements;
      float scores[kKeys / 8][4];
      attention::score_keys<T, kDim>(queries, k, 0, scores);
      if (args.score.inner != 0.0f) attention::cap_scores(args.score.inner, scores);
      if (key + kKeys - 1 > own.lowest || key < masked_before) {
        attention::mask_scores(visible, key, scores);
      }
      uint32_t weights[kKeys / 16][4];
      attention::weigh_keys<T>(scores, args.score.factor, split, weights);
      attention::weigh_values<T, kDim>(weights, k + Tile<kDim>::kElements, first_column, split);
    }
    if ((key + kKeys) % kAttentionSplit == 0 || key + kKeys >= end) {
      attention::merge_split(so_far, split, args.score.factor);
      split.reset();
    }
  }

  // The rows' places, from the tile read anew: kept through the loop, they would spill there.
  const BlockRows places{tiles[2 * tile + 1], group, rows.first, rows.count};
  int64_t row_at[2];
  RAPSHEE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = warp_row + dev::lane() / 4 + 8 * h;
    row_at[h] = row < rows.count ? places.at(row, kv_head, a) : -1;
  }
  attention::store_rows<T>(so_far, dev::Ptr<T>(static_cast<T*>(a.out)), row_at, first_column,
                           a.cache.head_dim);
}

}  // namespace

int prefill_tile_tokens(int num_heads, int num_kv_heads, int head_dim) {
  const int group = num_heads / num_kv_heads;
  const int rows = head_dim > 128 ? kBlockRows<256> : kBlockRows<128>;
  return rows > group ? rows / group : 1;
}

void paged_attention_prefill(const AttentionArgs& args, const PrefillWork& work, Stream stream) {
  attention::check(args);
  if (work.num_tiles == 0) return;
  const int group = args.num_heads / args.cache.num_kv_heads;
  PrefillArgs kernel_args;
  kernel_args.attention = args;
  kernel_args.tiles = work.tiles;
  kernel_args.score = attention::ScoreScale::of(args);
  kernel_args.tile_tokens =
      prefill_tile_tokens(args.num_heads, args.cache.num_kv_heads, args.cache.head_dim);
  attention::dispatch(args.half, args.cache.head_dim, [&]<class T, int kDim>() {
    constexpr size_t kSharedBytes =
        (size_t{kStages} * 2 * Tile<kDim>::kElements + kBlockRows<kDim> * kDim) * sizeof(T);
    const int row_blocks =
        (kernel_args.tile_tokens * group + kBlockRows<kDim> - 1) / kBlockRows<kDim>;
    const dev::Grid grid{static_cast<unsigned>(work.num_tiles * args.cache.num_kv_heads),
                         static_cast<unsigned>(row_blocks)};
    dev::launch(prefill_kernel<T, kDim>, {grid, kThreads, kSharedBytes, stream}, kernel_args);
  });
}

}  // namespace rapshee::cuda
