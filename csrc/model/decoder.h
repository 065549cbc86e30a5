// The only forward pass: every family is this decoder with another ModelConfig.
#pragma once

#include <memory>

#include "backend/backend.h"
#include "model/config.h"
#include "model/weights.h"

namespace rapshee {

class Decoder {
 public:
  // Keeps references to all three.
  Decoder(const ModelConfig& config, const ModelWeights& weights, Backend& backend);

  // Runs all layers over the batch of the step in progress; its hidden states are then x().
  void forward();

  const Buffer& x() const { return *x_; }  // [T, hidden]

 private:
  void layer(int index);

  const ModelConfig& config_;
  const ModelWeights& weights_;
  Backend& backend_;
  std::unique_ptr<Buffer> x_;          // [T, hidden] residual stream
  std::unique_ptr<Buffer> qkv_;        // [T, q_size + 2 * kv_size]
  std::unique_ptr<Buffer> attention_;  // [T, q_size]
};

}  // namespace rapshee
