// The decoder as data. Mirrors python/rapshee_engine/models/config.py.
#pragma once

#include <cstdint>
#include <vector>

namespace rapshee {

enum class Activation : uint8_t { kSilu, kGeluTanh };

// RMSNorm of queries and keys before their rotation: of each head alone, or of a whole row.
enum class QkNorm : uint8_t { kNone, kHead, kRow };

// One rotary embedding. The first 2 * inv_freq.size() dimensions of a head are rotated, in halves
// (dimension i with i + inv_freq.size()); cos and sin are multiplied by attention_factor.
struct Rope {
  std::vector<float> inv_freq;
  float attention_factor = 1.0f;
};

// What may differ from layer to layer.
struct LayerConfig {
  int rope = 0;    // index into ModelConfig::ropes; -1: no rotation
  int window = 0;  // sliding window in tokens, the query's own included; 0: everything is seen
};

struct ModelConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int64_t max_position = 0;
  float rms_norm_eps = 0.0f;
  float query_scale = 0.0f;     // factor on q . k before the softmax
  float attn_softcap = 0.0f;    // scores become cap * tanh(score / cap); 0: they stay
  float embed_scale = 1.0f;     // factor on embedded tokens
  float residual_scale = 1.0f;  // factor on what attention and the MLP add
  float logit_scale = 1.0f;     // factor on logits,
  float final_softcap = 0.0f;   // which then become cap * tanh(logit / cap); 0: they stay
  Activation activation = Activation::kSilu;
  bool tie_embeddings = false;
  bool qkv_bias = false;
  bool out_bias = false;
  bool mlp_bias = false;
  bool pre_norm = true;             // RMSNorm of what attention and the MLP read
  bool post_norm = false;           // RMSNorm of what they add to the residual stream
  bool norm_zero_centered = false;  // norm weights are stored less 1; undone when they are read
  QkNorm qk_norm = QkNorm::kNone;
  bool interleaved_qk = false;  // Q and K rows are stored pairwise, as in llama files of GGUF
  std::vector<Rope> ropes;
  std::vector<LayerConfig> layers;

  int num_layers() const { return static_cast<int>(layers.size()); }
  int group() const { return num_heads / num_kv_heads; }
  int64_t q_size() const { return int64_t{num_heads} * head_dim; }
  int64_t kv_size() const { return int64_t{num_kv_heads} * head_dim; }
  int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
  // Weights of the norms of queries and of keys.
  int64_t q_norm_size() const { return qk_norm == QkNorm::kRow ? q_size() : head_dim; }
  int64_t k_norm_size() const { return qk_norm == QkNorm::kRow ? kv_size() : head_dim; }

  // Layers with one window form a KV group: they share block tables, so that a window's blocks can
  // be given back on their own. The windows of the groups, in the order in which layers begin them.
  std::vector<int> kv_windows() const;
  // The group of each layer.
  std::vector<int> kv_groups() const;
  // Where each layer's blocks begin, counted in blocks of one layer, if its group has num_blocks of
  // them; behind the last layer, all there are.
  std::vector<int64_t> first_kv_blocks(const std::vector<int>& num_blocks) const;

  // Throws InvalidArgument naming the field that cannot be served.
  void validate() const;
};

}  // namespace rapshee
