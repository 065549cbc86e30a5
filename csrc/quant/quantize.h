// Floats to low-bit blocks, for checkpoints that are quantised as they are loaded.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace rapshee {

// Converts a row of `n` floats, a whole number of blocks, to `dtype`: q8_0, by its largest
// magnitude, or q4_1, by a search for the scale and the minimum of the least squared error. Writes
// row_bytes(dtype, n) bytes at `dst`, at any alignment. Depends on the numbers alone.
// Throws InvalidArgument for another dtype or n; WeightError where a number is not finite, or a
// scale or minimum is beyond the range of f16.
void quantize_row(DType dtype, const float* src, std::byte* dst, int64_t n);

}  // namespace rapshee
