// What a step's layers share, made on the device from what the host sent: token ids that were
// sampled by the step before, and the cosines and sines of the positions.
//
// Grid: a thread for each row of resolve_tokens, for each angle of rope_table. Bytes: a few a row,
// and 8 an angle, written once for all layers. Bound: the launch. Angles are reduced in double
// arithmetic, about 5 operations each, which is slow on devices for graphics and still nothing
// beside a layer. Every element is computed alone.
#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda {
namespace {

constexpr int kThreads = 128;

constexpr unsigned num_blocks(int64_t elements) {
  return static_cast<unsigned>((elements + kThreads - 1) / kThreads);
}

RAPSHEE_DEVICE int64_t element_of_thread() {
  return int64_t{dev::block().x} * kThreads + dev::thread();
}

RAPSHEE_KERNEL(kThreads, 1)
resolve_kernel(RAPSHEE_PARAM ResolveArgs args) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const int64_t row = element_of_thread();
  if (row >= args.rows) return;
  const dev::Ptr<int32_t> ids(args.token_ids);
  const int32_t id = ids[row];
  if (id >= 0) return;
  const int32_t sample = dev::Ptr<const int32_t>(args.samples)[~id];
  ids[row] = sample < 0 ? 0 : sample;
}

RAPSHEE_KERNEL(kThreads, 1)
rope_table_kernel(RAPSHEE_PARAM RopeTableArgs args) {
  dev::pdl_wait();
  dev::pdl_trigger();
  const int64_t at = element_of_thread();
  if (at >= int64_t{args.rows} * args.half_dim) return;
  const int64_t row = at / args.half_dim;
  const float position = static_cast<float>(dev::Ptr<const int32_t>(args.positions)[row]);
  const float angle = position * dev::Ptr<const float>(args.inv_freq)[at % args.half_dim];
  // Half turns and the rest, which is within a quarter turn: of it rounding to float loses 2^-26 at
  // most, and the double product less than that up to angles of 2^26.
  constexpr double kInversePi = 0.31830988618379067154;
  const double half_turns = static_cast<double>(angle) * kInversePi;
  const double whole = dev::rint(half_turns);
  float sin, cos;
  dev::sincospi(static_cast<float>(half_turns - whole), &sin, &cos);
  const bool odd = (static_cast<int64_t>(whole) & 1) != 0;
  const float factor = odd ? -args.attention_factor : args.attention_factor;
  dev::Ptr<float>(args.cos)[at] = cos * factor;
  dev::Ptr<float>(args.sin)[at] = sin * factor;
}

}  // namespace

void resolve_tokens(const ResolveArgs& args, Stream stream) {
  if (args.rows == 0) return;
  dev::launch(resolve_kernel,
              {.grid = {num_blocks(args.rows)}, .threads = kThreads, .stream = stream}, args);
}

void rope_table(const RopeTableArgs& args, Stream stream) {
  const int64_t angles = int64_t{args.rows} * args.half_dim;
  if (angles == 0) return;
  dev::launch(rope_table_kernel,
              {.grid = {num_blocks(angles)}, .threads = kThreads, .stream = stream}, args);
}

}  // namespace rapshee::cuda
