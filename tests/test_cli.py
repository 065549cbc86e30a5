"""The command line: what it passes on, and its one-line errors."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

import rapshee_engine
from rapshee_engine import cli
from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.outputs import CompletionOutput, RequestOutput
from rapshee_engine.errors import DownloadError
from rapshee_engine.pull import DEFAULT_MODEL
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.server.launch import LaunchOptions
from reference.tiny_llama import make_config


class FakeEngine:
    """Says two pieces, and keeps what it was asked."""

    made: list[FakeEngine]

    def __init__(self, model: str, **options: Any) -> None:
        self.config = EngineConfig(model=model, **options)
        self.chat_template: object | None = "a template"
        self.asked: list[tuple[Any, SamplingParams]] = []
        self.closed = False
        self.made.append(self)

    def render_chat(self, messages: Sequence[Any]) -> list[int]:
        return [len(messages[0]["content"])]

    async def generate(
        self, prompt: Any, params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        self.asked.append((prompt, params))
        for text in ("Hello", " there"):
            yield RequestOutput("r", None, [], [CompletionOutput(0, text, [])])

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of its own, with the default model in place."""
    monkeypatch.setenv("RAPSHEE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAPSHEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAPSHEE_API_KEY", raising=False)
    return tmp_path


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """Engines that were made."""
    made: list[FakeEngine] = []
    monkeypatch.setattr(FakeEngine, "made", made, raising=False)
    monkeypatch.setattr(cli, "AsyncEngine", FakeEngine)
    monkeypatch.setattr(cli, "pull", lambda _model, cache, **_: cache / "default.gguf")
    return made


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[LaunchOptions]:
    """Options of servers that were launched."""
    launched: list[LaunchOptions] = []
    monkeypatch.setattr(cli, "launch", launched.append)
    monkeypatch.setattr(cli, "pull", lambda _model, cache, **_: cache / "default.gguf")
    return launched


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    return str(path)


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command which fails prints."""
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("rapshee-engine: ")
    return line


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


# ---- the whole command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"rapshee-engine {rapshee_engine.__version__}\n"


@pytest.mark.parametrize("command", ["serve", "generate", "pull", "info"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: rapshee-engine {command}" in text
    assert len(text.splitlines()) > 5


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in usage_error(capsys)
    assert "invalid choice" in usage_error(capsys, "sing")


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "pull", interrupt)
    assert cli.main(["pull"]) == 130


def test_it_runs_as_a_module() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "rapshee_engine", "serve", "--model", "a=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("rapshee-engine: there is no model at /nowhere;")


# ---- serve


def test_serve_defaults(launches: list[LaunchOptions], home: Path) -> None:
    assert cli.main(["serve"]) == 0
    (options,) = launches
    default = str(home / "cache" / "default.gguf")
    assert options.models == {"rapshee-1": default, "rapshee-1-mini": default}
    assert (options.host, options.port) == ("127.0.0.1", 8000)
    assert options.home == home / "home"
    assert options.authenticate
    assert options.given_keys == ()
    # The command's defaults are the engine's.
    assert EngineConfig(model="m", **options.engine_options) == EngineConfig(model="m")


def test_serve_passes_everything_on(
    launches: list[LaunchOptions], model: str, tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    arguments = f"""serve --model a={model} --model b={model} --host ::1 --port 0 --no-auth
        --device cuda:1 --dtype float16 --load-format dummy --max-model-len 100
        --kv-cache-memory 2G --block-size 16
        --max-num-seqs 3 --max-num-batched-tokens 4 --threads 5 --no-prefix-caching
        --async-scheduling --no-deterministic --chat-template {template}"""
    assert cli.main(arguments.split()) == 0
    (options,) = launches
    assert options.models == {"a": model, "b": model}
    assert (options.host, options.port, options.authenticate) == ("::1", 0, False)
    assert options.engine_options == {
        "device": "cuda:1",
        "dtype": "float16",
        "load_format": "dummy",
        "max_model_len": 100,
        "kv_cache_memory_bytes": 2 << 30,
        "block_size": 16,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 4,
        "enable_prefix_caching": False,
        "async_scheduling": True,
        "deterministic": False,
        "threads": 5,
        "chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("512M", 512 << 20), ("2g", 2 << 30), ("1GiB", 1 << 30), ("3 kb", 3 << 10)],
)
def test_sizes(launches: list[LaunchOptions], text: str, size: int) -> None:
    assert cli.main(["serve", "--kv-cache-memory", text]) == 0
    assert launches[0].engine_options["kv_cache_memory_bytes"] == size


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kv-cache-memory", "lots"],
        ["--kv-cache-memory", "-1G"],
        ["--port", "65536"],
        ["--port", "-1"],
        ["--port", "http"],
        ["--model", "model.gguf"],
        ["--model", "=model.gguf"],
        ["--model", "a b=model.gguf"],
        ["--model", "a="],
        ["--dtype", "float8"],
        ["--threads", "two"],
    ],
)
def test_wrong_usage_of_serve(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert arguments[0] in usage_error(capsys, "serve", *arguments)


def test_duplicate_names(capsys: pytest.CaptureFixture[str], model: str) -> None:
    line = error_line(capsys, "serve", "--model", f"a={model}", "--model", f"a={model}")
    assert "--model a is given twice" in line


def test_a_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model at /nowhere" in error_line(capsys, "serve", "--model", "a=/nowhere")
    assert "no model at /nowhere" in error_line(capsys, "generate", "x", "--model", "/nowhere")


def test_no_auth_on_a_public_host(capsys: pytest.CaptureFixture[str], model: str) -> None:
    arguments = ["serve", "--model", f"a={model}", "--no-auth", "--host", "0.0.0.0"]
    assert "--no-auth needs a loopback host" in error_line(capsys, *arguments)


def test_an_unwritable_home(
    capsys: pytest.CaptureFixture[str], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAPSHEE_HOME", "/dev/null/home")
    line = error_line(capsys, "serve", "--model", f"a={model}", "--port", "0")
    assert "RAPSHEE_HOME" in line


def test_a_missing_template(capsys: pytest.CaptureFixture[str], model: str) -> None:
    arguments = ["serve", "--model", f"a={model}", "--chat-template", "/nowhere"]
    assert "cannot read --chat-template /nowhere" in error_line(capsys, *arguments)


def test_a_failed_download(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DownloadError("no network")

    monkeypatch.setattr(cli, "pull", fail)
    assert "no network" in error_line(capsys, "serve")


def test_keys_come_from_everywhere(
    launches: list[LaunchOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    path.write_text("# mine\nfrom-file\n\n  and-another  \n")
    monkeypatch.setenv("RAPSHEE_API_KEY", "from-environment")
    arguments = ["--api-key", "one", "--api-key", "two", "--api-key-file", str(path)]
    assert cli.main(["serve", *arguments]) == 0
    assert launches[0].given_keys == ("from-environment", "from-file", "and-another", "one", "two")
    assert launches[0].given_key_hint == "$RAPSHEE_API_KEY"


def test_a_shell_finds_the_first_key_of_the_file(
    launches: list[LaunchOptions], tmp_path: Path
) -> None:
    path = tmp_path / "my keys"
    path.write_text("# mine\n\nfirst\nsecond\n")
    assert cli.main(["serve", "--api-key-file", str(path)]) == 0
    command = ["sh", "-c", f'printf %s "{launches[0].given_key_hint}"']
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"first"


def test_keys_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    model = ["serve", "--model", f"a={tmp_path}"]
    assert "--api-key:" in error_line(capsys, *model, "--api-key", "a b")
    assert "--api-key:" in error_line(capsys, *model, "--api-key", "")
    assert "cannot read" in error_line(capsys, *model, "--api-key-file", "/nowhere")
    empty = str(tmp_path / "empty")
    assert "holds no key" in error_line(capsys, *model, "--api-key-file", empty)
    assert "--no-auth" in error_line(capsys, *model, "--no-auth", "--api-key", "x")
    monkeypatch.setenv("RAPSHEE_API_KEY", "caf\u00e9")
    assert "RAPSHEE_API_KEY:" in error_line(capsys, *model)


# ---- generate


def test_generate_chats_with_the_default_model(
    capsys: pytest.CaptureFixture[str], engines: list[FakeEngine], home: Path
) -> None:
    arguments = ["hello", "--max-tokens", "5", "--temperature", "0", "--seed", "7"]
    assert cli.main(["generate", *arguments]) == 0
    assert capsys.readouterr().out == "Hello there\n"
    (engine,) = engines
    assert engine.closed
    assert engine.config.model == str(home / "cache" / "default.gguf")
    ((prompt, params),) = engine.asked
    assert prompt == {"prompt_token_ids": [5]}
    assert params == SamplingParams(
        max_tokens=5, temperature=0, seed=7, output_kind=RequestOutputKind.DELTA
    )


def test_generate_continues_raw_text_from_standard_input(
    engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon"))
    assert cli.main(["generate", "--raw", "--model", model, "--threads", "1"]) == 0
    (engine,) = engines
    assert (engine.config.model, engine.config.threads) == (model, 1)
    assert engine.asked[0][0] == "Once upon"
    assert engine.asked[0][1].max_tokens == 512


def test_generate_without_a_template_continues_the_text(
    engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(model: str, **options: Any) -> FakeEngine:
        engine = FakeEngine(model, **options)
        engine.chat_template = None
        return engine

    monkeypatch.setattr(cli, "AsyncEngine", make)
    assert cli.main(["generate", "hi"]) == 0
    assert cli.main(["generate", "--chat", "hi"]) == 0
    assert [engine.asked[0][0] for engine in engines] == ["hi", {"prompt_token_ids": [2]}]


def test_generate_errors(capsys: pytest.CaptureFixture[str], engines: list[FakeEngine]) -> None:
    assert "the prompt is empty" in error_line(capsys, "generate", " ")
    assert "temperature" in error_line(capsys, "generate", "x", "--temperature", "3")
    assert "max_tokens" in error_line(capsys, "generate", "x", "--max-tokens", "0")
    assert all(engine.closed for engine in engines)
    assert "not allowed with" in usage_error(capsys, "generate", "--raw", "--chat", "x")


# ---- pull, info


def test_pull_prints_the_path(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    calls: list[Any] = []

    def pull(model: Any, cache: Path, *, verify: bool = False) -> Path:
        calls.append((model, cache, verify))
        return Path("/there.gguf")

    monkeypatch.setattr(cli, "pull", pull)
    assert cli.main(["pull"]) == 0
    assert cli.main(["pull", "--verify"]) == 0
    assert capsys.readouterr().out == "/there.gguf\n/there.gguf\n"
    assert calls == [(DEFAULT_MODEL, home / "cache", verify) for verify in (False, True)]


def test_info(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert cli.main(["info"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    shown = {name: value.strip() for name, value in lines.items()}
    assert shown["version"]
    assert shown["isa"] in shown["isas"].split(", ")
    assert "cpu" in shown["devices"].split(", ")
    assert shown["running sequences"] == "64 (--max-num-seqs)"
    assert shown["state"] == str(home / "home")
    assert shown["default model"].endswith("(not downloaded yet)")


@pytest.mark.parametrize(
    ("cuda", "shown"),
    [
        (False, "not in this build (-C cmake.define.RAPSHEE_CUDA=ON builds it)"),
        (
            {"kind": "cuda", "devices": ["NVIDIA H200 (sm_90, 139 GiB)"] * 2, "unavailable": ""},
            "NVIDIA H200 (sm_90, 139 GiB), NVIDIA H200 (sm_90, 139 GiB)",
        ),
        (
            {"kind": "cuda", "devices": [], "unavailable": "driver 12.4 is older than 13.0"},
            "no device: driver 12.4 is older than 13.0",
        ),
        (
            {"kind": "cuda-emu", "devices": ["emulator"], "unavailable": ""},
            "emulated, for tests: emulator",
        ),
    ],
)
def test_info_says_what_there_is_of_cuda(
    cuda: Any, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "build_info", lambda: {"version": "1", "cuda": cuda})
    assert cli.main(["info"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["cuda"].strip() == shown


def test_a_device_that_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    options = f"--model {tmp_path} --load-format dummy --device cuda:77 hello"
    line = error_line(capsys, "generate", *options.split())
    assert "no device 'cuda:77'" in line
    assert "available: cpu" in line


def test_a_model_without_a_tokenizer_takes_no_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    options = f"--model {tmp_path} --load-format dummy --device cpu hello"
    line = error_line(capsys, "generate", *options.split())
    assert line.endswith("was loaded without a tokenizer: it takes prompt_token_ids, not a text")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    """As in ``rapshee-engine serve --help | true``."""
    reading, writing = os.pipe()
    os.close(reading)
    program = "import sys; from rapshee_engine import cli; cli.pull = lambda *_, **__: 'path'; "
    program += "sys.exit(cli.main(['pull']))"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environ,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("command", [["info"], ["--version"], ["serve", "--help"]])
def test_an_instruction_set_that_is_not_there_is_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAPSHEE_CPU_ISA", "foo")
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("rapshee-engine: ")
    assert "available: scalar" in error
    assert error.count("\n") == 1
