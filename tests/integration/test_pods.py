"""Stages in pods of their own: each begins with an empty disk, and the output store is all that they share."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import FineTuneJob, load_job, spec_hash
from finetune_api.report import IMAGE_VARIABLE, ExitCode, Progress, Stage
from finetune_api.resolve import resolve
from finetune_api.stage_result import StageResult
from finetune_api.status import PlanStatus
from finetune_trainer import check_stage, stages
from finetune_trainer.__main__ import main
from finetune_trainer.adjustment import Adjustment
from finetune_trainer.errors import DataError, WorkerLostError
from finetune_trainer.manifest import verify_manifest
from finetune_trainer.stages import PodOptions

from .jobs import FIGURES, Silence, tiny_document, write_reviews
from .s3_server import S3Server

UID = "0b9ae2f4-5b8d-4b46-9d57-d0b4a7c2c9b1"
STEPS = 24
"""Far more than pass between the report of a step and the answer to a signal."""


class Listener:
    """Keeps what it is told; asks for a stop behind a step, as the kubelet does."""

    def __init__(self, stop_behind: int | None = None) -> None:
        self.told: list[Progress] = []
        self._stop_behind = stop_behind

    def report(self, progress: Progress) -> None:
        self.told.append(progress)
        if self._stop_behind is not None and (progress.step or 0) >= self._stop_behind:
            self._stop_behind = None
            os.kill(os.getpid(), signal.SIGTERM)

    def rates(self) -> dict[int, float]:
        """Return the newest learning rate at every step that was told of; rates are logged every few steps."""
        return {one.step: one.learning_rate for one in self.told if one.step and one.learning_rate is not None}

    @property
    def stages(self) -> set[Stage]:
        return {progress.stage for progress in self.told}


@pytest.fixture
def secrets(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.write_secret(tmp_path / "secrets" / "keys")
    monkeypatch.setenv("FINETUNE_SECRETS", str(tmp_path / "secrets"))


@pytest.fixture
def document(server: S3Server, secrets: None, tiny_model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A job whose model, rows and results lie in one bucket."""
    bucket = server.make_bucket()
    client = server.client()
    for path in tiny_model_dir.iterdir():
        client.upload_file(str(path), bucket, f"models/tiny/{path.name}")
    client.upload_file(str(write_reviews(tmp_path / "reviews.jsonl")), bucket, "rows/reviews.jsonl")
    document = tiny_document(tiny_model_dir, tmp_path, model__source=f"s3://{bucket}/models/tiny", checkpoint__keep=1)
    document["metadata"] |= {"namespace": "team", "uid": UID}
    document["spec"]["data"]["tasks"][0]["source"] = f"s3://{bucket}/rows/reviews.jsonl"
    document["spec"]["output"] = {
        "uri": f"s3://{bucket}/results",
        "endpoint": server.url,
        "secretRef": {"name": "keys"},
    }
    return document


def job_of(document: dict[str, Any]) -> FineTuneJob:
    return resolve(load_job(json.dumps(document), "job.json"))


def pod(job: FineTuneJob, stage: Stage, folder: Path, listener: Listener | None = None) -> StageResult:
    """Run a stage in an empty folder."""
    assert not folder.exists()
    return stages.run_one(stage, job, folder, listener or Listener(), PodOptions())


def keys(server: S3Server, document: dict[str, Any]) -> set[str]:
    """Return what lies below the job's prefix."""
    bucket = document["spec"]["output"]["uri"].split("/")[2]
    prefix = f"results/team/tiny-{UID[:8]}/"
    found = server.client().list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", ())
    return {entry["Key"].removeprefix(prefix) for entry in found}


def test_stages_hand_over_through_the_bucket_also_when_training_is_interrupted(
    server: S3Server, document: dict[str, Any], tmp_path: Path
):
    document["spec"]["training"] |= {"maxSteps": STEPS, "reportTo": {"tensorboard": True}}
    job = job_of(document)
    checked = pod(job, Stage.CHECK, tmp_path / "check")
    assert checked.exit_code is ExitCode.OK, checked.message
    assert checked.data is not None
    assert checked.data.rows.train > 50
    assert checked.model_revision is not None

    interrupted = pod(job, Stage.TRAIN, tmp_path / "train-1", Listener(stop_behind=5))
    assert interrupted.exit_code is ExitCode.PREEMPTED
    assert interrupted.resumed_from_step is None
    ((step, uri),) = [(one.step, one.uri) for one in interrupted.checkpoints]
    assert 5 <= step < STEPS
    assert uri == f"{document['spec']['output']['uri']}/team/tiny-{UID[:8]}/checkpoints/step-{step:06d}"
    assert f"checkpoints/step-{step:06d}/COMPLETE" in keys(server, document)

    trained = pod(job, Stage.TRAIN, tmp_path / "train-2")
    assert trained.exit_code is ExitCode.OK, trained.message
    assert trained.resumed_from_step == step
    assert not {key for key in keys(server, document) if key.startswith("checkpoints/")}
    assert {"state/training.json", "state/tuned/COMPLETE"} <= keys(server, document)

    again = Listener()
    found = pod(job, Stage.TRAIN, tmp_path / "train-3", again)
    assert found == trained.model_copy(update={"resumed_from_step": STEPS})
    assert not [progress for progress in again.told if progress.step], "nothing is trained twice"

    evaluated = pod(job, Stage.EVALUATE, tmp_path / "evaluate")
    assert evaluated.exit_code is ExitCode.OK, evaluated.message
    assert evaluated.published is True
    assert {artifact.kind.value for artifact in evaluated.artifacts} == {"adapter", "report"}
    assert evaluated.report_sha256 == evaluated.artifacts[-1].sha256
    assert evaluated.evaluation is not None
    assert {task.metric for task in evaluated.evaluation.tasks} == FIGURES
    assert {"model/COMPLETE", "report/COMPLETE", "state/predictions.parquet"} <= keys(server, document)
    assert [key for key in keys(server, document) if key.startswith("report/tensorboard/events.out.tfevents.")]

    restored = job.model_copy(update={"metadata": job.metadata.model_copy(update={"uid": UID[::-1]})})
    silent = Listener()
    published = pod(restored, Stage.CHECK, tmp_path / "check-of-a-restored-job", silent)
    assert published == evaluated.model_copy(update={"stage": Stage.CHECK})
    assert not silent.told, "neither model nor rows are read"

    scored = Listener()
    repeated = pod(job, Stage.EVALUATE, tmp_path / "evaluate-2", scored)
    assert repeated.artifacts == evaluated.artifacts
    assert not [progress for progress in scored.told if progress.percent and progress.stage is Stage.EVALUATE]


def test_a_rehearsal_goes_through_the_bucket_and_leaves_nothing_there(
    server: S3Server, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(check_stage, "REHEARSED_PARAMETERS", 0)
    listener = Listener()
    checked = pod(job_of(document), Stage.CHECK, tmp_path / "check", listener)
    assert checked.exit_code is ExitCode.OK, checked.message
    said = [progress.message for progress in listener.told]
    assert "rehearsing: resuming at step 1" in said
    assert "rehearsing: fetching the tuned weights" in said
    assert keys(server, document) == {"state/inputs.json", "state/data.json", "state/plan.json"}


def test_rows_that_change_in_the_bucket_are_noticed(server: S3Server, document: dict[str, Any], tmp_path: Path):
    job = job_of(document)
    assert pod(job, Stage.CHECK, tmp_path / "check").exit_code is ExitCode.OK
    bucket, key = document["spec"]["data"]["tasks"][0]["source"].removeprefix("s3://").split("/", 1)
    other = write_reviews(tmp_path / "other.jsonl", rows=130)
    server.client().upload_file(str(other), bucket, key)
    listener = Listener()
    trained = pod(job, Stage.TRAIN, tmp_path / "train", listener)
    assert trained.exit_code is ExitCode.OK, trained.message
    assert any("the rows of spec.data.tasks changed" in progress.message for progress in listener.told)
    server.client().upload_file(str(write_reviews(tmp_path / "third.jsonl", rows=140)), bucket, key)
    refused = pod(job, Stage.EVALUATE, tmp_path / "evaluate")
    assert refused.exit_code is ExitCode.BAD_DATA
    assert "since this run began training" in refused.message
    assert "another name" in refused.message


ON_WORKERS = {"workers": 2, "gpusPerWorker": 0}


def test_several_workers_do_not_go_on_with_other_rows_than_those_they_began_with(
    server: S3Server, document: dict[str, Any], tmp_path: Path
):
    document["spec"]["compute"] = ON_WORKERS
    job = job_of(document)
    assert pod(job, Stage.CHECK, tmp_path / "check").exit_code is ExitCode.OK
    bucket, key = document["spec"]["data"]["tasks"][0]["source"].removeprefix("s3://").split("/", 1)
    marker = f"results/team/tiny-{UID[:8]}/checkpoints/step-000005/COMPLETE"
    server.client().put_object(Bucket=bucket, Key=marker, Body=b"of their nodes")
    server.client().upload_file(str(write_reviews(tmp_path / "other.jsonl", rows=130)), bucket, key)
    refused = pod(job, Stage.TRAIN, tmp_path / "train")
    assert refused.exit_code is ExitCode.BAD_DATA, refused.message
    assert "since this run began training" in refused.message


def test_who_has_workers_train_leaves_the_weights_to_them(
    server: S3Server, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def lose_them(*_: Any) -> None:
        raise WorkerLostError("they are gone.", 1)

    monkeypatch.setattr("finetune_trainer.worker_group.train_on_workers", lose_them)
    document["spec"]["compute"] = ON_WORKERS
    job = job_of(document)
    assert pod(job, Stage.CHECK, tmp_path / "check").exit_code is ExitCode.OK
    assert pod(job, Stage.TRAIN, tmp_path / "train").exit_code is ExitCode.WORKER_LOST
    fetched = {path.name for path in (tmp_path / "train").rglob("*")}
    assert "tokenizer.json" in fetched and "model.safetensors" not in fetched


def test_smaller_micro_batch_of_an_attempt_changes_neither_place_nor_steps(
    server: S3Server, document: dict[str, Any], tmp_path: Path
):
    job = job_of(document)
    trained = stages.run_one(
        Stage.TRAIN, job, tmp_path / "train", Listener(), PodOptions(Adjustment(micro_batch_size=1))
    )
    assert trained.exit_code is ExitCode.OK, trained.message
    assert {metric.name: metric.value for metric in trained.latest_metrics}["steps"] == "8"
    assert "state/data.json" in keys(server, document), "a check that was left out is made up for"


def test_attempt_behind_one_that_diverged_goes_back_a_checkpoint_and_on_at_half_the_rate(
    server: S3Server, document: dict[str, Any], tmp_path: Path
):
    document["spec"]["checkpoint"]["keep"] = 2
    document["spec"]["training"]["maxSteps"] = STEPS
    job, before, behind = job_of(document), Listener(stop_behind=5), Listener()
    first = pod(job, Stage.TRAIN, tmp_path / "train-1", before)
    _, older = (one.step for one in first.checkpoints)
    change = Adjustment(learning_rate_scale=0.5, gradient_checkpointing=True)
    second = stages.run_one(Stage.TRAIN, job, tmp_path / "train-2", behind, PodOptions(change))
    assert second.exit_code is ExitCode.OK, second.message
    assert second.resumed_from_step == older
    assert min(behind.rates()) > older
    # The peak is 0.01, and neither has come far behind it.
    assert max(behind.rates().values()) < 0.005 < min(before.rates().values())


def test_checkpoint_that_was_damaged_in_the_store_is_passed_over(
    server: S3Server, document: dict[str, Any], tmp_path: Path
):
    document["spec"]["checkpoint"]["keep"] = 2
    job = job_of(document)
    interrupted = pod(job, Stage.TRAIN, tmp_path / "train-1", Listener(stop_behind=5))
    newest, older = (one.step for one in interrupted.checkpoints)
    bucket = document["spec"]["output"]["uri"].split("/")[2]
    damaged = f"results/team/tiny-{UID[:8]}/checkpoints/step-{newest:06d}/trainer_state.json"
    server.client().put_object(Bucket=bucket, Key=damaged, Body=b"{}")
    assert pod(job, Stage.TRAIN, tmp_path / "train-2").resumed_from_step == older


# --- on one machine


def local_job(model: Path, folder: Path) -> FineTuneJob:
    return job_of(tiny_document(model, folder))


def test_rerun_after_success_trains_nothing_and_refuses_other_rows(tiny_model_dir: Path, tmp_path: Path):
    job = local_job(tiny_model_dir, tmp_path)
    first = stages.run(job, tmp_path / "workspace", Silence())
    listener = Listener()
    assert stages.run(job, tmp_path / "workspace", listener).artifacts == first.artifacts
    assert not [progress for progress in listener.told if progress.step]
    write_reviews(tmp_path / "reviews.jsonl", rows=130)
    with pytest.raises(DataError, match=r"the rows of spec\.data\.tasks changed .* delete .*workspace"):
        stages.run(job, tmp_path / "workspace", Silence())


def test_rows_that_change_behind_the_check_are_checked_again(tiny_model_dir: Path, tmp_path: Path):
    job = local_job(tiny_model_dir, tmp_path)
    assert stages.run_one(Stage.CHECK, job, tmp_path / "workspace", Silence()).exit_code is ExitCode.OK
    write_reviews(tmp_path / "reviews.jsonl", rows=130)
    listener = Listener()
    result = stages.run_one(Stage.CHECK, job, tmp_path / "workspace", listener)
    assert result.data is not None
    assert result.data.rows.train + result.data.rows.validation + result.data.rows.test == 130
    assert any("checking again" in progress.message for progress in listener.told)


# --- the process


def last_words(path: Path) -> StageResult:
    content = path.read_bytes()
    assert len(content) <= 4096
    return StageResult.model_validate_json(content)


def test_process_leaves_its_result_and_uses_its_exit_code(tiny_model_dir: Path, tmp_path: Path):
    document = tiny_document(tiny_model_dir, tmp_path)
    document["metadata"]["uid"] = UID
    (tmp_path / "job.json").write_text(json.dumps(document))
    arguments = ["--spec", str(tmp_path / "job.json"), "--spec-hash", spec_hash(job_of(document).spec)]
    arguments += ["--workspace", str(tmp_path / "workspace"), "--attempt", "1"]
    assert main(["check", *arguments, "--termination-log", str(tmp_path / "log")]) is ExitCode.OK
    verdict = last_words(tmp_path / "log")
    assert (verdict.stage, verdict.exit_code, verdict.message) == (Stage.CHECK, ExitCode.OK, "")
    assert (tmp_path / "output" / "default" / f"tiny-{UID[:8]}" / "state" / "data.json").is_file()

    (tmp_path / "reviews.jsonl").unlink()
    assert main(["train", *arguments, "--termination-log", str(tmp_path / "log")]) is ExitCode.BAD_DATA
    assert "reviews.jsonl" in last_words(tmp_path / "log").message


def test_spec_of_another_hash_is_refused(tiny_model_dir: Path, tmp_path: Path):
    (tmp_path / "job.json").write_text(json.dumps(tiny_document(tiny_model_dir, tmp_path)))
    arguments = ["check", "--spec", str(tmp_path / "job.json"), "--spec-hash", "0" * 64]
    arguments += ["--workspace", str(tmp_path / "workspace"), "--termination-log", str(tmp_path / "log")]
    assert main(arguments) is ExitCode.BAD_SPEC
    assert "not 000000000000 as --spec-hash says" in last_words(tmp_path / "log").message
    assert not (tmp_path / "workspace").exists()


def test_the_operator_is_waited_for_longest_where_nothing_else_tells_it_the_result(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    waited = []

    class Line(Listener):
        def deliver(self, result: StageResult, patience_seconds: float) -> None:
            waited.append(patience_seconds)

        def close(self) -> None:
            """Has nothing open."""

    monkeypatch.setattr("finetune_trainer.__main__.open_client", Line)
    (tmp_path / "job.json").write_text(json.dumps(tiny_document(tiny_model_dir, tmp_path)))
    arguments = ["check", "--spec", str(tmp_path / "job.json"), "--spec-hash", "0" * 64, "--workspace", str(tmp_path)]
    main([*arguments, "--termination-log", str(tmp_path / "log")])
    main(arguments)
    plan = PlanStatus(parameters=1, warnings=("w" * 512,) * 16)
    long = StageResult(stage=Stage.CHECK, exit_code=ExitCode.OK, plan=plan)
    monkeypatch.setattr("finetune_trainer.__main__._run", lambda *_: long)
    main([*arguments, "--termination-log", str(tmp_path / "log")])
    assert waited == [120, 600, 600]


def test_published_trees_of_pods_are_whole_and_name_the_image(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    document = tiny_document(tiny_model_dir, tmp_path)
    document["metadata"]["uid"] = UID
    job = job_of(document)
    for stage in (Stage.CHECK, Stage.TRAIN):
        assert pod(job, stage, tmp_path / stage.value).exit_code is ExitCode.OK
    image = f"registry.example/trainer@sha256:{'a' * 64}"
    monkeypatch.setenv(IMAGE_VARIABLE, image)
    (tmp_path / "job.json").write_text(json.dumps(document))
    arguments = ["--spec", str(tmp_path / "job.json"), "--workspace", str(tmp_path / "evaluate"), "--attempt", "1"]
    assert main(["evaluate", *arguments]) is ExitCode.OK
    results = tmp_path / "output" / "default" / f"tiny-{UID[:8]}"
    for name in ("model", "report", "state/tuned"):
        verify_manifest(results / name)
    assert not (results / "checkpoints").exists()
    assert json.loads((results / "report" / "report.json").read_text())["image"] == image
    assert image in (results / "report" / "report.html").read_text()
    assert f"| image of the trainer | {image} |" in (results / "model" / "README.md").read_text()
