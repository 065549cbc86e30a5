"""Fetching a wheel from a Python package index, for environments without pip.

The index is the one that pip would use. Specifications: PEP 503 (HTML), PEP 691 (JSON).
"""

from __future__ import annotations

import base64
import configparser
import http.client
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rapshee_engine.errors import DownloadError

__all__ = ["fetch_wheel", "index_url"]

DEFAULT_INDEX = "https://pypi.org/simple"
_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.2"
_TIMEOUT_S = 30
_MAX_PAGE_BYTES = 16 << 20
_COPY_BYTES = 1 << 18


def index_url(environ: Mapping[str, str]) -> str:
    """The index that pip is configured to use: environment, then configuration files."""
    if environ.get("PIP_INDEX_URL"):
        return environ["PIP_INDEX_URL"]
    config = configparser.RawConfigParser()
    for path in _pip_config_files(environ):
        # Later files override earlier ones; those that do not exist or parse are pip's business.
        try:
            config.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue
    return config.get("global", "index-url", fallback=DEFAULT_INDEX)


def _pip_config_files(environ: Mapping[str, str]) -> list[Path]:
    home = Path.home()
    user_config = environ.get("XDG_CONFIG_HOME") or str(home / ".config")
    files = [
        Path("/etc/pip.conf"),
        home / ".pip" / "pip.conf",
        Path(user_config) / "pip" / "pip.conf",
        Path(sys.prefix) / "pip.conf",
    ]
    return [*files, Path(environ["PIP_CONFIG_FILE"])] if environ.get("PIP_CONFIG_FILE") else files


def fetch_wheel(distribution: str, version: str, folder: Path, environ: Mapping[str, str]) -> Path:
    """Download a pure wheel into ``folder`` with a progress bar.

    Raises:
        DownloadError: the index has no such wheel or does not answer.
        OSError: the folder cannot be written.
    """
    project = re.sub(r"[-_.]+", "-", distribution).lower()
    page_url = f"{index_url(environ).rstrip('/')}/{project}/"
    prefix = f"{project.replace('-', '_')}-{version}-"
    for name, url in _links(page_url):
        if name.startswith(prefix) and name.endswith("-none-any.whl"):
            return _save(url, folder / name)
    raise DownloadError(f"{_shown(page_url)} lists no wheel of {distribution} {version}")


def _links(page_url: str) -> list[tuple[str, str]]:
    """File names of a project's page with their absolute URLs."""
    with _open(page_url) as response:
        page = _read(response, _MAX_PAGE_BYTES, page_url)
        base, content_type = response.geturl(), response.headers.get_content_type()
    try:
        if content_type.endswith("json"):
            files = [
                (str(file["filename"]), str(file["url"])) for file in json.loads(page)["files"]
            ]
        else:
            files = _html_links(page.decode("utf-8"))
    except (ValueError, KeyError, TypeError):
        raise DownloadError(f"{_shown(page_url)} is no package index page") from None
    return [(name, urllib.parse.urljoin(base, url)) for name, url in files]


class _LinkParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [url for name, url in attrs if tag == "a" and name == "href" and url]


def _html_links(page: str) -> list[tuple[str, str]]:
    parser = _LinkParser()
    parser.feed(page)
    paths = ((urllib.parse.urlsplit(url).path, url) for url in parser.urls)
    return [(urllib.parse.unquote(path).rpartition("/")[2], url) for path, url in paths]


def _save(url: str, path: Path) -> Path:
    with _open(url) as response, path.open("xb") as file:
        total = int(response.headers.get("content-length", 0)) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
            while piece := _read(response, _COPY_BYTES, url):
                file.write(piece)
                bar.update(len(piece))
    return path


def _open(url: str) -> Any:
    """The response to a GET; credentials in the URL become a header, which urllib does not do."""
    parts = urllib.parse.urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    plain_url = parts._replace(netloc=host, fragment="").geturl()
    try:
        request = urllib.request.Request(plain_url, headers={"accept": _ACCEPT})
        if credentials:
            token = base64.b64encode(urllib.parse.unquote(credentials).encode()).decode("ascii")
            # Not sent along when the index redirects to another host.
            request.add_unredirected_header("authorization", f"Basic {token}")
        return urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DownloadError(f"{_shown(url)}: {reason}") from None


def _read(response: Any, most: int, url: str) -> bytes:
    try:
        piece: bytes = response.read(most)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{_shown(url)}: {error or 'connection lost'}") from None
    return piece


def _shown(url: str) -> str:
    """The URL without its credentials."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
