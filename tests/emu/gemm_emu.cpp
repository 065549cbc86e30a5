// gemm.h on the emulated device: sums from the last column to the first, so that nothing agrees bit
// by bit with the kernels by luck.
#include "backend/cuda/gemm.h"
#include "backend/cuda/kernels/device.cuh"

namespace rapshee::cuda {
namespace {

constexpr int kThreads = 32;

template <class T>
RAPSHEE_KERNEL(kThreads, 1)
gemm_kernel(RAPSHEE_PARAM GemmArgs args) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const int64_t row = dev::block().x, output = int64_t{dev::block().y} * kThreads + dev::thread();
  if (output >= args.outputs) return;
  const auto x = dev::Ptr<const T>(static_cast<const T*>(args.x)) + row * args.x_stride;
  const auto w = dev::Ptr<const T>(static_cast<const T*>(args.weight)) + output * args.cols;
  float sum = 0.0f;
  for (int64_t col = args.cols - 1; col >= 0; --col) {
    sum += dev::to_float(x[col]) * dev::to_float(w[col]);
  }
  if (args.bias != nullptr) sum += dev::Ptr<const float>(args.bias)[output];
  dev::Ptr<float>(args.y)[row * args.y_stride + output] = sum;
}

class EmulatedGemm final : public Gemm {
 public:
  void run(const GemmArgs& args, Stream stream) override {
    if (args.rows == 0) return;
    const dev::Launch config{
        .grid = {static_cast<unsigned>(args.rows),
                 static_cast<unsigned>((args.outputs + kThreads - 1) / kThreads)},
        .threads = kThreads,
        .stream = stream};
    if (args.half == HalfType::kBF16) {
      dev::launch(gemm_kernel<dev::Bf16>, config, args);
    } else {
      dev::launch(gemm_kernel<dev::F16>, config, args);
    }
  }
};

}  // namespace

std::unique_ptr<Gemm> make_gemm() { return std::make_unique<EmulatedGemm>(); }

}  // namespace rapshee::cuda
