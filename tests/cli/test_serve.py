"""``serve``: what it passes on, and its one-line errors."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rapshee_engine import cli
from rapshee_engine.cli import models, serve
from rapshee_engine.config import EngineConfig
from rapshee_engine.errors import DownloadError
from rapshee_engine.server.launch import LaunchOptions
from rapshee_engine.server.settings import ServerSettings


def test_serve_defaults(launches: list[LaunchOptions], home: Path) -> None:
    assert cli.main(["serve"]) == 0
    (options,) = launches
    default = str(home / "cache" / "default.gguf")
    assert options.models == {"rapshee-1": default, "rapshee-1-mini": default}
    assert (options.host, options.port) == ("127.0.0.1", 8000)
    assert options.home == home / "home"
    assert options.authenticate
    assert options.settings == ServerSettings()
    assert options.given_keys == ()
    # The command's defaults are the engine's.
    assert EngineConfig(model="m", **options.engine_options) == EngineConfig(model="m")


def test_serve_passes_everything_on(
    launches: list[LaunchOptions], model: str, tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    arguments = f"""serve --model a={model} --model b={model} --host ::1 --port 0 --no-auth
        --drain-timeout 1.5
        --device cuda:1 --dtype float16 --kv-dtype int8 --quantize q4 --load-format dummy
        --max-model-len 100 --kv-cache-memory 2G --block-size 16
        --max-num-seqs 3 --max-num-batched-tokens 4 --threads 5 --no-prefix-caching
        --async-scheduling --no-deterministic --chat-template {template}"""
    assert cli.main(arguments.split()) == 0
    (options,) = launches
    assert options.models == {"a": model, "b": model}
    assert (options.host, options.port, options.authenticate) == ("::1", 0, False)
    assert options.settings == ServerSettings(drain_timeout_s=1.5)
    assert options.engine_options == {
        "device": "cuda:1",
        "dtype": "float16",
        "kv_dtype": "int8",
        "quantize": "q4",
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


def test_how_serve_logs(
    launches: list[LaunchOptions], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    configured: list[tuple[str, str]] = []
    monkeypatch.setattr(serve, "configure_logging", lambda *how: configured.append(how))
    arguments = ["serve", "--model", f"a={model}"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--log-format", "json", "--log-level", "debug"]) == 0
    assert configured == [("text", "info"), ("json", "debug")]
    assert len(launches) == 2


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
        ["--log-format", "xml"],
        ["--log-level", "loud"],
        ["--drain-timeout", "-1"],
        ["--drain-timeout", "nan"],
        ["--drain-timeout", "1e99"],
        ["--port", "65536"],
        ["--port", "-1"],
        ["--port", "http"],
        ["--model", "my model.gguf"],
        ["--model", "=model.gguf"],
        ["--model", "a b=model.gguf"],
        ["--model", "a="],
        ["--dtype", "float8"],
        ["--threads", "two"],
    ],
)
def test_wrong_usage_of_serve(usage_error: Callable[..., str], arguments: list[str]) -> None:
    assert arguments[0] in usage_error("serve", *arguments)


def test_duplicate_names(error_line: Callable[..., str], model: str) -> None:
    line = error_line("serve", "--model", f"a={model}", "--model", f"a={model}")
    assert "--model a is given twice" in line


def test_a_missing_model(error_line: Callable[..., str]) -> None:
    assert "no model at /nowhere" in error_line("serve", "--model", "a=/nowhere")
    line = error_line("generate", "x", "--model", "/nowhere")
    assert "no model at /nowhere" in line
    assert "org/name" in line


def test_no_auth_on_a_public_host(error_line: Callable[..., str], model: str) -> None:
    arguments = ["serve", "--model", f"a={model}", "--no-auth", "--host", "0.0.0.0"]
    assert "--no-auth needs a loopback host" in error_line(*arguments)


def test_an_unwritable_home(
    error_line: Callable[..., str], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAPSHEE_HOME", "/dev/null/home")
    line = error_line("serve", "--model", f"a={model}", "--port", "0")
    assert "RAPSHEE_HOME" in line


def test_a_missing_template(error_line: Callable[..., str], model: str) -> None:
    arguments = ["serve", "--model", f"a={model}", "--chat-template", "/nowhere"]
    assert "cannot read --chat-template /nowhere" in error_line(*arguments)


def test_a_failed_download(error_line: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DownloadError("no network")

    monkeypatch.setattr(models, "pull", fail)
    assert "no network" in error_line("serve")


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
    error_line: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    model = ["serve", "--model", f"a={tmp_path}"]
    assert "--api-key:" in error_line(*model, "--api-key", "a b")
    assert "--api-key:" in error_line(*model, "--api-key", "")
    assert "cannot read" in error_line(*model, "--api-key-file", "/nowhere")
    empty = str(tmp_path / "empty")
    assert "holds no key" in error_line(*model, "--api-key-file", empty)
    assert "--no-auth" in error_line(*model, "--no-auth", "--api-key", "x")
    monkeypatch.setenv("RAPSHEE_API_KEY", "caf\u00e9")
    assert "RAPSHEE_API_KEY:" in error_line(*model)
