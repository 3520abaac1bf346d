"""Buckets as stores.

A bucket knows no rename, so a tree appears file by file: the old marker goes first, the new one comes last, and holds
the manifest's sha256. Files are only ever created, never overwritten (``If-None-Match: *``): a writer that was thought
dead cannot change files of a tree that a newer one has completed. Readers take what the manifest lists and verify it.
"""

import functools
import hashlib
import logging
import random
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from finetune_trainer.allowance import Allowance
from finetune_trainer.durable import disk_errors, is_partial, partial_name, sync_folder, write_file
from finetune_trainer.errors import DataError, FineTuneError, StorageError
from finetune_trainer.manifest import (
    COMPLETE_NAME,
    MANIFEST_NAME,
    content_files,
    is_complete,
    marker_files,
    read_manifest,
    verify_manifest,
)
from finetune_trainer.s3_client import S3Client
from finetune_trainer.source import is_pattern
from finetune_trainer.store import key_parts

logger = logging.getLogger(__name__)

T = TypeVar("T")

PART_BYTES = 8 << 20
_MOST_PARTS = 10_000
_THREADS = 4
_DELETED_AT_ONCE = 1000
_PIECE_BYTES = 1 << 20
_WRITE_ATTEMPTS = 4
_READ_ATTEMPTS = 3
MOST_OBJECTS = 100_000
"""What is read here has some dozens of files, rows at most 10,000. While it is listed each takes some 500 bytes."""
_MOST_PAGES = 10_000
"""Of a listing: a server may send fewer objects on a page than the 1,000 that are asked for, and none at all."""
LARGEST_FILE_IN_MEMORY = 1 << 30
"""Manifests, results and predictions are read whole; the largest, predictions, have some kilobytes a row."""
_CHECK_PATIENCE_SECONDS = 30.0
"""Someone waits for the answer whether the output can be written: a wrong address is told soon."""

_SHA256 = {"ChecksumAlgorithm": "SHA256"}
_ONLY_NEW = {"IfNoneMatch": "*"}
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchUpload", "412", "409")
"""How a server says that a key is not free any more, or that another writer has cleared the upload away."""
_WRITER = "writer"
"""Metadata that tells a writer's own object, whose answer was lost, from another writer's."""


class _DisturbedError(Exception):
    """Another writer is at work below the same prefix."""


class _TakenError(Exception):
    """A key is not free any more."""


@dataclass(frozen=True, slots=True)
class _Object:
    etag: str
    bytes: int


class S3Store:
    """A bucket, or a prefix of one."""

    def __init__(self, client: S3Client, root: str, part_bytes: int = PART_BYTES) -> None:
        self._client = client
        self._root = root
        self._part_bytes = part_bytes

    @property
    def uri(self) -> str:
        """The root as ``s3://bucket/path``."""
        return f"s3://{self._client.bucket}/{self._root}".rstrip("/")

    def check_writable(self) -> None:
        """Prove with a real object, removed again, that outputs can be written."""
        content = secrets.token_bytes(4096)
        key = self._below(partial_name("write-test"))

        def write(client: Any) -> bytes:
            client.put_object(Bucket=self._client.bucket, Key=key, Body=content, **_SHA256)
            read_back: bytes = client.get_object(Bucket=self._client.bucket, Key=key)["Body"].read()
            client.delete_object(Bucket=self._client.bucket, Key=key)
            return read_back

        if self._client.call("write to", self.uri, write, _CHECK_PATIENCE_SECONDS) != content:
            raise StorageError(f"{self.uri} gave back other bytes than were written. Check the store behind it.")

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Return all keys below the folder ``prefix``, sorted; none when there is no such folder."""
        return tuple(sorted(self._sizes(prefix)))

    def exists(self, key: str) -> bool:
        """Whether a file stands under ``key``."""
        return self._head(self._key(key)) is not None

    def get_bytes(self, key: str) -> bytes:
        """Return the content of one file."""
        name = self._key(key)

        def read(client: Any) -> bytes:
            answer = client.get_object(Bucket=self._client.bucket, Key=name, ChecksumMode="ENABLED")
            content = bytearray()
            with closing(answer["Body"]) as body:
                for piece in body.iter_chunks(_PIECE_BYTES):
                    content += piece
                    if len(content) > LARGEST_FILE_IN_MEMORY:
                        raise StorageError(
                            f"{self._client.field}: {self._show(name)} has more than {LARGEST_FILE_IN_MEMORY >> 20} "
                            "MiB, which nothing has that is read here at once. Check the store and what lies before it."
                        )
            return bytes(content)

        return self._client.call("read", self._show(name), read)

    def put_bytes(self, key: str, content: bytes) -> None:
        """Write one file, replacing an older one in one step."""
        name = self._key(key)
        self._client.call(
            "write",
            self._show(name),
            lambda client: client.put_object(Bucket=self._client.bucket, Key=name, Body=content, **_SHA256),
        )

    def get_file(self, key: str, folder: Path) -> Path:
        """Copy one object into ``folder`` under its own name and return where it is.

        Raises:
            DataError: there is no such object.
        """
        name = self._key(key)
        if (found := self._head(name)) is None:
            raise self._nothing_at(key)
        above, _, own = key.rpartition("/")
        self._download_all(above, {own: found["ContentLength"]}, folder)
        return folder / own

    def _nothing_at(self, key: str) -> DataError:
        return DataError(f"{self._client.field}: there is no {self._show(self._below(key))}. Correct the path.")

    def get_matching(self, key: str, folder: Path, choose: Callable[[Collection[str]], Sequence[str]]) -> Path:
        """Copy objects into ``folder``: the one under ``key``, or those below it, or those that it is a pattern of.

        Args:
            key: with or without wildcards.
            folder: for the copies, which keep their names below ``key``.
            choose: is shown the names, relative to what is before the first wildcard, and returns those to copy.

        Raises:
            DataError: there is no such object.
        """
        if not is_pattern(key) and self._head(self._key(key)) is not None:
            return self.get_file(key, folder)
        parts = key.split("/")
        fixed = "/".join(takewhile(lambda part: not is_pattern(part), parts))
        rest = "/".join(parts)[len(fixed) :].strip("/")
        start = self._below(f"{fixed}/" if fixed else "")
        found = {name[len(start) :]: entry.bytes for name, entry in self._objects(fixed).items()}
        matching = [name for name in found if not rest or fnmatchcase(name, rest) or fnmatchcase(name, f"{rest}/*")]
        if not matching:
            raise self._nothing_at(key)
        target = folder / hashlib.sha256(self._show(key).encode()).hexdigest()[:16]
        shutil.rmtree(target, ignore_errors=True)
        self._download_all(fixed, {name: found[name] for name in choose(matching)}, target)
        return target

    def get_tree(self, prefix: str, folder: Path) -> None:
        """Fetch everything below ``prefix`` into ``folder``; see ``Store.get_tree``."""
        key_parts(prefix)
        partial = folder.with_name(partial_name(folder.name))
        try:
            self._fetch_tree(prefix, partial)
            with disk_errors("create", folder):
                # An empty folder is replaced by the rename, a full one makes it fail.
                partial.rename(folder)
                sync_folder(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def put_tree(self, folder: Path, prefix: str) -> None:
        """Make ``prefix`` hold exactly the files of ``folder``; see ``Store.put_tree``."""
        key_parts(prefix)
        files = [*content_files(folder), *marker_files(folder)]
        for _ in range(_WRITE_ATTEMPTS):
            try:
                self._write_tree(folder, files, prefix)
            except _DisturbedError as error:
                logger.warning("another writer is at work, starting again uri=%s reason=%s", self._show(prefix), error)
                time.sleep(random.uniform(0.1, 2.0))
            else:
                return
        raise StorageError(
            f"another run keeps writing to {self.uri}/{prefix} at the same time. Stop it, then try again."
        )

    def delete_tree(self, prefix: str) -> None:
        """Remove everything below ``prefix``, the marker first; nothing happens when there is nothing."""
        key_parts(prefix)
        self._abort_uploads(prefix)
        marker = self._below(f"{prefix}/{COMPLETE_NAME}")
        rest = [key for key in self._objects(prefix) if key != marker]
        # Also when the listing did not show it: it may have been written meanwhile.
        for keys in ([marker], *(rest[at : at + _DELETED_AT_ONCE] for at in range(0, len(rest), _DELETED_AT_ONCE))):
            self._delete(keys)

    def cached_folder(
        self,
        cache: Path,
        check_names: Callable[[Collection[str]], None],
        is_wanted: Callable[[str], bool] = lambda name: True,
    ) -> Path:
        """Copy what lies below the root, but not below its folders, unless ``cache`` holds the same already.

        Args:
            cache: holds a folder for every content.
            check_names: is shown the names before anything is copied.
            is_wanted: which of them are copied.
        """
        skip = len(self._below(""))
        objects = {key[skip:]: found for key, found in self._objects("").items() if "/" not in key[skip:]}
        if not objects:
            raise DataError(
                f"{self._client.field}: there is nothing at {self.uri}. "
                "Check the path and that this is where the model lies."
            )
        check_names(objects.keys())
        objects = {name: found for name, found in objects.items() if is_wanted(name)}
        identity = "".join(f"{name}\0{found.etag}\0{found.bytes}\n" for name, found in sorted(objects.items()))
        folder = cache / hashlib.sha256(f"{self.uri}\n{identity}".encode()).hexdigest()[:32]
        if folder.is_dir():
            return folder
        partial = folder.with_name(partial_name(folder.name))
        try:
            self._download_all(
                "", {name: found.bytes for name, found in objects.items() if not is_partial(name)}, partial
            )
            if is_complete(partial):
                verify_manifest(partial)
            with disk_errors("create", folder), suppress(FileExistsError):
                # Another job may have fetched the same meanwhile.
                if not folder.is_dir():
                    partial.rename(folder)
                    sync_folder(cache)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder

    # --- keys

    def _key(self, key: str) -> str:
        return self._below("/".join(key_parts(key)))

    def _below(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root else name

    def _show(self, name: str) -> str:
        """Return a key of the bucket as a URI, for messages."""
        return f"s3://{self._client.bucket}/{name}"

    # --- reading

    def _head(self, key: str) -> dict[str, Any] | None:
        def head(client: Any) -> dict[str, Any] | None:
            try:
                found: dict[str, Any] = client.head_object(Bucket=self._client.bucket, Key=key)
                return found
            except ClientError as error:
                if not self._client.is_missing(error):
                    raise
            # The answer to HEAD has no body, so it does not say whether the bucket itself is missing; a listing does.
            client.list_objects_v2(Bucket=self._client.bucket, Prefix=key, MaxKeys=1)
            return None

        return self._client.call("look for", self._show(key), head)

    def _objects(self, prefix: str) -> dict[str, _Object]:
        """Return the bucket's keys below the folder ``prefix``; names that end in a slash stand for folders only."""
        start = self._below("/".join((*key_parts(prefix), "")) if prefix else "")

        def list_all(client: Any) -> dict[str, _Object]:
            found: dict[str, _Object] = {}
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._client.bucket, Prefix=start)
            for number, page in enumerate(pages, start=1):
                entries = [entry for entry in page.get("Contents", ()) if not entry["Key"].endswith("/")]
                found |= {entry["Key"]: _Object(entry["ETag"], entry["Size"]) for entry in entries}
                if len(found) > MOST_OBJECTS or number > _MOST_PAGES:
                    raise StorageError(
                        f"{self._client.field}: {self._show(start)} has more than {MOST_OBJECTS:,} objects, or a "
                        f"listing without end. Name a folder that holds what is meant alone, or join the files."
                    )
            return found

        return self._client.call("list", self._show(start), list_all)

    def _sizes(self, prefix: str) -> dict[str, int]:
        """Return what `list` does, with the size of each."""
        skip = len(self._below(""))
        sizes = {key[skip:]: found.bytes for key, found in self._objects(prefix).items()}
        return {key: size for key, size in sizes.items() if not any(is_partial(part) for part in key.split("/"))}

    def _fetch_tree(self, prefix: str, folder: Path) -> None:
        marker = self._key(f"{prefix}/{COMPLETE_NAME}")
        for attempt in range(_READ_ATTEMPTS):
            shutil.rmtree(folder, ignore_errors=True)
            sizes = self._sizes(prefix)
            if not sizes:
                raise DataError(f"there is nothing at {self.uri}/{prefix}. Check the path and that it was published.")
            before = self._head(marker)
            try:
                if before is None:
                    below = {key.removeprefix(f"{prefix}/"): size for key, size in sizes.items()}
                    self._download_all(prefix, below, folder)
                else:
                    self._download_complete(prefix, folder)
            except (DataError, StorageError) as error:
                # A writer may have replaced the tree while it was read; that shows in its marker. Bytes may have
                # changed on the way, for a server keeps no checksum of a range: then the next copy is right.
                replaced = _etag(self._head(marker)) != _etag(before)
                again = replaced or (isinstance(error, DataError) and attempt == 0)
                if not again or attempt == _READ_ATTEMPTS - 1:
                    raise
                logger.warning("fetching again uri=%s reason=%s", self._show(self._key(prefix)), error)
                continue
            return

    def _download_complete(self, prefix: str, folder: Path) -> None:
        """Fetch what the manifest lists, and nothing that another writer may have left beside it."""
        write_file(folder / MANIFEST_NAME, self.get_bytes(f"{prefix}/{MANIFEST_NAME}"))
        write_file(folder / COMPLETE_NAME, self.get_bytes(f"{prefix}/{COMPLETE_NAME}"))
        self._download_all(prefix, {entry.path: entry.bytes for entry in read_manifest(folder).files}, folder)
        verify_manifest(folder)

    def _download_all(self, prefix: str, sizes: Mapping[str, int], folder: Path) -> None:
        """Fetch files below ``prefix``, of each what is announced for it, and none without room for all."""
        with disk_errors("create", folder):
            folder.mkdir(parents=True, exist_ok=True)
            allowance = Allowance.of_disk(
                f"{self._client.field}: cannot read {self._show(self._below(prefix))}: the store",
                folder,
                "Check the store and what lies before it",
            )
        for name, size in sizes.items():
            allowance.begin(name, size)
        for name, size in sizes.items():
            # The names come from the store: one that climbs out must not be written.
            path = folder.joinpath(*key_parts(name))
            with disk_errors("create", path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            key = self._key(f"{prefix}/{name}" if prefix else name)
            self._download(key, path, functools.partial(allowance.intake, name, size))

    def _download(self, key: str, path: Path, intake: Callable[[], Callable[[int], None]]) -> None:
        transfer = TransferConfig(max_concurrency=_THREADS, multipart_chunksize=self._part_bytes)

        def fetch(client: Any) -> None:
            client.download_file(self._client.bucket, key, str(path), Callback=intake(), Config=transfer)

        with disk_errors("write", path):
            self._client.call("read", self._show(key), fetch)

    # --- writing

    def _write_tree(self, folder: Path, files: Sequence[Path], prefix: str) -> None:
        self.delete_tree(prefix)
        writer = secrets.token_hex(16)
        *content, marker = files if files and files[-1] == folder / COMPLETE_NAME else [*files, None]
        written = {}
        for path in content:
            assert path is not None
            key = self._key(f"{prefix}/{path.relative_to(folder).as_posix()}")
            written[key] = self._create(path, key, writer)
        self._refuse_others(prefix, written)
        if marker is None:
            return
        key = self._key(f"{prefix}/{COMPLETE_NAME}")
        written[key] = self._create(marker, key, writer)
        try:
            self._refuse_others(prefix, written)
        except _DisturbedError:
            self._delete([key])
            raise

    def _refuse_others(self, prefix: str, written: dict[str, str]) -> None:
        found = {key: entry.etag for key, entry in self._objects(prefix).items()}
        if others := sorted(key for key in found.keys() | written.keys() if found.get(key) != written.get(key)):
            raise _DisturbedError(f"{self._show(others[0])} is not what was written there")

    def _create(self, path: Path, key: str, writer: str) -> str:
        """Upload one file under a key that must be free; return its ETag."""
        with disk_errors("read", path):
            size = path.stat().st_size
            try:
                if size <= self._part_bytes:
                    return self._put(path, key, writer)
                return self._put_parts(path, size, key, writer)
            except _TakenError:
                # By this very upload when its answer was lost, else by another writer.
                return self._etag_of_own(key, writer)

    def _write(self, key: str, request: Callable[[Any], T]) -> T:
        def unless_taken(client: Any) -> T:
            try:
                return request(client)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in _TAKEN:
                    raise _TakenError(key) from error
                raise

        return self._client.call("write", self._show(key), unless_taken)

    def _put(self, path: Path, key: str, writer: str) -> str:
        def put(client: Any) -> str:
            with path.open("rb") as file:
                answer = client.put_object(
                    Bucket=self._client.bucket, Key=key, Body=file, Metadata={_WRITER: writer}, **_SHA256, **_ONLY_NEW
                )
            return str(answer["ETag"])

        return self._write(key, put)

    def _put_parts(self, path: Path, size: int, key: str, writer: str) -> str:
        """Upload a large file; what goes wrong costs the part that it happened to."""
        target = {"Bucket": self._client.bucket, "Key": key}
        created = self._write(
            key, lambda client: client.create_multipart_upload(**target, Metadata={_WRITER: writer}, **_SHA256)
        )
        upload = {**target, "UploadId": created["UploadId"]}
        step = max(self._part_bytes, -(-size // _MOST_PARTS))

        def put(number: int) -> dict[str, Any]:
            with path.open("rb") as file:
                file.seek((number - 1) * step)
                content = file.read(step)
            asked_before = False

            def send(client: Any) -> dict[str, Any]:
                nonlocal asked_before
                if asked_before:
                    self._refuse_vanished(client, upload)
                asked_before = True
                sent: dict[str, Any] = client.upload_part(**upload, PartNumber=number, Body=content, **_SHA256)
                return sent

            answer = self._write(key, send)
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": answer["ChecksumSHA256"]}

        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                parts = list(pool.map(put, range(1, -(-size // step) + 1)))
            whole = {"MultipartUpload": {"Parts": parts}, **_ONLY_NEW}
            answer = self._write(key, lambda client: client.complete_multipart_upload(**upload, **whole))
        except BaseException:
            # Whatever happened: parts of an upload that nobody ends are invisible and cost money.
            with suppress(FineTuneError):
                self._client.call(
                    "clean up", self._show(key), lambda client: client.abort_multipart_upload(**upload), 0.0
                )
            raise
        return str(answer["ETag"])

    def _refuse_vanished(self, client: Any, upload: dict[str, str]) -> None:
        """Raise NoSuchUpload when another writer has cleared the upload away; a server may just hang up on a part."""
        try:
            client.list_parts(**upload, MaxParts=1)
        except ClientError as error:
            # Not everyone who may write may list parts.
            if error.response.get("Error", {}).get("Code") in _TAKEN:
                raise

    def _etag_of_own(self, key: str, writer: str) -> str:
        found = self._head(key)
        if found is None or found.get("Metadata", {}).get(_WRITER) != writer:
            raise _DisturbedError(f"{self._show(key)} was written by another run")
        return str(found["ETag"])

    def _abort_uploads(self, prefix: str) -> None:
        """End what crashed writers left: parts of unfinished uploads are invisible and cost money."""
        start = f"{self._key(prefix)}/"

        def abort(client: Any) -> None:
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self._client.bucket, Prefix=start)
            for page in pages:
                for upload in page.get("Uploads", ()):
                    client.abort_multipart_upload(
                        Bucket=self._client.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )

        try:
            self._client.call("clean up", self._show(start), abort, patience_seconds=0)
        except StorageError as error:
            # Not everyone who may write may list uploads; a lifecycle rule of the bucket does the same.
            logger.info("unfinished uploads stay uri=%s reason=%s", self._show(start), error)

    def _delete(self, keys: Collection[str]) -> None:
        # One request a key: DeleteObjects reports refusals key by key, and not every server has it.
        def delete(client: Any) -> None:
            with ThreadPoolExecutor(_THREADS) as pool:
                for _ in pool.map(lambda key: client.delete_object(Bucket=self._client.bucket, Key=key), keys):
                    pass

        self._client.call("remove", self._show(next(iter(keys))), delete)


def _etag(found: dict[str, Any] | None) -> str:
    return "" if found is None else str(found["ETag"])
