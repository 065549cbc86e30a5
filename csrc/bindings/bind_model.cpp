// ModelConfig and the entries of a checkpoint.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>

#include "bindings/bindings.h"
#include "core/error.h"
#include "model/config.h"
#include "model/weights.h"

namespace py = pybind11;

namespace rapshee::bindings {
namespace {

Activation parse_activation(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  RAPSHEE_CHECK(name == "gelu_tanh", "activation: got '", name, "', expected silu or gelu_tanh");
  return Activation::kGeluTanh;
}

QkNorm parse_qk_norm(const std::string& name) {
  if (name == "none") return QkNorm::kNone;
  if (name == "head") return QkNorm::kHead;
  RAPSHEE_CHECK(name == "row", "qk_norm: got '", name, "', expected none, head or row");
  return QkNorm::kRow;
}

ModelConfig make_config(int64_t vocab_size, int64_t hidden_size, int64_t intermediate_size,
                        int num_heads, int num_kv_heads, int head_dim, int64_t max_position,
                        float rms_norm_eps, float query_scale, float attn_softcap,
                        float embed_scale, float residual_scale, float logit_scale,
                        float final_softcap, const std::string& activation, bool tie_embeddings,
                        bool qkv_bias, bool out_bias, bool mlp_bias, bool pre_norm, bool post_norm,
                        bool norm_zero_centered, const std::string& qk_norm, bool interleaved_qk,
                        std::vector<Rope> ropes, std::vector<LayerConfig> layers) {
  ModelConfig config;
  config.vocab_size = vocab_size;
  config.hidden_size = hidden_size;
  config.intermediate_size = intermediate_size;
  config.num_heads = num_heads;
  config.num_kv_heads = num_kv_heads;
  config.head_dim = head_dim;
  config.max_position = max_position;
  config.rms_norm_eps = rms_norm_eps;
  config.query_scale = query_scale;
  config.attn_softcap = attn_softcap;
  config.embed_scale = embed_scale;
  config.residual_scale = residual_scale;
  config.logit_scale = logit_scale;
  config.final_softcap = final_softcap;
  config.activation = parse_activation(activation);
  config.tie_embeddings = tie_embeddings;
  config.qkv_bias = qkv_bias;
  config.out_bias = out_bias;
  config.mlp_bias = mlp_bias;
  config.pre_norm = pre_norm;
  config.post_norm = post_norm;
  config.norm_zero_centered = norm_zero_centered;
  config.qk_norm = parse_qk_norm(qk_norm);
  config.interleaved_qk = interleaved_qk;
  config.ropes = std::move(ropes);
  config.layers = std::move(layers);
  config.validate();
  return config;
}

}  // namespace

void register_model(py::module_& m) {
  using py::arg;
  py::class_<Rope>(m, "Rope").def(py::init([](std::vector<float> inv_freq, float attention_factor) {
                                    return Rope{std::move(inv_freq), attention_factor};
                                  }),
                                  arg("inv_freq"), arg("attention_factor") = 1.0f);
  py::class_<LayerConfig>(m, "LayerConfig")
      .def(py::init([](int rope, int window) { return LayerConfig{rope, window}; }),
           arg("rope") = 0, arg("window") = 0);
  py::class_<ModelConfig>(m, "ModelConfig")
      .def(py::init(&make_config), py::kw_only(), arg("vocab_size"), arg("hidden_size"),
           arg("intermediate_size"), arg("num_heads"), arg("num_kv_heads"), arg("head_dim"),
           arg("max_position"), arg("rms_norm_eps"), arg("query_scale"), arg("attn_softcap"),
           arg("embed_scale"), arg("residual_scale"), arg("logit_scale"), arg("final_softcap"),
           arg("activation"), arg("tie_embeddings"), arg("qkv_bias"), arg("out_bias"),
           arg("mlp_bias"), arg("pre_norm"), arg("post_norm"), arg("norm_zero_centered"),
           arg("qk_norm"), arg("interleaved_qk"), arg("ropes"), arg("layers"))
      .def_property_readonly("kv_windows", &ModelConfig::kv_windows);
  py::class_<TensorEntry>(m, "TensorEntry")
      .def(py::init([](std::string name, const std::string& dtype, std::vector<int64_t> shape,
                       const std::filesystem::path& file, int64_t offset, int64_t nbytes) {
             RAPSHEE_CHECK(offset >= 0 && nbytes >= 0, "tensor ", name, ": offset ", offset,
                           ", nbytes ", nbytes, "; expected 0 or more");
             return TensorEntry{std::move(name),  parse_dtype(dtype),
                                std::move(shape), file.string(),
                                offset,           nbytes};
           }),
           arg("name"), arg("dtype"), arg("shape"), arg("file"), arg("offset"), arg("nbytes"));
}

}  // namespace rapshee::bindings
