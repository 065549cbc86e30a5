// Linear layers (linear.cu) of 2-bit codes with a scale and a minimum for 16 (GGUF Q2_K): a file of
// its own, as compilers take long for its six kernels.
#include "backend/cuda/kernels/linear_core.cuh"

namespace rapshee::cuda::linear_core {

void launch_q2m(const Params& params, HalfType half, Stream stream) {
  launch_format<WeightFormat::kQ2M>(params, half, stream);
}

}  // namespace rapshee::cuda::linear_core
