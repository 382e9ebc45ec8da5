"""Pools on the Hugging Face Hub: one repository, one commit a push.

The library's own client does the talking, with the token and endpoint that it is set up with
(HF_TOKEN, HF_ENDPOINT). Files are compared by the digests that the Hub's listing gives, so that
nothing is sent or hashed twice, and a push is one commit on the state that was looked at: readers
see all of it or nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolreg.errors import (
    Conflict,
    NotFound,
    PoolregError,
    Refused,
    StorageError,
    UsageError,
)
from poolreg.files import storage_errors
from poolreg.sharing.places import (
    Entry,
    Moved,
    Outgoing,
    Snapshot,
    Unanswered,
    alias_of,
    object_path,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi

MOST_FILES = 25_000  # in one commit
BATCH_FILES = 256
BATCH_BYTES = 1 << 30
SMALL = 1 << 20  # bytes
ATTRIBUTES = b"objects/** filter=lfs diff=lfs merge=lfs -text\n"
REPO_TYPES = ("model", "dataset")

_REPO = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_NO_XET = (
    "if the server has no Xet storage, set HF_HUB_DISABLE_XET=1 and run the command again; "
    "otherwise check the network"
)


class HubPlace:
    """A pool in a repository of the Hub, at a branch, tag or commit (default: main)."""

    def __init__(
        self, repo: str, *, repo_type: str = "model", revision: str | None = None,
        private: bool = False,
    ) -> None:  # fmt: skip
        if not _REPO.fullmatch(repo):
            raise UsageError(
                f"{repo!r} is not the name of a repository",
                hint="write OWNER/NAME, or a URL such as file:///data/pool or s3://bucket/pool",
            )
        if repo_type not in REPO_TYPES:
            raise UsageError(f"unknown repo type {repo_type!r}", hint="use model or dataset")
        self.url = repo
        self.alias = alias_of(repo)
        self.repo_type = repo_type
        self.revision = revision
        self.private = private
        self.api = hub_api()
        self._snapshot = Snapshot({})

    def create(self) -> None:
        """Make the repository, and the branch that is to be pushed to, unless they are there.

        A name without an owner is the user's own. Raises `Conflict` for a public repository that
        should be private.
        """
        with hub_errors(self.url):
            self._complete()
            self.api.create_repo(
                self.url, repo_type=self.repo_type, private=self.private or None, exist_ok=True
            )
            if self.revision:
                self.api.create_branch(
                    self.url, branch=self.revision, repo_type=self.repo_type, exist_ok=True
                )
            info = self.api.repo_info(self.url, repo_type=self.repo_type, expand="private")
            if self.private and not info.private:
                raise Conflict(
                    f"{self.url} is there already and is public",
                    hint="make it private in its settings, or leave out --private",
                )

    def check_tag(self, name: str) -> None:
        """Raise `Conflict` for a tag that the repository has already."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with hub_errors(self.url):
            self._complete()
            try:
                tags = self.api.list_repo_refs(self.url, repo_type=self.repo_type).tags
            except RepositoryNotFoundError:
                return
        if name in [ref.name for ref in tags]:
            raise Conflict(f"{self.url} has the tag {name!r} already", hint="choose another tag")

    def tag(self, name: str, version: str) -> None:
        """Give a commit a new tag."""
        with hub_errors(self.url):
            self.api.create_tag(self.url, tag=name, revision=version, repo_type=self.repo_type)

    def look(self) -> Snapshot:
        """List the files at the present commit: one request for 1,000 of them."""
        return self._listed("", self._head())

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes of the files in a folder, at one commit; look at nothing else."""
        found = self._listed(folder, self._head())
        return {path: entry.size for path, entry in found.files.items()}

    def _head(self) -> str:
        with hub_errors(self.url):
            self._complete()
            info = self.api.repo_info(
                self.url, repo_type=self.repo_type, revision=self.revision, expand="sha"
            )
        return str(info.sha)

    def _complete(self) -> None:
        if "/" not in self.url:
            self.url = f"{self.api.whoami()['name']}/{self.url}"

    def _listed(self, folder: str, commit: str) -> Snapshot:
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        with hub_errors(self.url):
            try:
                listing = self.api.list_repo_tree(
                    self.url, folder or None, repo_type=self.repo_type, revision=commit,
                    recursive=True,
                )  # fmt: skip
                files = {
                    item.path: Entry(item.size, item.lfs.sha256 if item.lfs else None, item.blob_id)
                    for item in listing
                    if isinstance(item, RepoFile)
                }
            except EntryNotFoundError:  # no such folder
                files = {}
        self._snapshot = Snapshot(files, commit)
        return self._snapshot

    def fetch(self, path: str, target: Path, *, progress: Callable[[int], None]) -> None:
        """Download one file of the commit that was looked at."""
        size = self._snapshot.files[path].size
        if size <= SMALL:
            data = self.read(path, 0, size)
            with storage_errors(f"writing {target.name}"):
                target.write_bytes(data)
            progress(size)
            return
        with hub_errors(self.url):
            # Beside the target, so that it can be moved there and need not be copied.
            found = self.api.hf_hub_download(
                self.url, path, repo_type=self.repo_type, revision=self._snapshot.version,
                local_dir=target.parent / "hub", tqdm_class=_bar(progress),
            )  # fmt: skip
            Path(found).replace(target)

    def read(self, path: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file of the commit that was looked at.

        One request, where the client's way to a file would take two.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        if start >= end:
            return b""
        url = hf_hub_url(
            self.url, path, repo_type=self.repo_type, revision=self._snapshot.version,
            endpoint=self.api.endpoint,
        )  # fmt: skip
        headers = build_hf_headers(token=self.api.token, library_name="poolreg")
        with hub_errors(self.url):
            headers["range"] = f"bytes={start}-{end - 1}"
            response = http_backoff("GET", url, headers=headers, follow_redirects=True)
            hf_raise_for_status(response)
            return bytes(response.content)

    def publish(
        self, snapshot: Snapshot, objects: Sequence[Outgoing], rest: Sequence[Outgoing],
        deleted: Sequence[str], *, message: str, progress: Callable[[int], None],
    ) -> str:  # fmt: skip
        """Upload what the Hub lacks and make one commit of it.

        More files than a commit takes go in commits of objects before it, which nothing names.
        """
        from huggingface_hub import CommitOperationDelete

        with hub_errors(self.url):
            head = snapshot.version
            if objects and not snapshot.objects():
                head = self._prepare(snapshot)
            told: set[str] = set()
            operations: list[Any] = []
            # What stands at two places is uploaded once if it is there when asked for again.
            for batch in (*_batches(objects), *_batches(rest)):
                operations += self._upload(batch)
                fresh = {item.sha256: item.size for item in batch if item.sha256 not in told}
                told |= fresh.keys()  # a model's weights stand at two places, and are sent once
                progress(sum(fresh.values()))
            operations += [CommitOperationDelete(path, is_folder=False) for path in deleted]
            early = max(0, min(len(objects), len(operations) - MOST_FILES))
            for start in range(0, early, MOST_FILES):
                part = operations[start : min(start + MOST_FILES, early)]
                head = self._commit(part, f"{message} (objects)", head)
            return self._commit(operations[early:], message, head)

    def _prepare(self, snapshot: Snapshot) -> str:
        """Let the Hub keep all objects as large files, which have their sha256 in its listing.

        It would note each of them in .gitattributes otherwise.
        """
        from huggingface_hub import CommitOperationAdd

        path = ".gitattributes"
        entry = snapshot.files.get(path)
        present = self.read(path, 0, entry.size) if entry else b""
        if ATTRIBUTES in present:
            return snapshot.version
        operation = CommitOperationAdd(path, present.rstrip(b"\n") + b"\n" + ATTRIBUTES)
        return self._commit([operation], "Keep objects as large files", snapshot.version)

    def _upload(self, batch: Sequence[Outgoing]) -> list[CommitOperationAdd | CommitOperationCopy]:
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy

        here, elsewhere = [], []
        for item in batch:
            if not item.source.is_file():  # a pool without weights shows what is there already
                elsewhere.append(CommitOperationCopy(object_path(item.sha256), item.path))
                continue
            operation = CommitOperationAdd(item.path, item.source)
            operation.upload_info.sha256 = bytes.fromhex(item.sha256)  # known; not hashed again
            here.append(operation)
        with _quiet():
            self.api.preupload_lfs_files(
                self.url, here, repo_type=self.repo_type, revision=self.revision
            )
        return [*here, *elsewhere]

    def _commit(self, operations: list[Any], message: str, parent: str) -> str:
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        try:
            with _quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tables beside models are meant to be there
                made = self.api.create_commit(
                    self.url, operations, commit_message=message, repo_type=self.repo_type,
                    revision=self.revision, parent_commit=parent,
                )  # fmt: skip
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code == 412:
                raise Moved from error
            raise
        except HTTPError as error:
            raise Unanswered(_first_line(error)) from error
        return str(made.oid)


def hub_api() -> HfApi:
    """Return the client with the endpoint and token of the environment."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="poolreg")


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn the client's errors about a repository into ours, each with the way out."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise NotFound(
            f"{repo} is gated", hint="ask for access on its page, then log in: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFound(
            f"there is no repository {repo} that you may read",
            hint="check OWNER/NAME and --repo-type; log in for private ones: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"{repo} has no such revision", hint="check --revision") from error
    except errors.LocalEntryNotFoundError as error:  # the Hub did not answer, and no cache is asked
        raise StorageError(f"the Hub cannot be reached for {repo}", hint=_NO_XET) from error
    except errors.EntryNotFoundError as error:
        raise NotFound(
            f"a file of {repo} is gone: {_first_line(error)}", hint="run the command again"
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{repo}: {_first_line(error)}", hint="write OWNER/NAME") from error
    except errors.LocalTokenNotFoundError as error:
        raise UsageError("you are not logged in", hint="hf auth login, or set HF_TOKEN") from error
    except errors.HfHubHTTPError as error:
        raise _http_error(repo, error) from error
    except (errors.HTTPError, ConnectionError, errors.XetDownloadError) as error:
        what = _first_line(error) or type(error).__name__
        raise StorageError(f"the Hub cannot be reached for {repo}: {what}", hint=_NO_XET) from error
    except (RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and not _is_upload(error):
            raise
        with storage_errors(f"exchanging files with {repo}"):
            if isinstance(error, OSError) and error.errno:
                raise error
        raise StorageError(
            f"{repo}: {_first_line(error)}", hint="run the command again; it goes on"
        ) from error


def _is_upload(error: RuntimeError) -> bool:
    # The client wraps whatever goes wrong with one file of many.
    return error.__cause__ is not None or "xet" in str(error).lower()


def _http_error(repo: str, error: Any) -> PoolregError:
    status = error.response.status_code if error.response is not None else 0
    what = _first_line(error)
    if status in (401, 403):
        return Refused(
            f"the Hub does not allow this for {repo}: {what}",
            hint="log in with a token that may write there: hf auth login, or HF_TOKEN",
        )
    if status == 409:
        return Conflict(f"{repo}: {what}", hint="choose another name or tag")
    again = "run the command again; it goes on" if status >= 500 or status == 429 else "check it"
    return StorageError(f"the Hub answered {status} for {repo}: {what}", hint=again)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


def _batches(items: Sequence[Outgoing]) -> Iterator[list[Outgoing]]:
    """Cut files into parts of bounded number and size."""
    batch: list[Outgoing] = []
    size = 0
    for item in items:
        if batch and (len(batch) == BATCH_FILES or size + item.size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item.size
    if batch:
        yield batch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's own bars off the terminal, where ours is."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _bar(progress: Callable[[int], None]) -> Any:
    """Return a class of bars, as the client wants one, that tells its steps to `progress`."""
    from tqdm import tqdm

    class Told(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            progress(int(n or 0))

    return Told
