"""Runners that may round as is fastest give nearly what the deterministic ones give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _core
from rapshee_engine.weights.loader import load_checkpoint
from reference.devices import OTHER_DEVICES
from reference.steps import Chunk, StepArrays, make_runner, make_step, native_config
from reference.tiny_llama import make_config, make_weights, write_gguf_file

ROWS = [1, 8, 9, 40]  # on both sides of where the library takes over
VOCAB = 301
PROMPT = np.random.default_rng(0).integers(0, VOCAB, 41).tolist()
BLOCKS = [5, 2, 9]

# Biases everywhere and a head of its own; norms of heads; matrices of both kinds side by side.
MODELS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "biased": (
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {},
    ),
    "qwen3": ({"model_type": "qwen3", "head_dim": 32}, {}),
    "mixed": (
        {"hidden_size": 512, "num_hidden_layers": 1},
        {"k_proj": "q8_0", "gate_proj": "q4_1"},
    ),
}


@dataclass(frozen=True)
class Scores:
    """Of each row: log-probability of its target, the best token, and its lead over the next."""

    logprobs: npt.NDArray[np.float32]
    best: npt.NDArray[np.int32]
    leads: npt.NDArray[np.float32]


def run(runner: _core.ModelRunner, step: StepArrays) -> Scores:
    out = runner.collect(runner.launch(**step))
    return Scores(out.logprobs, out.top_ids[:, 0], out.top_logprobs[:, 0] - out.top_logprobs[:, 1])


def prefill(rows: int, num_logprobs: int = 2) -> StepArrays:
    chunk = Chunk(PROMPT[:rows], 0, BLOCKS, PROMPT[1 : rows + 1])
    return make_step([chunk], num_logprobs=num_logprobs)


def decode(rows: int) -> StepArrays:
    """One token for each of so many sequences, the targets forced."""
    chunks = [Chunk([PROMPT[i]], 0, [i], [PROMPT[i + 1]]) for i in range(rows)]
    return make_step(chunks, num_logprobs=2)


def assert_close(actual: Scores, expected: Scores) -> None:
    assert np.abs(actual.logprobs - expected.logprobs).mean() <= 0.02
    clear = expected.leads > 0.05
    assert clear.any() or len(clear) < 8
    np.testing.assert_array_equal(actual.best[clear], expected.best[clear])


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes, dtypes = MODELS[request.param]
    config = make_config(vocab_size=VOCAB, **changes)
    path = tmp_path_factory.mktemp(request.param) / "tiny.gguf"
    return write_gguf_file(path, config, make_weights(config, seed=7), "bf16", dtypes=dtypes)


@pytest.fixture(scope="module", params=OTHER_DEVICES)
def runners(
    request: pytest.FixtureRequest, checkpoint: Path
) -> Iterator[tuple[_core.ModelRunner, _core.ModelRunner]]:
    """The deterministic one and the other."""
    options = {"device": request.param, "max_num_seqs": 40, "max_num_tokens": 64}
    try:
        free = make_runner(checkpoint, deterministic=False, **options)
    except _core.DeviceError as error:
        if "pip install nvidia-cublas" not in str(error):
            raise
        pytest.skip(str(error))
    strict = make_runner(checkpoint, **options)
    yield strict, free
    strict.close()
    free.close()


Runners = tuple[_core.ModelRunner, _core.ModelRunner]


@pytest.mark.parametrize("rows", ROWS)
def test_prompts(runners: Runners, rows: int) -> None:
    strict, free = runners
    assert_close(run(free, prefill(rows)), run(strict, prefill(rows)))


@pytest.mark.parametrize("rows", [8, 40])
def test_it_does_go_another_way(runners: Runners, rows: int) -> None:
    step = prefill(rows, num_logprobs=VOCAB)
    strict, free = (r.collect(r.launch(**step)).top_logprobs for r in runners)
    assert (strict != free).any()


@pytest.mark.parametrize("rows", ROWS)
def test_decode_steps_and_their_recordings(runners: Runners, rows: int) -> None:
    strict, free = runners
    expected = run(strict, decode(rows))
    first, recorded, replayed = (run(free, decode(rows)) for _ in range(3))
    assert_close(first, expected)
    np.testing.assert_array_equal(recorded.logprobs, first.logprobs)
    np.testing.assert_array_equal(replayed.logprobs, first.logprobs)


def test_descriptions_differ(runners: Runners) -> None:
    strict, free = runners
    assert free.description == strict.description + ", not deterministic"


@pytest.mark.parametrize("device", OTHER_DEVICES)
def test_the_workspace_of_the_library_is_accounted_for(checkpoint: Path, device: str) -> None:
    config = native_config(load_checkpoint(checkpoint, "auto").config)
    sizes = {"device": device, "max_num_tokens": 64, "max_num_seqs": 8, "block_size": 64}
    strict = _core.workspace_bytes(config, **sizes)
    assert _core.workspace_bytes(config, deterministic=False, **sizes) >= strict + (32 << 20)
