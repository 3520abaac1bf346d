import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_api.progress_message import ProgressMessage, message_of
from finetune_api.report import Progress, Stage
from finetune_api.status import FineTuneJobStatus, ProgressStatus
from finetune_operator.progress import (
    Moment,
    followed,
    is_outdated,
    moment_of,
    short_duration,
    status_patch,
)
from finetune_operator.rate_limit import RateLimit

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def moment(said: dict[str, Any], stage: Stage = Stage.TRAIN) -> Moment:
    """Return what is made of a body."""
    return moment_of(ProgressMessage.model_validate({"trainerStatus": said}, by_alias=True, by_name=False), stage, NOW)


def metrics(**values: str) -> dict[str, Any]:
    return {"metrics": [{"name": name, "value": value} for name, value in values.items()]}


def test_what_our_trainer_reports_arrives_whole() -> None:
    progress = Progress(
        stage=Stage.TRAIN,
        message="training",
        percent=12.9,
        step=3,
        total_steps=24,
        epoch=0.125,
        loss=1.5,
        validation_loss=1.25,
        learning_rate=2e-5,
        tokens_per_second=1000,
        eta_seconds=60.9,
    )
    body = message_of(progress, NOW).model_dump_json(by_alias=True)
    arrived = moment_of(ProgressMessage.model_validate_json(body), Stage.TRAIN, NOW)
    assert arrived.progress == ProgressStatus(
        stage=Stage.TRAIN,
        message="training",
        percent=12,
        step=3,
        total_steps=24,
        epoch="0.125",
        eta_seconds=60,
        tokens_per_second="1000",
        last_update_time=NOW,
    )
    assert arrived.metrics == {
        "loss": "1.5",
        "validation_loss": "1.25",
        "learning_rate": "2e-05",
        "tokens_per_second": "1000",
    }


def test_the_callbacks_metrics_become_step_and_epoch() -> None:
    arrived = moment(metrics(current_step="4", total_steps="10", current_epoch="1.25", loss="0.5"))
    assert (arrived.progress.step, arrived.progress.total_steps, arrived.progress.epoch) == (4, 10, "1.25")
    assert arrived.metrics == {"loss": "0.5"}


@pytest.mark.parametrize("step", ["nan", "inf", "-1", "1e300", "four"])
def test_a_step_that_is_none_is_skipped(step: str) -> None:
    assert moment(metrics(current_step=step)).progress.step is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("0.412345678", "0.412346"),
        ("NaN", "nan"),
        ("-Infinity", "-inf"),
        (" 5 ", "5"),
        ("True", None),
        ("none of your business", None),
    ],
)
def test_a_metric_is_shown_as_a_number(text: str, shown: str | None) -> None:
    assert moment(metrics(loss=text)).metrics.get("loss") == shown


def test_text_from_a_trainer_cannot_move_a_cursor_or_grow() -> None:
    arrived = moment({"message": "a\x1b[31m\nb\u202ec\x00" + "x" * 1000, **metrics(**{"lo\x07ss\n": "1"})})
    assert arrived.progress.message.startswith("a [31m b c xxx")
    assert len(arrived.progress.message) <= 256
    assert arrived.metrics == {"lo ss": "1"}


def test_many_metrics_are_cut() -> None:
    arrived = moment(metrics(**{f"m{number}": "1" for number in range(200)}))
    assert len(arrived.metrics) == 32
    assert len(status_patch(followed(arrived, moment(metrics(loss="1"))))["latestMetrics"]) == 32


def test_fields_of_a_newer_trainer_are_skipped() -> None:
    assert moment({"percentOfNextVersion": 3, "progressPercentage": 5}).progress.percent == 5


@pytest.mark.parametrize(
    ("of_pod", "said", "shown"),
    [
        (Stage.EVALUATE, "publish", Stage.PUBLISH),
        (Stage.EVALUATE, "check", Stage.EVALUATE),
        (Stage.TRAIN, "publish", Stage.TRAIN),
        (Stage.TRAIN, None, Stage.TRAIN),
    ],
)
def test_only_evaluation_publishes(of_pod: Stage, said: str | None, shown: Stage) -> None:
    assert moment({"stage": said}, of_pod).progress.stage is shown


def test_what_is_not_said_again_still_holds() -> None:
    earlier = moment({"progressPercentage": 40, "step": 4, **metrics(loss="1", validation_loss="2")})
    later = followed(earlier, moment({"message": "saving", **metrics(loss="0.5")}))
    assert (later.progress.percent, later.progress.step, later.progress.message) == (40, 4, "saving")
    assert later.metrics == {"loss": "0.5", "validation_loss": "2"}


def test_another_stage_begins_anew() -> None:
    earlier = moment({"progressPercentage": 100, "step": 4}, Stage.EVALUATE)
    later = followed(earlier, moment({"stage": "publish", "message": "writing"}, Stage.EVALUATE))
    assert (later.progress.percent, later.progress.step) == (None, None)


@pytest.mark.parametrize(("seconds", "is_old"), [(-1, True), (0, False), (1, False), (None, False)])
def test_a_moment_that_was_overtaken_is_old(seconds: int | None, is_old: bool) -> None:
    told = None if seconds is None else (NOW + timedelta(seconds=seconds)).isoformat()
    assert is_outdated(moment({"lastUpdatedTime": NOW.isoformat()}), moment({"lastUpdatedTime": told})) is is_old


def test_a_patch_removes_what_is_not_known_any_more() -> None:
    patch = status_patch(moment({"message": "reading rows"}))
    assert patch["summary"] == {"progress": None, "eta": None}
    assert patch["progress"]["percent"] is None
    assert "latestMetrics" not in patch, "figures of the stage before stay"


def test_a_patch_is_a_status() -> None:
    said = {"progressPercentage": 100, "estimatedRemainingSeconds": 2**53, "epoch": 1e9, "message": "x", "step": 2**53}
    patch = status_patch(moment({**said, **metrics(loss="-inf", rate="1e-300")}))
    status = FineTuneJobStatus.model_validate(patch, by_alias=True, by_name=False)
    assert status.summary is not None
    assert status.summary.progress == "100 %"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h00m"), (86399, "23h59m"), (100_000, "1d3h")],
)
def test_a_time_fits_its_column(seconds: int, shown: str) -> None:
    assert short_duration(seconds) == shown


def test_what_is_no_number_is_not_told_as_one() -> None:
    progress = Progress(stage=Stage.TRAIN, percent=math.nan, eta_seconds=math.inf, epoch=math.nan, loss=math.nan)
    said = message_of(progress, NOW).trainer_status
    assert (said.progress_percentage, said.estimated_remaining_seconds, said.epoch) == (None, None, None)
    assert [(metric.name, metric.value) for metric in said.metrics] == [("loss", "nan")]


# --- how often


def test_a_burst_is_allowed_and_then_a_steady_rate() -> None:
    limit = RateLimit(per_second=2, burst=3)
    assert [limit.seconds_to_wait("a", 0.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert limit.seconds_to_wait("a", 0.25) == 0.25
    assert limit.seconds_to_wait("a", 0.5) == 0


def test_one_caller_does_not_use_up_anothers_permits() -> None:
    limit = RateLimit(per_second=1, burst=1)
    assert limit.seconds_to_wait("a", 0.0) == 0
    assert limit.seconds_to_wait("b", 0.0) == 0
    assert limit.seconds_to_wait("a", 0.0) > 0


def test_many_callers_are_forgotten_oldest_first() -> None:
    limit = RateLimit(per_second=1, burst=1, most_callers=2)
    for caller in ("a", "b", "c"):
        assert limit.seconds_to_wait(caller, 0.0) == 0
    assert limit.seconds_to_wait("c", 0.0) > 0
    assert limit.seconds_to_wait("a", 0.0) == 0
