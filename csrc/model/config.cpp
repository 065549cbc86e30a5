#include "model/config.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace rapshee {
namespace {

// Bounds keep every product of sizes far inside int64 and catch nonsense from hostile headers.
constexpr int64_t kMaxDim = int64_t{1} << 24;
constexpr int kMaxHeadDim = 1024;

void check_range(const char* field, int64_t value, int64_t most) {
  RAPSHEE_CHECK(value >= 1 && value <= most, field, ": got ", value, ", expected 1 to ", most);
}

void check_factor(const char* field, float value) {
  RAPSHEE_CHECK(std::isfinite(value) && value > 0, field, ": got ", value, ", expected above 0");
}

void check_cap(const char* field, float value) {
  RAPSHEE_CHECK(std::isfinite(value) && value >= 0, field, ": got ", value, ", expected 0 or more");
}

void check_rope(const Rope& rope, int head_dim) {
  RAPSHEE_CHECK(2 * rope.inv_freq.size() <= static_cast<size_t>(head_dim), "inv_freq: got ",
                rope.inv_freq.size(), " frequencies, head_dim is ", head_dim);
  RAPSHEE_CHECK(std::isfinite(rope.attention_factor), "attention_factor: not finite");
  for (float f : rope.inv_freq) RAPSHEE_CHECK(std::isfinite(f), "inv_freq: not finite");
}

}  // namespace

std::vector<int> ModelConfig::kv_windows() const {
  std::vector<int> windows;
  for (const LayerConfig& layer : layers) {
    if (std::find(windows.begin(), windows.end(), layer.window) == windows.end()) {
      windows.push_back(layer.window);
    }
  }
  return windows;
}

std::vector<int> ModelConfig::kv_groups() const {
  const std::vector<int> windows = kv_windows();
  std::vector<int> groups;
  for (const LayerConfig& layer : layers) {
    const auto found = std::find(windows.begin(), windows.end(), layer.window);
    groups.push_back(static_cast<int>(found - windows.begin()));
  }
  return groups;
}

std::vector<int64_t> ModelConfig::first_kv_blocks(const std::vector<int>& num_blocks) const {
  std::vector<int64_t> first = {0};
  for (const int group : kv_groups()) {
    first.push_back(first.back() + num_blocks[static_cast<size_t>(group)]);
  }
  return first;
}

void ModelConfig::validate() const {
  check_range("vocab_size", vocab_size, kMaxDim);
  check_range("hidden_size", hidden_size, kMaxDim);
  check_range("intermediate_size", intermediate_size, kMaxDim);
  check_range("num_heads", num_heads, 1 << 12);
  check_range("num_kv_heads", num_kv_heads, num_heads);
  check_range("head_dim", head_dim, kMaxHeadDim);
  check_range("max_position", max_position, int64_t{1} << 30);
  check_range("layers", num_layers(), 1 << 12);
  RAPSHEE_CHECK(num_heads % num_kv_heads == 0, "num_heads: got ", num_heads,
                ", expected a multiple of num_kv_heads ", num_kv_heads);
  RAPSHEE_CHECK(head_dim % 2 == 0, "head_dim: got ", head_dim, ", expected an even number");
  RAPSHEE_CHECK(std::isfinite(rms_norm_eps) && rms_norm_eps >= 0, "rms_norm_eps: got ",
                rms_norm_eps);
  RAPSHEE_CHECK(std::isfinite(query_scale) && query_scale > 0, "query_scale: got ", query_scale);
  check_factor("embed_scale", embed_scale);
  check_factor("residual_scale", residual_scale);
  check_factor("logit_scale", logit_scale);
  check_cap("attn_softcap", attn_softcap);
  check_cap("final_softcap", final_softcap);
  for (const Rope& rope : ropes) check_rope(rope, head_dim);
  for (const LayerConfig& layer : layers) {
    RAPSHEE_CHECK(layer.rope >= -1 && layer.rope < static_cast<int>(ropes.size()),
                  "layer rope: got ", layer.rope, ", there are ", ropes.size());
    RAPSHEE_CHECK(layer.window >= 0, "layer window: got ", layer.window);
  }
}

}  // namespace rapshee
