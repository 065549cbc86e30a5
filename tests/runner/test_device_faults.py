"""A GPU without memory, or one that fails in mid-step: typed errors, nothing kept, nothing hangs.
Faults are the emulated device's, in processes of their own, as a failed device stays failed."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rapshee_engine import LLM, SamplingParams, _core
from reference.devices import OTHER_DEVICES, is_emulated
from reference.tiny_llama import make_config

EMULATED = [device for device in OTHER_DEVICES if is_emulated(device)]

PRELUDE = """
import sys
from rapshee_engine import LLM, SamplingParams, _core
from rapshee_engine.errors import ConfigError, EngineDeadError

PROMPTS = [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [4]}]
PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)

def load(device):
    return LLM(sys.argv[1], load_format="dummy", device=device, max_num_seqs=4, max_model_len=64)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    return tmp_path


def run(folder: Path, program: str, device: str, **variables: str) -> str:
    """What a program prints, in a process with these environment variables."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program, str(folder), device],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("device", OTHER_DEVICES)
def test_all_memory_is_given_back(folder: Path, device: str) -> None:
    def use() -> None:
        with LLM(str(folder), load_format="dummy", device=device, max_num_seqs=4) as llm:
            params = SamplingParams(max_tokens=4, presence_penalty=0.5, logprobs=2)
            llm.generate([{"prompt_token_ids": [1, 2, 3]}] * 3, params, use_tqdm=False)

    use()  # what the driver keeps for itself is there from now on
    gc.collect()
    before = _core.available_memory(device)
    use()
    gc.collect()
    assert _core.available_memory(device) == before


# Kernels of the first step, of a later step, of one that is being replayed.
@pytest.mark.parametrize("device", EMULATED)
@pytest.mark.parametrize("kernel", [1, 60, 200])
def test_a_kernel_that_fails_ends_every_request_and_the_engine(
    folder: Path, device: str, kernel: int
) -> None:
    program = """
import os
llm = load(sys.argv[2])
os.environ["RAPSHEE_EMU_FAIL_LAUNCH"] = os.environ["FAIL_AT"]
for _ in range(2):
    try:
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    except EngineDeadError as error:
        print(error)
llm.close()
with load("cpu") as other:
    print(len(other.generate(PROMPTS, PARAMS, use_tqdm=False)))
"""
    first, second, others = run(folder, program, device, FAIL_AT=str(kernel)).splitlines()
    assert "the device failed" in first
    assert second
    assert others == "2"


@pytest.mark.parametrize("device", EMULATED)
@pytest.mark.parametrize("allocation", [1, 10, 20, 30])
def test_an_allocation_that_fails_leaves_a_device_that_can_be_used(
    folder: Path, device: str, allocation: int
) -> None:
    program = """
try:
    load(sys.argv[2]).close()
except ConfigError as error:
    print(error)
free = _core.available_memory(sys.argv[2])
with load(sys.argv[2]) as llm:
    print(len(llm.generate(PROMPTS, PARAMS, use_tqdm=False)))
assert _core.available_memory(sys.argv[2]) == free
"""
    variables = {"RAPSHEE_EMU_FAIL_ALLOCATION": str(allocation)}
    error, answers = run(folder, program, device, **variables).splitlines()
    assert "out of memory" in error
    assert answers == "2"


@pytest.mark.parametrize("device", EMULATED)
def test_too_little_memory_is_said_in_one_line(folder: Path, device: str) -> None:
    program = """
try:
    load(sys.argv[2])
except ConfigError as error:
    print(error)
"""
    (line,) = run(folder, program, device, RAPSHEE_EMU_MEMORY=str(1 << 20)).splitlines()
    assert "memory" in line
