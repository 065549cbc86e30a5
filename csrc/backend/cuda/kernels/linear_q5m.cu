// Linear layers (linear.cu) of 5-bit codes with a scale and a minimum (GGUF Q5_0, Q5_1, Q5_K): a
// file of its own, as compilers take long for its six kernels.
#include "backend/cuda/kernels/linear_core.cuh"

namespace rapshee::cuda::linear_core {

void launch_q5m(const Params& params, HalfType half, Stream stream) {
  launch_format<WeightFormat::kQ5M>(params, half, stream);
}

}  // namespace rapshee::cuda::linear_core
