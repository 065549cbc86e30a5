"""Fused sampling from logits.

    python bench/cuda/bench_sampling.py [--json FILE] [--ceilings FILE] [--small]

torch: argmax, or softmax, a sort where top-k and top-p need one, and multinomial.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import _path  # noqa: F401
import numpy as np
import numpy.typing as npt
from torch_peer import TorchPeer

from gpu_report import GpuReport, add_gpu_options
from rapshee_engine import _cuda_ops
from roofline import gpu_sampling

VOCABS = [128256, 151936]  # Llama 3, Qwen3
ROWS = [1, 64, 256]
SMALL = ([1000], [1, 3])
KINDS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.6},
    "top-k + top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "penalties": {
        "temperature": 0.6,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.2,
    },
}

Floats = npt.NDArray[np.float32]


def columns(rows: int, changes: dict[str, float]) -> dict[str, Any]:
    arrays: dict[str, npt.NDArray[Any]] = {
        "target_ids": np.full(rows, -1, np.int32),
        "temperature": np.ones(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "repetition_penalty": np.ones(rows, np.float32),
        "presence_penalty": np.zeros(rows, np.float32),
        "frequency_penalty": np.zeros(rows, np.float32),
        "seed": np.arange(rows, dtype=np.uint64),
        "draw_index": np.zeros(rows, np.uint32),
        "num_logprobs": np.zeros(rows, np.int32),
        "state_slot": np.full(rows, -1, np.int32),
        "bias_indptr": np.zeros(rows + 1, np.int32),
        "bias_ids": np.zeros(0, np.int32),
        "bias_values": np.zeros(0, np.float32),
        "mask_index": np.full(rows, -1, np.int32),
    }
    for name, value in changes.items():
        arrays[name].fill(value)
    return arrays


def has_penalties(changes: dict[str, float]) -> bool:
    return "repetition_penalty" in changes


def sample(logits: Floats, changes: dict[str, float], repeats: int = 0) -> Any:
    rows, vocab = logits.shape
    arrays = columns(rows, changes)
    counts = np.zeros((0, vocab), np.uint32)
    if has_penalties(changes):
        arrays["state_slot"] = np.arange(rows, dtype=np.int32)
        # A prompt of some hundred tokens, and some of them in the output.
        counts = np.zeros((rows, vocab), np.uint32)
        counts[:, ::200] = 1 << 31
        counts[:, ::600] += 2
    masks = np.zeros((0, -(-vocab // 32)), np.uint32)
    return _cuda_ops.sample(logits, masks=masks, counts=counts, repeats=repeats, **arrays)


def logits_of(rows: int, vocab: int) -> Floats:
    return np.random.default_rng(rows).standard_normal((rows, vocab), np.float32) * 3


def verify() -> None:
    """Greedy rows draw the largest; the log-probability of what is drawn is that of the logits."""
    logits = logits_of(3, 1000)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    for name, changes in KINDS.items():
        tokens, logprobs, *_ = sample(logits, changes)
        assert ((tokens >= 0) & (tokens < 1000)).all(), f"{name}: tokens {tokens}"
        np.testing.assert_allclose(logprobs, expected[np.arange(3), tokens], atol=1e-4)
        if name == "greedy":
            np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
        if name == "top-k + top-p":
            assert ((logits > logits[np.arange(3), tokens][:, None]).sum(axis=1) < 50).all()
        alone, *_ = sample(logits[:1], changes)
        assert alone[0] == tokens[0]


def bench(
    report: GpuReport, torch: TorchPeer, rows: int, vocab: int, kind: str, repeats: int
) -> None:
    changes = KINDS[kind]
    *_, times = sample(logits_of(rows, vocab), changes, repeats)
    cost = gpu_sampling(rows, vocab, penalties=has_penalties(changes))
    peer = torch.time(
        lambda torch: sampler_of(torch, rows, vocab, changes),
        nbytes=8 * cost.nbytes,
        repeats=repeats,
    )
    report.add(name_of(rows, vocab, kind), times, cost, torch_us=peer)


def sampler_of(torch: Any, rows: int, vocab: int, changes: dict[str, float]) -> Any:
    logits = torch.randn((rows, vocab), device="cuda") * 3
    temperature = changes["temperature"]
    if temperature == 0:
        return lambda: logits.argmax(dim=-1)

    def plain() -> Any:
        return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)

    def filtered() -> Any:
        ordered, ids = torch.sort(logits / temperature, dim=-1, descending=True)
        ordered[:, int(changes["top_k"]) :] = -torch.inf
        shares = torch.softmax(ordered, dim=-1)
        shares[torch.cumsum(shares, dim=-1) - shares >= changes["top_p"]] = 0
        return ids.gather(1, torch.multinomial(shares, 1))

    prompt = torch.zeros((rows, vocab), dtype=torch.bool, device="cuda")
    prompt[:, ::200] = True
    counts = torch.zeros((rows, vocab), device="cuda")
    counts[:, ::600] = 2

    def penalised() -> Any:
        seen = prompt | (counts > 0)
        factor = changes["repetition_penalty"]
        changed = torch.where(
            seen, torch.where(logits > 0, logits / factor, logits * factor), logits
        )
        changed = changed - changes["frequency_penalty"] * counts
        changed = changed - changes["presence_penalty"] * (counts > 0)
        return torch.multinomial(torch.softmax(changed / temperature, dim=-1), 1)

    if has_penalties(changes):
        return penalised
    return filtered if "top_k" in changes else plain


def name_of(rows: int, vocab: int, kind: str) -> str:
    return f"sampling {kind}, {rows} x {vocab}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_gpu_options(parser)
    options = parser.parse_args()
    report = GpuReport.from_options("kernels", options)
    torch = TorchPeer(not options.no_torch)
    vocabs, all_rows = SMALL if options.small else (VOCABS, ROWS)
    repeats = options.repeats or (1 if options.small else 20)
    with report.attempt("sampling: correctness"):
        verify()
    report.try_all(
        [
            (
                name_of(rows, vocab, kind),
                partial(bench, report, torch, rows, vocab, kind, repeats),
            )
            for vocab in vocabs
            for rows in all_rows
            for kind in KINDS
        ]
    )
    return report.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
