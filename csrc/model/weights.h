// Tensors of a checkpoint by canonical name, checked against the config and repacked.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"

namespace rapshee {

// Where one tensor's bytes lie. An empty file means: filled with counter-based random numbers.
struct TensorEntry {
  std::string name;  // canonical, e.g. "layers.3.q.weight"
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  // outermost first
  std::string file;
  int64_t offset = 0;  // bytes
  int64_t nbytes = 0;
};

struct LinearWeight {
  std::unique_ptr<Weight> weight, bias;  // bias may be null
  operator Linear() const { return {weight.get(), bias.get()}; }
};

struct LayerWeights {
  std::unique_ptr<Weight> attn_norm, mlp_norm;            // [hidden] or null
  std::unique_ptr<Weight> attn_post_norm, mlp_post_norm;  // [hidden] or null
  std::unique_ptr<Weight> q_norm, k_norm;                 // of a head or a row, or null
  LinearWeight q;                                         // [q_size, hidden]
  LinearWeight k, v;                                      // [kv_size, hidden]
  LinearWeight out;                                       // [hidden, q_size]
  LinearWeight gate, up;                                  // [intermediate, hidden]
  LinearWeight down;                                      // [hidden, intermediate]
};

struct ModelWeights {
  std::unique_ptr<Weight> embed;  // [vocab, hidden]
  std::vector<LayerWeights> layers;
  std::unique_ptr<Weight> final_norm;   // [hidden]
  std::unique_ptr<Weight> untied_head;  // [vocab, hidden], null where the embedding serves

  uint64_t checksum = 0;  // over names, dtypes, shapes and bytes of all tensors
  size_t bytes = 0;       // on the device
  bool all_f32 = true;    // every matrix came as F32

  const Weight& head() const { return untied_head ? *untied_head : *embed; }
};

// Called with the bytes read so far and in all; what it throws ends the load.
using Progress = std::function<void(uint64_t done, uint64_t total)>;

// Throws WeightError naming tensor and file where one is missing, unknown, double or of the wrong
// shape, or where its bytes cannot be read.
ModelWeights load_weights(const ModelConfig& config, const std::vector<TensorEntry>& entries,
                          Backend& backend, const Progress& progress);

}  // namespace rapshee
