// What the kernels of sampling share: the workspace, the options of a row, logits by chunks, and
// masses as integers.
//
// A row is cut into chunks of kChunk tokens at absolute positions. One warp takes the statistics of
// a chunk (sampling_stats.cu); what comes later reads those, and of the logits only the chunks
// whose largest says that they matter.
//
// Logits are compared as ordered keys: unsigned integers in the order of the floats, -0 and +0
// alike. An entry is a key and the complement of a token id, so that the largest entry is the
// largest logit and, of equals, the lowest id.
//
// Masses that threads add up are integers, multiples of 2^-40 of the mass of the row's largest
// logit: their sums have no order. What falls below is lost: of 2^17 tokens together 2^-23 of the
// largest's mass at most.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda::sampling {

constexpr int kChunk = 512;  // 2 KB in flight for a warp; 251 chunks for 128,256 tokens
constexpr int kVector = 4;   // logits of a lane at a time: 16 bytes
constexpr int kVectors = kChunk / (32 * kVector);
constexpr int kMaxWarps = 16;           // of a block that has a row to itself
constexpr int kFixedPointBits = 40;     // of a mass
constexpr int64_t kMaxVocab = 1 << 22;  // sums of masses stay below 2^63

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kLog2E = 1.44269504f;

// Arguments of every kernel of sampling: the launch, and its workspace by rows of the launch.
struct SamplingStep {
  SampleArgs args;
  int num_chunks = 0;
  bool vectors = false;  // rows of logits are 16-byte aligned
  // Of the logits as they are.
  uint64_t* raw_best = nullptr;   // [rows, chunks] largest entry; kNotFinite if a logit is not
  float* raw_sum = nullptr;       // [rows, chunks] of exp(logit - largest of the chunk)
  double* log_sum_exp = nullptr;  // [rows] NaN if a logit is not finite
  // Of the logits that are drawn from.
  uint64_t* best = nullptr;       // [rows, chunks] of processed rows; others have raw_best
  float* mass = nullptr;          // [rows, chunks] as raw_sum, at the row's temperature
  uint64_t* survivors = nullptr;  // [rows, chunks] mass of what the filters keep
  uint32_t* threshold = nullptr;  // [rows] lowest key that the filters keep
  float* processed = nullptr;     // [rows, processed_stride] of processed rows; -inf: excluded
  int64_t processed_stride = 0;
  uint64_t* sorted = nullptr;  // [rows, sort_size(top_width)] where shared memory is too small
};

void launch_stats(const SamplingStep& step, Stream stream);
void launch_filter(const SamplingStep& step, Stream stream);
void launch_draw(const SamplingStep& step, Stream stream);
void launch_rank(const SamplingStep& step, Stream stream);

// Threads of a block that has a row to itself: a function of the vocabulary alone.
constexpr int threads_of_row(int num_chunks) {
  return 32 * (num_chunks < kMaxWarps ? num_chunks : kMaxWarps);
}
// Entries of a bitonic sort of `count`: a power of two.
constexpr int64_t sort_size(int64_t count) {
  int64_t size = 1;
  while (size < count) size *= 2;
  return size;
}
constexpr int kSharedSort = 1024;  // entries that are sorted in shared memory

// ------------------------------------------------------------------------------ keys and entries
RAPSHEE_DEVICE uint32_t key_of(float value) {
  const uint32_t bits = dev::float_to_bits(value + 0.0f);  // -0 becomes +0
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
RAPSHEE_DEVICE float value_of_key(uint32_t key) {
  return dev::bits_to_float((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}
constexpr uint32_t kLowestKey = 0x00800000u;   // of finite logits: -inf is below
constexpr uint32_t kHighestKey = 0xff7fffffu;  // of finite logits
constexpr uint64_t kNotFinite = ~uint64_t{0};

RAPSHEE_DEVICE uint64_t entry_of(float value, int id) {
  return static_cast<uint64_t>(key_of(value)) << 32 | ~static_cast<uint32_t>(id);
}
RAPSHEE_DEVICE uint32_t key_of_entry(uint64_t entry) { return static_cast<uint32_t>(entry >> 32); }
RAPSHEE_DEVICE int id_of_entry(uint64_t entry) {
  return static_cast<int>(~static_cast<uint32_t>(entry));
}
RAPSHEE_DEVICE float value_of_entry(uint64_t entry) { return value_of_key(key_of_entry(entry)); }

// -------------------------------------------------------------------------------- options of rows
RAPSHEE_DEVICE int64_t step_row(const SampleArgs& args, int row) { return args.first_row + row; }

struct Penalties {
  int32_t slot;  // -1: none
  float repetition, presence, frequency;

  RAPSHEE_DEVICE static Penalties read(const SamplingArrays& a, int64_t r) {
    return {dev::Ptr<const int32_t>(a.state_slot)[r],
            dev::Ptr<const float>(a.repetition_penalty)[r],
            dev::Ptr<const float>(a.presence_penalty)[r],
            dev::Ptr<const float>(a.frequency_penalty)[r]};
  }
  RAPSHEE_DEVICE bool any() const {
    return slot >= 0 && (repetition != 1.0f || presence != 0.0f || frequency != 0.0f);
  }
};

// What is done to the logits of a row before it is drawn. Read at once: one wait, not several.
struct Changes {
  int32_t target, mask, first_bias, end_bias;
  Penalties penalties;

  RAPSHEE_DEVICE static Changes read(const SamplingArrays& a, int64_t r) {
    const dev::Ptr<const int32_t> bias_indptr(a.bias_indptr);
    return {dev::Ptr<const int32_t>(a.target_ids)[r], dev::Ptr<const int32_t>(a.mask_index)[r],
            bias_indptr[r], bias_indptr[r + 1], Penalties::read(a, r)};
  }
  RAPSHEE_DEVICE bool any() const {
    return target < 0 && (mask >= 0 || first_bias != end_bias || penalties.any());
  }
};
// Whether the row is drawn from other logits than it was given.
RAPSHEE_DEVICE bool is_processed(const SampleArgs& args, int64_t r) {
  return args.needs.process && Changes::read(args.arrays, r).any();
}

// What is left of a row's vocabulary to draw from.
struct Filters {
  float min_p, top_p;
  int64_t top_k;  // 0: off

  RAPSHEE_DEVICE static Filters read(const SampleArgs& args, int64_t r) {
    const int32_t top_k = dev::Ptr<const int32_t>(args.arrays.top_k)[r];
    return {dev::Ptr<const float>(args.arrays.min_p)[r],
            dev::Ptr<const float>(args.arrays.top_p)[r],
            top_k > 0 && top_k < args.vocab ? top_k : 0};
  }
  RAPSHEE_DEVICE bool any() const { return min_p > 0.0f || top_k > 0 || top_p < 1.0f; }
};
RAPSHEE_DEVICE bool is_filtered(const SampleArgs& args, int64_t r) {
  if (!args.needs.filter) return false;
  const int32_t target = dev::Ptr<const int32_t>(args.arrays.target_ids)[r];
  const float temperature = dev::Ptr<const float>(args.arrays.temperature)[r];
  return Filters::read(args, r).any() && target < 0 && temperature > 0.0f;
}

// ------------------------------------------------------------------------------- logits by chunks
// A lane's logits of a chunk; -inf beyond the vocabulary.
struct Tile {
  float x[kVectors][kVector];
};
// Of x[i][0], counted from the chunk's first token.
RAPSHEE_DEVICE int offset_of(int i) { return (i * 32 + dev::lane()) * kVector; }

// `size`: of the row, a multiple of kVector if `vectors`.
RAPSHEE_DEVICE Tile load_tile(const dev::Ptr<const float>& logits, int first, int64_t size,
                              bool vectors) {
  Tile tile;
  RAPSHEE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const int id = first + offset_of(i);
    if (vectors && id < size) {
      const dev::Vec16 v = dev::load16(logits + id);
      RAPSHEE_UNROLL
      for (int c = 0; c < kVector; ++c) tile.x[i][c] = dev::bits_to_float(v.word[c]);
      continue;
    }
    RAPSHEE_UNROLL
    for (int c = 0; c < kVector; ++c) tile.x[i][c] = id + c < size ? logits[id + c] : -kInfinity;
  }
  return tile;
}

// A row of logits and the largest entries of its chunks.
struct ChunkedRow {
  dev::Ptr<const float> logits;
  dev::Ptr<const uint64_t> best;  // [num_chunks]
  int64_t size;
  int num_chunks;
  bool vectors;

  RAPSHEE_DEVICE static ChunkedRow raw(const SamplingStep& step, int row) {
    const int64_t vocab = step.args.vocab;
    return {dev::Ptr<const float>(step.args.logits) + row * vocab,
            dev::Ptr<const uint64_t>(step.raw_best) + int64_t{row} * step.num_chunks, vocab,
            step.num_chunks, step.vectors};
  }
  // What the row is drawn from.
  RAPSHEE_DEVICE static ChunkedRow drawn(const SamplingStep& step, int row) {
    if (!is_processed(step.args, step_row(step.args, row))) return raw(step, row);
    return {dev::Ptr<const float>(step.processed) + row * step.processed_stride,
            dev::Ptr<const uint64_t>(step.best) + int64_t{row} * step.num_chunks,
            step.processed_stride, step.num_chunks, true};
  }

  RAPSHEE_DEVICE Tile load(int chunk) const {
    return load_tile(logits, chunk * kChunk, size, vectors);
  }
};

// ---------------------------------------------------------------------------------------- masses
// Mass is exp2((logit - max) * scale): finite, so that the largest logit's is 1 at any temperature.
RAPSHEE_DEVICE float mass_scale(float temperature) {
  return dev::min(dev::divide(1.0f, temperature) * kLog2E, kLargest);
}
RAPSHEE_DEVICE float mass_of(float logit, float max, float scale) {
  return dev::exp2((logit - max) * scale);
}
RAPSHEE_DEVICE uint64_t fixed_point(float mass) {
  return static_cast<uint64_t>(mass * static_cast<float>(int64_t{1} << kFixedPointBits));
}
// Of a chunk of a row without filters, `max` the row's.
RAPSHEE_DEVICE uint64_t chunk_mass(uint64_t best, float mass, float max, float scale) {
  return fixed_point(mass * mass_of(value_of_entry(best), max, scale));
}

// ----------------------------------------------------------------------------------------- warps
template <class T>
RAPSHEE_DEVICE T warp_max(T v) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const T other = dev::shfl_xor(v, mask);
    v = other > v ? other : v;
  }
  return v;
}
template <class T>
RAPSHEE_DEVICE T warp_sum(T v) {
  for (int mask = 16; mask > 0; mask /= 2) v += dev::shfl_xor(v, mask);
  return v;
}
// The sum of the lanes up to this one.
template <class T>
RAPSHEE_DEVICE T warp_scan(T v) {
  for (int delta = 1; delta < 32; delta *= 2) {
    const T below = dev::shfl_up(v, delta);
    if (dev::lane() >= delta) v += below;
  }
  return v;
}
// mask != 0.
RAPSHEE_DEVICE int lowest_bit(uint32_t mask) { return 31 - dev::count_leading_zeros(mask & -mask); }

// The largest entry of all chunks, by each warp.
RAPSHEE_DEVICE uint64_t best_of_row(const ChunkedRow& row) {
  uint64_t best = 0;
  for (int c = dev::lane(); c < row.num_chunks; c += 32) {
    const uint64_t other = row.best[c];
    best = other > best ? other : best;
  }
  return warp_max(best);
}

}  // namespace rapshee::cuda::sampling
