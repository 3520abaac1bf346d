"""A spec that was published is found again as long as what it published is there, and only then."""

from pathlib import Path

import pytest

from finetune_api.report import ArtifactKind, ExitCode, Stage
from finetune_api.stage_result import StageResult
from finetune_api.status import PublishedArtifact
from finetune_trainer.file_store import FileStore
from finetune_trainer.publication import find_publication, record_publication

from .jobs import tiny_job
from .tree import make_tree


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def published(store: FileStore, folder: Path) -> StageResult:
    """Publish a model, and return what the evaluate stage would say."""
    if not store.exists("team/job-1/model/COMPLETE"):
        store.put_tree(make_tree(folder / "model", "one"), "team/job-1/model")
    artifact = PublishedArtifact(
        kind=ArtifactKind.ADAPTER, uri=f"{store.uri}/team/job-1/model", sha256="a" * 64, bytes=1
    )
    return StageResult(stage=Stage.EVALUATE, exit_code=ExitCode.OK, published=True, artifacts=(artifact,))


def test_what_was_published_is_found_by_name_and_spec(store: FileStore, tmp_path: Path):
    job = tiny_job(tmp_path, tmp_path)
    assert find_publication(store, job) is None
    result = published(store, tmp_path)
    record_publication(store, job, result)
    assert find_publication(store, job) == result.model_copy(update={"stage": Stage.CHECK})
    assert find_publication(store, tiny_job(tmp_path, tmp_path, training__maxSteps=9)) is None
    renamed = job.model_copy(update={"metadata": job.metadata.model_copy(update={"name": "other"})})
    assert find_publication(store, renamed) is None
    moved = job.model_copy(update={"metadata": job.metadata.model_copy(update={"namespace": "other"})})
    assert find_publication(store, moved) is None


def test_what_was_deleted_or_damaged_or_kept_back_is_made_again(store: FileStore, tmp_path: Path):
    job, result = tiny_job(tmp_path, tmp_path), published(store, tmp_path)
    record_publication(store, job, result)
    store.delete_tree("team/job-1/model")
    assert find_publication(store, job) is None
    record_publication(store, job, published(store, tmp_path / "again").model_copy(update={"published": False}))
    assert find_publication(store, job) is None
    record_publication(store, job, result.model_copy(update={"artifacts": ()}))
    assert find_publication(store, job) is None
    (key,) = [key for key in store.list() if ".published/" in key]
    store.put_bytes(key, b"{")
    assert find_publication(store, job) is None
