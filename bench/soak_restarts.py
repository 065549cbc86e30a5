"""Starts and stops an engine many times under load, and checks that nothing is lost or left.

``server``: a server process a cycle, clients that ask until it is gone, a signal in the middle.
Every request must get exactly its tokens, or 503 after the signal, or an error after the drain
timeout, or a closed connection once the server closes; the process must end with status 0.

``embedded``: an `LLM` a cycle in this process. Threads and open files must be the same after each
cycle, and resident memory at the end within 5 % of what it was after the first cycles.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import time
from typing import Any

import httpx

from rapshee_engine import LLM, SamplingParams

__all__ = ["Usage", "check_usage", "restart_embedded", "restart_server"]

_KEY = "soak-key"
_NUM_PROMPTS = 4
_WARM_UP = 8  # cycles until allocator, worker pool and import state are what they stay
_RSS_TOLERANCE = 1.05


# ---- server


@dataclass(frozen=True)
class Outcome:
    """How a request ended: ``answer``, ``busy`` (503), ``ended`` (by the timeout), ``closed``."""

    kind: str
    at: float


@dataclass
class Load:
    """Clients of one server process, and what they got."""

    base_url: str
    max_tokens: int
    expected: dict[int, str]
    outcomes: list[Outcome] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    answered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @contextmanager
    def clients(self, count: int) -> Iterator[None]:
        """So many clients, which ask until they find the server closed."""
        threads = [threading.Thread(target=self._ask_on, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for thread in threads:
                thread.join()

    def _ask_on(self, index: int) -> None:
        with httpx.Client(base_url=self.base_url, timeout=600) as http:
            kind = ""
            while kind != "closed" and not self.errors:
                try:
                    kind = self._ask(http, index % _NUM_PROMPTS, stream=index % 3 != 0)
                except httpx.TransportError:
                    kind = "closed"
                except Exception as error:
                    self.errors.append(repr(error))
                self.outcomes.append(Outcome(kind, time()))
                self.answered.release()
                index += 1

    def _ask(self, http: httpx.Client, prompt: int, *, stream: bool) -> str:
        body = {
            "model": "soak",
            "messages": [{"role": "user", "content": f"Tell me about the number {prompt}."}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "stream": stream,
        }
        headers = {"authorization": f"Bearer {_KEY}"}
        with http.stream("POST", "/chat/completions", json=body, headers=headers) as answer:
            answer.read()
        if answer.status_code == 503:
            code = answer.json()["error"]["code"]
            return {"server_overloaded": "busy", "server_shutting_down": "ended"}[code]
        assert answer.status_code == 200, answer.text
        if stream and '"error"' in answer.text:
            assert '"code":"server_shutting_down"' in answer.text, answer.text
            return "ended"
        text = _streamed_text(answer.text) if stream else _content(answer.json())
        assert text == self.expected.setdefault(prompt, text), "other tokens than before"
        return "answer"


def _streamed_text(events: str) -> str:
    *chunks, last = [line[6:] for line in events.split("\n") if line]
    assert last == "[DONE]", f"a stream ended with {last}"
    return "".join(json.loads(c)["choices"][0]["delta"].get("content", "") for c in chunks)


def _content(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def restart_server(
    cycles: int,
    model: str,
    *,
    num_clients: int = 8,
    max_tokens: int = 24,
    options: Sequence[str] = (),
    report: bool = False,
) -> Counter[str]:
    """Run so many servers, one after another; how many requests ended in which way.

    Of four cycles, two have time to drain, one ends what still runs at once, and one gets a second
    signal.
    """
    expected: dict[int, str] = {}
    total: Counter[str] = Counter()
    for cycle in range(cycles):
        found = _one_server(cycle, model, num_clients, max_tokens, options, expected)
        total += found
        if report:
            print(f"server {cycle + 1}: {dict(found)}", flush=True)
    return total


def _one_server(
    cycle: int,
    model: str,
    num_clients: int,
    max_tokens: int,
    options: Sequence[str],
    expected: dict[int, str],
) -> Counter[str]:
    drain_timeout = "0" if cycle % 4 == 2 else "600"
    command = [sys.executable, "-m", "rapshee_engine", "serve", "--model", f"soak={model}"]
    command += ["--port", "0", "--log-format", "json", "--drain-timeout", drain_timeout, *options]
    with (
        tempfile.TemporaryDirectory() as home,
        (Path(home) / "log").open("w+") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "RAPSHEE_HOME": home, "RAPSHEE_API_KEY": _KEY},
        ) as process,
    ):
        load = Load(_base_url(process, log), max_tokens, expected)
        with load.clients(num_clients):
            for _ in range(num_clients):
                load.answered.acquire()
            signalled_at = time()
            process.send_signal((signal.SIGTERM, signal.SIGINT)[cycle % 2])
            if cycle % 4 == 3:
                _wait_for_busy(load)
                process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, f"status {process.returncode}"
        assert not load.errors, load.errors
        log.seek(0)
        _check(load.outcomes, signalled_at, _moments(log.read()))
    return Counter(outcome.kind for outcome in load.outcomes)


def _base_url(process: subprocess.Popen[str], log: Any) -> str:
    assert process.stdout is not None
    url = ""
    for line in process.stdout:
        url = line.split()[1] if line.startswith("URL:") else url
        if line == "ready\n":
            return url
    log.seek(0)
    raise AssertionError(f"the server did not start: {log.read()}")


def _wait_for_busy(load: Load) -> None:
    """Until a client was told that the server drains, or that it is gone."""
    while not any(outcome.kind in ("busy", "closed") for outcome in load.outcomes):
        load.answered.acquire()


def _moments(log: str) -> dict[str, float]:
    """Message -> when it was logged first. Every line must be an object, and none hold a key."""
    assert _KEY not in log
    moments: dict[str, float] = {}
    for line in log.splitlines():
        entry = json.loads(line)
        at = datetime.fromisoformat(entry["time"].replace("Z", "+00:00")).timestamp()
        moments.setdefault(entry["message"].partition(":")[0], at)
    return moments


def _check(outcomes: Sequence[Outcome], signalled_at: float, moments: dict[str, float]) -> None:
    never = float("inf")
    earliest = {
        "answer": 0.0,
        "busy": signalled_at,
        "ended": min(moments.get("drain timeout is over", never), moments.get("closing", never)),
        "closed": moments.get("closing", never),
    }
    for outcome in outcomes:
        # The log has milliseconds.
        assert outcome.at >= earliest[outcome.kind] - 0.001, f"{outcome} before {earliest}"


# ---- embedded


@dataclass(frozen=True)
class Usage:
    """What this process holds: threads, open files, bytes of resident memory."""

    threads: int
    files: int
    rss: int

    @classmethod
    def now(cls) -> Usage:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            threads=len(os.listdir("/proc/self/task")),
            files=len(os.listdir("/proc/self/fd")),
            rss=pages * os.sysconf("SC_PAGE_SIZE"),
        )


def restart_embedded(cycles: int, model: str, **options: Any) -> list[Usage]:
    """Make an `LLM`, use it and close it, so many times; what the process held after each."""
    params = SamplingParams(max_tokens=8, temperature=0.0)
    prompts = [f"The number {i}" for i in range(8)]
    usages = []
    texts = set()
    for _ in range(cycles):
        texts.add(_answer(model, prompts, params, options))
        usages.append(Usage.now())
    assert len(texts) == 1, "other tokens than before"
    return usages


def _answer(
    model: str, prompts: Sequence[str], params: SamplingParams, options: dict[str, Any]
) -> tuple[str, ...]:
    with LLM(model=model, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return tuple(output.outputs[0].text for output in outputs)


def check_usage(usages: Sequence[Usage]) -> None:
    """Compare the last cycles with the first ones."""
    before, after = usages[_WARM_UP - 1], usages[-1]
    assert len({usage.threads for usage in usages[_WARM_UP - 1 :]}) == 1, usages
    assert len({usage.files for usage in usages[_WARM_UP - 1 :]}) == 1, usages
    assert after.rss <= before.rss * _RSS_TOLERANCE, f"{before} -> {after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="GGUF file or Hugging Face folder with a chat template")
    parser.add_argument("part", nargs="*", help="server, embedded (default: both)")
    parser.add_argument("--cycles", type=int, default=100, help="of each part (%(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="of a server (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=24, help="of an answer (%(default)s)")
    options = parser.parse_args()
    parts = options.part or ["server", "embedded"]
    if "embedded" in parts:
        memory = 64 << 20
        usages = restart_embedded(options.cycles, options.model, kv_cache_memory_bytes=memory)
        print(f"embedded: {usages[0]}, {usages[_WARM_UP - 1]}, {usages[-1]}", flush=True)
        check_usage(usages)
    if "server" in parts:
        total = restart_server(
            options.cycles,
            options.model,
            num_clients=options.clients,
            max_tokens=options.max_tokens,
            options=["--kv-cache-memory", "64M"],
            report=True,
        )
        print(f"servers: {options.cycles}, requests: {dict(total)}")


if __name__ == "__main__":
    main()
