#include "model/decoder.h"

namespace rapshee {

Decoder::Decoder(const ModelConfig& config, const ModelWeights& weights, Backend& backend)
    : config_(config),
      weights_(weights),
      backend_(backend),
      x_(backend.allocate(config.hidden_size)),
      qkv_(backend.allocate(config.qkv_size())),
      attention_(backend.allocate(config.q_size())) {}

void Decoder::forward() {
  backend_.embed(*weights_.embed, *x_);
  for (int i = 0; i < config_.num_layers(); ++i) layer(i);
}

void Decoder::layer(int index) {
  const LayerWeights& w = weights_.layers[static_cast<size_t>(index)];
  const AttentionArgs attention{index, *qkv_, *attention_, w.q_norm.get(), w.k_norm.get()};
  backend_.norm_qkv({*x_, w.attn_norm.get(), w.q, w.k, w.v, *qkv_});
  backend_.qk_norm_rope_cache(attention);
  backend_.paged_attention(attention);
  backend_.out_proj({*attention_, w.out, w.attn_post_norm.get(), *x_});
  backend_.norm_gated_mlp({w.mlp_norm.get(), w.gate, w.up, w.down, w.mlp_post_norm.get(), *x_});
}

}  // namespace rapshee
