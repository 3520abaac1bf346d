"""Open what the URIs of a job name: a store for its output, local files and folders for what it reads.

Sources that are not local are copied first. An ``s3://`` source uses the Secret it names, with that Secret's
AWS_ENDPOINT_URL; one that names none uses the output's endpoint and Secret.
"""

import glob
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import urlsplit

from finetune_api.spec import OutputSpec, SecretRef
from finetune_api.support import SCHEMES
from finetune_trainer.durable import disk_errors
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.file_store import FileStore
from finetune_trainer.hub import Hub, Wanted, retry
from finetune_trainer.location import Mounts, bucket_and_key, config_map_path, local_path, volume_path
from finetune_trainer.s3_client import S3Access, S3Client, read_key
from finetune_trainer.s3_store import S3Store
from finetune_trainer.source import choose_files, fetch_local
from finetune_trainer.store import Store

logger = logging.getLogger(__name__)

OUTPUT_FIELD = "spec.output.uri"


@dataclass(frozen=True, slots=True)
class Storage:
    """The stores of one job, seen from where it runs."""

    output: OutputSpec
    mounts: Mounts

    def open_output(self) -> Store:
        """Return the store of ``spec.output``; touches nothing yet.

        Raises:
            SpecError: its scheme cannot be written from here.
        """
        uri = self.output.uri
        match scheme := urlsplit(uri).scheme:
            case "file":
                return FileStore(local_path(uri))
            case "pvc":
                return FileStore(volume_path(uri, self.mounts, OUTPUT_FIELD), uri)
            case "s3":
                bucket, key = bucket_and_key(uri, OUTPUT_FIELD)
                return S3Store(S3Client(bucket, self._access_to_output()), key)
            case _:
                raise _unknown_scheme(OUTPUT_FIELD, uri, scheme, "output.uri")

    def fetch_rows(
        self, uri: str, field: str, secret_ref: SecretRef | None, folder: Path, revision: str | None = None
    ) -> Path:
        """Return the path of a file of rows, of a folder of such files, or of a pattern that they match.

        What is in a bucket is copied into ``folder`` each time; a hub data set unless its commit is there already.

        Args:
            uri: the source as written; a plain path is returned as it is.
            field: the setting that names it, such as ``spec.data.tasks[0].source``.
            secret_ref: the task's own Secret.
            folder: for copies; made when it is needed.
            revision: of a hub data set; the branch main where it is absent.
        """
        if (here := self._on_this_machine(uri, field)) is not None:
            return here
        match scheme := urlsplit(uri).scheme:
            case "s3":
                bucket, key = bucket_and_key(uri, field)
                client = S3Client(bucket, self._access_to_source(field, secret_ref))
                where = f"s3://{bucket}/{key}"
                return S3Store(client, "").get_matching(key, folder, lambda names: choose_files(names, where, field))
            case "hf":
                secret_field = f"{field.rpartition('.')[0]}.secretRef"
                token = self._hub_token(secret_ref, secret_field, os.environ)
                return _fetch_data_set(
                    uri, revision or "main", field, secret_field, Hub.from_environment(token, folder)
                )
            case _:
                raise _unknown_scheme(field, uri, scheme, "data.tasks[].source")

    def read_file(self, uri: str, field: str, folder: Path) -> bytes:
        """Return the content of a small file: of a benchmark's task.

        Args:
            uri: file://, pvc://, configMap:// or s3://.
            field: the setting that names it.
            folder: for a copy of what is in a bucket; made when it is needed.
        """
        if (here := self._on_this_machine(uri, field)) is not None:
            return _read(here, field)
        match scheme := urlsplit(uri).scheme:
            case "s3":
                bucket, key = bucket_and_key(uri, field)
                store = S3Store(S3Client(bucket, self._access_to_source(field, None)), "")
                return _read(store.get_file(key, folder), field)
            case _:
                raise _unknown_scheme(field, uri, scheme, "evaluation.benchmarks[].suite")

    def _on_this_machine(self, uri: str, field: str) -> Path | None:
        """Return where a source lies that needs no copy: a plain path, a local folder, what is mounted."""
        match urlsplit(uri).scheme if "://" in uri else "":
            case "" | "file":
                return fetch_local(uri, field)
            case "pvc":
                return volume_path(uri, self.mounts, field)
            case "configmap":  # urlsplit lowers a scheme's case
                return config_map_path(uri, self.mounts, field)
            case _:
                return None

    def fetch_model_folder(
        self,
        uri: str,
        secret_ref: SecretRef | None,
        cache: Path,
        check_names: Callable[[Collection[str]], None],
        is_wanted: Callable[[str], bool] = lambda name: True,
    ) -> Path:
        """Return the folder of a model; one in a bucket is copied into ``cache`` unless the same is there already.

        Args:
            uri: ``spec.model.source``: file://, pvc:// or s3://.
            secret_ref: ``spec.model.secretRef``.
            cache: for copies, each in a folder named by its content.
            check_names: is shown the names of the files before anything is copied, and raises when they are not those
                of a model.
            is_wanted: which files are copied, where there is something to copy.
        """
        field = "spec.model.source"
        match scheme := urlsplit(uri).scheme:
            case "file":
                return local_path(uri)
            case "pvc":
                return volume_path(uri, self.mounts, field)
            case "s3":
                bucket, key = bucket_and_key(uri, field)
                client = S3Client(bucket, self._access_to_source(field, secret_ref))
                return S3Store(client, key).cached_folder(cache / "s3", check_names, is_wanted)
            case _:
                raise _unknown_scheme(field, uri, scheme, "model.source")

    def fetch_artifact(self, uri: str, field: str, cache: Path) -> Path:
        """Return the folder of what another job has published; one in a bucket is read as the output is.

        Args:
            uri: file://, pvc:// or s3://.
            field: what names it.
            cache: for copies, each in a folder named by its content.
        """
        match scheme := urlsplit(uri).scheme:
            case "file":
                return local_path(uri)
            case "pvc":
                return volume_path(uri, self.mounts, field)
            case "s3":
                bucket, key = bucket_and_key(uri, field)
                output = self._access_to_output()
                access = S3Access(output.endpoint, output.secret, field, output.secret_field)
                return S3Store(S3Client(bucket, access), key).cached_folder(cache / "s3", lambda names: None)
            case _:
                raise _unknown_scheme(field, uri, scheme, "model.startFrom.source")

    def hub_token(self, secret_ref: SecretRef | None, environment: Mapping[str, str]) -> str | None:
        """Return the hub's token: of the model's Secret where there is one, else HF_TOKEN of the environment."""
        return self._hub_token(secret_ref, "spec.model.secretRef", environment)

    def _hub_token(self, secret_ref: SecretRef | None, field: str, environment: Mapping[str, str]) -> str | None:
        secret = self._secret(secret_ref, field)
        if secret is None:
            return environment.get("HF_TOKEN") or None
        return read_key(secret, "HF_TOKEN") or read_key(secret, "token")

    def _access_to_output(self) -> S3Access:
        secret = self._secret(self.output.secret_ref, "spec.output.secretRef")
        return S3Access(self.output.endpoint, secret, OUTPUT_FIELD, "spec.output.secretRef")

    def _access_to_source(self, field: str, secret_ref: SecretRef | None) -> S3Access:
        own = f"{field.rpartition('.')[0]}.secretRef"
        if secret_ref is not None and (secret := self._secret(secret_ref, own)) is not None:
            return S3Access(None, secret, field, own)
        if not self.output.uri.startswith("s3://"):
            return S3Access(None, None, field, own)
        output = self._access_to_output()
        return S3Access(output.endpoint, output.secret, field, output.secret_field)

    def _secret(self, secret_ref: SecretRef | None, field: str) -> Path | None:
        if secret_ref is None:
            return None
        folder = self.mounts.secret(secret_ref.name)
        if folder is None:
            logger.info("secret not used, no Secrets are mounted here field=%s name=%s", field, secret_ref.name)
        return folder


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{field}: cannot read {path}: {error}. Correct the path.") from error


def _fetch_data_set(uri: str, revision: str, field: str, secret_field: str, hub: Hub) -> Path:
    """Return the folder with the rows of ``hf://datasets/organisation/name`` or of a path or pattern in it."""
    kind, organisation, name, *inner = [*uri.removeprefix("hf://").strip("/").split("/"), "", ""]
    if kind != "datasets" or not organisation or not name:
        raise SpecError(
            f"{field}: {uri!r} is no data set of the hub. Write hf://datasets/organisation/name, with a file, a folder "
            f"or a pattern in it behind where it holds several splits: hf://datasets/organisation/name/data/train*"
        )
    rest = "/".join(part for part in inner if part)
    wanted = Wanted("dataset", field, uri, f"{organisation}/{name}", revision, secret_field)

    def fetch() -> Path:
        commit = hub.fetch(wanted, ())
        names = [
            found
            for found in hub.names(wanted, commit)
            if not rest or fnmatchcase(found, rest) or fnmatchcase(found, f"{rest}/*")
        ]
        chosen = choose_files(names, uri, field)
        path = hub.fetch(wanted, [glob.escape(found) for found in chosen], revision=commit.name)
        return _linked(path, chosen, hub.cache / "chosen" / commit.name, rest)

    return retry(fetch)


def _linked(snapshot: Path, names: Collection[str], folder: Path, rest: str) -> Path:
    """Return a folder with nothing but ``names``: the snapshot may hold what another source has fetched."""
    target = folder / hashlib.sha256(rest.encode()).hexdigest()[:16]
    shutil.rmtree(target, ignore_errors=True)
    for name in names:
        path = target / name
        with disk_errors("create", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # The cache's own files are links into a folder of blobs.
            os.link((snapshot / name).resolve(), path)
    return target


def _unknown_scheme(field: str, uri: str, scheme: str, name: str) -> SpecError:
    supported = " or ".join(f"{one}://" for one in SCHEMES[name])
    return SpecError(f"{field}: {uri!r} has the scheme {scheme!r}, which is not supported here. Use {supported}.")
