"""This engine and llama.cpp on the same GGUF file: perplexity, prefill and decode, as ratios.

    pip install llama-cpp-python
    python bench/peers/compare_llama_cpp.py MODEL.gguf [--threads N] [--json FILE]

Both engines run in this process, with the same token ids and number of threads, and take turns: A B
A B. So whatever else the machine does meets both. The text is the Python reference manual that each
Python carries (``pydoc_data``), or ``--text FILE``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data import topics

import _path  # noqa: F401
import llama_cpp
import numpy as np
import numpy.typing as npt

from bench_step import BLOCK_SIZE, CHUNK, Chunk, Steps, greedy_columns
from harness import environment
from rapshee_engine import _core
from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.runner import Runner
from rapshee_engine.weights.loader import load_checkpoint

CONTEXT = 3072
PERPLEXITY_TOKENS = 3000
PREFILL = 512
DECODE = 64  # tokens, after a prompt of 128
DECODE_PROMPT = 128

Tokens = npt.NDArray[np.int32]


@llama_cpp.llama_log_callback
def silent(_level: int, _text: bytes, _data: object) -> None:
    """Instead of what llama.cpp tells of every tensor of a model."""


class Ours:
    """The runner: a forward pass and sampling, without scheduler and tokenizer."""

    def __init__(self, model: str, threads: int) -> None:
        config = EngineConfig(
            model=model,
            threads=threads,
            block_size=BLOCK_SIZE,
            max_model_len=CONTEXT,
            max_num_seqs=1,
            max_num_batched_tokens=CHUNK,
        )
        self._runner = Runner(config, load_checkpoint(model))
        self._steps = Steps(self._runner, CONTEXT // BLOCK_SIZE)

    def negative_log_likelihoods(self, tokens: Tokens) -> npt.NDArray[np.float64]:
        """Of each token but the first, given those before it."""
        found = []
        for start in range(0, len(tokens) - 1, CHUNK):
            targets = tokens[start + 1 : start + 1 + CHUNK]
            rows = len(targets)
            scored = greedy_columns(rows) | {"target_ids": targets}
            step = replace(
                self._steps.build([Chunk(0, start, rows)], sample=False),
                token_ids=tokens[start : start + rows],
                sample_rows=np.arange(rows, dtype=np.int32),
                **scored,
            )
            result = self._runner.collect(self._runner.launch(step))
            found.append(-result.logprobs.astype(np.float64))
        return np.concatenate(found)

    def prefill(self) -> None:
        for step in self._steps.prefill(0, PREFILL):
            self._steps.run(step)

    def start_decode(self) -> None:
        for step in self._steps.prefill(0, DECODE_PROMPT):
            self._steps.run(step)

    def decode(self) -> None:
        for i in range(DECODE):
            self._steps.run(self._steps.build([Chunk(0, DECODE_PROMPT + i, 1)], sample=True))


class LlamaCpp:
    """The library's C interface: no sampling but an arg-max, no tokenizer in what is timed."""

    def __init__(self, model: str, threads: int) -> None:
        llama_cpp.llama_log_set(silent, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = CONTEXT
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)

    def tokenize(self, text: str) -> Tokens:
        data = text.encode()
        tokens = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(
            self._vocab, data, len(data), tokens, len(tokens), True, False
        )
        return np.array(tokens[:count], np.int32)

    def _run(self, tokens: Sequence[int], start: int, *, all_logits: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = start + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_logits or i == len(tokens) - 1
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama.cpp could not run a batch")

    def _logits(self, rows: int) -> npt.NDArray[np.float32]:
        pointer = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (rows, self.vocab_size)
        )

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def negative_log_likelihoods(self, tokens: Tokens) -> npt.NDArray[np.float64]:
        """Of each token but the first, given those before it."""
        self._clear()
        found = []
        for start in range(0, len(tokens) - 1, CHUNK):
            targets = tokens[start + 1 : start + 1 + CHUNK]
            self._run(tokens[start : start + len(targets)].tolist(), start, all_logits=True)
            for row, target in zip(self._logits(len(targets)), targets, strict=True):
                shifted = row.astype(np.float64) - row.max()
                found.append(np.log(np.exp(shifted).sum()) - shifted[target])
        return np.array(found)

    def _prompt(self, count: int) -> None:
        self._clear()
        prompt = [i * 7919 % self.vocab_size for i in range(count)]
        self._run(prompt, 0, all_logits=False)

    def prefill(self) -> None:
        self._prompt(PREFILL)
        self._logits(1).argmax()

    def start_decode(self) -> None:
        self._prompt(DECODE_PROMPT)

    def decode(self) -> None:
        for i in range(DECODE):
            position = DECODE_PROMPT + i
            self._run([position * 7919 % self.vocab_size], position, all_logits=False)
            self._logits(1).argmax()


def seconds_of(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare_speed(ours: Ours, theirs: LlamaCpp, rounds: int) -> dict[str, dict[str, float]]:
    """Median tokens a second of both, and the median of the ratios of neighbouring runs."""
    seconds: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    for number in range(rounds + 1):
        prefill = seconds_of(ours.prefill), seconds_of(theirs.prefill)
        ours.start_decode()
        decode_ours = seconds_of(ours.decode)
        theirs.start_decode()
        decode = decode_ours, seconds_of(theirs.decode)
        if number:  # the first round touches memory for the first time
            seconds["prefill"].append(prefill)
            seconds["decode"].append(decode)
    results = {}
    for name, count in (("prefill", PREFILL), ("decode", DECODE)):
        ratios = [b / a for a, b in seconds[name]]
        results[name] = {
            "ours_tokens_per_s": count / statistics.median(a for a, _ in seconds[name]),
            "theirs_tokens_per_s": count / statistics.median(b for _, b in seconds[name]),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return results


def compare_perplexity(ours: Ours, theirs: LlamaCpp, tokens: Tokens) -> dict[str, float]:
    a, b = ours.negative_log_likelihoods(tokens), theirs.negative_log_likelihoods(tokens)
    return {
        "tokens": len(tokens),
        "ours": math.exp(a.mean()),
        "theirs": math.exp(b.mean()),
        "ratio": math.exp(a.mean() - b.mean()),
        "mean_difference": float(np.abs(a - b).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="GGUF file")
    parser.add_argument("--threads", type=int, default=_core.usable_cores())
    parser.add_argument("--rounds", type=int, default=7, help="of each measurement")
    parser.add_argument("--text", type=Path, help="text for perplexity")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line")
    options = parser.parse_args()
    text = options.text.read_text() if options.text else "\n".join(topics.topics.values())
    ours, theirs = Ours(options.model, options.threads), LlamaCpp(options.model, options.threads)
    tokens = theirs.tokenize(text[: 10 * PERPLEXITY_TOKENS])[:PERPLEXITY_TOKENS]
    result = {
        "model": Path(options.model).name,
        "threads": options.threads,
        **environment(),
        "llama_cpp_python": llama_cpp.__version__,
        "perplexity": compare_perplexity(ours, theirs, tokens),
        **compare_speed(ours, theirs, options.rounds),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
