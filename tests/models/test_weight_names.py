from __future__ import annotations

import pytest

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.models.config import ModelConfig
from rapshee_engine.models.families import config_from_hf
from rapshee_engine.models.weight_names import (
    GGUF_NAMES,
    HF_NAMES,
    NameTable,
    canonical_shapes,
    match_tensors,
)
from reference.tiny_llama import make_config, make_weights

Shapes = dict[str, tuple[int, ...]]


def model(**changes: object) -> ModelConfig:
    return config_from_hf(make_config(**changes), "config.json")


def file_shapes(names: NameTable, config: ModelConfig) -> Shapes:
    return {names.file_name(name): shape for name, shape in canonical_shapes(config).items()}


def test_canonical_shapes() -> None:
    config = model(
        num_hidden_layers=1,
        head_dim=8,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    )
    assert canonical_shapes(config) == {
        "embed.weight": (160, 64),
        "layers.0.attn_norm.weight": (64,),
        "layers.0.q.weight": (32, 64),
        "layers.0.q.bias": (32,),
        "layers.0.k.weight": (16, 64),
        "layers.0.k.bias": (16,),
        "layers.0.v.weight": (16, 64),
        "layers.0.v.bias": (16,),
        "layers.0.o.weight": (64, 32),
        "layers.0.o.bias": (64,),
        "layers.0.mlp_norm.weight": (64,),
        "layers.0.gate.weight": (96, 64),
        "layers.0.gate.bias": (96,),
        "layers.0.up.weight": (96, 64),
        "layers.0.up.bias": (96,),
        "layers.0.down.weight": (64, 96),
        "layers.0.down.bias": (64,),
        "final_norm.weight": (64,),
        "head.weight": (160, 64),
    }


def test_tied_models_without_biases_have_fewer() -> None:
    names = canonical_shapes(model())
    assert "head.weight" not in names
    assert not [name for name in names if name.endswith(".bias")]
    assert len(names) == 2 + 2 * 9


def test_norms_of_heads_come_with_the_family() -> None:
    shapes = canonical_shapes(model(model_type="qwen3", num_hidden_layers=1, head_dim=8))
    added = {name: shape for name, shape in shapes.items() if name not in canonical_shapes(model())}
    assert added == {"layers.0.q_norm.weight": (8,), "layers.0.k_norm.weight": (8,)}
    names = [GGUF_NAMES.file_name(name) for name in added]
    assert names == ["blk.0.attn_q_norm.weight", "blk.0.attn_k_norm.weight"]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_hf_names_are_those_of_transformers(model_type: str, has_biases: bool, tied: bool) -> None:
    changes = {
        "model_type": model_type,
        "attention_bias": has_biases,
        "mlp_bias": has_biases and model_type == "llama",
        "tie_word_embeddings": tied,
    }
    # These names load strictly into transformers' model, see golden/make_tiny_llama.py.
    stored = {name: w.shape for name, w in make_weights(make_config(**changes), seed=0).items()}
    assert file_shapes(HF_NAMES, model(**changes)) == stored


def test_gguf_names() -> None:
    assert {
        GGUF_NAMES.file_name(name)
        for name in canonical_shapes(model(num_hidden_layers=1, tie_word_embeddings=False))
    } == {
        "token_embd.weight",
        "blk.0.attn_norm.weight",
        "blk.0.attn_q.weight",
        "blk.0.attn_k.weight",
        "blk.0.attn_v.weight",
        "blk.0.attn_output.weight",
        "blk.0.ffn_norm.weight",
        "blk.0.ffn_gate.weight",
        "blk.0.ffn_up.weight",
        "blk.0.ffn_down.weight",
        "output_norm.weight",
        "output.weight",
    }
    assert GGUF_NAMES.file_name("layers.17.down.bias") == "blk.17.ffn_down.bias"


@pytest.mark.parametrize("names", [HF_NAMES, GGUF_NAMES], ids=["hf", "gguf"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_every_missing_tensor_is_named(names: NameTable, model_type: str) -> None:
    config = model(model_type=model_type, tie_word_embeddings=False)
    shapes = file_shapes(names, config)
    matched = match_tensors(config, names, shapes, "file")
    assert matched == {name: names.file_name(name) for name in canonical_shapes(config)}
    for missing in shapes:
        rest = {name: shape for name, shape in shapes.items() if name != missing}
        with pytest.raises(WeightFileError, match="is missing") as caught:
            match_tensors(config, names, rest, "file")
        assert (caught.value.file, caught.value.tensor) == ("file", missing)


@pytest.mark.parametrize("names", [HF_NAMES, GGUF_NAMES], ids=["hf", "gguf"])
def test_every_wrong_shape_is_named(names: NameTable) -> None:
    config = model()
    shapes = file_shapes(names, config)
    for wrong, shape in shapes.items():
        for other in ((shape[0] + 1, *shape[1:]), (*shape, 1), (*shape[::-1], 1)):
            with pytest.raises(WeightFileError, match="must have shape") as caught:
                match_tensors(config, names, {**shapes, wrong: other}, "file")
            assert caught.value.tensor == wrong


@pytest.mark.parametrize(
    ("names", "extra"),
    [
        (HF_NAMES, "model.layers.0.self_attn.q_proj.bias"),
        (HF_NAMES, "model.layers.0.self_attn.q_norm.weight"),
        (HF_NAMES, "model.layers.2.input_layernorm.weight"),
        (HF_NAMES, "score.weight"),
        (GGUF_NAMES, "blk.0.attn_q.bias"),
        (GGUF_NAMES, "blk.0.ffn_gate_exps.weight"),
        (GGUF_NAMES, "rope_factors_long.weight"),
    ],
)
def test_extra_tensors_are_refused_by_name(names: NameTable, extra: str) -> None:
    config = model()
    with pytest.raises(UnsupportedModelError, match=f"file: tensor '{extra}' is not known"):
        match_tensors(config, names, {**file_shapes(names, config), extra: (1,)}, "file")


@pytest.mark.parametrize(
    ("names", "extra"),
    [
        (HF_NAMES, "model.layers.1.self_attn.rotary_emb.inv_freq"),
        (HF_NAMES, "lm_head.weight"),
        (GGUF_NAMES, "rope_freqs.weight"),
    ],
)
def test_harmless_tensors_are_left_out(names: NameTable, extra: str) -> None:
    config = model()
    shapes = file_shapes(names, config)
    matched = match_tensors(config, names, {**shapes, extra: (160, 64)}, "file")
    assert set(matched.values()) == set(shapes)
