"""transformers on the shapes of bench_engine.py, with random weights.

    python bench/cuda/bench_transformers.py [--config NAME] [--json FILE] [--ceilings FILE]

Decoding by ``generate`` on a batch of equal prompts, and continuous batching by ``generate_batch``
on the prompts of the workload; that takes one number of tokens for all requests, so each gets the
mean of the workload's.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from bench_engine import Sizes, Workload, config_folder
from gpu_report import GpuReport, load_ceilings
from rapshee_engine.weights.loader import load_checkpoint
from roofline import decode_cost, workload_seconds

STEPS = 32


def load(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval()


def seconds_of(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def generate(model: Any, ids: Any, count: int) -> None:
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )


class Peer:
    def __init__(self, options: argparse.Namespace) -> None:
        limits = load_ceilings(options.ceilings)
        self.limits = None if limits is None else replace(limits, launch=0.0)
        self.report = GpuReport("peers", self.limits, options.json)
        self.sizes = Sizes()
        folder = config_folder(options.config)
        self.name = folder.name
        self.checkpoint = load_checkpoint(str(folder), "dummy")
        self.model = load(folder)

    def decode(self, rows: int) -> None:
        """The difference of generations of some tokens more."""
        vocab = self.checkpoint.config.vocab_size
        ids = torch.randint(0, vocab, (rows, self.sizes.context), device="cuda")
        generate(self.model, ids[:, :16], 4)
        one = seconds_of(lambda: generate(self.model, ids, 1))
        many = seconds_of(lambda: generate(self.model, ids, 1 + STEPS))
        cost = decode_cost(self.checkpoint, rows, self.sizes.context + STEPS / 2)
        floor = None if self.limits is None else self.limits.seconds(cost)[0]
        self.add(f"decode, {rows} rows, context {self.sizes.context}", (many - one) / STEPS, rows,
                 floor)  # fmt: skip

    def workload(self) -> None:
        sizes = self.sizes
        vocab = self.checkpoint.config.vocab_size
        work = Workload.draw(sizes.requests, sizes.shortest, sizes.longest, vocab)
        count = round(sum(work.max_tokens) / sizes.requests)
        floor = None
        if self.limits is not None:
            lengths = [len(ids) for ids in work.prompts]
            floor = workload_seconds(self.checkpoint, self.limits, lengths, [count] * len(lengths))
        what = f"workload, {sizes.requests} requests of {count} tokens"
        # The first run also makes the cache and records graphs; the second finds no prompt that it
        # knows.
        others = [[token + 1 for token in ids] for ids in work.prompts]
        for prompts, note in ((work.prompts, ", with its start"), (others, "")):
            begin = time.perf_counter()
            outputs = self.batch(prompts, count)
            seconds = time.perf_counter() - begin
            drawn = sum(len(output.generated_tokens) for output in outputs.values())
            self.add(what + note, seconds, drawn, floor)

    def batch(self, prompts: list[list[int]], count: int) -> Any:
        generation = GenerationConfig(
            max_new_tokens=count, do_sample=True, temperature=0.6, eos_token_id=-1, pad_token_id=0
        )
        return self.model.generate_batch(
            inputs=prompts,
            generation_config=generation,
            progress_bar=False,
            persistent_manager=True,
        )

    def add(self, what: str, seconds: float, tokens: int, floor: float | None) -> None:
        name = f"transformers {self.name} {what}"
        record: dict[str, Any] = {
            "name": name,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
        }
        line = f"{name:<72} | {seconds * 1e3:>10.3f} ms | {tokens / seconds:>9.0f} tok/s"
        if floor is not None:
            record |= {"floor_seconds": floor, "share": floor / seconds}
            line += f" | floor {floor * 1e3:.3f} ms | {floor / seconds:.0%}"
        print(line, flush=True)
        self.report.write(record)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="qwen3-0.6b", metavar="NAME|FOLDER")
    parser.add_argument("--ceilings", type=Path, metavar="FILE", help="of measure_ceilings.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a result")
    peer = Peer(parser.parse_args())
    with torch.inference_mode():
        for rows in peer.sizes.rows:
            with peer.report.attempt(f"transformers {peer.name} decode, {rows} rows"):
                peer.decode(rows)
            free_memory()
    with peer.report.attempt(f"transformers {peer.name} workload"):
        peer.workload()
    return peer.report.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
