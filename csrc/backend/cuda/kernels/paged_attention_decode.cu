// Attention of sequences with one query token over the paged cache, split along the keys.
//
// Work: units of (sequence, split of kAttentionSplit keys, KV head, 16 heads of its group), from a
// list in device memory, so that a recorded launch serves other lengths; a fixed grid walks it.
// Block: four warps on the 16 rows of a unit (a group of fewer heads leaves rows of the mma operand
// empty, which costs no bandwidth), tiles as in attention_core.cuh. Each warp scores a quarter of a
// tile's keys; the scores go round through shared memory, every warp turns all of them into weights
// as a warp of prefill does, and weighs a quarter of the columns of V. So prefill's bits come out,
// and a tile's latency is a quarter.
//
// K and V have two buffers each and are copied in the order they are needed, K of the tile after
// next as soon as K of this one has been scored: up to three of the four are on their way while one
// is used, also across units. For head size 128 that is 48 KB a block and, with three blocks an SM,
// about 140 KB an SM: several times bandwidth times latency (25 to 40 KB an SM).
//
// Bytes: K and V of the visible keys once for each 16 heads of a group: 4 * head_dim a key; partial
// results of sequences with several splits are 1 to 2 % of that for groups of 4. Operations: 4 *
// head_dim * 16 a key, 16 a byte. Expected bound: memory; estimate 80 % of the copy bandwidth for
// 64 sequences of 4096 keys with 8 KV heads.
//
// Registers: up to 163 a thread for head sizes up to 128: three blocks an SM; 208 for 256: two.
// Shared memory: K and V of two tiles and the scores, 36, 68 and 66 KB.
//
// A sequence of one split is written at once. Of several, each leaves its maximum, sum and output
// in the workspace; the block that arrives last merges them in ascending order, as prefill does.
//
// Determinism: attention_core.cuh; which block arrives last does not matter.
#include "backend/cuda/kernels/attention_core.cuh"

namespace rapshee::cuda {
namespace {

using attention::CachedHead;
using attention::KeyRange;
using attention::RowState;
using attention::Tile;
using attention::TileCopy;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerSm = 3;  // two of the largest heads: registers
// Blocks that walk the work: all that an H200 (132 SMs) runs at once. Elsewhere they run in turn,
// or some SMs hold fewer; results do not depend on it.
constexpr int kMaxBlocks = 132 * kBlocksPerSm;

// Partial results: of each item, and each head.
struct Partials {
  float* out = nullptr;          // [max_items][num_heads][head_dim]
  float* max_sum = nullptr;      // [max_items][num_heads][2]
  uint32_t* arrivals = nullptr;  // [num_seqs][num_heads], at the first head of a unit
};

struct DecodeArgs {
  AttentionArgs attention;
  DecodeWork work;
  attention::ScoreScale score;
  Partials partials;
};

// Shared memory, in elements of T: K and V of two tiles, then the scores.
template <int kDim>
struct Layout {
  static constexpr int kScores = 4 * Tile<kDim>::kElements;
  static constexpr size_t kBytes =
      kScores * 2 + attention::kRows * Tile<kDim>::kKeys * sizeof(float);

  RAPSHEE_DEVICE static int k(int tile) { return tile % 2 * 2 * Tile<kDim>::kElements; }
  RAPSHEE_DEVICE static int v(int tile) { return k(tile) + Tile<kDim>::kElements; }
};

// What a block computes at a time.
struct Unit {
  int item, seq, split;
  int kv_head;
  int first_row;   // of the group's heads
  int length;      // keys of the sequence
  int begin, end;  // keys of the unit, begin at a tile

  template <int kKeys>
  RAPSHEE_DEVICE static Unit read(const DecodeArgs& args, int index) {
    const AttentionArgs& a = args.attention;
    const int row_blocks = row_blocks_of(a);
    const int units_per_item = a.cache.num_kv_heads * row_blocks;
    Unit unit;
    unit.item = index / units_per_item;
    const int part = index % units_per_item;
    unit.kv_head = part / row_blocks;
    unit.first_row = part % row_blocks * attention::kRows;
    const dev::Ptr<const int32_t> items(args.work.items), seq_lens(a.seq_lens);
    unit.seq = items[2 * unit.item];
    unit.split = items[2 * unit.item + 1];
    unit.length = seq_lens[unit.seq];
    const int first = attention::first_visible(unit.length - 1, a.window) / kKeys * kKeys;
    const int split_begin = unit.split * kAttentionSplit;
    const int split_end = split_begin + kAttentionSplit;
    unit.begin = first > split_begin ? first : split_begin;
    unit.end = unit.length < split_end ? unit.length : split_end;
    return unit;
  }

  RAPSHEE_DEVICE static int row_blocks_of(const AttentionArgs& a) {
    const int group = a.num_heads / a.cache.num_kv_heads;
    return (group + attention::kRows - 1) / attention::kRows;
  }
};

// The tiles of all units of a block in order, copied as the walk frees their buffers: K and V of a
// tile alternate. A unit has one tile at least.
template <class T, int kDim>
class TileFeed {
 public:
  RAPSHEE_DEVICE TileFeed(const DecodeArgs& args, int first_unit, int num_units)
      : args_(args), unit_(first_unit), num_units_(num_units) {
    if (unit_ < num_units_) enter();
  }

  RAPSHEE_DEVICE void copy_k() {
    if (unit_ < num_units_) {
      const CachedHead<T> head = cached();
      copy_.find(head, key_);
      copy_.copy_k(head, dev::shared<T>() + Layout<kDim>::k(tile_));
    }
    dev::cp_async_commit();
  }
  // Of the same tile; then moves on.
  RAPSHEE_DEVICE void copy_v() {
    if (unit_ < num_units_) {
      copy_.copy_v(cached(), dev::shared<T>() + Layout<kDim>::v(tile_));
      ++tile_;
      key_ += Tile<kDim>::kKeys;
      if (key_ >= end_) {
        unit_ += static_cast<int>(dev::grid().x);
        if (unit_ < num_units_) enter();
      }
    }
    dev::cp_async_commit();
  }

 private:
  RAPSHEE_DEVICE void enter() {
    const Unit unit = Unit::read<Tile<kDim>::kKeys>(args_, unit_);
    seq_ = unit.seq;
    kv_head_ = unit.kv_head;
    key_ = unit.begin;
    end_ = unit.end;
  }
  RAPSHEE_DEVICE CachedHead<T> cached() const {
    return CachedHead<T>(args_.attention, seq_, kv_head_);
  }

  const DecodeArgs& args_;
  int unit_, num_units_;
  int seq_ = 0, kv_head_ = 0, key_ = 0, end_ = 0;
  int tile_ = 0;
  TileCopy<T, kDim, kThreads> copy_;
};

// Scores of a warp's keys to shared memory, and those of all keys back: 16 bytes a lane for each
// 8 keys, as the mma accumulators hold them.
template <int kOwn, int kAll>
RAPSHEE_DEVICE void put_scores(dev::SharedPtr<float> to, const float (&own)[kOwn][4]) {
  static_assert(kOwn * kWarps == kAll);
  RAPSHEE_UNROLL
  for (int j = 0; j < kOwn; ++j) {
    const int at = ((dev::warp() * kOwn + j) * 32 + dev::lane()) * 4;
    dev::Vec16 v;
    RAPSHEE_UNROLL
    for (int i = 0; i < 4; ++i) v.word[i] = dev::float_to_bits(own[j][i]);
    dev::store16(to + at, v);
  }
}
template <int kAll>
RAPSHEE_DEVICE void get_scores(dev::SharedPtr<const float> from, float (&all)[kAll][4]) {
  RAPSHEE_UNROLL
  for (int j = 0; j < kAll; ++j) {
    const dev::Vec16 v = dev::load16(from + (j * 32 + dev::lane()) * 4);
    RAPSHEE_UNROLL
    for (int i = 0; i < 4; ++i) all[j][i] = dev::bits_to_float(v.word[i]);
  }
}

// Leaves the state of one split in the workspace. heads[h]: < 0: no such row.
template <int kTiles>
RAPSHEE_DEVICE void store_partial(const DecodeArgs& args, int item, const int (&heads)[2],
                                  int first_column, const RowState<kTiles>& state) {
  const dev::Ptr<float> out(args.partials.out), max_sum(args.partials.max_sum);
  const int head_dim = args.attention.cache.head_dim;
  RAPSHEE_UNROLL
  for (int h = 0; h < 2; ++h) {
    if (heads[h] < 0) continue;
    const int64_t row = static_cast<int64_t>(item) * args.attention.num_heads + heads[h];
    RAPSHEE_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const int column = first_column + 8 * j + dev::lane() % 4 * 2;
      if (column >= head_dim) continue;
      dev::store8(out + (row * head_dim + column),
                  dev::Vec8{{dev::float_to_bits(state.out[j][2 * h]),
                             dev::float_to_bits(state.out[j][2 * h + 1])}});
    }
    if (dev::warp() == 0 && dev::lane() % 4 == 0) {
      max_sum[2 * row] = state.max[h];
      max_sum[2 * row + 1] = state.sum[2 * h];
    }
  }
}

// Merges the splits of a sequence in ascending order: four columns a thread.
template <class T>
RAPSHEE_DEVICE void merge_partials(const DecodeArgs& args, int first_item, int num_splits,
                                   int first_head, int num_rows, int64_t out_row) {
  constexpr int kColumns = 4;
  constexpr int kAtOnce = 4;  // splits whose loads are in flight together
  const dev::Ptr<const float> outs(args.partials.out), max_sums(args.partials.max_sum);
  const dev::Ptr<T> result(static_cast<T*>(args.attention.out));
  const int head_dim = args.attention.cache.head_dim, num_heads = args.attention.num_heads;
  const int vectors = head_dim / kColumns;
  for (int i = dev::thread(); i < num_rows * vectors; i += kThreads) {
    const int head = first_head + i / vectors, column = i % vectors * kColumns;
    float max = dev::bits_to_float(attention::kMinusInfinityBits), sum = 0.0f;
    float so_far[kColumns] = {};
    for (int first = 0; first < num_splits; first += kAtOnce) {
      dev::Vec16 out[kAtOnce];
      dev::Vec8 max_sum[kAtOnce];
      RAPSHEE_UNROLL
      for (int s = 0; s < kAtOnce; ++s) {
        // Beyond the last split: one that no row sees anything of.
        out[s] = {};
        max_sum[s] = {{attention::kMinusInfinityBits, 0}};
        if (first + s >= num_splits) continue;
        const int64_t row = static_cast<int64_t>(first_item + first + s) * num_heads + head;
        out[s] = dev::load16(outs + (row * head_dim + column));
        max_sum[s] = dev::load8(max_sums + 2 * row);
      }
      RAPSHEE_UNROLL
      for (int s = 0; s < kAtOnce; ++s) {
        const attention::Merge merge =
            attention::merge_rows(max, sum, dev::bits_to_float(max_sum[s].word[0]),
                                  dev::bits_to_float(max_sum[s].word[1]), args.score.factor);
        RAPSHEE_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          so_far[c] = merge.apply(so_far[c], dev::bits_to_float(out[s].word[c]));
        }
      }
    }
    const float inverse = dev::divide(1.0f, sum);
    const int64_t at = (out_row * num_heads + head) * head_dim + column;
    dev::store8(result + at, dev::Vec8{{dev::pack2<T>(so_far[0] * inverse, so_far[1] * inverse),
                                        dev::pack2<T>(so_far[2] * inverse, so_far[3] * inverse)}});
  }
}

template <class T, int kDim>
RAPSHEE_KERNEL(kThreads, (kDim > 128 ? 2 : kBlocksPerSm))
decode_kernel(RAPSHEE_PARAM DecodeArgs args) {
  dev::pdl_wait();
  dev::pdl_trigger();
  constexpr int kKeys = Tile<kDim>::kKeys;
  constexpr int kOwnKeys = kKeys / kWarps;
  constexpr int kOwnColumns = kDim / kWarps;

  const AttentionArgs& a = args.attention;
  const int group = a.num_heads / a.cache.num_kv_heads;
  const int num_units = dev::Ptr<const int32_t>(args.work.num_items)[0] * a.cache.num_kv_heads *
                        Unit::row_blocks_of(a);
  const auto first_unit = static_cast<int>(dev::block().x);
  const auto scores_at = dev::shared<float>(Layout<kDim>::kScores * sizeof(T));
  const int first_column = dev::warp() * kOwnColumns;

  TileFeed<T, kDim> feed(args, first_unit, num_units);
  feed.copy_k();
  feed.copy_v();
  feed.copy_k();
  int tile = 0;
  for (int index = first_unit; index < num_units; index += static_cast<int>(dev::grid().x)) {
    const Unit unit = Unit::read<kKeys>(args, index);
    const int64_t out_row = dev::Ptr<const int32_t>(a.query_start_loc)[unit.seq];
    const int position = unit.length - 1;
    const int first_head = unit.kv_head * group + unit.first_row;
    const KeyRange sees{attention::first_visible(position, a.window), position};
    const KeyRange visible[2] = {sees, sees};
    int heads[2];
    int64_t row_at[2];
    RAPSHEE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = dev::lane() / 4 + 8 * h;
      heads[h] = unit.first_row + row < group ? first_head + row : -1;
      row_at[h] = heads[h] < 0 ? -1 : (out_row * a.num_heads + heads[h]) * a.cache.head_dim;
    }
    attention::HeldQueries<T, kDim> queries;
    queries.load(dev::Ptr<const T>(static_cast<const T*>(a.q)), row_at, a.cache.head_dim);

    RowState<kOwnColumns / 8> state;
    state.reset();
    for (int key = unit.begin; key < unit.end; key += kKeys, ++tile) {
      // Two later copies may be on their way: V of this tile and K of the next.
      dev::cp_async_wait<2>();
      dev::sync();  // K is there for all, and V of the tile before has been used by all
      feed.copy_v();
      float own[kOwnKeys / 8][4];
      attention::score_keys<T, kDim>(queries, dev::shared<const T>() + Layout<kDim>::k(tile),
                                     dev::warp() * kOwnKeys, own);
      if (args.score.inner != 0.0f) attention::cap_scores(args.score.inner, own);
      attention::mask_scores(visible, key + dev::warp() * kOwnKeys, own);
      put_scores<kOwnKeys / 8, kKeys / 8>(scores_at, own);

      dev::cp_async_wait<2>();
      dev::sync();  // V and the scores are there for all, and K has been used by all
      feed.copy_k();
      float scores[kKeys / 8][4];
      get_scores(dev::SharedPtr<const float>(scores_at), scores);
      uint32_t weights[kKeys / 16][4];
      attention::weigh_keys<T>(scores, args.score.factor, state, weights);
      attention::weigh_values<T, kDim>(weights, dev::shared<const T>() + Layout<kDim>::v(tile),
                                       first_column, state);
    }

    const int num_splits = dev::Ptr<const int32_t>(args.work.num_splits)[unit.seq];
    if (num_splits == 1) {
      attention::store_rows<T>(state, dev::Ptr<T>(static_cast<T*>(a.out)), row_at, first_column,
                               a.cache.head_dim);
      continue;
    }
    store_partial(args, unit.item, heads, first_column, state);
    dev::fence();
    dev::sync();  // all of the partial result is written
    const auto arrivals = dev::Ptr<uint32_t>(args.partials.arrivals) +
                          (static_cast<int64_t>(unit.seq) * a.num_heads + first_head);
    const auto all = static_cast<uint32_t>(num_splits);
    const bool last = dev::thread() == 0 && dev::atomic_add(arrivals, 1u) + 1 == all;
    if (!dev::sync_or(last)) continue;
    dev::fence();
    if (dev::thread() == 0) arrivals[0] = 0;
    const int rows_left = group - unit.first_row;
    merge_partials<T>(args, dev::Ptr<const int32_t>(args.work.first_item)[unit.seq], num_splits,
                      first_head, rows_left < attention::kRows ? rows_left : attention::kRows,
                      out_row);
  }
  dev::cp_async_wait<0>();
}

constexpr size_t kPartAlignment = 16;

constexpr size_t aligned(size_t bytes) {
  return (bytes + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
}

size_t out_bytes(int max_items, int num_heads, int head_dim) {
  return static_cast<size_t>(max_items) * static_cast<size_t>(num_heads) *
         static_cast<size_t>(head_dim) * sizeof(float);
}

size_t max_sum_bytes(int max_items, int num_heads) {
  return aligned(static_cast<size_t>(max_items) * static_cast<size_t>(num_heads) * 2 *
                 sizeof(float));
}

}  // namespace

size_t decode_workspace_bytes(int max_items, int max_seqs, int num_heads, int head_dim) {
  return out_bytes(max_items, num_heads, head_dim) + max_sum_bytes(max_items, num_heads) +
         aligned(static_cast<size_t>(max_seqs) * static_cast<size_t>(num_heads) * sizeof(uint32_t));
}

void paged_attention_decode(const AttentionArgs& args, const DecodeWork& work, void* workspace,
                            Stream stream) {
  attention::check(args);
  if (work.num_seqs == 0 || work.max_items == 0) return;
  auto* out = static_cast<std::byte*>(workspace);
  std::byte* max_sum = out + out_bytes(work.max_items, args.num_heads, args.cache.head_dim);
  std::byte* arrivals = max_sum + max_sum_bytes(work.max_items, args.num_heads);
  DecodeArgs kernel_args;
  kernel_args.attention = args;
  kernel_args.work = work;
  kernel_args.score = attention::ScoreScale::of(args);
  kernel_args.partials = {reinterpret_cast<float*>(out), reinterpret_cast<float*>(max_sum),
                          reinterpret_cast<uint32_t*>(arrivals)};
  const int group = args.num_heads / args.cache.num_kv_heads;
  const int row_blocks = (group + attention::kRows - 1) / attention::kRows;
  const int64_t max_units = int64_t{work.max_items} * args.cache.num_kv_heads * row_blocks;
  const auto blocks = static_cast<unsigned>(max_units < kMaxBlocks ? max_units : kMaxBlocks);
  attention::dispatch(args.half, args.cache.head_dim, [&]<class T, int kDim>() {
    dev::launch(decode_kernel<T, kDim>, {{blocks}, kThreads, Layout<kDim>::kBytes, stream},
                kernel_args);
  });
}

}  // namespace rapshee::cuda
