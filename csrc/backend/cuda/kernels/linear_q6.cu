// Linear layers (linear.cu) of 6-bit codes with a scale for 16 (GGUF Q6_K): a file of its own, as
// compilers take long for its six kernels.
#include "backend/cuda/kernels/linear_core.cuh"

namespace rapshee::cuda::linear_core {

void launch_q6(const Params& params, HalfType half, Stream stream) {
  launch_format<WeightFormat::kQ6>(params, half, stream);
}

}  // namespace rapshee::cuda::linear_core
