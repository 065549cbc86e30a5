"""What is asked of the hub, through its own library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rapshee_engine.errors import DownloadError
from rapshee_engine.hub.listing import Listing, RepoFile

__all__ = ["HubClient", "HubUnreachableError"]

_TIMEOUT_S = 20.0


class HubUnreachableError(DownloadError):
    """There is no hub to ask, or it was said that none may be asked."""


class HubClient:
    """The hub at ``HF_ENDPOINT``, as who ``HF_TOKEN`` says; ``HF_HUB_OFFLINE=1``: none."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._endpoint = (environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._token = environ.get("HF_TOKEN") or get_token()
        self._is_offline = environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true")

    def listing(self, repo: str, revision: str) -> Listing:
        """What the revision consists of.

        Raises:
            HubUnreachableError: nobody answers.
            DownloadError: there is no such model or revision, or it is not for us.
        """
        if self._is_offline:
            raise HubUnreachableError("HF_HUB_OFFLINE is set")
        api = HfApi(endpoint=self._endpoint, token=self._token or False)
        try:
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
        except OfflineModeIsEnabled:
            raise HubUnreachableError("HF_HUB_OFFLINE is set") from None
        except httpx2.RequestError as error:
            reason = str(error) or type(error).__name__
            raise HubUnreachableError(f"{self._endpoint} cannot be reached ({reason})") from None
        except (HfHubHTTPError, HFValidationError) as error:
            raise DownloadError(self._reason(error, revision)) from None
        except (httpx2.InvalidURL, ValueError, KeyError, TypeError, AttributeError):
            raise DownloadError(f"{self._endpoint} answers, but not as a hub does") from None
        files = tuple(_repo_file(sibling) for sibling in info.siblings or ())
        return Listing(str(info.sha), files)

    def address(self, repo: str, commit: str, path: str) -> tuple[str, dict[str, str]]:
        """URL of a file, and the headers to ask for it with."""
        url = hf_hub_url(repo, path, revision=commit, endpoint=self._endpoint)
        return url, {"authorization": f"Bearer {self._token}"} if self._token else {}

    def _reason(self, error: Exception, revision: str) -> str:
        if isinstance(error, GatedRepoError):
            return (
                "access to it is restricted; accept its conditions on its page, and set HF_TOKEN "
                "to a token of that account"
            )
        if isinstance(error, RevisionNotFoundError):
            return f"it has no revision {revision!r}"
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            if status == 401 and self._token:
                return f"{self._endpoint} does not accept the token in HF_TOKEN (401)"
            if status == 401 or isinstance(error, RepositoryNotFoundError):
                return (
                    f"there is no such model on {self._endpoint}, or it is private and HF_TOKEN "
                    "does not open it"
                )
            return f"{self._endpoint} answered {status}"
        return str(error)


def _repo_file(sibling: Any) -> RepoFile:
    digest = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
    return RepoFile(sibling.rfilename, sibling.size, str(digest))
