// cuda_api.h on the CUDA runtime, which is linked statically and opens the driver when it is used.
#include <cuda_runtime.h>

#include <cstdlib>
#include <string>

#include "backend/cuda/cuda_api.h"
#include "core/error.h"

namespace rapshee::cuda::api {
namespace {

constexpr int kMinMajor = 8;  // compute capability: cp.async, mma of bf16

// What to do about an error; empty where its words say it all.
const char* advice(cudaError_t status) {
  switch (status) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
    case cudaErrorContained:
    case cudaErrorExternalDevice:
    case cudaErrorMpsClientTerminated:
    case cudaErrorTensorMemoryLeak:
      return "; the device can no longer be used by this process: restart it";
    case cudaErrorInitializationError:
      return "; a child forked after its parent had used CUDA cannot use it: start processes with "
             "'spawn'";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "; this build has no code for this GPU: build with its architecture in "
             "CMAKE_CUDA_ARCHITECTURES";
    case cudaErrorDevicesUnavailable:
      return "; another process may have the GPU to itself";
    default:
      return "";
  }
}

std::string describe(cudaError_t status) {
  return concat(cudaGetErrorString(status), " (", cudaGetErrorName(status), ")", advice(status));
}

// A failed call stays the runtime's last error, from which end_capture learns that something was
// refused in between.
void check(cudaError_t status, const char* doing) {
  if (status != cudaSuccess) throw DeviceError(concat("CUDA, ", doing, ": ", describe(status)));
}

std::string version_name(int version) { return concat(version / 1000, ".", version % 1000 / 10); }

std::string describe_unavailable(cudaError_t status) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "there is no NVIDIA driver: libcuda.so.1 was not found";
  if (status == cudaErrorInsufficientDriver) {
    return concat("the NVIDIA driver is too old: it supports CUDA ", version_name(driver),
                  ", and this build needs ", version_name(runtime), ": update the driver");
  }
  if (status == cudaErrorNoDevice || status == cudaSuccess) {
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    if (visible == nullptr) return "there is no NVIDIA GPU";
    return concat("there is no NVIDIA GPU among CUDA_VISIBLE_DEVICES='", visible, "'");
  }
  return describe(status);
}

cudaError_t count_devices(int& count) {
  count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    count = 0;
    cudaGetLastError();
  }
  return status;
}

void check_index(int device) {
  int count = 0;
  const cudaError_t status = count_devices(count);
  if (count == 0) throw DeviceError("CUDA: " + describe_unavailable(status));
  if (device < 0 || device >= count) {
    throw DeviceError(concat("CUDA device: got ", device, ", expected 0 to ", count - 1));
  }
}

// `call` is the runtime's allocation, of `kind` memory.
template <class Call>
void* allocate_with(size_t bytes, const char* kind, Call&& call) {
  void* memory = nullptr;
  const cudaError_t status = call(&memory);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // the device stays usable
    const MemoryInfo info = memory_info();
    throw DeviceError(concat("out of memory: ", bytes, " bytes of ", kind, " memory asked for, ",
                             info.free, " of ", info.total, " on the device are free"));
  }
  check(status, concat("allocation of ", bytes, " bytes of ", kind, " memory").c_str());
  return memory;
}

}  // namespace

const char* device_kind() noexcept { return "cuda"; }

int device_count() noexcept {
  int count = 0;
  count_devices(count);
  return count;
}

std::string unavailable_reason() {
  int count = 0;
  const cudaError_t status = count_devices(count);
  return count > 0 ? "" : describe_unavailable(status);
}

DeviceInfo device_info(int device) {
  check_index(device);
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "properties of the device");
  return {properties.name, properties.major, properties.minor, properties.totalGlobalMem};
}

void set_device(int device) {
  check_index(device);
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "compute capability of the device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "compute capability of the device");
  if (major < kMinMajor) {
    throw DeviceError(concat("CUDA device ", device, " has compute capability ", major, ".", minor,
                             ", expected ", kMinMajor,
                             ".0 or later (A100 and newer): choose another GPU with "
                             "CUDA_VISIBLE_DEVICES, or use the device 'cpu'"));
  }
  check(cudaSetDevice(device), "choice of the device");
}

MemoryInfo memory_info() {
  MemoryInfo info;
  check(cudaMemGetInfo(&info.free, &info.total), "memory of the device");
  return info;
}

void* allocate(size_t bytes) {
  return allocate_with(bytes, "device", [&](void** memory) { return cudaMalloc(memory, bytes); });
}

void free(void* memory) noexcept {
  if (memory != nullptr) cudaFree(memory);
}

void* allocate_pinned(size_t bytes) {
  return allocate_with(bytes, "page-locked host",
                       [&](void** memory) { return cudaMallocHost(memory, bytes); });
}

void free_pinned(void* memory) noexcept {
  if (memory != nullptr) cudaFreeHost(memory);
}

Stream create_stream() {
  Stream stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creation of a stream");
  return stream;
}

void destroy_stream(Stream stream) noexcept {
  if (stream != nullptr) cudaStreamDestroy(stream);
}

void synchronize(Stream stream) { check(cudaStreamSynchronize(stream), "work on a stream"); }

void copy_to_device(void* to, const void* from, size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream), "copy to the device");
}

void copy_to_host(void* to, const void* from, size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream), "copy to the host");
}

void fill(void* memory, uint8_t value, size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemsetAsync(memory, value, bytes, stream), "fill of device memory");
}

Event create_event(bool timing) {
  Event event = nullptr;
  check(cudaEventCreateWithFlags(&event, timing ? cudaEventDefault : cudaEventDisableTiming),
        "creation of an event");
  return event;
}

void destroy_event(Event event) noexcept {
  if (event != nullptr) cudaEventDestroy(event);
}

void record(Event event, Stream stream) {
  check(cudaEventRecord(event, stream), "record of an event");
}

void wait(Stream stream, Event event) {
  check(cudaStreamWaitEvent(stream, event, 0), "wait for an event");
}

void synchronize(Event event) { check(cudaEventSynchronize(event), "work before an event"); }

float elapsed_ms(Event from, Event to) {
  float ms = 0.0f;
  check(cudaEventElapsedTime(&ms, from, to), "time between events");
  return ms;
}

void begin_capture(Stream stream) {
  cudaGetLastError();  // errors from here on are the capture's
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin of a capture");
}

Graph end_capture(Stream stream) {
  // A launch that was refused leaves a capture without it, but valid.
  const cudaError_t refused = cudaGetLastError();
  cudaGraph_t recording = nullptr;
  cudaError_t status = cudaStreamEndCapture(stream, &recording);
  if (refused != cudaSuccess) status = refused;
  Graph graph = nullptr;
  if (status == cudaSuccess) status = cudaGraphInstantiate(&graph, recording, 0);
  if (recording != nullptr) cudaGraphDestroy(recording);
  check(status, "end of a capture, which is of no use");
  return graph;
}

void launch(Graph graph, Stream stream) {
  check(cudaGraphLaunch(graph, stream), "launch of a recorded graph");
}

void destroy_graph(Graph graph) noexcept {
  if (graph != nullptr) cudaGraphExecDestroy(graph);
}

}  // namespace rapshee::cuda::api
