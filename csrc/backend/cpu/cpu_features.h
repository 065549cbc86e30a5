// Which instruction set the kernels run on.
#pragma once

#include <string>
#include <vector>

#include "backend/cpu/kernel_table.h"

namespace rapshee::cpu {

// The tables that were built and that this processor can run, slowest first.
std::vector<const KernelTable*> usable_kernels();

// The table named `isa` ("scalar", "avx2", "avx512"); empty: RAPSHEE_CPU_ISA where it is set, else
// the fastest. Throws DeviceError listing what is available.
const KernelTable& select_kernels(const std::string& isa = {});

// Whether RAPSHEE_CPU_ACT=f32 asks for float activations (a reference path for tests). Throws
// DeviceError for another value.
bool float_activations();

// The processor's own name, and the features that decide the choice, for `rapshee-engine info`.
std::string cpu_model_name();
std::vector<std::string> cpu_features();

}  // namespace rapshee::cpu
