// Linear layers (linear.cu) of weights that are not quantised: a file of its own, as compilers take
// long for its six kernels.
#include "backend/cuda/kernels/linear_core.cuh"

namespace rapshee::cuda::linear_core {

void launch_half(const Params& params, HalfType half, Stream stream) {
  launch_format<WeightFormat::kHalf>(params, half, stream);
}

}  // namespace rapshee::cuda::linear_core
