// Logits of families that scale or cap them, in place, before anything reads them.
//
// Grid: a thread for each 4 logits, across rows. Bytes: 8 a logit. Operations: a tanh a logit where
// they are capped. Expected bound: memory; for few rows the launch.
//
// Every logit is computed alone.
#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 4;  // of a thread: 16 bytes of floats

struct ScaleParams {
  float* logits = nullptr;
  int64_t count = 0;
  float inner = 1.0f;  // factor of a logit
  float cap = 0.0f;    // factor of its tanh; 0: none is taken
};

RAPSHEE_DEVICE float scaled(const ScaleParams& params, float logit) {
  const float y = logit * params.inner;
  const bool finite = y - y == 0.0f;
  return params.cap == 0.0f || !finite ? y : params.cap * dev::tanh(y);
}

RAPSHEE_KERNEL(kThreads, 4)
scale_logits_kernel(RAPSHEE_PARAM ScaleParams params) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const int64_t first = (int64_t{dev::block().x} * kThreads + dev::thread()) * kColumns;
  const dev::Ptr<float> logits(params.logits);
  if (first + kColumns <= params.count) {
    dev::Vec16 v = dev::load16(logits + first);
    RAPSHEE_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      v.word[c] = dev::float_to_bits(scaled(params, dev::bits_to_float(v.word[c])));
    }
    dev::store16(logits + first, v);
    return;
  }
  for (int64_t i = first; i < params.count; ++i) logits[i] = scaled(params, logits[i]);
}

}  // namespace

void scale_logits(const ScaleLogitsArgs& args, Stream stream) {
  RAPSHEE_CHECK(args.scale > 0.0f && args.softcap >= 0.0f, "scale: got ", args.scale,
                ", softcap: ", args.softcap, ", expected above 0 and none below 0");
  if (args.count == 0) return;
  constexpr int64_t kOfBlock = int64_t{kThreads} * kColumns;
  const ScaleParams params{args.logits, args.count,
                           args.softcap > 0.0f ? args.scale / args.softcap : args.scale,
                           args.softcap};
  const dev::Grid grid{static_cast<unsigned>((args.count + kOfBlock - 1) / kOfBlock)};
  dev::launch(scale_logits_kernel, {grid, kThreads, 0, stream}, params);
}

}  // namespace rapshee::cuda
