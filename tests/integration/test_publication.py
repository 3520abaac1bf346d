"""A spec that was published is found again as long as what it published is there, and only then."""

from pathlib import Path

import pytest

from finetune_api.job import FineTuneJob
from finetune_api.report import ArtifactKind, DataReport, ExitCode, Report, SplitRows, Stage, TrainingReport
from finetune_api.resolve import LEARNING_RATES, LearningRate
from finetune_api.stage_result import StageResult
from finetune_api.status import PublishedArtifact
from finetune_trainer.durable import write_file
from finetune_trainer.file_store import FileStore
from finetune_trainer.manifest import write_manifest
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


def test_a_release_with_another_learning_rate_finds_what_was_published(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def job() -> FineTuneJob:
        """Without a rate of its own."""
        return tiny_job(tmp_path, tmp_path, training__learningRate=None)

    before = job()
    record_publication(store, before, published(store, tmp_path))
    monkeypatch.setitem(LEARNING_RATES, before.spec.method.type, LearningRate(0.123, "test"))
    assert job().spec.training.learning_rate == 0.123
    assert find_publication(store, job()) is not None
    assert find_publication(store, tiny_job(tmp_path, tmp_path, training__learningRate=0.5)) is None


def test_a_record_of_an_earlier_release_is_found_by_what_its_report_says_was_asked_for(
    store: FileStore, tmp_path: Path
):
    job = tiny_job(tmp_path, tmp_path, training__learningRate=None)
    resolved = job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    # The earlier release had this field not yet.
    del resolved["checkpoint"]["keep"]
    report = Report(
        name="tiny",
        namespace="default",
        spec_hash="c" * 64,
        base_model=job.spec.model.source,
        data=DataReport(rows=SplitRows(train=8, validation=1, test=1), hash="", format="raw"),
        training=TrainingReport(method="lora", parameters=9, trainable_parameters=1, steps=1, epochs=1),
        seed=0,
        resolved=resolved,
    )
    write_file(tmp_path / "report" / "report.json", report.model_dump_json(by_alias=True).encode())
    write_manifest(tmp_path / "report", {"kind": "report"})
    store.put_tree(tmp_path / "report", "team/job-1/report")
    result = published(store, tmp_path)
    told = PublishedArtifact(kind=ArtifactKind.REPORT, uri=f"{store.uri}/team/job-1/report", sha256="b" * 64, bytes=1)
    result = result.model_copy(update={"artifacts": (*result.artifacts, told)})
    store.put_bytes(f"default/tiny.published/{'c' * 64}.json", result.model_dump_json(by_alias=True).encode())
    assert find_publication(store, job) == result.model_copy(update={"stage": Stage.CHECK})
    assert find_publication(store, tiny_job(tmp_path, tmp_path, training__maxSteps=9)) is None
    store.put_bytes("team/job-1/report/report.json", b"{}")
    assert find_publication(store, job) is None


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
