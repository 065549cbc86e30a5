// The devices of this build, by name.
#include <array>

#include "backend/backend.h"
#include "backend/cpu/cache_layout.h"
#include "backend/cpu/cpu_backend.h"
#include "core/error.h"
#include "core/system.h"

namespace rapshee {
namespace {

constexpr std::array kDevices = {"cpu"};

void check_device(const std::string& device) {
  if (device == kDevices[0]) return;
  throw DeviceError("device '" + device + "' is not in this build; available: " + kDevices[0]);
}

}  // namespace

std::unique_ptr<Backend> make_backend(const std::string& device, const BackendOptions& options) {
  check_device(device);
  return std::make_unique<cpu::CpuBackend>(options);
}

std::span<const char* const> list_devices() { return kDevices; }

int default_block_size(const std::string& device) {
  check_device(device);
  return cpu::kLanes;
}

size_t kv_block_bytes(const std::string& device, const ModelConfig& config, DType kv_dtype,
                      int block_size) {
  check_device(device);
  cpu::check_block_size(block_size);
  const cpu::CacheLayout layout{kv_dtype, config.head_dim, block_size};
  return layout.head_bytes() * static_cast<size_t>(config.num_kv_heads) *
         static_cast<size_t>(config.num_layers());
}

size_t available_memory(const std::string& device) {
  check_device(device);
  return available_memory();
}

}  // namespace rapshee
