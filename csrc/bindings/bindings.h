// The parts of the extension; module.cpp is the table of contents.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "backend/backend.h"

namespace rapshee::bindings {

void register_errors(pybind11::module_& m);
void register_model(pybind11::module_& m);
void register_runner(pybind11::module_& m);
void register_devices(pybind11::module_& m);
void register_ops(pybind11::module_& m);
void register_quantize(pybind11::module_& m);
void register_roofline(pybind11::module_& m);
void register_sampling_ops(pybind11::module_& m);

// "auto", "bfloat16", "float16" or "float32"; InvalidArgument for anything else.
ComputeType parse_compute(const std::string& name);

}  // namespace rapshee::bindings
