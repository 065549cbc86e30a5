"""Reads the committed outputs of ``tests/golden/make_*.py``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "GOLDEN_FOLDER",
    "FamilyCase",
    "GoldenText",
    "TinyLlamaCase",
    "family_cases",
    "smollm2_goldens",
    "tiny_llama_cases",
]

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class TinyLlamaCase:
    """One tiny checkpoint, made by `reference.tiny_llama.make_weights(config, seed)`, and what
    transformers computes with it in float32: logits f32 [T, V] at every position."""

    name: str
    config: dict[str, Any]
    seed: int
    token_ids: tuple[int, ...]
    inv_freq: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


@dataclass(frozen=True)
class FamilyCase:
    """One tiny checkpoint, made by `reference.tiny_families.family_weights(config, seed)`, and what
    transformers computes with it in float32.

    Attributes:
        context_length: that the model is to be loaded for, or None.
        gguf: whether a GGUF file can say all of it.
        logits: f32 [T, V] at every position.
    """

    name: str
    config: dict[str, Any]
    context_length: int | None
    gguf: bool
    seed: int
    token_ids: tuple[int, ...]
    logits: npt.NDArray[np.float32]


@dataclass(frozen=True)
class GoldenText:
    """A prompt and its greedy continuation (G tokens, through end-of-sequence tokens) by
    transformers in float32 on the dequantised weights of SmolLM2-135M-Instruct Q4_1.

    Attributes:
        prompt_logprobs: f32 [P - 1], of prompt token i + 1 after the tokens up to i.
        logprobs: f32 [G], of each continuation token.
        argmax_ids: i32 [G], most likely token at each position of the continuation, computed in
            one pass over prompt and continuation.
        margins: f32 [G], gap between the two largest logits.
        top_ids, top_logprobs: [G, 8], best first.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    prompt_logprobs: npt.NDArray[np.float32]
    logprobs: npt.NDArray[np.float32]
    argmax_ids: npt.NDArray[np.int32]
    margins: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


def tiny_llama_cases() -> tuple[TinyLlamaCase, ...]:
    with np.load(GOLDEN_FOLDER / "tiny_llama.npz") as stored:
        cases = json.loads(str(stored["cases"]))
        return tuple(
            TinyLlamaCase(
                name=case["name"],
                config=case["config"],
                seed=case["seed"],
                token_ids=tuple(stored[f"{case['name']}.token_ids"].tolist()),
                inv_freq=stored[f"{case['name']}.inv_freq"],
                logits=stored[f"{case['name']}.logits"],
            )
            for case in cases
        )


def family_cases() -> tuple[FamilyCase, ...]:
    with np.load(GOLDEN_FOLDER / "tiny_families.npz") as stored:
        return tuple(
            FamilyCase(
                **case,
                token_ids=tuple(stored[f"{case['name']}.token_ids"].tolist()),
                logits=stored[f"{case['name']}.logits"],
            )
            for case in json.loads(str(stored["cases"]))
        )


def smollm2_goldens() -> tuple[GoldenText, ...]:
    prompts = json.loads((GOLDEN_FOLDER / "smollm2_prompts.json").read_text())
    with np.load(GOLDEN_FOLDER / "smollm2.npz") as stored:
        ends = np.cumsum(stored["prompt_lengths"]).tolist()
        starts = [0, *ends[:-1]]
        return tuple(
            GoldenText(
                prompt=prompt["text"],
                prompt_ids=tuple(stored["prompt_ids"][start:end].tolist()),
                token_ids=tuple(stored["token_ids"][i].tolist()),
                # One fewer than tokens in each prompt.
                prompt_logprobs=stored["prompt_logprobs"][start - i : end - i - 1],
                logprobs=stored["logprobs"][i],
                argmax_ids=stored["argmax_ids"][i],
                margins=stored["margins"][i],
                top_ids=stored["top_ids"][i],
                top_logprobs=stored["top_logprobs"][i],
            )
            for i, (prompt, start, end) in enumerate(zip(prompts, starts, ends, strict=True))
        )
