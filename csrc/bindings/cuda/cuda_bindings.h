// The parts of the extension _cuda_ops.
#pragma once

#include <pybind11/pybind11.h>

namespace rapshee::bindings {

void register_cuda_attention(pybind11::module_& m);
void register_cuda_elementwise(pybind11::module_& m);
void register_cuda_linear(pybind11::module_& m);
void register_cuda_sampling(pybind11::module_& m);

}  // namespace rapshee::bindings
