// The devices of this build and machine, by name.
#include <charconv>

#include "backend/backend.h"
#include "backend/cpu/cache_layout.h"
#include "backend/cpu/cpu_backend.h"
#include "core/error.h"
#include "core/system.h"
#if defined(RAPSHEE_WITH_CUDA)
#include "backend/cuda/cuda_api.h"
#include "backend/cuda/cuda_backend.h"
#endif

namespace rapshee {
namespace {

// What is known of a device before anything is loaded: see the functions of backend.h.
class Device {
 public:
  virtual ~Device() = default;
  virtual std::unique_ptr<Backend> make_backend(const BackendOptions& options) const = 0;
  virtual int default_block_size() const = 0;
  virtual std::vector<std::string> dtypes() const = 0;
  virtual size_t kv_block_bytes(const ModelConfig& config, DType kv_dtype,
                                int block_size) const = 0;
  virtual size_t workspace_bytes(const ModelConfig& config,
                                 const BackendOptions& options) const = 0;
  virtual size_t available_memory() const = 0;
};

class CpuDevice final : public Device {
 public:
  std::unique_ptr<Backend> make_backend(const BackendOptions& options) const override {
    if (!options.deterministic) {
      throw DeviceError(
          "deterministic=False (--no-deterministic) needs a CUDA device; leave it out");
    }
    return std::make_unique<cpu::CpuBackend>(options);
  }
  int default_block_size() const override { return cpu::kLanes; }
  std::vector<std::string> dtypes() const override { return {"bfloat16", "float32"}; }
  size_t kv_block_bytes(const ModelConfig& config, DType kv_dtype, int block_size) const override {
    cpu::check_block_size(block_size);
    const cpu::CacheLayout layout{kv_dtype, config.head_dim, block_size};
    return layout.head_bytes() * static_cast<size_t>(config.num_kv_heads);
  }
  size_t workspace_bytes(const ModelConfig&, const BackendOptions&) const override { return 0; }
  size_t available_memory() const override { return rapshee::available_memory(); }
};

#if defined(RAPSHEE_WITH_CUDA)

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index) {}
  std::unique_ptr<Backend> make_backend(const BackendOptions& options) const override {
    if (options.cache == CacheType::kInt8) {
      throw DeviceError("kv_dtype=int8 (--kv-dtype) is for the CPU; leave it out on CUDA");
    }
    if (options.cache == CacheType::kBFloat16 && options.compute == ComputeType::kFloat16) {
      throw DeviceError("kv_dtype=bf16 (--kv-dtype) does not go with float16; leave it out");
    }
    return std::make_unique<cuda::CudaBackend>(index_, options);
  }
  int default_block_size() const override { return 64; }
  std::vector<std::string> dtypes() const override { return {"bfloat16", "float16"}; }
  size_t kv_block_bytes(const ModelConfig& config, DType, int block_size) const override {
    cuda::check_block_size(block_size);
    return cuda::block_bytes(config, block_size);
  }
  size_t workspace_bytes(const ModelConfig& config, const BackendOptions& options) const override {
    return cuda::CudaBackend::workspace_bytes(config, options);
  }
  size_t available_memory() const override {
    cuda::api::set_device(index_);
    return cuda::api::memory_info().free;
  }

 private:
  int index_;
};

// The device that `name` means: a kind, "cuda" or "cuda-emu", alone or before ":" and a number.
// Null where there is none.
std::unique_ptr<Device> find_cuda(const std::string& name) {
  const std::string kind = cuda::api::device_kind();
  if (name != kind && name.rfind(kind + ":", 0) != 0) return nullptr;
  int index = 0;
  if (name != kind) {
    const char* end = name.data() + name.size();
    const auto [stop, error] = std::from_chars(name.data() + kind.size() + 1, end, index);
    if (error != std::errc() || stop != end) return nullptr;
  }
  if (index < 0 || index >= cuda::api::device_count()) return nullptr;
  return std::make_unique<CudaDevice>(index);
}

#endif

std::string why_missing(const std::string& name) {
  if (name.rfind("cuda", 0) != 0) return "";
  const CudaInfo cuda = cuda_info();
  if (!cuda.built) {
    return " (this build has no CUDA backend: pip install . -C cmake.define.RAPSHEE_CUDA=ON, with "
           "CUDA 13)";
  }
  return cuda.unavailable.empty() ? "" : " (" + cuda.unavailable + ")";
}

std::unique_ptr<Device> find_device(const std::string& name) {
  if (name == "cpu") return std::make_unique<CpuDevice>();
#if defined(RAPSHEE_WITH_CUDA)
  if (std::unique_ptr<Device> device = find_cuda(name)) return device;
#endif
  std::string available;
  for (const std::string& device : list_devices()) {
    available += (available.empty() ? "" : ", ") + device;
  }
  throw DeviceError("no device '" + name + "'" + why_missing(name) + "; available: " + available);
}

}  // namespace

std::unique_ptr<Backend> make_backend(const std::string& device, const BackendOptions& options) {
  return find_device(device)->make_backend(options);
}

int default_block_size(const std::string& device) {
  return find_device(device)->default_block_size();
}

std::vector<std::string> device_dtypes(const std::string& device) {
  return find_device(device)->dtypes();
}

size_t kv_block_bytes(const std::string& device, const ModelConfig& config, DType kv_dtype,
                      int block_size) {
  return find_device(device)->kv_block_bytes(config, kv_dtype, block_size);
}

size_t workspace_bytes(const std::string& device, const ModelConfig& config,
                       const BackendOptions& options) {
  return find_device(device)->workspace_bytes(config, options);
}

size_t available_memory(const std::string& device) {
  return find_device(device)->available_memory();
}

std::vector<std::string> list_devices() {
  std::vector<std::string> names = {"cpu"};
#if defined(RAPSHEE_WITH_CUDA)
  const int count = cuda::api::device_count();
  for (int i = 0; i < count; ++i) names.push_back(concat(cuda::api::device_kind(), ":", i));
#endif
  return names;
}

CudaInfo cuda_info() {
  CudaInfo info;
#if defined(RAPSHEE_WITH_CUDA)
  info.built = true;
  info.kind = cuda::api::device_kind();
  info.unavailable = cuda::api::unavailable_reason();
  for (int i = 0; i < cuda::api::device_count(); ++i) {
    const cuda::api::DeviceInfo device = cuda::api::device_info(i);
    info.models.push_back(concat(device.name, " (sm_", device.major, device.minor, ", ",
                                 device.total_memory >> 30, " GiB)"));
  }
#endif
  return info;
}

}  // namespace rapshee
