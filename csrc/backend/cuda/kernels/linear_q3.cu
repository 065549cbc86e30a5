// Linear layers (linear.cu) of 3-bit codes with a scale for 16 (GGUF Q3_K): a file of its own, as
// compilers take long for its six kernels.
#include "backend/cuda/kernels/linear_core.cuh"

namespace rapshee::cuda::linear_core {

void launch_q3(const Params& params, HalfType half, Stream stream) {
  launch_format<WeightFormat::kQ3>(params, half, stream);
}

}  // namespace rapshee::cuda::linear_core
