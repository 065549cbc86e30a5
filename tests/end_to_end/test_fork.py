"""A forked child has no copy of its parent's threads: it is refused, and neither it nor its parent
comes to harm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import asyncio, os, sys
from rapshee_engine import LLM, AsyncEngine, SamplingParams
from rapshee_engine.errors import EngineClosedError

model = sys.argv[1]
options = dict(kv_cache_memory_bytes=64 << 20, max_model_len=512)
params = SamplingParams(max_tokens=4, temperature=0.0)

def ask_llm(llm):
    return llm.generate("The sky is", params, use_tqdm=False)[0].outputs[0].text

async def ask_async(engine):
    async for output in engine.generate("The sky is", params):
        text = output.outputs[0].text
    return text

def refused(ask):
    try:
        ask()
    except EngineClosedError:
        return
    sys.exit("not refused")

llm, engine = LLM(model, **options), AsyncEngine(model, **options)
expected = ask_llm(llm)
child = os.fork()
if child == 0:
    refused(lambda: ask_llm(llm))
    refused(lambda: asyncio.run(ask_async(engine)))
    assert not engine.is_ready
    CHILD_END
    with LLM(model, **options) as own:
        assert ask_llm(own) == expected
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert ask_llm(llm) == expected == asyncio.run(ask_async(engine))
llm.close()
engine.close()
print("done")
"""


@pytest.mark.parametrize("end", ["llm.close(); engine.close()", "del llm, engine", "pass"])
def test_a_forked_child_makes_its_own(end: str, default_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("CHILD_END", end), str(default_model)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
