"""Options of the commands that sample."""

from __future__ import annotations

import argparse
from typing import Any

from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams

__all__ = ["add_sampling_options", "sampling_params"]


def add_sampling_options(command: Any, *, max_tokens: int | None) -> None:
    """``max_tokens``: the default; None: up to the end of the context."""
    group = command.add_argument_group("sampling")
    shown = "the end of the context" if max_tokens is None else max_tokens
    group.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"stop after so many at the latest (default: {shown})",
    )
    group.add_argument(
        "--temperature", type=float, metavar="T", default=1.0, help="0: greedy (%(default)s)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        default=1.0,
        help="draw from the smallest set that reaches this probability (%(default)s)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        default=0,
        help="draw from so many most likely tokens; 0: all (%(default)s)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        default=0.0,
        help="drop tokens less likely than P times the most likely (%(default)s)",
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="equal seeds give equal text (default: random)"
    )


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """For a stream of deltas."""
    return SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        seed=options.seed,
        output_kind=RequestOutputKind.DELTA,
    )
