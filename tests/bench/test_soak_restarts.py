"""A few of the starts and stops under load that ``bench/soak_restarts.py`` does by the hundred."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reference.tiny_chat import write_chat_folder
from soak_restarts import Outcome, Usage, _check, check_usage, restart_embedded, restart_server

OPTIONS = ["--device", "cpu", "--kv-cache-memory", "64M", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("soak")
    return str(write_chat_folder(folder, max_position_embeddings=4096))


def test_servers_lose_no_request(model: str) -> None:
    """Twice with time to drain, once without, once with a second signal."""
    total = restart_server(4, model, num_clients=4, max_tokens=200, options=OPTIONS)
    assert total["answer"] >= 4 * 4
    assert total["closed"] == 4 * 4


def test_embedded_engines_leave_nothing(model: str) -> None:
    usages = restart_embedded(
        16, model, device="cpu", kv_cache_memory_bytes=64 << 20, max_model_len=512
    )
    check_usage(usages)


def test_the_checks_see_what_is_lost() -> None:
    moments = {"draining": 1.0, "drain timeout is over": 2.0, "closing": 3.0}
    _check([Outcome("busy", 1.5), Outcome("ended", 2.5), Outcome("closed", 3.0)], 1.0, moments)
    for lost in (Outcome("busy", 0.5), Outcome("ended", 1.5), Outcome("closed", 2.5)):
        with pytest.raises(AssertionError, match="before"):
            _check([lost], 1.0, moments)


@pytest.mark.parametrize("left", [{"threads": 6}, {"files": 4}, {"rss": 1060}])
def test_the_checks_see_what_is_left(left: dict[str, int]) -> None:
    usage = Usage(threads=5, files=3, rss=1000)
    check_usage([usage] * 9)
    with pytest.raises(AssertionError):
        check_usage([*[usage] * 8, replace(usage, **left)])
