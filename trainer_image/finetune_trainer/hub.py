"""Fetch files of a model or a data set from the hub; say what it answers in words of the spec.

No token is taken from anywhere but the job's Secret or HF_TOKEN. Nothing that comes from there is run.
"""

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx2
from huggingface_hub import constants, get_cached_repo_tree, hf_hub_download, set_client_factory, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import tqdm

from finetune_trainer.allowance import Allowance
from finetune_trainer.durable import disk_errors
from finetune_trainer.errors import FineTuneError, SpecError, StorageError
from finetune_trainer.hub_client import HubClient, one_listing

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_SECONDS = (1.0, 3.0, 9.0)
"""Waits between the attempts to reach the hub; after the last one the stage ends with a retryable exit code."""
_LONGEST_QUOTE = 300
"""Characters of an answer in a message."""
_CONNECTIONS = 8
"""Files that are fetched at a time."""

# It warns when no file is wanted, which is how a listing is asked for.
logging.getLogger("huggingface_hub._snapshot_download").setLevel(logging.ERROR)

# Xet's library opens connections and writes files itself, past what bounds them here.
constants.HF_HUB_DISABLE_XET = True
set_client_factory(HubClient)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is fetched, in the words of its setting."""

    kind: Literal["model", "dataset"]
    field: str
    """``spec.model.source`` or that of a task's rows."""
    source: str
    """As written in the spec."""
    repository: str
    revision: str
    secret_field: str

    @property
    def noun(self) -> str:
        """What it is called in messages."""
        return "model" if self.kind == "model" else "data set"

    @property
    def revision_field(self) -> str | None:
        """The setting beside it that names the revision; sources of a list and rows of a benchmark have none."""
        block, _, name = self.field.rpartition(".")
        return f"{block}.revision" if name.lower().endswith("source") else None

    @property
    def where(self) -> str:
        """Source and revision."""
        return f"{self.source} at revision {self.revision!r}"


@dataclass(frozen=True, slots=True)
class Hub:
    """The hub as this process reaches it."""

    endpoint: str
    token: str | None
    cache: Path

    @classmethod
    def from_environment(cls, token: str | None, cache: Path, environment: Mapping[str, str] = os.environ) -> "Hub":
        """Return the hub that HF_ENDPOINT names, or the public one."""
        return cls(environment.get("HF_ENDPOINT") or constants.ENDPOINT, token, cache)

    def fetch(
        self, wanted: Wanted, patterns: Collection[str], ignored: Collection[str] = (), revision: str | None = None
    ) -> Path:
        """Bring the files that match ``patterns`` to the cache and return their folder, which is named by the commit.

        No more is written of a file than the hub's listing announces, and nothing of one that the disk has no room for.

        Args:
            wanted: the repository.
            patterns: as of a shell.
            ignored: matching files are left out.
            revision: the commit, where it is known already.
        """
        with _HubErrors(self, wanted):
            folder = self._list(wanted, revision or wanted.revision)
            files = [
                file
                for file in self._tree(wanted, folder)
                if _matches(file.path, patterns) and not _matches(file.path, ignored)
            ]
            allowance = Allowance.of_disk(
                f"cannot read {wanted.where}: {self.endpoint}", self.cache, "Check HF_ENDPOINT and the proxy"
            )
            with ThreadPoolExecutor(_CONNECTIONS) as pool:
                for _ in pool.map(lambda file: self._fetch_file(wanted, file, folder.name, allowance), files):
                    pass
            return folder

    def names(self, wanted: Wanted, folder: Path) -> set[str]:
        """Return the names of all files of the commit that `fetch` found, fetched or not."""
        with _HubErrors(self, wanted):
            return {file.path for file in self._tree(wanted, folder)}

    def _list(self, wanted: Wanted, revision: str) -> Path:
        """Bring the listing of ``revision`` to the cache and return the folder for its files."""
        with one_listing():
            return Path(
                snapshot_download(
                    wanted.repository, **self._place(wanted, revision), allow_patterns=[], tqdm_class=_Silent
                )
            )

    def _tree(self, wanted: Wanted, folder: Path) -> list[RepoFile]:
        return get_cached_repo_tree(
            wanted.repository, repo_type=wanted.kind, revision=folder.name, cache_dir=self.cache
        )

    def _fetch_file(self, wanted: Wanted, file: RepoFile, commit: str, allowance: Allowance) -> None:
        try:
            hf_hub_download(
                wanted.repository, file.path, **self._place(wanted, commit), tqdm_class=_bar(file, allowance)
            )
        except ValueError as error:
            if file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
                raise
            raise SpecError(
                f"{wanted.field}: {wanted.where} has {file.path!r} of {file.size:,} bytes; more than "
                f"{constants.MAX_HTTP_DOWNLOAD_SIZE:,} in one file come through Xet alone, which is not used here. "
                f"Copy the {wanted.noun} to a bucket or a volume and name that."
            ) from error

    def _place(self, wanted: Wanted, revision: str) -> dict[str, Any]:
        """Return where the client finds a repository, and where it keeps what it fetches."""
        return {
            "repo_type": wanted.kind,
            "revision": revision,
            "cache_dir": self.cache,
            "endpoint": self.endpoint,
            "token": self.token or False,  # None would search the user's home for one
        }


class _Silent(tqdm):
    """Shows nothing of a listing, which is no download."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"disable": True})  # type: ignore[no-untyped-call]


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _bar(file: RepoFile, allowance: Allowance) -> type[tqdm]:
    """Return the progress bar for ``file``: the client tells nobody else of a piece before it is written."""
    take = allowance.intake(file.path, file.size)

    class Bar(tqdm):
        def __init__(self, **options: Any) -> None:
            allowance.begin(file.path, file.size)
            super().__init__(**options)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            take(int(n or 0))
            shown: bool | None = super().update(n)
            return shown

    return Bar


def retry(fetch: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
    """Return what ``fetch`` gives, also when the hub answers only after a while."""
    for seconds in _RETRY_SECONDS:
        try:
            return fetch()
        except StorageError as error:
            logger.warning("hub did not answer, trying again in_seconds=%s reason=%s", seconds, error)
            sleep(seconds)
    return fetch()


_NAMED = (OSError, httpx2.HTTPError, HFValidationError)
_SENSELESS = (ValueError, TypeError, LookupError, AttributeError, CachedRepoTreeNotFoundError)
"""What the client raises at names that climb, sizes and commits that are none, answers of another form."""


@dataclass(frozen=True, slots=True)
class _HubErrors:
    """Turns what the hub client raises into our errors."""

    hub: Hub
    wanted: Wanted

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _NAMED):
            raise self._translate(error) from error
        if isinstance(error, _SENSELESS):
            raise StorageError(
                f"cannot read {self.wanted.where}: what {self.hub.endpoint} answers is not what a hub says "
                f"({type(error).__name__}: {_first_line(error)}). Check HF_ENDPOINT and the proxy, then try again."
            ) from error

    def _translate(self, error: OSError | httpx2.HTTPError | HFValidationError) -> FineTuneError:
        noun, field, where = self.wanted.noun, self.wanted.field, self.wanted.where
        match error:
            case GatedRepoError():
                return SpecError(f"{where} is gated. Accept its terms on {self.hub.endpoint}, then {self._login}.")
            case RepositoryNotFoundError():
                return SpecError(
                    f"{where}: {self.hub.endpoint} knows no such {noun}, or it is private. "
                    f"Check {field}; for a private {noun} {self._login}."
                )
            case RevisionNotFoundError():
                if self.wanted.revision_field is None:
                    return SpecError(f"{field}: {where}: the {noun} has no such branch.")
                return SpecError(
                    f"{where}: the {noun} has no such branch, tag or commit. Correct {self.wanted.revision_field}."
                )
            case HfHubHTTPError() if error.response.status_code in (401, 403):
                return SpecError(
                    f"{where}: {self.hub.endpoint} refuses access (HTTP {error.response.status_code}). "
                    f"Check that the token is valid and may read this {noun}: {self._login}."
                )
            case HfHubHTTPError() if 400 <= error.response.status_code < 500 and error.response.status_code != 429:
                return SpecError(
                    f"{where}: {self.hub.endpoint} answers HTTP {error.response.status_code}. Check {field}."
                )
            case HFValidationError():
                form = "hf://organisation/name" if self.wanted.kind == "model" else "hf://datasets/organisation/name"
                return SpecError(f"{field}: {where} is no name of a hub {noun}. Write {form}.")
            case OSError(errno=int()) if not isinstance(error, LocalEntryNotFoundError):
                return _as_disk_error(error, noun, self.hub.cache)
            case _:
                return StorageError(
                    f"cannot read {where} from {self.hub.endpoint}: {_first_line(error)}. "
                    "Check the network, the proxy settings and HF_ENDPOINT, then try again; "
                    "what was downloaded is kept."
                )

    @property
    def _login(self) -> str:
        if self.hub.token is None:
            return f"put a token into the environment variable HF_TOKEN (in a cluster: {self.wanted.secret_field})"
        return f"use a token of an account that has access (HF_TOKEN; in a cluster: {self.wanted.secret_field})"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:_LONGEST_QUOTE]


def _as_disk_error(error: OSError, noun: str, cache: Path) -> StorageError:
    try:
        with disk_errors(f"write the downloaded {noun} to", cache):
            raise error
    except StorageError as translated:
        return translated
