// Linear layers (linear.cu) of 4-bit codes with a scale and a minimum (GGUF Q4_1, Q4_K): a file of
// its own, as compilers take long for its six kernels.
#include "backend/cuda/kernels/linear_core.cuh"

namespace rapshee::cuda::linear_core {

void launch_q4m(const Params& params, HalfType half, Stream stream) {
  launch_format<WeightFormat::kQ4M>(params, half, stream);
}

}  // namespace rapshee::cuda::linear_core
