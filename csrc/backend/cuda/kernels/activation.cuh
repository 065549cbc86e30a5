// The activations of gated layers, for every kernel that ends one: one formula, so that a layer's
// bytes do not depend on which kernel it took.
#pragma once

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/launchers.h"

namespace rapshee::cuda {

RAPSHEE_DEVICE float gate(GatedActivation activation, float v) {
  constexpr float kLog2E = 1.44269504f;
  if (activation == GatedActivation::kSilu) return dev::divide(v, 1.0f + dev::exp2(-v * kLog2E));
  // 0.5 (1 + tanh(u)) is the logistic function of 2 u.
  constexpr float kRootTwoOverPi = 0.797884561f;
  const float u = kRootTwoOverPi * dev::fma(0.044715f * v * v, v, v);
  return dev::divide(v, 1.0f + dev::exp2(-2.0f * u * kLog2E));
}

}  // namespace rapshee::cuda
