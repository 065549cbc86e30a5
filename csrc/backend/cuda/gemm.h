// Matrix products of many rows by a library that rounds as it likes: only where a backend need not
// be deterministic.
//
// Two implementations, chosen when the library is built: cuBLASLt, opened when the first Gemm is
// made (gemm_cublaslt.cpp), and the emulator's (tests/emu).
#pragma once

#include <cstdint>
#include <memory>

#include "backend/cuda/cuda_api.h"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda {

// y = x W^T + bias. Rows of x and W begin at multiples of 16 bytes.
struct GemmArgs {
  HalfType half = HalfType::kBF16;
  const void* x = nullptr;       // [rows, cols] halves
  int64_t x_stride = 0;          // elements
  const void* weight = nullptr;  // [outputs, cols] halves
  const float* bias = nullptr;   // [outputs] or null
  float* y = nullptr;            // [rows, outputs]
  int64_t y_stride = 0;
  int64_t rows = 0, outputs = 0, cols = 0;
};

// Products share a workspace: one stream for all of them. It may be captured meanwhile.
class Gemm {
 public:
  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // as NVIDIA advises for Hopper

  virtual ~Gemm() = default;
  virtual void run(const GemmArgs& args, Stream stream) = 0;
};

// For the current device. DeviceError where the library cannot be opened or used, with what to do
// about it.
std::unique_ptr<Gemm> make_gemm();

}  // namespace rapshee::cuda
