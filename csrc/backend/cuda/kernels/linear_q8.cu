// Linear layers (linear.cu) of 8-bit codes with a scale (GGUF Q8_0): a file of its own, as
// compilers take long for its six kernels.
#include "backend/cuda/kernels/linear_core.cuh"

namespace rapshee::cuda::linear_core {

void launch_q8(const Params& params, HalfType half, Stream stream) {
  launch_format<WeightFormat::kQ8>(params, half, stream);
}

}  // namespace rapshee::cuda::linear_core
