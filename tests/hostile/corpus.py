"""All cases, and the program that loads them in a process with little memory.

``python -m hostile.corpus``, with ``tests`` on ``PYTHONPATH``, prints what each attack took, in
milliseconds and in KiB by which the process grew at its peak, and what was said.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from hostile.case import Case, Write
from hostile.folder_cases import folder_cases
from hostile.gguf_cases import gguf_cases
from hostile.kind_cases import kind_cases
from hostile.text_cases import text_cases
from rapshee_engine.errors import RapsheeError
from rapshee_engine.llm import LLM
from rapshee_engine.sampling_params import SamplingParams
from rapshee_engine.tokenizer import (
    chat_template_from_folder,
    chat_template_from_gguf,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)
from rapshee_engine.weights.loader import load_checkpoint

__all__ = ["CASES", "Verdict", "run_all"]

CASES: dict[str, Case] = {
    case.name: case for case in (*gguf_cases(), *folder_cases(), *text_cases(), *kind_cases())
}

# What the process may take beyond what it has once a model was loaded. No case has files of more
# than some MB, and none justifies a hundred times that.
_MEMORY = 512 << 20
# Far beyond what a case takes: one that hangs must not hang the tests.
_PATIENCE_S = 60
_CHAT = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Verdict:
    """What came of one checkpoint.

    Attributes:
        stage: that refused it (see `Case`); ``none``: it loads and answers.
        errors: names of the type of the error and its bases.
        message: of the error.
        path: of the checkpoint.
        milliseconds: that it took.
        peak_kib: by which the process grew at its peak.
    """

    stage: str
    errors: list[str]
    message: str
    path: str
    milliseconds: float
    peak_kib: int


def _stages(path: Path, case: Case) -> Iterator[str]:
    """Each stage's name before it runs."""
    options = dict(case.options)
    yield "checkpoint"
    checkpoint = load_checkpoint(path, options.get("load_format", "auto"))
    yield "tokenizer"
    if checkpoint.gguf_metadata is not None:
        tokenizer_from_gguf(checkpoint.gguf_metadata, checkpoint.path)
        chat_template_from_gguf(checkpoint.gguf_metadata, checkpoint.path)
    elif (path / "tokenizer.json").exists() or checkpoint.format != "dummy":
        tokenizer_from_folder(path)
        chat_template_from_folder(path)
    yield "engine"
    with _model(path, case) as llm:
        yield "chat"
        one = SamplingParams(max_tokens=1, temperature=0.0)
        llm.generate({"prompt_token_ids": [3]}, one, use_tqdm=False)
        llm.chat(_CHAT, one, use_tqdm=False)
    yield "none"


def _model(path: Path, case: Case) -> LLM:
    options = {"device": "cpu", "threads": 1, "kv_cache_memory_bytes": 1 << 20, "max_num_seqs": 4}
    return LLM(str(path), **options, **dict(case.options))


def _load(path: Path, case: Case) -> tuple[str, BaseException | None]:
    stage, error = "", None
    try:
        for name in _stages(path, case):
            stage = name
        return stage, None
    except BaseException as caught:  # a panic of a Rust library is no Exception
        error = caught
    if stage in ("checkpoint", "tokenizer") and isinstance(error, RapsheeError):
        try:  # whoever asks for the whole model is told the same
            _model(path, case).close()
            error = AssertionError("the model loads")
        except BaseException as caught:
            error = caught
    return stage, error


def _judge(case: Case, write: Write) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder))
        before = _memory_kib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start = time.perf_counter()
        stage, error = _load(path, case)
        milliseconds = (time.perf_counter() - start) * 1e3
        return Verdict(
            stage,
            [] if error is None else [kind.__name__ for kind in type(error).__mro__],
            "" if error is None else str(error),
            os.fsdecode(path),
            round(milliseconds, 1),
            _memory_kib("VmHWM") - before,
        )


def _memory_kib(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0])


def _limit_memory() -> None:
    """Load a model first: what libraries take once is not the files' doing."""
    any_case = next(iter(CASES.values()))
    _judge(any_case, any_case.twin)
    limit = (_memory_kib("VmSize") << 10) + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_all() -> Iterator[tuple[str, str, Verdict]]:
    """(case, ``attack`` or ``twin``, verdict) of everything, with this process's memory limited."""
    logging.disable()
    _limit_memory()
    known: dict[tuple[Write, object], Verdict] = {}  # many cases have one twin
    for case in CASES.values():
        for kind, write in (("attack", case.attack), ("twin", case.twin)):
            key = (write, case.options)
            if key not in known:
                faulthandler.dump_traceback_later(_PATIENCE_S, exit=True)
                print(f"{case.name} ({kind})", file=sys.stderr, flush=True)
                known[key] = _judge(case, write)
            yield case.name, kind, known[key]
    faulthandler.cancel_dump_traceback_later()


def _report() -> None:
    for name, kind, verdict in run_all():
        if "--json" in sys.argv:
            print(json.dumps([name, kind, asdict(verdict)]), flush=True)
        elif kind == "attack":
            print(
                f"{verdict.milliseconds:8.1f} ms {verdict.peak_kib:8} KiB  {name}: "
                f"{verdict.stage}, {(verdict.errors or ['nothing'])[0]}: {verdict.message:.150}"
            )


if __name__ == "__main__":
    _report()
