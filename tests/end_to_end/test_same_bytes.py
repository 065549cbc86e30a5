"""The same request gives the same tokens and log-probabilities, whatever surrounds it.

On the real model, through the public API. `tests/runner/test_invariance.py` holds the native runner
to the same on tiny models of every format.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine import LLM, SamplingParams, _core
from rapshee_engine.engine.outputs import RequestOutput

TEXT = (
    "The library of the old town had one rule that nobody remembered making: a book that was "
    "read twice in a day had to be read a third time, aloud, to the cat. "
)
SCENES: dict[str, dict[str, Any]] = {
    "small chunks": {"max_num_batched_tokens": 64},
    "one thread": {"threads": 1},
    "two threads": {"threads": 2},
    "a step in flight": {"async_scheduling": True},
    "no prefix cache": {"enable_prefix_caching": False},
    "large blocks": {"block_size": 64},
}


def requests(count: int) -> list[tuple[str, SamplingParams]]:
    """Prompts of 1 to about 270 tokens, greedy and drawn, some with penalties."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 12},
        {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5, "seed": 13},
    ]
    return [
        (
            f"{i} {TEXT * (i % 8)}",
            SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3, **kinds[i % len(kinds)]),
        )
        for i in range(count)
    ]


def bits(output: RequestOutput) -> list[Any]:
    """Everything that must not change, log-probabilities exactly."""
    return [
        (c.text, c.token_ids, [[(t, e.logprob, e.rank) for t, e in p.items()] for p in c.logprobs])
        for c in output.outputs
        if c.logprobs is not None
    ]


def run(model: Path, batch: list[tuple[str, SamplingParams]], **options: Any) -> list[list[Any]]:
    prompts, params = zip(*batch, strict=True)
    with LLM(model=str(model), kv_cache_memory_bytes=512 << 20, **options) as llm:
        return [bits(o) for o in llm.generate(list(prompts), list(params), use_tqdm=False)]


@pytest.fixture(scope="module")
def alone(default_model: Path) -> list[list[Any]]:
    """Each of eight requests by itself, in an engine of its own kind: no cache, no company."""
    with LLM(
        model=str(default_model), enable_prefix_caching=False, kv_cache_memory_bytes=512 << 20
    ) as llm:
        return [
            bits(llm.generate(prompt, params, use_tqdm=False)[0]) for prompt, params in requests(8)
        ]


def test_requests_differ(alone: list[list[Any]]) -> None:
    texts = [output[0][0] for output in alone]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("scene", SCENES)
def test_among_31_others(scene: str, alone: list[list[Any]], default_model: Path) -> None:
    together = run(default_model, requests(32), **SCENES[scene])
    assert together[:8] == alone


def test_after_a_prefix_hit(alone: list[list[Any]], default_model: Path) -> None:
    batch = requests(8)
    with LLM(model=str(default_model), kv_cache_memory_bytes=512 << 20) as llm:
        for prompt, params in batch:
            llm.generate(prompt, params, use_tqdm=False)
        again = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt, params in batch]
    assert [bits(output) for output in again] == alone
    assert sum(output.num_cached_tokens for output in again) > 500


def test_after_a_preemption(default_model: Path) -> None:
    """Eight short prompts enter a pool of 24 blocks together, and outgrow it."""
    block_bytes = 30 * 3 * 2 * 64 * 2 * 16  # layers, KV heads, K and V, head size, bf16, tokens
    prompts = [f"{i} little" for i in range(8)]
    params = [replace(options, max_tokens=80) for _, options in requests(len(prompts))]
    with LLM(
        model=str(default_model),
        kv_cache_memory_bytes=24 * block_bytes,
        max_model_len=384,
        enable_prefix_caching=False,
    ) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
        num_preemptions = llm._engine.stats.num_preemptions
        alone = [
            llm.generate(prompt, options, use_tqdm=False)[0]
            for prompt, options in zip(prompts, params, strict=True)
        ]
        assert llm._engine.stats.num_preemptions == num_preemptions > 0
    assert [bits(output) for output in together] == [bits(output) for output in alone]


@pytest.mark.parametrize("isa", _core.build_info()["isas"])
def test_on_each_instruction_set(
    isa: str, default_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, company, threads and steps in flight together, against one request at a time."""
    monkeypatch.setenv("RAPSHEE_CPU_ISA", isa)
    batch = requests(5)
    with LLM(
        model=str(default_model), enable_prefix_caching=False, threads=1, max_model_len=512
    ) as llm:
        alone = [bits(llm.generate(p, s, use_tqdm=False)[0]) for p, s in batch]
    together = run(
        default_model, batch, threads=2, max_num_batched_tokens=64, async_scheduling=True
    )
    assert together == alone
