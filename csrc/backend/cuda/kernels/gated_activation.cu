// The end of a gated layer whose products are there already: act(gate) * up, rounded to halves.
//
// Grid: (row, parts of a row); a thread takes 4 columns. Bytes: 8 read and 2 written an element, by
// accesses of 16 and 8 bytes of neighbouring lanes. Operations: about 10 an element. Bound: memory;
// for few rows the launch. Registers: under 32, so that an SM is full.
//
// Every element is computed alone, by the formula of gated_linear.
#include "backend/cuda/kernels/activation.cuh"
#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 4;  // of a thread: 16 bytes of floats

template <class T>
RAPSHEE_KERNEL(kThreads, 8)
gated_activation_kernel(RAPSHEE_PARAM GatedActivationArgs args) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const int64_t column = (int64_t{dev::block().y} * kThreads + dev::thread()) * kColumns;
  if (column >= args.size) return;
  const int64_t row = dev::block().x;
  const dev::Ptr<const float> from =
      dev::Ptr<const float>(args.gate_up) + (row * 2 * args.size + column);
  const dev::Vec16 gates = dev::load16(from), ups = dev::load16(from + args.size);
  float to[kColumns];
  RAPSHEE_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    to[c] =
        gate(args.activation, dev::bits_to_float(gates.word[c])) * dev::bits_to_float(ups.word[c]);
  }
  const dev::Ptr<T> out = dev::Ptr<T>(static_cast<T*>(args.out)) + (row * args.size + column);
  dev::store8(out, dev::Vec8{{dev::pack2<T>(to[0], to[1]), dev::pack2<T>(to[2], to[3])}});
}

}  // namespace

void gated_activation(const GatedActivationArgs& args, Stream stream) {
  RAPSHEE_CHECK(args.size % kColumns == 0, "gated activation: got a size of ", args.size,
                ", expected a multiple of ", kColumns);
  if (args.rows == 0 || args.size == 0) return;
  constexpr int64_t kColumnsOfBlock = int64_t{kThreads} * kColumns;
  const auto parts = static_cast<unsigned>((args.size + kColumnsOfBlock - 1) / kColumnsOfBlock);
  const dev::Launch config{
      .grid = {static_cast<unsigned>(args.rows), parts}, .threads = kThreads, .stream = stream};
  if (args.half == HalfType::kBF16) {
    dev::launch(gated_activation_kernel<dev::Bf16>, config, args);
  } else {
    dev::launch(gated_activation_kernel<dev::F16>, config, args);
  }
}

}  // namespace rapshee::cuda
