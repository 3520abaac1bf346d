"""What is shown of a job on a cluster, how its end becomes an exit code, and how a watch goes on over interruptions."""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pytest

from finetune_api.report import ExitCode
from finetune_api.stored_status import read_status
from finetune_cli.cluster_job import cluster_job
from finetune_cli.job_end import failure_of
from finetune_cli.job_watch import follow
from finetune_cli.patience import PAUSES, Patience
from finetune_cli.refusal import ClusterError, NotFoundError
from finetune_cli.status_text import job_table, news, status_lines

from .cluster_api import UID, FakeJobApi, make_object

NOW = datetime(2026, 1, 2, 4, 4, 5, tzinfo=UTC)


def condition(kind: str, status: str = "True", reason: str = "SpecValid", message: str = "") -> dict[str, str]:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": "2026-01-02T03:04:05Z",
    }


# --- text

RUNNING: dict[str, Any] = {
    "phase": "Training",
    "summary": {"message": "training since 03:10"},
    "resolved": {"outputPath": "s3://bucket/out/team/reviews-1a2b3c4d"},
    "progress": {
        "stage": "train",
        "message": "training",
        "percent": 45,
        "step": 45,
        "totalSteps": 100,
        "etaSeconds": 75,
        "lastUpdateTime": "2026-01-02T04:04:00Z",
    },
    "latestMetrics": [{"name": "loss", "value": "0.4123"}],
    "conditions": [
        condition("Trained", "False", "Running"),
        condition("Accepted"),
        condition("Checked", "True", "StageSucceeded", "2,400 rows\x1b[2J read"),
    ],
    "attempts": [
        {
            "stage": "train",
            "number": 1,
            "child": "reviews-train-a1",
            "startTime": "2026-01-02T03:10:00Z",
            "endTime": "2026-01-02T03:12:05Z",
            "reason": "OutOfMemory",
            "exitCode": 71,
            "node": "gpu-1",
        },
        {
            "stage": "train",
            "number": 2,
            "child": "reviews-train-a2",
            "startTime": "2026-01-02T03:13:00Z",
            "resumedFromStep": 20,
            "change": "microBatchSize 8 -> 4",
        },
    ],
    "plan": {
        "parameters": 134515008,
        "trainableParameters": 460800,
        "trainablePercent": "0.34",
        "gpus": 1,
        "memoryBytesPerGpu": 3000000000,
        "gpuMemoryBytes": 24000000000,
        "gpusNeeded": 2,
        "warnings": ["few rows"],
    },
    "data": {
        "rows": {"train": 2400, "validation": 300, "test": 300},
        "tokens": 81234,
        "duplicates": 3,
        "exactDuplicates": 2,
        "overlaps": [{"source": "arc", "questions": 90, "overlapping": 4, "givenAway": 1}],
        "personalData": {"emails": 2},
        "tasks": [
            {"name": "sentiment", "rows": 2400, "language": "en", "labels": [{"label": "no\x1b\nwhere", "rows": 1201}]}
        ],
        "layout": "packed: packed examples stay apart",
        "rehearsal": {"seconds": 62},
    },
}

RUNNING_TEXT = """\
Job     reviews in namespace team
Phase   Training
        training since 03:10
Model   hf://acme/tiny
Method  lora
Output  s3://bucket/out/team/reviews-1a2b3c4d

train  [#########-----------]  45 %  step 45/100, loss 0.412, 1:15 left

Conditions
  Accepted  True   SpecValid
  Checked   True   StageSucceeded  2,400 rows [2J read
  Trained   False  Running

Attempts
  stage  reason       node   change                 number  exit  from step    ran
  train  OutOfMemory  gpu-1  -                           1    71          -   2:05
  train  Running      -      microBatchSize 8 -> 4       2     -         20  51:05

Plan
  460,800 of 134,515,008 parameters (0.34 %), 1 GPU (2 needed), 2.8 GiB of 22.4 GiB each
  warning: few rows

Data
  2,400 training, 300 validation, 300 test rows, 81,234 tokens, 3 duplicates (2 exact)
  task sentiment: 2,400 training rows, language en, no where 1,201
  4 of 90 questions of arc share words in a row with training rows, 1 as a whole
  personal data: 2 e-mail, 0 telephone, 0 secret keys
  rows are packed: packed examples stay apart
  rehearsed in small in 1:02
"""

DONE: dict[str, Any] = {
    "phase": "Succeeded",
    "evaluation": {
        "tasks": [
            {
                "name": "sentiment",
                "metric": "accuracy",
                "base": "0.5",
                "tuned": "0.95",
                "delta": "0.45",
                "low": "0.3",
                "high": "0.6",
            },
            {"name": "sentiment", "metric": "perplexity", "tuned": "nan"},
        ],
        "gates": [{"metric": "sentiment.accuracy", "passed": False, "why": "+0.010 is below 0.02"}],
    },
    "artifacts": [
        {"kind": "report", "uri": "s3://bucket/out/team/reviews-1a2b3c4d/report", "sha256": "ab" * 32, "bytes": 2048}
    ],
}

DONE_TEXT = """\
Job     reviews in namespace team
Phase   Succeeded
Model   hf://acme/tiny
Method  lora

Evaluation
  task       metric       base  tuned   delta     95 % interval
  sentiment  accuracy    0.500  0.950  +0.450  +0.300 to +0.600
  sentiment  perplexity      -    nan       -                 -
  gate sentiment.accuracy: NOT passed, +0.010 is below 0.02

Artifacts
  report  s3://bucket/out/team/reviews-1a2b3c4d/report  2.0 KiB  sha256 abababababab
"""


@pytest.mark.parametrize("status, text", [(RUNNING, RUNNING_TEXT), (DONE, DONE_TEXT)], ids=["running", "done"])
def test_everything_that_is_known_is_shown_as_plain_text(status, text):
    lines = status_lines(cluster_job(make_object(status)), NOW)
    assert lines == text.splitlines()
    assert "\n".join(lines).isascii(), "any terminal can show it"


def test_a_rehearsal_that_did_not_end_is_told_in_a_line():
    rehearsal = {"whyNot": "no tiny llama\n\x1b[2J can be built"}
    data = {"rows": {"train": 1, "validation": 1, "test": 1}, "rehearsal": rehearsal}
    lines = status_lines(cluster_job(make_object({"phase": "Checking", "data": data})), NOW)
    assert lines[-1] == "  not rehearsed to the end: no tiny llama [2J can be built"


def test_a_job_that_nobody_looks_at_says_what_may_be_missing():
    assert "no operator runs" in status_lines(cluster_job(make_object()), NOW)[1]


AGES = {
    "2026-01-02T04:04:00Z": "5s",
    "2026-01-02T04:00:00Z": "4m",
    "2026-01-02T01:04:05Z": "3h",
    "2025-12-01T00:00:00Z": "32d",
}


@pytest.mark.parametrize("created, age", AGES.items(), ids=AGES.values())
def test_the_age_has_one_unit(created, age):
    job = make_object()
    job["metadata"]["creationTimestamp"] = created
    assert job_table([cluster_job(job)], NOW)[1].split()[-1] == age


def test_the_table_tells_what_became_of_the_model():
    kept_back = make_object({"conditions": [condition("Published", "False", "WorseThanBase", "accuracy fell")]})
    header, line = job_table([cluster_job(kept_back)], NOW)
    assert line[header.index("PUBLISHED") :].split()[0] == "WorseThanBase"


def test_news_are_conditions_that_changed():
    before = read_status({"conditions": [condition("Accepted"), condition("Checked", "Unknown", "Waiting")]})
    now = read_status(
        {
            "conditions": [
                condition("Accepted"),
                condition("Checked", "False", "ImagePullFailed", "no such image; correct spec.compute.image"),
                condition("Trained", "Unknown", "Waiting"),
            ]
        }
    )
    assert news(before, now) == ["not Checked (ImagePullFailed): no such image; correct spec.compute.image"]
    assert news(None, before) == ["Accepted (SpecValid)"]


def test_an_end_by_a_reason_of_a_later_release_is_shown_with_its_message():
    ended = make_object({"phase": "Succeeded", "conditions": [condition("Complete", reason="Blessed", message="good")]})
    [line] = [line for line in status_lines(cluster_job(ended), NOW) if "Complete" in line]
    assert line.split() == ["Complete", "True", "Unknown", "good"]


# --- exit codes

ENDS: dict[str, tuple[dict[str, Any], ExitCode]] = {
    "a refused spec": ({"conditions": [condition("Failed", reason="SpecInvalid")]}, ExitCode.BAD_SPEC),
    "bad rows": ({"conditions": [condition("Failed", reason="BadData")]}, ExitCode.BAD_DATA),
    "a store that stays away": (
        {
            "conditions": [condition("Failed", reason="RetriesExhausted")],
            "attempts": [
                {"stage": "train", "number": 1, "child": "x", "exitCode": 71},
                {"stage": "train", "number": 2, "child": "x", "exitCode": 69},
            ],
        },
        ExitCode.STORAGE,
    ),
    "a signal": (
        {
            "conditions": [condition("Failed", reason="RetriesExhausted")],
            "attempts": [{"stage": "train", "number": 1, "child": "x", "exitCode": 137}],
        },
        ExitCode.INTERNAL,
    ),
    "retries, the last of them evicted for what it stored": (
        {
            "conditions": [condition("Failed", reason="RetriesExhausted")],
            "attempts": [{"stage": "train", "number": 1, "child": "x", "exitCode": 75, "reason": "StorageUnreachable"}],
        },
        ExitCode.STORAGE,
    ),
    "a deadline": ({"conditions": [condition("Failed", reason="DeadlineExceeded")]}, ExitCode.INTERNAL),
    "no word at all": ({}, ExitCode.INTERNAL),
}


@pytest.mark.parametrize("status, code", ENDS.values(), ids=ENDS.keys())
def test_a_failed_job_ends_its_watcher_with_the_trainers_code(status, code):
    failure = failure_of(cluster_job(make_object({"phase": "Failed", **status})))
    assert failure is not None
    assert failure.exit_code == code


@pytest.mark.parametrize("phase", ["Training", "Succeeded", "Suspended"])
def test_only_a_failed_job_is_a_failure(phase):
    assert failure_of(cluster_job(make_object({"phase": phase}))) is None


# --- watching


class Pauses:
    """Notes what is said and how long is waited, and waits for nothing."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.seconds: list[float] = []

    @property
    def patience(self) -> Patience:
        return Patience(self.said.append, self.seconds.append)


def versions(api: FakeJobApi, pauses: Pauses, count: int) -> list[str]:
    first = cluster_job(api.get("team", "reviews"))
    return [job.resource_version for job in islice(follow(api, first, pauses.patience), count)]


def test_a_watch_goes_on_where_the_last_one_ended_and_repeats_nothing():
    api, pauses = FakeJobApi(make_object(version=1)), Pauses()

    def two_changes() -> Iterator[tuple[str, dict[str, Any]]]:
        api.job = make_object(version=3)
        yield "MODIFIED", make_object(version=2)
        yield "MODIFIED", make_object(version=3)

    api.on_watch = [two_changes, lambda: iter([("MODIFIED", make_object(version=4))])]
    assert versions(api, pauses, 4) == ["1", "2", "3", "4"]
    assert pauses.seconds == []


def test_what_changed_while_nobody_watched_is_seen():
    api, pauses = FakeJobApi(make_object(version=1)), Pauses()

    def forgotten() -> Iterator[tuple[str, dict[str, Any]]]:
        api.job = make_object(version=9)
        raise ClusterError("the cluster answers HTTP 410: too old resource version: 1 (8).")

    api.on_watch = [forgotten]
    assert versions(api, pauses, 2) == ["1", "9"]


def test_a_server_that_ends_every_watch_is_not_asked_in_a_tight_loop():
    api, pauses = FakeJobApi(make_object(version=1)), Pauses()
    api.on_watch = [lambda: iter([]), lambda: iter([]), lambda: iter([("MODIFIED", make_object(version=2))])]
    assert versions(api, pauses, 2) == ["1", "2"]
    assert pauses.seconds == [1.0, 1.0]


def test_a_lost_connection_is_told_and_waited_for():
    api, pauses = FakeJobApi(make_object(version=1)), Pauses()

    def lost() -> Iterator[tuple[str, dict[str, Any]]]:
        api.failures = [ClusterError("away"), ClusterError("away")]
        api.job = make_object(version=2)
        return iter([])

    api.on_watch = [lost]
    assert versions(api, pauses, 2) == ["1", "2"]
    assert pauses.said == ["The connection to the cluster is lost; trying again. The job is not affected."] * 2


def test_a_cluster_that_stays_away_ends_the_watch():
    api, pauses = FakeJobApi(make_object(version=1)), Pauses()

    def lost() -> Iterator[tuple[str, dict[str, Any]]]:
        api.failures = [ClusterError("away")] * (len(PAUSES) + 1)
        return iter([])

    api.on_watch = [lost]
    with pytest.raises(ClusterError, match="away"):
        versions(api, pauses, 2)
    assert sum(pauses.seconds) > 300


def test_a_job_that_was_deleted_and_made_anew_is_another_one():
    api, pauses = FakeJobApi(make_object(version=1)), Pauses()

    def renewed() -> Iterator[tuple[str, dict[str, Any]]]:
        assert api.job is not None
        api.job["metadata"]["uid"] = UID.replace("1", "2")
        return iter([])

    api.on_watch = [renewed]
    with pytest.raises(NotFoundError, match="FineTuneJob reviews in namespace team was deleted"):
        versions(api, pauses, 2)
