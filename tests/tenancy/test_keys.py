"""API keys and their store."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rapshee_engine.errors import ConfigError
from rapshee_engine.tenancy.keys import (
    Keyring,
    KeyStore,
    check_key_text,
    generate_key,
    home_folder,
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "data" / "rapshee-engine"


def first_key(store: KeyStore) -> str:
    keys: list[str] = []
    assert store.create_first(keys.append)
    return keys[0]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_form_of_a_key() -> None:
    keys = {generate_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"rk-[a-z0-9]{8}-[A-Za-z0-9_-]{43}", key) for key in keys)


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/ada")
    assert home_folder({}) == Path("/users/ada/.local/share/rapshee-engine")
    assert home_folder({"XDG_DATA_HOME": "/data"}) == Path("/data/rapshee-engine")
    assert home_folder({"XDG_DATA_HOME": "/data", "RAPSHEE_HOME": "/x"}) == Path("/x")


def test_modes_do_not_follow_the_umask(home: Path) -> None:
    before = os.umask(0)
    try:
        store = KeyStore(home)
        first_key(store)
        assert mode(home) == 0o700
        assert {path.name: mode(path) for path in home.iterdir()} == {
            "state.db": 0o600,
            "state.db-shm": 0o600,
            "state.db-wal": 0o600,
        }
        store.close()
    finally:
        os.umask(before)


def test_the_store_uses_a_write_ahead_log(home: Path) -> None:
    KeyStore(home).close()
    db = sqlite3.connect(home / "state.db")
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def test_only_hashes_are_stored(home: Path) -> None:
    store = KeyStore(home)
    key = first_key(store)
    assert store.hash_of(key[3:11]) == hashlib.sha256(key.encode()).digest()
    store.close()
    secret = key[12:].encode()
    assert all(secret not in path.read_bytes() for path in home.iterdir())


def test_there_is_one_first_key(home: Path) -> None:
    store = KeyStore(home)
    first_key(store)
    assert not store.create_first(lambda _key: pytest.fail("a second first key"))
    store.close()
    store = KeyStore(home)
    assert not store.create_first(lambda _key: pytest.fail("a second first key"))
    store.close()


def test_a_key_that_could_not_be_handed_over_is_not_kept(home: Path) -> None:
    def fail(key: str) -> None:
        raise OSError(key)

    store = KeyStore(home)
    with pytest.raises(ConfigError, match="RAPSHEE_HOME") as caught:
        store.create_first(fail)
    lost = str(caught.value).split(": ")[1].split(";")[0]
    assert lost.startswith("rk-")
    assert Keyring(store).identify(lost) is None
    assert Keyring(store).identify(first_key(store)) is not None
    store.close()


def test_processes_that_start_together_make_one_key(home: Path) -> None:
    def start(_index: int) -> list[str]:
        keys: list[str] = []
        store = KeyStore(home)
        store.create_first(keys.append)
        store.close()
        return keys

    with ThreadPoolExecutor(8) as pool:
        assert len([key for keys in pool.map(start, range(8)) for key in keys]) == 1


def test_identifies_a_stored_key_and_nothing_near_it(home: Path) -> None:
    store = KeyStore(home)
    key = first_key(store)
    ring = Keyring(store)
    assert ring.identify(key) == key[3:11]
    other = "b" if key[-1] == "a" else "a"
    for wrong in (
        key[:-1] + other,
        key[:-1],
        key + "a",
        key.upper(),
        f" {key}",
        key[3:11],
        generate_key(),
        f"rk-{key[3:11]}-{'A' * 43}",
        "",
        "rk-",
        "' OR 1=1 --",
        "\udcff",
    ):
        assert ring.identify(wrong) is None
    store.close()


def test_identifies_given_keys() -> None:
    ring = Keyring(None, ("one", "two"))
    first, second = ring.identify("one"), ring.identify("two")
    assert first
    assert second
    assert first != second
    assert ring.identify("three") is None
    assert ring.identify(generate_key()) is None
    assert Keyring(None, ("two",)).identify("two") == second


def test_given_and_stored_keys_together(home: Path) -> None:
    store = KeyStore(home)
    key = first_key(store)
    ring = Keyring(store, ("one",))
    assert ring.identify("one") is not None
    assert ring.identify(key) == key[3:11]
    store.close()


@pytest.mark.parametrize("key", ["", "a b", "a\n", "\u00e9", "a\x00", "\x7f"])
def test_keys_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        check_key_text(key, source="--api-key")


def test_any_printable_key_is_good() -> None:
    assert check_key_text("~!x", source="--api-key") == "~!x"


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="RAPSHEE_HOME"):
        KeyStore(tmp_path / "file" / "home")


def test_a_file_that_is_no_database(home: Path) -> None:
    home.mkdir(parents=True)
    (home / "state.db").write_text("not a database at all" * 100)
    with pytest.raises(ConfigError, match=r"cannot use .*state\.db"):
        KeyStore(home)


def test_a_database_of_a_newer_version(home: Path) -> None:
    KeyStore(home).close()
    db = sqlite3.connect(home / "state.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigError, match="newer version"):
        KeyStore(home)
