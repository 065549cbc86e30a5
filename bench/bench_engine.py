"""The engine on random weights: decoding, prompts, first tokens, start-up, a mixed workload.

    python bench/bench_engine.py [--device D] [--config NAME|FOLDER] [--case CASE]... [--json FILE]

NAME is a folder of ``bench/configs`` (a ``config.json``, no weights). Every figure stands beside
its floor: the bytes and operations that the step cannot avoid, at the ceilings of the same run
(``--ceilings`` on a GPU, measured here on a CPU). Cases:

    decode    steps that decode 1, 8, 64 and 256 rows with 1,024 tokens of context
    prefill   prompts of 1,024 and 8,192 tokens: the forward pass, and the time to the first token
    workload  256 requests of 100 to 1,024 prompt and output tokens, all at once (nano-vllm's
              bench.py: 142,827 prompt and 133,966 output tokens)
    startup   from the start of a process to its first token
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

import harness
from gpu_report import GpuReport, load_ceilings
from rapshee_engine import SamplingParams, _core
from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.batch_builder import StepInput
from rapshee_engine.engine.engine import Engine, RequestFailure
from rapshee_engine.engine.outputs import RequestOutput
from rapshee_engine.engine.runner import StepResult, StepRunner
from rapshee_engine.llm import LLM
from rapshee_engine.weights.loader import Checkpoint, load_checkpoint
from roofline import Cost, GpuLimits, Limits, decode_cost, prompt_cost, workload_seconds

CONFIGS = Path(__file__).with_name("configs")
CASES = ("decode", "prefill", "workload", "startup")
CHILD_SECONDS = 300  # that a start may take


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        rows: of decode steps, ascending.
        context: tokens of each row before the steps that count.
        steps: decode steps that count.
        prompts: lengths of single prompts.
        requests, shortest, longest: of the workload; longest is that of prompts and of outputs.
        budget: most tokens of a step.
    """

    rows: tuple[int, ...] = (1, 8, 64, 256)
    context: int = 1024
    steps: int = 64
    prompts: tuple[int, ...] = (1024, 8192)
    prompt_repeats: int = 5
    requests: int = 256
    shortest: int = 100
    longest: int = 1024
    budget: int = 8192


SMALL = Sizes(
    rows=(1, 3),
    context=20,
    steps=4,
    prompts=(8, 20),
    prompt_repeats=2,
    requests=4,
    shortest=2,
    longest=9,
    budget=16,
)


@dataclass(frozen=True)
class Workload:
    """Requests as nano-vllm's ``bench.py`` draws them, prompts first."""

    prompts: list[list[int]]
    max_tokens: list[int]

    @classmethod
    def draw(cls, requests: int, shortest: int, longest: int, vocab_size: int) -> Workload:
        rng = random.Random(0)
        ids = min(10000, vocab_size - 1)
        prompts = [
            [rng.randint(0, ids) for _ in range(rng.randint(shortest, longest))]
            for _ in range(requests)
        ]
        return cls(prompts, [rng.randint(shortest, longest) for _ in range(requests)])


@dataclass
class TimedRunner:
    """A runner that remembers how long each step took the device, by the runner's own clock."""

    runner: StepRunner
    device_us: list[int] = field(default_factory=list)

    def collect(self, ticket: int) -> StepResult:
        result = self.runner.collect(ticket)
        self.device_us.append(int(getattr(result, "timing_us", 0)))
        return result

    def launch(self, step_input: StepInput) -> int:
        return self.runner.launch(step_input)

    def set_masks(self, ticket: int, masks: npt.NDArray[np.uint32]) -> None:
        self.runner.set_masks(ticket, masks)

    def set_state(
        self, slot: int, token_ids: npt.NDArray[np.int32], num_prompt_tokens: int
    ) -> None:
        self.runner.set_state(slot, token_ids, num_prompt_tokens)

    def close(self) -> None:
        self.runner.close()

    def __getattr__(self, name: str) -> Any:  # sizes and names
        return getattr(self.runner, name)


class Bench:
    """One model, whose engine is made when a case first needs it."""

    def __init__(
        self,
        options: argparse.Namespace,
        report: GpuReport,
        limits: GpuLimits | Limits | None,
    ) -> None:
        self.report = report
        self.limits = limits
        self.sizes = SMALL if options.small else Sizes()
        folder = config_folder(options.config)
        self.name = folder.name + (", not deterministic" if options.no_deterministic else "")
        self.checkpoint: Checkpoint = load_checkpoint(str(folder), "dummy")
        self.options: dict[str, Any] = {
            "model": str(folder),
            "load_format": "dummy",
            "device": options.device,
            "max_num_seqs": max(self.sizes.rows),
            "max_num_batched_tokens": self.sizes.budget,
            "max_model_len": min(
                self.checkpoint.config.max_position,
                max(*self.sizes.prompts, 2 * self.sizes.longest, self.sizes.context) + 1024,
            ),
            # The same tokens come again and again, and each time they are to be computed.
            "enable_prefix_caching": False,
            "async_scheduling": True,
            "deterministic": not options.no_deterministic,
        }
        if options.kv_cache_memory is not None:
            self.options["kv_cache_memory_bytes"] = options.kv_cache_memory
        self._llm: LLM | None = None

    @property
    def llm(self) -> LLM:
        if self._llm is None:
            engine = Engine.from_config(EngineConfig(**self.options))
            engine.runner = TimedRunner(engine.runner)
            self._llm = LLM.from_engine(engine)
            print(
                f"{self.name}: {engine.runner.description}, KV cache of "
                f"{' + '.join(str(group.num_blocks) for group in engine.runner.kv_groups)} "
                f"blocks of {engine.runner.block_size} tokens",
                flush=True,
            )
        return self._llm

    @property
    def engine(self) -> Engine:
        return self.llm._engine

    @property
    def device_us(self) -> list[int]:
        """Of the steps so far; the list grows."""
        runner = self.engine.runner
        assert isinstance(runner, TimedRunner)
        return runner.device_us

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()

    # Cases

    def decode(self) -> None:
        for rows in self.sizes.rows:
            name = f"{self.name} decode, {rows} rows, context {self.sizes.context}"
            with self.report.attempt(name):
                self._decode(name, rows)

    def _decode(self, name: str, rows: int) -> None:
        """Steps of ``rows`` running requests, one after the other as `Engine.step` makes them."""
        engine, sizes = self.engine, self.sizes
        rng = np.random.default_rng(rows)
        prompt_steps = -(-rows * sizes.context // max(1, sizes.budget - rows))
        warm_up = 8
        most = 2 * prompt_steps + warm_up + sizes.steps + 8
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=most)
        for i in range(rows):
            ids = rng.integers(0, self.checkpoint.config.vocab_size, sizes.context).tolist()
            engine.add_request(f"{name} {i}", {"prompt_token_ids": ids}, params)
        try:
            self._step_until(lambda: all_decode(engine, rows))
            for _ in range(warm_up):
                step(engine)
            device, before = self.device_us, engine.stats.generation_tokens
            first = len(device)
            lengths = sum(request.num_tokens for request in engine.scheduler.running) / rows
            times = []
            for _ in range(sizes.steps):
                begin = time.perf_counter()
                step(engine)
                times.append(time.perf_counter() - begin)
            drawn = engine.stats.generation_tokens - before
            if drawn != rows * sizes.steps:
                raise RuntimeError(f"{drawn} tokens in {sizes.steps} steps of {rows} rows")
        finally:
            for i in range(rows):
                engine.abort(f"{name} {i}")
            self._step_until(lambda: not engine.has_unfinished)
        device_us = median(device[first:])
        self._add(
            name,
            median(times),
            decode_cost(self.checkpoint, rows, lengths + sizes.steps / 2),
            tokens=rows,
            p90_us=float(np.percentile(times, 90)) * 1e6,
            device_us=device_us,
            # What a step takes beyond the device's own time: gaps in which it waits for the host.
            host_us=max(0.0, median(times) * 1e6 - device_us),
        )

    def prefill(self) -> None:
        for count in self.sizes.prompts:
            name = f"{self.name} prefill, {count} tokens"
            with self.report.attempt(name):
                self._prefill(name, count)

    def _prefill(self, name: str, count: int) -> None:
        rng = np.random.default_rng(count)
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1)
        walls, forwards = [], []
        for _ in range(2 + self.sizes.prompt_repeats):
            ids = rng.integers(0, self.checkpoint.config.vocab_size, count).tolist()
            first = len(self.device_us)
            begin = time.perf_counter()
            self.llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
            walls.append(time.perf_counter() - begin)
            forwards.append(sum(self.device_us[first:]) * 1e-6)
        cost = prompt_cost(self.checkpoint, count, self.sizes.budget)
        self._add(name, median(forwards[2:]), cost, tokens=count)
        self._add(f"{self.name} first token, {count} tokens", median(walls[2:]), cost, tokens=count)

    def workload(self) -> None:
        name = f"{self.name} workload, {self.sizes.requests} requests"
        with self.report.attempt(name):
            self._workload(name)

    def _workload(self, name: str) -> None:
        sizes, vocab = self.sizes, self.checkpoint.config.vocab_size
        work = Workload.draw(sizes.requests, sizes.shortest, sizes.longest, vocab)
        params = [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=count, seed=i)
            for i, count in enumerate(work.max_tokens)
        ]
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in work.prompts]
        self.llm.generate({"prompt_token_ids": [1] * sizes.shortest}, SamplingParams(), False)
        preemptions, first = self.engine.scheduler.num_preemptions, len(self.device_us)
        begin = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        wall = time.perf_counter() - begin
        drawn = sum(len(output.outputs[0].token_ids) for output in outputs)
        if drawn != sum(work.max_tokens):
            raise RuntimeError(f"{drawn} tokens, expected {sum(work.max_tokens)}")
        floor = None
        if self.limits is not None:
            lengths = [len(ids) for ids in work.prompts]
            floor = workload_seconds(self.checkpoint, self.limits, lengths, work.max_tokens)
        device = self.device_us[first:]
        self._add(
            name,
            wall,
            None,
            tokens=drawn,
            floor=floor,
            prompt_tokens=sum(map(len, work.prompts)),
            num_steps=len(device),
            num_preemptions=self.engine.scheduler.num_preemptions - preemptions,
            device_seconds=sum(device) * 1e-6,
        )

    def startup(self) -> None:
        """In a process of its own; the engine of this one gives its memory back first."""
        name = f"{self.name} start to first token"
        with self.report.attempt(name):
            self.close()
            self._llm = None
            environment = {**os.environ, "RAPSHEE_BENCH_OPTIONS": json.dumps(self.options)}
            begin = time.time()
            done = subprocess.run(
                [sys.executable, "-c", _FIRST_TOKEN],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=CHILD_SECONDS,
            )
            seconds = float(done.stdout.split()[-1]) - begin
            # Every weight is written once.
            self._add(name, seconds, Cost(self.checkpoint.weight_bytes), tokens=None)

    def _step_until(self, done: Callable[[], bool]) -> None:
        """Raises what a request failed with."""
        while not done():
            if not self.engine.has_unfinished:
                raise RuntimeError("all requests ended before the steps that count")
            step(self.engine)

    def _add(
        self,
        name: str,
        seconds: float,
        cost: Cost | None,
        *,
        tokens: int | None,
        floor: float | None = None,
        **more: Any,
    ) -> None:
        record: dict[str, Any] = {"name": name, "seconds": seconds, **more}
        if cost is not None and self.limits is not None:
            floor, record["bound"] = self.limits.seconds(cost)
            record["gb"] = cost.nbytes / 1e9
        line = f"{name:<58} | {seconds * 1e3:>10.3f} ms"
        if tokens is not None:
            record["tokens_per_s"] = tokens / seconds
            line += f" | {tokens / seconds:>9.0f} tok/s"
        if floor is not None:
            record |= {"floor_seconds": floor, "share": floor / seconds}
            line += f" | floor {floor * 1e3:.3f} ms"
            if tokens is not None:
                record["floor_tokens_per_s"] = tokens / floor
                line += f", {tokens / floor:.0f} tok/s"
            line += f" | {floor / seconds:.0%}"
        if "host_us" in more:
            line += f" | device {more['device_us']:.0f} us, waits {more['host_us']:.0f} us"
        print(line, flush=True)
        self.report.write(record)


# The parent's clock began before this process was started.
_FIRST_TOKEN = """
import json, os, time
from rapshee_engine import LLM, SamplingParams
options = json.loads(os.environ["RAPSHEE_BENCH_OPTIONS"])
with LLM(**options) as llm:
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)
    print(time.time(), flush=True)
"""


def step(engine: Engine) -> list[RequestOutput]:
    """Raises what a request failed with."""
    outputs = []
    for event in engine.step():
        if isinstance(event, RequestFailure):
            raise event.error
        outputs.append(event)
    return outputs


def all_decode(engine: Engine, rows: int) -> bool:
    """All requests have a token and none waits: the next steps decode one token of each."""
    running = engine.scheduler.running
    return len(running) == rows and all(request.num_output_tokens > 0 for request in running)


def config_folder(name: str) -> Path:
    """A folder of ``bench/configs`` or any other with a ``config.json``."""
    for folder in (CONFIGS / name, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    known = ", ".join(sorted(path.name for path in CONFIGS.iterdir()))
    raise SystemExit(f"--config: {name!r} is neither {known} nor a folder with a config.json")


def runs_on_cpu(device: str) -> bool:
    has_gpu = any(name.startswith("cuda:") for name in _core.list_devices())
    return device == "cpu" or (device == "auto" and not has_gpu)


def limits_of(options: argparse.Namespace) -> GpuLimits | Limits | None:
    """Ceilings of the device; None where a GPU's were not given."""
    if runs_on_cpu(options.device):
        return Limits.measure(_core.usable_cores())
    limits = load_ceilings(options.ceilings)
    # A step is one launch, whatever its kernels are.
    return None if limits is None else replace(limits, launch=0.0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="as of the engine (%(default)s)")
    parser.add_argument(
        "--config",
        default="qwen3-0.6b",
        metavar="NAME|FOLDER",
        help="of bench/configs, or a folder with a config.json (%(default)s)",
    )
    parser.add_argument(
        "--case", action="append", choices=CASES, help="may be repeated; default: all"
    )
    parser.add_argument(
        "--no-deterministic",
        action="store_true",
        help="with the engine's deterministic=False (CUDA)",
    )
    parser.add_argument("--kv-cache-memory", type=int, metavar="BYTES", help="of the KV cache")
    parser.add_argument("--ceilings", type=Path, metavar="FILE", help="of measure_ceilings.py")
    parser.add_argument("--small", action="store_true", help="few and short requests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a result")
    options = parser.parse_args()
    limits = limits_of(options)
    environment = harness.environment() if runs_on_cpu(options.device) else None
    report = GpuReport("engine", limits, options.json, environment)
    bench = Bench(options, report, limits)
    for case in options.case or CASES:
        with report.attempt(f"{bench.name} {case}"):
            getattr(bench, case)()
    bench.close()
    return report.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
