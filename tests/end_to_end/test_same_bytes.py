"""The same request gives the same tokens and log-probabilities, whatever surrounds it.

On the real model, through the public API. `tests/runner/test_invariance.py` holds the native runner
to the same on tiny models of every format. An emulated device gets a tiny model here too, and fewer
and shorter requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine import LLM, SamplingParams, _core
from rapshee_engine.engine.outputs import RequestOutput
from rapshee_engine.weights.loader import load_checkpoint
from reference.devices import is_emulated
from reference.fake_runner import EOS, make_library_tokenizer, make_tokenizer
from reference.steps import native_config
from reference.tiny_llama import make_config, make_weights, write_hf_folder

TEXT = (
    "The library of the old town had one rule that nobody remembered making: a book that was "
    "read twice in a day had to be read a third time, aloud, to the cat. "
)
SHORT_TEXT = "aloud, to the cat. "  # one token a byte in the tiny model
SCENES: dict[str, dict[str, Any]] = {
    "small chunks": {"max_num_batched_tokens": 64},
    "one thread": {"threads": 1},
    "two threads": {"threads": 2},
    "a step in flight": {"async_scheduling": True},
    "no prefix cache": {"enable_prefix_caching": False},
    "large blocks": {"block_size": 128},
}

Batch = Sequence[tuple[str, SamplingParams]]


@dataclass(frozen=True)
class Rig:
    """A device with the model that it can run in reasonable time."""

    model: Path
    device: str

    def requests(self, count: int) -> Batch:
        """Prompts of 1 to about 270 tokens, greedy and drawn, some with penalties."""
        kinds: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"temperature": 1.0, "seed": 11},
            {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 12},
            {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5, "seed": 13},
        ]
        emulated = is_emulated(self.device)
        text, max_tokens = (SHORT_TEXT, 4) if emulated else (TEXT, 12)
        return [
            (
                f"{i} {text * (i % 8)}",
                SamplingParams(
                    max_tokens=max_tokens, ignore_eos=True, logprobs=3, **kinds[i % len(kinds)]
                ),
            )
            for i in range(min(count, 9) if emulated else count)
        ]

    def open(self, **options: Any) -> LLM:
        options = {"kv_cache_memory_bytes": self.memory(1400), **options}
        return LLM(model=str(self.model), device=self.device, **options)

    def memory(self, num_blocks: int) -> int:
        """Bytes of blocks of 16 tokens."""
        config = native_config(load_checkpoint(self.model).config)
        block_bytes = _core.kv_block_bytes(
            config, device=self.device, dtype="bfloat16", block_size=16
        )
        return num_blocks * sum(block_bytes)

    def run(self, batch: Batch, **options: Any) -> list[list[Any]]:
        """All requests together."""
        prompts, params = zip(*batch, strict=True)
        with self.open(**options) as llm:
            return [bits(o) for o in llm.generate(list(prompts), list(params), use_tqdm=False)]

    def run_alone(self, batch: Batch, **options: Any) -> list[list[Any]]:
        """Each request by itself, without a cache."""
        with self.open(enable_prefix_caching=False, **options) as llm:
            return one_by_one(llm, batch)


def bits(output: RequestOutput) -> list[Any]:
    """Everything that must not change, log-probabilities exactly."""
    return [
        (c.text, c.token_ids, [[(t, e.logprob, e.rank) for t, e in p.items()] for p in c.logprobs])
        for c in output.outputs
        if c.logprobs is not None
    ]


def one_by_one(llm: LLM, batch: Batch) -> list[list[Any]]:
    return [bits(llm.generate(prompt, params, use_tqdm=False)[0]) for prompt, params in batch]


@pytest.fixture(scope="module")
def rig(device: str, tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Rig:
    if not is_emulated(device):
        return Rig(default_model, device)
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), make_tokenizer()
    config = make_config(vocab_size=tokenizer.vocab_size, eos_token_id=EOS)
    write_hf_folder(folder, config, make_weights(config, seed=9), dtype="bf16")
    make_library_tokenizer().save(str(folder / "tokenizer.json"))
    return Rig(folder, device)


@pytest.fixture(scope="module")
def alone(rig: Rig) -> list[list[Any]]:
    return rig.run_alone(rig.requests(8))


def test_requests_differ(alone: list[list[Any]]) -> None:
    assert len(set(map(repr, alone))) == len(alone)


@pytest.mark.parametrize("scene", SCENES)
def test_among_31_others(scene: str, rig: Rig, alone: list[list[Any]]) -> None:
    together = rig.run(rig.requests(32), **SCENES[scene])
    assert together[:8] == alone


def test_after_a_prefix_hit(rig: Rig, alone: list[list[Any]]) -> None:
    batch = rig.requests(8)
    with rig.open(block_size=16) as llm:
        for prompt, params in batch:
            llm.generate(prompt, params, use_tqdm=False)
        again = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt, params in batch]
    assert [bits(output) for output in again] == alone
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in again)
    assert sum(output.num_cached_tokens for output in again) > num_prompt_tokens // 2


def test_after_a_preemption(rig: Rig) -> None:
    """Short prompts enter a small pool together, and outgrow it."""
    count, max_tokens, num_blocks = (3, 34, 6) if is_emulated(rig.device) else (8, 80, 24)
    batch = [
        (f"{i} little", replace(params, max_tokens=max_tokens))
        for i, (_, params) in enumerate(rig.requests(count))
    ]
    prompts, params = zip(*batch, strict=True)
    with rig.open(
        kv_cache_memory_bytes=rig.memory(num_blocks),
        block_size=16,
        max_model_len=num_blocks * 16,
        enable_prefix_caching=False,
    ) as llm:
        together = llm.generate(list(prompts), list(params), use_tqdm=False)
        num_preemptions = llm._engine.stats.num_preemptions
        alone = one_by_one(llm, batch)
        assert llm._engine.stats.num_preemptions == num_preemptions > 0
    assert [bits(output) for output in together] == alone


@pytest.mark.parametrize("isa", _core.build_info()["isas"])
def test_on_each_instruction_set(
    isa: str, default_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, company, threads and steps in flight together, against one request at a time."""
    monkeypatch.setenv("RAPSHEE_CPU_ISA", isa)
    rig = Rig(default_model, "cpu")
    batch = rig.requests(5)
    alone = rig.run_alone(batch, threads=1, max_model_len=512)
    together = rig.run(batch, threads=2, max_num_batched_tokens=64, async_scheduling=True)
    assert together == alone
