"""What the node's containerd holds, and how an image gets from Docker into it with little written to disk.

Three ways, by what is possible and by what the node has already:

- `docker save` into `ctr import`: always possible; writes an image three times.
- Shared layers: for root beside a daemon of this machine, whose layers lie on one file system with the node's. The
  node gets hard links; nothing is written.
- On top: an image whose lower layers the node has. One small layer travels.
"""

import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import kind
from .command import pipe, run
from .daemon import Docker

logger = logging.getLogger(__name__)

LOAD_SECONDS = 900

LABEL = "finetune/docker-id"
"""Marks an image in the node with the id that it has in Docker."""

CONFIGURED = ("Cmd", "Entrypoint", "Env", "Labels", "User", "WorkingDir")
"""Of what Docker tells about an image, what the OCI image specification knows."""

MEDIA_TYPE = "application/vnd.oci.image"


def is_loaded(docker: Docker, name: str) -> bool:
    """Return whether the node has the image ``name`` as Docker has it."""
    wanted = f'name=={_full_name(name)},labels."{LABEL}"=={_id(docker, name)}'
    return bool(_ctr(docker, "images", "list", "--quiet", wanted).strip())


def load(docker: Docker, name: str) -> None:
    """Give the node the image ``name``; nothing to do when it has it."""
    if is_loaded(docker, name):
        return
    logger.info("loading %s", name)
    layers = _layer_folders(docker, name)
    if layers:
        _share(docker, name, layers)
    else:
        pipe(
            [docker.client, "save", name],
            [docker.client, *_ctr_words("images", "import", "-")],
            timeout=LOAD_SECONDS,
            environment=docker.environment,
        )
    _mark(docker, name)


def load_on_top(docker: Docker, name: str, below: str, folder: str) -> None:
    """Give the node the image ``name`` that adds ``folder`` and settings to the image ``below``, which it has."""
    if is_loaded(docker, name):
        return
    logger.info("loading %s", name)
    container = docker("create", name).strip()
    try:
        layer = docker.read("cp", f"{container}:{folder}", "-")
    finally:
        docker("rm", container)
    listed = _ctr(docker, "images", "list", f"name=={_full_name(below)}")
    manifest = re.search(r"sha256:[0-9a-f]{64}", listed)
    assert manifest, f"the node has no image {below}"
    layers = json.loads(_ctr(docker, "content", "get", manifest[0]))["layers"]
    added = _descriptor(f"{MEDIA_TYPE}.layer.v1.tar", layer)
    _import(docker, name, [*layers, added], [*_diff_ids(docker, below), added["digest"]], layer)
    _mark(docker, name)


def _layer_folders(docker: Docker, name: str) -> list[Path]:
    """Return where Docker keeps the layers of an image, lowest first; nothing where we may not go."""
    driver = json.loads(docker("image", "inspect", "--format", "{{json .GraphDriver}}", name))
    if driver["Name"] != "overlay2":
        return []
    data = driver["Data"]
    layers = [Path(folder) for folder in [data["UpperDir"], *data.get("LowerDir", "").split(":")] if folder]
    return layers[::-1] if all(os.access(layer, os.W_OK) for layer in layers) else []


def _share(docker: Docker, name: str, layers: Sequence[Path]) -> None:
    mounts = json.loads(docker("inspect", "--format", "{{json .Mounts}}", kind.NODE))
    var = next(Path(mount["Source"]) for mount in mounts if mount["Destination"] == "/var")
    diff_ids = _diff_ids(docker, name)
    chain = ""
    for layer, diff_id in zip(layers, diff_ids, strict=True):
        parent = chain
        chain = _digest(f"{parent} {diff_id}".encode()) if parent else diff_id
        if chain in _ctr(docker, "snapshots", "list"):
            continue
        active = f"sharing-{chain}"
        _ctr(docker, "snapshots", "prepare", active, *([parent] if parent else []))
        mount = _ctr(docker, "snapshots", "mounts", "/", active)
        folder = re.search(r"(?:upperdir=|bind )/var(/[^, ]+)", mount)
        assert folder, mount
        run(["cp", "--archive", "--link", f"{layer}/.", f"{var}{folder[1]}/"], timeout=LOAD_SECONDS)
        _ctr(docker, "snapshots", "commit", chain, active)
    # containerd asks for a layer's content only where it has no snapshot of it; what a layer weighs nobody asks.
    _import(docker, name, [_reference(f"{MEDIA_TYPE}.layer.v1.tar", diff_id, 0) for diff_id in diff_ids], diff_ids)


def _import(
    docker: Docker, name: str, layers: Sequence[Mapping[str, Any]], diff_ids: Sequence[str], *blobs: bytes
) -> None:
    """Import the image ``name`` with the settings that it has in Docker and, of its layers, no more than ``blobs``."""
    described = json.loads(docker("image", "inspect", name))[0]
    configuration = _json(
        {
            "architecture": described["Architecture"],
            "os": described["Os"],
            "config": {key: value for key, value in described["Config"].items() if key in CONFIGURED and value},
            "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{MEDIA_TYPE}.manifest.v1+json",
            "config": _descriptor(f"{MEDIA_TYPE}.config.v1+json", configuration),
            "layers": list(layers),
        }
    )
    entry = _descriptor(f"{MEDIA_TYPE}.manifest.v1+json", manifest)
    entry["annotations"] = {"io.containerd.image.name": _full_name(name)}
    files = {
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
        "index.json": _json({"schemaVersion": 2, "manifests": [entry]}),
        **{f"blobs/{_digest(blob).replace(':', '/')}": blob for blob in (configuration, manifest, *blobs)},
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    _ctr(docker, "images", "import", "-", stdin=packed.getvalue())


def _mark(docker: Docker, name: str) -> None:
    _ctr(docker, "images", "label", _full_name(name), f"{LABEL}={_id(docker, name)}")


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode()


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _reference(media_type: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size}


def _descriptor(media_type: str, blob: bytes) -> dict[str, Any]:
    return _reference(media_type, _digest(blob), len(blob))


def _id(docker: Docker, name: str) -> str:
    return docker("image", "inspect", "--format", "{{.Id}}", name).strip()


def _diff_ids(docker: Docker, name: str) -> list[str]:
    return list(json.loads(docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", name)))


def _full_name(name: str) -> str:
    return f"docker.io/{name}" if "/" in name else f"docker.io/library/{name}"


def _ctr_words(*arguments: str) -> list[str]:
    return ["exec", "--interactive", kind.NODE, "ctr", "--namespace=k8s.io", *arguments]


def _ctr(docker: Docker, *arguments: str, stdin: bytes | None = None) -> str:
    return docker(*_ctr_words(*arguments), stdin=stdin, timeout=LOAD_SECONDS)
