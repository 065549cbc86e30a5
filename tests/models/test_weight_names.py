from __future__ import annotations

from collections.abc import Callable

import pytest

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.models.config import ModelConfig
from rapshee_engine.models.hf_config import config_from_hf
from rapshee_engine.models.hf_families import HF_FAMILIES
from rapshee_engine.models.weight_names import (
    NameTable,
    TensorRows,
    canonical_shapes,
    gguf_names,
    hf_names,
    match_tensors,
)
from reference.tiny_families import FAMILIES, family_config, family_weights

Shapes = dict[str, tuple[int, ...]]
MakeNames = Callable[[ModelConfig], NameTable]

FORMATS = pytest.mark.parametrize("make_names", [hf_names, gguf_names], ids=["hf", "gguf"])
EACH_FAMILY = pytest.mark.parametrize("model_type", sorted(HF_FAMILIES))


def model(**changes: object) -> ModelConfig:
    config = family_config(str(changes.pop("model_type", "llama")), vocab_size=160, **changes)
    return config_from_hf(config, "config.json")


def file_shapes(names: NameTable, config: ModelConfig) -> Shapes:
    """Tensors of a file that has the fused ones only where it must."""
    needed = canonical_shapes(config)
    located = (names.locate(name, needed, ()) for name in needed)
    return {rows.name: shape for rows, shape in located}


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
    names = [gguf_names(model(model_type="qwen3")).file_name(name) for name in added]
    assert names == ["blk.0.attn_q_norm.weight", "blk.0.attn_k_norm.weight"]


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@EACH_FAMILY
def test_hf_names_are_those_of_transformers(model_type: str, has_biases: bool, tied: bool) -> None:
    changes = {
        "model_type": model_type,
        "attention_bias": has_biases and HF_FAMILIES[model_type].attention_bias,
        "mlp_bias": has_biases and HF_FAMILIES[model_type].mlp_bias,
        "tie_word_embeddings": tied,
    }
    # These names load strictly into transformers' model, see golden/make_tiny_*.py.
    weights = family_weights(family_config(**changes, vocab_size=160), seed=0)
    stored = {name: w.shape for name, w in weights.items()}
    config = model(**changes)
    assert file_shapes(hf_names(config), config) == stored


def test_every_family_is_tested() -> None:
    assert set(FAMILIES) == set(HF_FAMILIES)


def test_gguf_names() -> None:
    names = gguf_names(model())
    assert {
        names.file_name(name)
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
    assert names.file_name("layers.17.down.bias") == "blk.17.ffn_down.bias"


@FORMATS
@EACH_FAMILY
def test_every_missing_tensor_is_named(make_names: MakeNames, model_type: str) -> None:
    config = model(model_type=model_type, tie_word_embeddings=False)
    names = make_names(config)
    shapes = file_shapes(names, config)
    matched = match_tensors(config, names, shapes, "file")
    assert {name: rows.shape for name, rows in matched.items()} == canonical_shapes(config)
    assert {rows.name for rows in matched.values()} == set(shapes)
    for missing in shapes:
        rest = {name: shape for name, shape in shapes.items() if name != missing}
        with pytest.raises(WeightFileError, match="is missing") as caught:
            match_tensors(config, names, rest, "file")
        assert (caught.value.file, caught.value.tensor) == ("file", missing)


@FORMATS
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_every_wrong_shape_is_named(make_names: MakeNames, model_type: str) -> None:
    config = model(model_type=model_type)
    names = make_names(config)
    shapes = file_shapes(names, config)
    for wrong, shape in shapes.items():
        for other in ((shape[0] + 1, *shape[1:]), (*shape, 1), (*shape[::-1], 1)):
            with pytest.raises(WeightFileError, match="must have shape") as caught:
                match_tensors(config, names, {**shapes, wrong: other}, "file")
            assert caught.value.tensor == wrong


@pytest.mark.parametrize(
    ("make_names", "extra"),
    [
        (hf_names, "model.layers.0.self_attn.q_proj.bias"),
        (hf_names, "model.layers.0.self_attn.q_norm.weight"),
        (hf_names, "model.layers.2.input_layernorm.weight"),
        (hf_names, "score.weight"),
        (gguf_names, "blk.0.attn_q.bias"),
        (gguf_names, "blk.0.ffn_gate_exps.weight"),
        (gguf_names, "blk.0.post_attention_norm.weight"),
        (gguf_names, "output.bias"),
    ],
)
def test_extra_tensors_are_refused_by_name(make_names: MakeNames, extra: str) -> None:
    config = model()
    names = make_names(config)
    with pytest.raises(UnsupportedModelError, match=f"file: tensor '{extra}' is not known"):
        match_tensors(config, names, {**file_shapes(names, config), extra: (1,)}, "file")


@pytest.mark.parametrize(
    ("make_names", "extra"),
    [
        (hf_names, "model.layers.1.self_attn.rotary_emb.inv_freq"),
        (hf_names, "lm_head.weight"),
        (gguf_names, "rope_freqs.weight"),
        (gguf_names, "rope_factors_long.weight"),
        (gguf_names, "rope_factors_short.weight"),
    ],
)
def test_harmless_tensors_are_left_out(make_names: MakeNames, extra: str) -> None:
    config = model()
    names = make_names(config)
    shapes = file_shapes(names, config)
    matched = match_tensors(config, names, {**shapes, extra: (160, 64)}, "file")
    assert {rows.name for rows in matched.values()} == set(shapes)


def test_fused_tensors_are_shared_out_by_rows() -> None:
    config = model(model_type="phi3", num_hidden_layers=1, head_dim=16)
    for names, qkv, gate_up in (
        (hf_names(config), "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"),
        (gguf_names(config), "blk.0.attn_qkv", "blk.0.ffn_up"),
    ):
        shapes = {**file_shapes(names, config), f"{qkv}.weight": (128, 64)}
        for part in "qkv":  # which GGUF files may also have
            shapes.pop(f"blk.0.attn_{part}.weight", None)
        matched = match_tensors(config, names, shapes, "file")
        assert {
            name: rows for name, rows in matched.items() if rows.name.startswith((qkv, gate_up))
        } == {
            "layers.0.q.weight": TensorRows(f"{qkv}.weight", 0, (64, 64)),
            "layers.0.k.weight": TensorRows(f"{qkv}.weight", 64, (32, 64)),
            "layers.0.v.weight": TensorRows(f"{qkv}.weight", 96, (32, 64)),
            "layers.0.gate.weight": TensorRows(f"{gate_up}.weight", 0, (96, 64)),
            "layers.0.up.weight": TensorRows(f"{gate_up}.weight", 96, (96, 64)),
        }
        assert shapes[f"{gate_up}.weight"] == (192, 64)


def test_any_gguf_may_have_fused_queries_keys_and_values() -> None:
    config = model(num_hidden_layers=1, attention_bias=True)
    names = gguf_names(config)
    shapes = file_shapes(names, config)
    for part in "qkv":
        del shapes[f"blk.0.attn_{part}.weight"], shapes[f"blk.0.attn_{part}.bias"]
    shapes |= {"blk.0.attn_qkv.weight": (128, 64), "blk.0.attn_qkv.bias": (128,)}
    matched = match_tensors(config, names, shapes, "file")
    assert matched["layers.0.v.weight"] == TensorRows("blk.0.attn_qkv.weight", 96, (32, 64))
    assert matched["layers.0.k.bias"] == TensorRows("blk.0.attn_qkv.bias", 64, (32,))
    both = {**shapes, "blk.0.attn_q.weight": (64, 64)}
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_q\.weight"):
        match_tensors(config, names, both, "file")
