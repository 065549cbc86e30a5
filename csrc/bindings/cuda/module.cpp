// Table of contents of rapshee_engine._cuda_ops: single CUDA kernels on numpy arrays, for tests and
// benchmarks. Built with -DRAPSHEE_CUDA_OPS=ON.
#include "bindings/bindings.h"
#include "bindings/cuda/cuda_bindings.h"

PYBIND11_MODULE(_cuda_ops, m) {
  using namespace rapshee::bindings;
  register_errors(m);
  register_cuda_elementwise(m);
  register_cuda_linear(m);
  register_cuda_attention(m);
  register_cuda_sampling(m);
}
