// How keys and values lie in a KV block. A block holds, for each KV head, its groups of 16 tokens;
// a group holds K, then V:
//   bf16: K [head_dim / 2][16 keys][2], V [8 key pairs][padded head_dim][2]  (both as bf16 dot
//         products want them)
//   f32:  K [head_dim][16 keys],        V [16 keys][padded head_dim]
//   i8:   the same, then a float scale for each key of K [16], and of V [16]
// head_dim is padded to 16 in V.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cpu/kernel_table.h"
#include "core/dtype.h"

namespace rapshee::cpu {

struct CacheLayout {
  DType dtype = DType::kF32;
  int head_dim = 0;
  int block_size = 0;

  // Not by the table of dtypes: kernel objects must not define what others share.
  size_t element() const {
    if (dtype == DType::kI8) return 1;
    return dtype == DType::kF32 ? sizeof(float) : sizeof(uint16_t);
  }
  size_t k_bytes() const { return element() * kLanes * static_cast<size_t>(head_dim); }
  size_t v_bytes() const {
    return element() * kLanes * static_cast<size_t>(round_up(head_dim, kLanes));
  }
  size_t scale_bytes() const { return dtype == DType::kI8 ? 2 * kLanes * sizeof(float) : 0; }
  size_t group_bytes() const { return k_bytes() + v_bytes() + scale_bytes(); }
  // One KV head of one block.
  size_t head_bytes() const { return group_bytes() * static_cast<size_t>(block_size / kLanes); }
};

}  // namespace rapshee::cpu
