// What this GPU can do, without any of the engine's code: a copy, a read, an empty kernel, and what
// a kernel of a recorded graph costs, with and without programmatic dependent launch. Prints a line
// of JSON for each; what fails is a line with an "error". Built and run by measure_ceilings.py.
//
//   nvcc -O3 -std=c++20 -arch=sm_90 bench/cuda/ceilings.cu -o ceilings && ./ceilings [MIB]
//
// MIB: size of the working set, 4096 without it.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int kRepeats = 20;
constexpr int kChain = 200;                 // kernels of a graph
constexpr size_t kFlushBytes = 256u << 20;  // as CallStream::time of the bindings

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
#define CHECK(call) check(call, #call)

__global__ void fill(uint4* to, size_t count) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z ^= z >> 27;
    const auto low = static_cast<uint32_t>(z), high = static_cast<uint32_t>(z >> 32);
    to[i] = make_uint4(low, high, low ^ 0x55555555u, high ^ 0x33333333u);
  }
}

// Four independent loads of 16 bytes a thread at a time; what they hold decides whether anything is
// written, so that they cannot be left out.
__global__ void __launch_bounds__(512) read(const uint4* from, size_t count, uint32_t* found) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  uint32_t bits = 0;
  for (; i + 3 * step < count; i += 4 * step) {
    const uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
    bits ^= a.x ^ b.x ^ c.x ^ d.x ^ a.y ^ b.y ^ c.y ^ d.y;
    bits += a.z ^ b.z ^ c.z ^ d.z ^ a.w ^ b.w ^ c.w ^ d.w;
  }
  for (; i < count; i += step) bits += from[i].x ^ from[i].y ^ from[i].z ^ from[i].w;
  if (bits == 0x9e3779b9u) *found = bits;
}

__global__ void empty() {}

__global__ void empty_dependent() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

cudaStream_t stream;

// Seconds of `body` by events, after `before`.
double seconds(const std::function<void()>& before, const std::function<void()>& body) {
  cudaEvent_t from, to;
  CHECK(cudaEventCreate(&from));
  CHECK(cudaEventCreate(&to));
  std::vector<double> times;
  for (int i = -3; i < kRepeats; ++i) {
    before();
    CHECK(cudaEventRecord(from, stream));
    body();
    CHECK(cudaEventRecord(to, stream));
    CHECK(cudaEventSynchronize(to));
    float ms = 0.0f;
    CHECK(cudaEventElapsedTime(&ms, from, to));
    if (i >= 0) times.push_back(ms * 1e-3);
  }
  CHECK(cudaEventDestroy(from));
  CHECK(cudaEventDestroy(to));
  return median(times);
}

void launch_chain(bool dependent) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = dependent ? 1 : 0;
  for (int i = 0; i < kChain; ++i) {
    CHECK(dependent ? cudaLaunchKernelEx(&config, empty_dependent)
                    : cudaLaunchKernelEx(&config, empty));
  }
}

cudaGraphExec_t record_chain(bool dependent) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  launch_chain(dependent);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  CHECK(cudaGraphDestroy(graph));
  return executable;
}

// One line for `name`: `value` in its unit.
void report(const char* name, const char* what, const std::function<double()>& value) {
  try {
    std::printf("{\"ceiling\": \"%s\", \"what\": \"%s\", \"value\": %.9g}\n", name, what, value());
  } catch (const std::exception& error) {
    std::printf("{\"ceiling\": \"%s\", \"what\": \"%s\", \"value\": null, \"error\": \"%s\"}\n",
                name, what, error.what());
  }
  std::fflush(stdout);
}

double launch_seconds_of_graph(bool dependent) {
  const cudaGraphExec_t graph = record_chain(dependent);
  const double total = seconds([] {}, [&] { CHECK(cudaGraphLaunch(graph, stream)); });
  CHECK(cudaGraphExecDestroy(graph));
  return total / kChain;
}

// From the call to the host knowing that it is done.
double round_trip_of_graph() {
  const cudaGraphExec_t graph = record_chain(false);
  std::vector<double> times;
  for (int i = -3; i < kRepeats; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    CHECK(cudaGraphLaunch(graph, stream));
    CHECK(cudaStreamSynchronize(stream));
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    if (i >= 0) times.push_back(time.count());
  }
  CHECK(cudaGraphExecDestroy(graph));
  return median(times);
}

void measure(size_t bytes) {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  CHECK(cudaStreamCreate(&stream));
  const int blocks = 4 * device.multiProcessorCount;
  std::byte* memory = nullptr;
  CHECK(cudaMalloc(&memory, bytes + kFlushBytes));
  std::byte* const scratch = memory + bytes;
  auto* const words = reinterpret_cast<uint4*>(memory);
  const size_t count = bytes / sizeof(uint4);
  fill<<<blocks, 512, 0, stream>>>(words, count);
  CHECK(cudaGetLastError());
  CHECK(cudaStreamSynchronize(stream));

  const auto nothing = [] {};
  const auto flush = [&] { CHECK(cudaMemsetAsync(scratch, 0, kFlushBytes, stream)); };
  report("memory", "bytes/s of a copy within the device, read and written", [&] {
    const double time = seconds(nothing, [&] {
      CHECK(
          cudaMemcpyAsync(memory + bytes / 2, memory, bytes / 2, cudaMemcpyDeviceToDevice, stream));
    });
    return static_cast<double>(bytes) / time;
  });
  report("read", "bytes/s of a kernel that only reads", [&] {
    const double time = seconds(nothing, [&] {
      read<<<blocks, 512, 0, stream>>>(words, count, reinterpret_cast<uint32_t*>(scratch));
      CHECK(cudaGetLastError());
    });
    return static_cast<double>(bytes) / time;
  });
  report("launch", "seconds from event to event around an empty kernel, cache flushed before", [&] {
    return seconds(flush, [&] {
      empty<<<1, 32, 0, stream>>>();
      CHECK(cudaGetLastError());
    });
  });
  report("graph_kernel", "seconds of an empty kernel in a graph of 200",
         [&] { return launch_seconds_of_graph(false); });
  report("graph_kernel_dependent", "the same with programmatic dependent launch",
         [&] { return launch_seconds_of_graph(true); });
  report("graph_round_trip", "seconds of that graph from the host's call to its end",
         [&] { return round_trip_of_graph(); });
  CHECK(cudaFree(memory));
}

}  // namespace

int main(int argc, char** argv) {
  const long mib = argc > 1 ? std::atol(argv[1]) : 4096;
  if (mib < 2) {
    std::fprintf(stderr, "usage: ceilings [MIB], 2 or more\n");
    return 2;
  }
  try {
    measure(static_cast<size_t>(mib) << 20);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
