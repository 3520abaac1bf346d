"""Where the URIs of a job lead: local folders, what Kubernetes mounts into a pod, buckets."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from finetune_trainer.durable import disk_errors
from finetune_trainer.errors import SpecError, StorageError


@dataclass(frozen=True, slots=True)
class Mounts:
    """Where a pod finds what the operator mounts. On a laptop none of these folders exists."""

    secrets: Path = Path("/var/run/secrets/finetune")
    """Holds a folder for every Secret, which holds a file for every key."""
    volumes: Path = Path("/mnt/pvc")
    """Holds a folder for every claim."""
    config: Path = Path("/mnt/config")
    """Holds a folder for every ConfigMap, which holds a file for every key."""
    cache: Path | None = None
    """A volume that several jobs keep their downloads on."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Mounts":
        """Return the usual places, or those that FINETUNE_SECRETS, _PVC, _CONFIG and _CACHE name."""
        named = {
            field: Path(environment[variable]) for field, variable in _VARIABLES.items() if environment.get(variable)
        }
        return cls(**named)

    def secret(self, name: str) -> Path | None:
        """Return the folder with the keys of a Secret; absent on a machine without mounted Secrets."""
        return self.secrets / name if self.secrets.is_dir() else None


_VARIABLES = {
    "secrets": "FINETUNE_SECRETS",
    "volumes": "FINETUNE_PVC",
    "config": "FINETUNE_CONFIG",
    "cache": "FINETUNE_CACHE",
}


def local_path(uri: str) -> Path:
    """Return the absolute path behind ``file:///path``, percent escapes decoded.

    Raises:
        SpecError: the URI names a host or a relative path, or climbs with ``..``.
    """
    path = unquote(uri.removeprefix("file://"))
    if not uri.startswith("file://") or not path.startswith("/"):
        raise SpecError(f"{uri!r} is no local folder. Write file:///absolute/path (three slashes).")
    if "\0" in path or ".." in path.split("/"):
        raise SpecError(f"{uri!r} climbs out with '..' or holds a NUL character. Write the path it really means.")
    return Path(path)


def volume_path(uri: str, mounts: Mounts, field: str) -> Path:
    """Return the folder or file behind ``pvc://claim/path``.

    Raises:
        SpecError: there are no mounted volumes here, or the path leaves its volume.
        StorageError: this volume is not among the mounted ones.
    """
    return _mounted_path(uri, mounts.volumes, field, "a volume of a cluster")


def config_map_path(uri: str, mounts: Mounts, field: str) -> Path:
    """Return the file behind ``configMap://name/key``; raises as `volume_path` does."""
    return _mounted_path(uri, mounts.config, field, "a ConfigMap of a cluster")


def _mounted_path(uri: str, root: Path, field: str, what: str) -> Path:
    name, _, rest = uri.partition("://")[2].partition("/")
    rest = unquote(rest)
    outside = SpecError(f"{field}: {uri!r} leads out of {name!r}. Write a path inside it, without '..' and links.")
    if "\0" in rest or ".." in (name, *rest.split("/")):
        raise outside
    if not root.is_dir():
        raise SpecError(
            f"{field}: {uri!r} is {what}, and none is mounted on this machine ({root} does not exist). "
            "Use file:///path/to/folder here, or run the job in the cluster."
        )
    with disk_errors(f"use {field}:", repr(uri)):
        if not (root / name).is_dir():
            raise StorageError(f"{field}: {name!r} of {uri!r} is not mounted at {root / name}. Check that it exists.")
        path = root / name / rest.strip("/")
        # Links that stay inside the mount are how the kubelet publishes keys; a link out of it could lead to a Secret.
        try:
            is_inside = path.resolve().is_relative_to((root / name).resolve())
        except RuntimeError as error:
            raise SpecError(f"{field}: {uri!r} is a link that leads back to itself. Write a real path.") from error
    if not is_inside:
        raise outside
    return path


def bucket_and_key(uri: str, field: str) -> tuple[str, str]:
    """Return the two parts of ``s3://bucket/some/key``; the key has no slash at its ends and may be empty.

    Raises:
        SpecError: a part of the key would leave it.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    key = key.strip("/")
    if not bucket or any(part in ("", ".", "..") for part in key.split("/") if key):
        raise SpecError(f"{field}: {uri!r} names no folder of a bucket. Write s3://bucket/path, without '..' or '//'.")
    return bucket, key
