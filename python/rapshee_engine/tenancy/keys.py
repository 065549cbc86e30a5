"""API keys: their form, the store of their hashes, and recognising a presented one."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import string
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rapshee_engine.errors import ConfigError

__all__ = ["KeyStore", "Keyring", "check_key_text", "generate_key", "home_folder"]

_ID_LENGTH = 8
_ID_ALPHABET = string.ascii_lowercase + string.digits
_SECRET_BYTES = 32  # 43 base64url characters
_KEY = re.compile(r"rk-([a-z0-9]{8})-[A-Za-z0-9_-]{43}")
_SCHEMA_VERSION = 1


def home_folder(environ: Mapping[str, str]) -> Path:
    """Where the server keeps its state: ``$RAPSHEE_HOME``, else in the user's data folder."""
    if environ.get("RAPSHEE_HOME"):
        return Path(environ["RAPSHEE_HOME"])
    data_home = environ.get("XDG_DATA_HOME")
    base = Path(data_home) if data_home else Path("~/.local/share").expanduser()
    return base / "rapshee-engine"


def generate_key() -> str:
    """A fresh key: ``rk-``, 8 characters of id, ``-``, 43 base64url characters of randomness."""
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))
    return f"rk-{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"


def check_key_text(key: str, *, source: str) -> str:
    """``key``, which its owner chose, if a client can send it in a header.

    Raises:
        ConfigError: it is empty, or holds blanks or other than printable ASCII characters.
    """
    if not key or not all("!" <= character <= "~" for character in key):
        raise ConfigError(f"{source}: an API key is printable ASCII without blanks, at least one")
    return key


class KeyStore:
    """Hashes of the server's own keys in ``state.db``. One thread uses it.

    The folder is made with mode 0700, the file with 0600. Keys themselves are never stored.
    """

    def __init__(self, home: Path) -> None:
        """Open the store, or make it.

        Raises:
            ConfigError: the folder cannot be written, or its ``state.db`` is not ours.
        """
        self.path = home / "state.db"
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Made here and not by SQLite, whose modes follow the umask; its side files copy ours.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise ConfigError(
                f"cannot write {self.path}: {error.strerror}; set RAPSHEE_HOME to a folder that "
                "this user can write"
            ) from None
        self._db = _open(self.path)

    def close(self) -> None:
        self._db.close()

    def create_first(self, hand_over: Callable[[str], None]) -> bool:
        """Make a key if there is none yet; whether that was so.

        ``hand_over`` gets the key, the only time it is seen, before it becomes valid: if it raises,
        the store stays empty. Of several processes that start at once, one makes the key.

        Raises:
            ConfigError: the key cannot be stored or handed over.
        """
        try:
            with self._db:
                return self._create_first(hand_over)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"cannot keep an API key in {self.path.parent}: {error}; set RAPSHEE_HOME to a "
                "folder that this user can write"
            ) from None

    def _create_first(self, hand_over: Callable[[str], None]) -> bool:
        self._db.execute("BEGIN IMMEDIATE")
        if self._db.execute("SELECT EXISTS (SELECT 1 FROM keys)").fetchone()[0]:
            return False
        key = generate_key()
        self._db.execute(
            "INSERT INTO keys (id, hash, created) VALUES (?, ?, ?)",
            (_key_id(key), _digest(key), int(time.time())),
        )
        hand_over(key)
        return True

    def hash_of(self, key_id: str) -> bytes | None:
        """SHA-256 of the key with this id."""
        row = self._db.execute("SELECT hash FROM keys WHERE id = ?", (key_id,)).fetchone()
        return None if row is None else row[0]


class Keyring:
    """All keys that a server accepts: those of its store, and those given at its start."""

    def __init__(self, store: KeyStore | None, given: Iterable[str] = ()) -> None:
        self._store = store
        self._given = tuple(_digest(key) for key in given)

    def identify(self, presented: str) -> str | None:
        """Id of a presented key, or None. Hashes are compared in constant time."""
        digest = _digest(presented)
        found = None
        # No early end: the time must not tell which one matched.
        for given in self._given:
            if hmac.compare_digest(given, digest):
                found = given.hex()[:16]
        return found or self._identify_stored(presented, digest)

    def _identify_stored(self, presented: str, digest: bytes) -> str | None:
        match = _KEY.fullmatch(presented)
        if match is None or self._store is None:
            return None
        stored = self._store.hash_of(match[1])
        # An unknown id is compared too, with a hash that nothing has.
        known = hmac.compare_digest(stored or bytes(len(digest)), digest)
        return match[1] if known else None


def _key_id(key: str) -> str:
    return key[len("rk-") :][:_ID_LENGTH]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _open(path: Path) -> sqlite3.Connection:
    """The database, with its table.

    Raises:
        ConfigError: the file is no state database of this version.
    """
    db = sqlite3.connect(path, isolation_level=None, timeout=10)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        with db:
            db.execute("BEGIN IMMEDIATE")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                db.execute(
                    "CREATE TABLE keys (id TEXT PRIMARY KEY, hash BLOB NOT NULL, "
                    "created INTEGER NOT NULL) WITHOUT ROWID"
                )
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    except sqlite3.Error as error:
        db.close()
        raise ConfigError(
            f"cannot use {path}: {error}; end the program that uses it, move the file away if it "
            "is broken, or set RAPSHEE_HOME to another folder"
        ) from None
    if version not in (0, _SCHEMA_VERSION):
        db.close()
        raise ConfigError(
            f"{path} was written by a newer version; set RAPSHEE_HOME to another folder"
        )
    return db
