"""The command ``rapshee-engine``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.async_engine import AsyncEngine
from rapshee_engine.engine.runner import build_info
from rapshee_engine.errors import ConfigError, RapsheeError
from rapshee_engine.pull import DEFAULT_MODEL, cache_folder, model_path, pull
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.server.launch import LaunchOptions, launch
from rapshee_engine.server.settings import ServerSettings
from rapshee_engine.tenancy.keys import check_key_text, home_folder

__all__ = ["main"]

# The hosted API's names, for clients that know them.
_DEFAULT_NAMES = ("rapshee-1", "rapshee-1-mini")
_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_SIZE_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 0, 1 for an error, 2 for wrong usage, 130 if interrupted."""
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
    except RapsheeError as error:
        print(f"rapshee-engine: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output left; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rapshee-engine",
        description="Serve language models over an OpenAI-compatible API, or run them here.",
    )
    version = f"%(prog)s {build_info()['version']}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_generate(commands)
    _add_pull(commands)
    _add_info(commands)
    return parser


def _add_command(commands: Any, name: str, run: Any, summary: str, epilog: str) -> Any:
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


# ---- serve


def _add_serve(commands: Any) -> None:
    command = _add_command(
        commands,
        "serve",
        _serve,
        "serve models over HTTP until interrupted",
        "examples:\n"
        "  rapshee-engine serve\n"
        "  rapshee-engine serve --model tiny=./tiny.gguf --model big=./big-folder --port 9000\n"
        "  RAPSHEE_API_KEY=secret rapshee-engine serve --host 0.0.0.0\n\n"
        "The first start makes an API key, shows it on the terminal (or writes it to a file if\n"
        "there is none) and keeps its hash in $RAPSHEE_HOME (~/.local/share/rapshee-engine).\n"
        "Without --model, the first start downloads the default model as `pull` does.",
    )
    command.add_argument(
        "--model",
        metavar="NAME=PATH",
        action="append",
        type=_named_path,
        default=[],
        help="serve the GGUF file or Hugging Face folder at PATH as NAME; repeatable "
        f"(default: {DEFAULT_MODEL.name} as {' and '.join(_DEFAULT_NAMES)})",
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    command.add_argument("--port", type=_port, default=8000, help="0: any free one (%(default)s)")
    keys = command.add_argument_group("authentication")
    keys.add_argument(
        "--api-key",
        metavar="KEY",
        action="append",
        default=[],
        help="accept this key too; repeatable. Other users of the machine can see it: "
        "better set RAPSHEE_API_KEY or use a file",
    )
    keys.add_argument("--api-key-file", metavar="FILE", help="accept the keys in FILE, one a line")
    keys.add_argument(
        "--no-auth", action="store_true", help="need no key; only with a loopback --host"
    )
    _add_engine_options(command)


def _serve(options: argparse.Namespace) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    given_keys, hint = _given_keys(options, os.environ)
    launch(
        LaunchOptions(
            models=_models(options.model),
            engine_options=_engine_options(options),
            host=options.host,
            port=options.port,
            home=home_folder(os.environ),
            given_keys=given_keys,
            given_key_hint=hint,
            authenticate=not options.no_auth,
        )
    )


def _named_path(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not path or not name.isprintable() or not name or " " in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 to 65535")
    return int(text)


def _models(given: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Served name -> absolute path.

    Raises:
        ConfigError: a name comes twice, or nothing lies at a path.
    """
    if not given:
        path = str(pull(DEFAULT_MODEL, cache_folder(os.environ)))
        return dict.fromkeys(_DEFAULT_NAMES, path)
    models: dict[str, str] = {}
    for name, path in given:
        if name in models:
            raise ConfigError(f"--model {name} is given twice; give every model its own name")
        models[name] = _existing(path)
    return models


def _existing(path: str) -> str:
    if not os.path.exists(path):
        raise ConfigError(
            f"there is no model at {path}; give a GGUF file or a Hugging Face folder, or leave "
            f"--model out for {DEFAULT_MODEL.name}"
        )
    return os.path.realpath(path)


def _given_keys(
    options: argparse.Namespace, environ: Mapping[str, str]
) -> tuple[tuple[str, ...], str]:
    """The keys that the operator chose, and how a shell gets one of them.

    Raises:
        ConfigError: a key cannot be sent in a header, or the file cannot be read.
    """
    keys = []
    hint = ""
    if environ.get("RAPSHEE_API_KEY"):
        hint = "$RAPSHEE_API_KEY"
        keys.append(check_key_text(environ["RAPSHEE_API_KEY"], source="RAPSHEE_API_KEY"))
    if options.api_key_file is not None:
        hint = hint or f"$(grep -m1 '^[^#]' {shlex.quote(options.api_key_file)})"
        keys += _keys_in_file(options.api_key_file)
    for key in options.api_key:
        hint = hint or "YOUR_KEY"
        keys.append(check_key_text(key, source="--api-key"))
    if keys and options.no_auth:
        raise ConfigError("--no-auth takes no keys: remove it, or the keys")
    return tuple(keys), hint


def _keys_in_file(name: str) -> list[str]:
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --api-key-file {name}: {error}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {name} holds no key; write one a line")
    return [check_key_text(key, source=f"--api-key-file {name}") for key in keys]


# ---- generate


def _add_generate(commands: Any) -> None:
    command = _add_command(
        commands,
        "generate",
        _generate,
        "answer one prompt on standard output",
        "examples:\n"
        '  rapshee-engine generate "Why is the sky blue?"\n'
        "  echo 'Once upon a time' | rapshee-engine generate --raw --max-tokens 100\n",
    )
    command.add_argument("prompt", nargs="?", help="the text (default: standard input)")
    command.add_argument(
        "--model", metavar="PATH", help=f"GGUF file or folder (default: {DEFAULT_MODEL.name})"
    )
    command.add_argument(
        "--max-tokens",
        type=int,
        default=512,
        metavar="N",
        help="stop after so many at the latest (%(default)s)",
    )
    command.add_argument("--temperature", type=float, default=1.0, help="0: greedy (%(default)s)")
    command.add_argument("--seed", type=int, help="equal seeds give equal text (default: random)")
    form = command.add_mutually_exclusive_group()
    form.add_argument(
        "--chat",
        action="store_true",
        default=None,
        dest="chat",
        help="as a user's message (default where the model has a chat template)",
    )
    form.add_argument(
        "--raw", action="store_false", dest="chat", help="as text to continue, control tokens too"
    )
    _add_engine_options(command)


def _generate(options: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    if not prompt.strip():
        raise ConfigError("the prompt is empty; give it as an argument or on standard input")
    path = _existing(options.model) if options.model else pull(DEFAULT_MODEL, _cache())
    with closing(AsyncEngine(model=str(path), **_engine_options(options))) as engine:
        asyncio.run(_print_completion(engine, prompt, options))


async def _print_completion(engine: AsyncEngine, prompt: str, options: argparse.Namespace) -> None:
    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        output_kind=RequestOutputKind.DELTA,
    )
    chat = engine.chat_template is not None if options.chat is None else options.chat
    # Only a raw prompt is one that may hold control tokens.
    asked: Any = prompt
    if chat:
        asked = {"prompt_token_ids": engine.render_chat([{"role": "user", "content": prompt}])}
    async with aclosing(engine.generate(asked, params)) as outputs:
        async for output in outputs:
            print(output.outputs[0].text, end="", flush=True)
    print()


# ---- pull


def _add_pull(commands: Any) -> None:
    command = _add_command(
        commands,
        "pull",
        _pull,
        f"download the default model, {DEFAULT_MODEL.name}",
        "The file goes to models/ in $RAPSHEE_CACHE (~/.cache/rapshee-engine), and its path to\n"
        "standard output. A model that is there already is not downloaded again.",
    )
    command.add_argument(
        "--verify",
        action="store_true",
        help="check the SHA-256 of a model that is there already, and replace it if it is wrong",
    )


def _pull(options: argparse.Namespace) -> None:
    print(pull(DEFAULT_MODEL, _cache(), verify=options.verify))


def _cache() -> Path:
    return cache_folder(os.environ)


# ---- info


def _add_info(commands: Any) -> None:
    _add_command(
        commands,
        "info",
        _info,
        "show build, instruction sets, devices, limits and folders",
        "RAPSHEE_CPU_ISA=scalar|avx2|avx512 selects another instruction set.",
    )


def _info(_options: argparse.Namespace) -> None:
    engine = EngineConfig(model="-")
    default_model = model_path(DEFAULT_MODEL, _cache())
    present = "" if default_model.exists() else " (not downloaded yet)"
    limits = {
        "running sequences": f"{engine.max_num_seqs} (--max-num-seqs)",
        "tokens per step": f"{engine.max_num_batched_tokens} (--max-num-batched-tokens)",
        "request body": f"{ServerSettings().max_body_bytes >> 20} MiB",
        "pending completions": f"{ServerSettings().max_pending} per engine",
    }
    folders = {"default model": f"{default_model}{present}", "state": home_folder(os.environ)}
    build = build_info()
    build["cuda"] = _cuda_line(build["cuda"])
    for name, value in {**build, **limits, **folders}.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{name.replace('_', ' ') + ':':22}{shown}")


def _cuda_line(cuda: Any) -> str:
    """What ``build_info()`` says about CUDA, for people."""
    if not cuda:
        return "not in this build (-C cmake.define.RAPSHEE_CUDA=ON builds it)"
    kind = "emulated, for tests: " if cuda["kind"] == "cuda-emu" else ""
    if cuda["unavailable"]:
        return f"{kind}no device: {cuda['unavailable']}"
    return kind + ", ".join(cuda["devices"])


# ---- engine options, common to serve and generate


def _add_engine_options(command: Any) -> None:
    group = command.add_argument_group("engine")
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda (the first GPU), cuda:1, or auto: a GPU where there is one (%(default)s)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of unquantised weights and the KV cache; float16 on CUDA, float32 on CPU only "
        "(%(default)s)",
    )
    group.add_argument(
        "--load-format",
        default="auto",
        choices=("auto", "gguf", "safetensors", "dummy"),
        help="dummy: random weights for the config.json in the model's folder (%(default)s)",
    )
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="context in tokens (default: the model's)"
    )
    group.add_argument(
        "--kv-cache-memory",
        type=_size,
        metavar="SIZE",
        help="memory for the KV cache, such as 512M or 2G (default: what --max-num-seqs full "
        "contexts need, at most a quarter of what is free, 90 %% on a GPU)",
    )
    group.add_argument(
        "--block-size", type=int, metavar="N", help="tokens of a KV block (default: the device's)"
    )
    group.add_argument(
        "--max-num-seqs", type=int, metavar="N", default=64, help="that run at once (%(default)s)"
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        default=512,
        help="most tokens of one step (%(default)s)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="(default: the physical cores)")
    group.add_argument(
        "--no-prefix-caching", action="store_true", help="compute equal prompt beginnings anew"
    )
    group.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="prepare a step while another runs (default: on a GPU)",
    )
    group.add_argument(
        "--no-deterministic",
        action="store_true",
        help="on CUDA: let a request's rounding depend on what else runs, where that is faster "
        "(needs cuBLASLt: pip install nvidia-cublas)",
    )
    group.add_argument(
        "--chat-template", metavar="FILE", help="Jinja template (default: the model's own)"
    )


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": options.device,
        "dtype": options.dtype,
        "load_format": options.load_format,
        "max_model_len": options.max_model_len,
        "kv_cache_memory_bytes": options.kv_cache_memory,
        "block_size": options.block_size,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "enable_prefix_caching": not options.no_prefix_caching,
        "async_scheduling": options.async_scheduling,
        "deterministic": not options.no_deterministic,
        "threads": options.threads,
        "chat_template": _template(options.chat_template),
    }


def _template(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --chat-template {name}: {error}") from None


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 512M or 2G")
    return int(match[1]) << _SIZE_SHIFT[match[2].lower()]
