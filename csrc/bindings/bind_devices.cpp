// What this build and this machine offer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "backend/backend.h"
#include "backend/cpu/cpu_features.h"
#include "bindings/bindings.h"
#include "core/system.h"

namespace py = pybind11;

namespace rapshee::bindings {
namespace {

py::dict build_info() {
  py::list isas;
  for (const cpu::KernelTable* table : cpu::usable_kernels()) isas.append(table->isa);
  py::dict info;
  info["version"] = RAPSHEE_VERSION;
  info["compiler"] = "gcc-compatible " __VERSION__;
  info["build_type"] = RAPSHEE_BUILD_TYPE;
  info["cuda"] = false;
  info["isas"] = isas;
  info["isa"] = cpu::select_kernels().isa;
  info["cpu"] = cpu::cpu_model_name();
  info["cpu_features"] = cpu::cpu_features();
  return info;
}

std::vector<std::string> devices() {
  const auto names = list_devices();
  return {names.begin(), names.end()};
}

DType parse_kv_dtype(const std::string& name) {
  RAPSHEE_CHECK(name == "bfloat16" || name == "float32", "dtype: got '", name,
                "', expected bfloat16 or float32");
  return name == "float32" ? DType::kF32 : DType::kBF16;
}

}  // namespace

void register_devices(py::module_& m) {
  using py::arg;
  m.def("build_info", &build_info);
  m.def("list_devices", &devices);
  m.def("default_block_size", &default_block_size, arg("device"));
  m.def(
      "kv_block_bytes",
      [](const ModelConfig& config, const std::string& device, const std::string& dtype,
         int block_size) {
        return kv_block_bytes(device, config, parse_kv_dtype(dtype), block_size);
      },
      arg("config"), py::kw_only(), arg("device"), arg("dtype"), arg("block_size"));
  m.def("available_memory", py::overload_cast<const std::string&>(&available_memory),
        arg("device"));
  m.def("usable_cores", &usable_cores);
}

}  // namespace rapshee::bindings
