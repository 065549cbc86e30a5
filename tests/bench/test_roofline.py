from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import roofline
from rapshee_engine import _core
from rapshee_engine.models.hf_config import config_from_hf
from rapshee_engine.weights.loader import Checkpoint, load_checkpoint
from reference.quant import DTYPES, encode
from reference.tiny_llama import make_config, make_weights, write_gguf_file
from roofline import Cost, Limits

LIMITS = Limits(threads=1, isa="scalar", memory=10.0, cache=100.0, peak={"f32": 2.0, "int8": 4.0})


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    config = make_config(tie_word_embeddings=request.param)
    path = tmp_path / "tiny.gguf"
    return load_checkpoint(write_gguf_file(path, config, make_weights(config, 0), dtype="q8_0"))


def test_costs_add_up() -> None:
    cost = Cost(10, {"f32": 1, "int8": 2}) + Cost(5, {"int8": 3, "bf16": 4})
    assert cost == Cost(15, {"f32": 1, "int8": 5, "bf16": 4})
    assert cost * 2 == Cost(30, {"f32": 2, "int8": 10, "bf16": 8})
    assert cost.total_operations == 10


def test_the_slower_of_moving_and_computing_is_the_limit() -> None:
    assert LIMITS.seconds(Cost(50, {"int8": 4})) == (5.0, "memory")
    assert LIMITS.seconds(Cost(50, {"int8": 4}), cached=True) == (1.0, "arithmetic")
    assert LIMITS.seconds(Cost(300, {"int8": 4}), cached=True) == (3.0, "cache")
    # Both kinds of arithmetic take their time.
    assert LIMITS.seconds(Cost(0, {"f32": 2, "int8": 4})) == (2.0, "arithmetic")


def test_limits_are_positive_numbers() -> None:
    for isa in _core.build_info()["isas"]:
        assert _core.measure_read(1 << 20, threads=2, isa=isa) > 0
        for kind in ("f32", "bf16", "int8"):
            assert _core.measure_peak(kind, isa=isa) > 0


def test_wrong_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="kind: got 'fp8', expected f32, bf16 or int8"):
        _core.measure_peak("fp8")
    for threads in (0, 1025):
        with pytest.raises(ValueError, match=f"threads: got {threads}"):
            _core.measure_peak("f32", threads=threads)
        with pytest.raises(ValueError, match=f"threads: got {threads}"):
            _core.measure_read(64, threads=threads)
    with pytest.raises(ValueError, match="nbytes: got 0"):
        _core.measure_read(0)
    with pytest.raises(_core.DeviceError, match="available: scalar"):
        _core.measure_read(64, isa="mmx")


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_bytes_are_those_of_the_panels(dtype: str) -> None:
    data = np.frombuffer(encode(np.zeros((48, 1024)), dtype), np.uint8)
    matrix = _core.PackedMatrix(data, dtype, 48, 1024)
    assert roofline.matrix_bytes(dtype, 48, 1024) == matrix.nbytes


def test_a_product_reads_its_matrix_once_for_all_rows() -> None:
    one, ten = (roofline.linear(n, 64, 32, "q8_0") for n in (1, 10))
    assert one == Cost(64 * 34 + 96 * 4, {"int8": 2 * 64 * 32})
    assert ten == Cost(64 * 34 + 960 * 4, {"int8": 20 * 64 * 32})


def test_attention_counts_visible_pairs() -> None:
    cost = roofline.paged_attention(7, 4, group=3, head_dim=16, tokens=2, dtype="bf16")
    assert cost == Cost(2 * 4 * 16 * 2 + 2 * 2 * 3 * 16 * 4, {"bf16": 4 * 7 * 3 * 16})


def test_a_row_of_an_int8_cache_has_a_scale() -> None:
    cost = roofline.paged_attention(7, 4, group=3, head_dim=16, tokens=2, dtype="int8")
    assert cost == Cost(2 * 4 * (16 + 4) + 2 * 2 * 3 * 16 * 4, {"f32": 4 * 7 * 3 * 16})


def test_rowwise_operations() -> None:
    assert roofline.rms_norm(2, 10) == Cost(200, {"f32": 80})
    assert roofline.rope(3, 8) == Cost(224, {"f32": 72})
    assert roofline.silu_mul(10) == Cost(120, {"f32": 200})
    assert roofline.sampling(2, 100) == Cost(800)


def test_keys_and_values_of_a_token() -> None:
    config = make_config(num_hidden_layers=3, num_key_value_heads=2)
    assert roofline_bytes(config, "bf16") == 2 * 3 * 2 * 16 * 2
    assert roofline_bytes(config, "f32") == 2 * 3 * 2 * 16 * 4


def roofline_bytes(config: dict[str, object], dtype: str) -> float:
    return roofline.kv_token_bytes(config_from_hf(config, "test"), dtype)


def weights_of_layers(checkpoint: Checkpoint) -> float:
    return sum(
        entry.shape[0] * entry.shape[1]
        for entry in checkpoint.entries
        if len(entry.shape) == 2 and entry.name.startswith("layers.")
    )


def test_a_decode_step_reads_layers_head_and_caches(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    layers, head = weights_of_layers(checkpoint), config.vocab_size * config.hidden_size
    cost = roofline.model_step(checkpoint, tokens=1, sampled=5, start=99)
    # The embedding table is gathered from, not read, unless it is the head.
    kv = 5 * 100 * roofline.kv_token_bytes(config, "bf16")
    assert cost.nbytes == pytest.approx((layers + head) * 34 / 32 + kv)
    assert cost.operations["int8"] == 2 * 5 * (layers + head)
    assert cost.operations["bf16"] == 4 * 5 * 100 * 4 * 16 * 2


def test_a_prompt_computes_one_row_of_logits(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    layers, head = weights_of_layers(checkpoint), config.vocab_size * config.hidden_size
    cost = roofline.model_step(checkpoint, tokens=10, sampled=1, start=20)
    assert cost.operations["int8"] == 2 * (10 * layers + head)
    # Token i sees 20 + i + 1 keys.
    assert cost.operations["bf16"] == 4 * (10 * 20 + 55) * 4 * 16 * 2
    assert cost.nbytes == pytest.approx(
        (layers + head) * 34 / 32 + 30 * roofline.kv_token_bytes(config, "bf16")
    )


def test_the_cache_is_wide_with_wide_weights(tmp_path: Path) -> None:
    config = make_config()
    for dtype, expected in (("f32", "f32"), ("q4_1", "bf16"), ("bf16", "bf16")):
        path = tmp_path / f"{dtype}.gguf"
        write_gguf_file(path, config, make_weights(config, 0), dtype=dtype)
        assert roofline.kv_dtype(load_checkpoint(path)) == expected


def test_costs_of_cuda_kernels() -> None:
    # Halves of 2 bytes, floats of 4; scales of a group of 32 columns as in a GGUF block.
    assert roofline.gpu_linear(3, 64, 32, "bf16") == Cost(
        64 * 32 * 2 + 3 * (32 * 2 + 64 * 4), {"bf16": 2 * 3 * 64 * 32}
    )
    assert roofline.gpu_linear(1, 64, 32, "q4_1").nbytes == 64 * 20 + 32 * 2 + 64 * 4
    assert roofline.gpu_linear(1, 64, 256, "q6_k").nbytes == 64 * 256 * 7 / 8 + 256 * 2 + 64 * 4
    decode = roofline.gpu_decode_attention(5, 100, heads=8, kv_heads=2, head_dim=16)
    assert decode == Cost(
        2 * 5 * 100 * 2 * 16 * 2 + 2 * 5 * 8 * 16 * 2, {"bf16": 4 * 5 * 100 * 8 * 16}
    )
    prefill = roofline.gpu_prefill_attention(10, heads=8, kv_heads=2, head_dim=16)
    assert prefill == Cost(2 * 10 * (8 + 2) * 16 * 2, {"bf16": 4 * 55 * 8 * 16})
    assert roofline.gpu_rms_norm(2, 10, splits=3).nbytes == 2 * 10 * (4 + 3 * 4 + 4 + 2) + 40
    assert roofline.gpu_rms_norm(2, 10, splits=3, norms=2).nbytes == 2 * 10 * 22 + 80
    assert roofline.gpu_scale_logits(3, 100) == Cost(2400)
    rope = roofline.gpu_rope_kv_write(3, heads=4, kv_heads=2, head_dim=8, splits=2)
    assert rope.nbytes == 3 * 8 * 8 * (2 * 4 + 2) + 3 * 8 * 4
    assert roofline.gpu_embed(3, 64, "bf16").nbytes == 3 * 64 * (2 + 4)
    assert roofline.gpu_gated_activation(3, 10).nbytes == 3 * 10 * (4 + 4 + 2)
    assert roofline.gpu_sampling(2, 100).nbytes == 800
    assert roofline.gpu_sampling(2, 100, penalties=True).nbytes == 1600


def test_a_decode_step_of_unequal_sequences_costs_what_their_mean_says(
    checkpoint: Checkpoint,
) -> None:
    three = roofline.decode_cost(checkpoint, 3, (10 + 20 + 33) / 3)
    kv = roofline.kv_token_bytes(checkpoint.config, "bf16")
    one = roofline.decode_cost(checkpoint, 1, 63)
    assert three.nbytes == pytest.approx(one.nbytes)  # the same 63 keys
    assert one.nbytes - roofline.decode_cost(checkpoint, 1, 62).nbytes == pytest.approx(kv)
    assert one == roofline.model_step(checkpoint, tokens=1, sampled=1, start=62)


def test_a_prompt_in_steps_reads_the_weights_for_each(checkpoint: Checkpoint) -> None:
    whole = roofline.prompt_cost(checkpoint, 20, budget=20)
    parts = roofline.prompt_cost(checkpoint, 20, budget=8)
    assert whole == roofline.model_step(checkpoint, tokens=20, sampled=1, start=0)
    assert parts.operations == pytest.approx(whole.operations)
    assert parts.nbytes > whole.nbytes + 2 * weights_of_layers(checkpoint)


def test_the_floor_of_a_workload(checkpoint: Checkpoint) -> None:
    limits = roofline.GpuLimits(memory=1e9, matrix=1e12)
    seconds = roofline.workload_seconds(checkpoint, limits, [5, 9], [1, 3])
    prompts = [roofline.prompt_cost(checkpoint, n, n).total_operations / 1e12 for n in (5, 9)]
    # The first request ends with its prompt; the second decodes with 10 and 11 keys.
    decode = [roofline.decode_cost(checkpoint, 1, n).nbytes / 1e9 for n in (10, 11)]
    assert seconds == pytest.approx(sum(prompts) + sum(decode))
