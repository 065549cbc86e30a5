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

py::object cuda() {
  const CudaInfo cuda = cuda_info();
  if (!cuda.built) return py::bool_(false);
  py::dict info;
  info["kind"] = cuda.kind;
  info["devices"] = cuda.models;
  info["unavailable"] = cuda.unavailable;
  return info;
}

py::dict build_info() {
  py::list isas;
  for (const cpu::KernelTable* table : cpu::usable_kernels()) isas.append(table->isa);
  py::dict info;
  info["version"] = RAPSHEE_VERSION;
  info["compiler"] = "gcc-compatible " __VERSION__;
  info["build_type"] = RAPSHEE_BUILD_TYPE;
  info["cuda"] = cuda();
  info["isas"] = isas;
  info["isa"] = cpu::select_kernels().isa;
  info["cpu"] = cpu::cpu_model_name();
  info["cpu_features"] = cpu::cpu_features();
  return info;
}

DType parse_kv_dtype(const std::string& name) {
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  if (name == "int8") return DType::kI8;
  RAPSHEE_CHECK(name == "float32", "dtype: got '", name,
                "', expected bfloat16, float16, float32 or int8");
  return DType::kF32;
}

}  // namespace

void register_devices(py::module_& m) {
  using py::arg;
  m.def("build_info", &build_info);
  m.def("list_devices", &list_devices);
  m.def("device_dtypes", &device_dtypes, arg("device"));
  m.def("default_block_size", &default_block_size, arg("device"));
  m.def(
      "kv_block_bytes",
      [](const ModelConfig& config, const std::string& device, const std::string& dtype,
         int block_size) {
        const size_t layer = kv_block_bytes(device, config, parse_kv_dtype(dtype), block_size);
        std::vector<size_t> bytes(config.kv_windows().size());
        for (const int group : config.kv_groups()) bytes[static_cast<size_t>(group)] += layer;
        return bytes;
      },
      arg("config"), py::kw_only(), arg("device"), arg("dtype"), arg("block_size"));
  m.def(
      "workspace_bytes",
      [](const ModelConfig& config, const std::string& device, int max_num_tokens, int max_num_seqs,
         int block_size, bool deterministic) {
        return workspace_bytes(device, config,
                               {.block_size = block_size,
                                .max_num_tokens = max_num_tokens,
                                .max_num_seqs = max_num_seqs,
                                .deterministic = deterministic});
      },
      arg("config"), py::kw_only(), arg("device"), arg("max_num_tokens"), arg("max_num_seqs"),
      arg("block_size"), arg("deterministic") = true);
  m.def("available_memory", py::overload_cast<const std::string&>(&available_memory),
        arg("device"));
  m.def("usable_cores", &usable_cores);
}

}  // namespace rapshee::bindings
