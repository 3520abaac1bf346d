"""A published model on the local disk: an adapter or full weights, every file of it as its manifest says."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from finetune_api.model import ApiModel
from finetune_api.report import Ancestor, ArtifactKind
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.manifest import Manifest, is_complete, verify_manifest
from finetune_trainer.storage import Storage

LINEAGE_FILE = "lineage.json"
"""What an artifact was itself tuned from, besides its base; absent where that is nothing."""

_MODELS: Collection[str] = [kind.value for kind in ArtifactKind if kind is not ArtifactKind.REPORT]


class Lineage(ApiModel):
    """The content of `LINEAGE_FILE`."""

    ancestors: tuple[Ancestor, ...]
    """Nearest first."""


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """One that was verified."""

    path: Path
    lineage: tuple[Ancestor, ...]
    """The artifact itself, then what it was tuned from, nearest first."""
    base: str
    """Its base model, for people."""
    base_revision: str
    """As `ModelFiles.revision`."""

    @property
    def kind(self) -> ArtifactKind:
        """What it holds."""
        return self.lineage[0].kind

    @property
    def sha256(self) -> str:
        """Of its manifest."""
        return self.lineage[0].sha256

    @property
    def uri(self) -> str:
        """As it was named."""
        return self.lineage[0].uri


def open_published(uri: str, field: str, storage: Storage, cache: Path) -> PublishedModel:
    """Return the model that a job has published at ``uri``.

    Args:
        uri: file://, pvc:// or s3://; the folder ``model`` or ``merged``.
        field: what names it, for messages.
        storage: opens it.
        cache: for a copy of what is in a bucket.

    Raises:
        SpecError: it is not there, or no model.
        DataError: it is unfinished, or was changed since it was published.
    """
    path = storage.fetch_artifact(uri, field, cache)
    if not path.is_dir():
        raise SpecError(f"{field}: {uri} is no folder. Name the folder model that a job has published.")
    if not is_complete(path) and is_complete(path / "model"):
        raise SpecError(f"{field}: {uri} holds a job's results. Write {uri.rstrip('/')}/model.")
    try:
        manifest = verify_manifest(path)
    except DataError as error:
        raise DataError(f"{field} ({uri}): {error}") from error
    return _opened(uri, field, path, manifest)


def _opened(uri: str, field: str, path: Path, manifest: Manifest) -> PublishedModel:
    about = manifest.about
    if about.get("kind") not in _MODELS:
        raise SpecError(
            f"{field}: {uri} is no model but {about.get('kind') or 'something else'}. Name the folder model, or "
            "merged, that a job has published."
        )
    if "baseRevision" not in about:
        raise SpecError(
            f"{field}: {uri} does not say which base model it was tuned from: an older version published it. "
            "Publish it again."
        )
    ancestor = Ancestor(uri=uri, kind=about["kind"], sha256=manifest.sha256, spec_hash=about.get("specHash", ""))
    return PublishedModel(path, (ancestor, *_read_lineage(path, field)), about.get("base", ""), about["baseRevision"])


def _read_lineage(folder: Path, field: str) -> tuple[Ancestor, ...]:
    file = folder / LINEAGE_FILE
    if not file.exists():
        return ()
    try:
        return Lineage.model_validate_json(file.read_bytes()).ancestors
    except ValidationError as error:
        raise DataError(f"{field}: {file} is of another version: {error.errors()[0]['msg']}.") from error
