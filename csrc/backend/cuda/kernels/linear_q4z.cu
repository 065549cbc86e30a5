// Linear layers (linear.cu) of 4-bit codes with a scale (GGUF Q4_0): a file of its own, as
// compilers take long for its six kernels.
#include "backend/cuda/kernels/linear_core.cuh"

namespace rapshee::cuda::linear_core {

void launch_q4z(const Params& params, HalfType half, Stream stream) {
  launch_format<WeightFormat::kQ4Z>(params, half, stream);
}

}  // namespace rapshee::cuda::linear_core
