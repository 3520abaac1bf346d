"""What is read of a status that another release has written: all that this one knows."""

from typing import Any

import pytest

from finetune_api.status import FineTuneJobStatus
from finetune_api.stored_status import read_status

TIME = "2026-01-02T03:04:05Z"
ACCEPTED = {"type": "Accepted", "status": "True", "reason": "SpecValid", "lastTransitionTime": TIME}
COMPLETE = ACCEPTED | {"type": "Complete", "reason": "Published", "message": "all is well"}
ENDED = {
    "stage": "train",
    "number": 1,
    "failures": 1,
    "child": "reviews-train-a1",
    "endTime": TIME,
    "reason": "Diverged",
}
RUNS = {"stage": "train", "number": 2, "child": "reviews-train-a2", "startTime": TIME}
REPORT = {"kind": "report", "uri": "x", "sha256": "0" * 64, "bytes": 1}
RESOLVED = {"configMap": "reviews-spec-12345678", "specHash": "a" * 64, "image": "i"}

UNKNOWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a field": ({"phase": "Training", "mood": "good"}, {"phase": "Training"}),
    "a phase": ({"phase": "Dreaming", "observedGeneration": 3}, {"observedGeneration": 3}),
    "a kind of condition": ({"conditions": [ACCEPTED | {"type": "Blessed"}, ACCEPTED]}, {"conditions": [ACCEPTED]}),
    "a condition without what each has": ({"conditions": [{"type": "Checked"}, ACCEPTED]}, {"conditions": [ACCEPTED]}),
    "a field of a block": ({"resolved": {**RESOLVED, "digest": "d"}}, {"resolved": RESOLVED}),
    "a field of an attempt": ({"attempts": [ENDED | {"watts": 700}, RUNS]}, {"attempts": [ENDED, RUNS]}),
    "a field of an artifact": ({"artifacts": [REPORT | {"colour": "red"}]}, {"artifacts": [REPORT]}),
    "an attempt at a stage": ({"attempts": [ENDED | {"stage": "distill"}, RUNS]}, {"attempts": [RUNS]}),
    "the reason of an attempt": (
        {"attempts": [ENDED | {"reason": "Overheated"}, RUNS]},
        {"attempts": [ENDED | {"reason": "Unknown"}, RUNS]},
    ),
    "the reason of a condition": (
        {"conditions": [ACCEPTED, COMPLETE | {"reason": "Blessed"}]},
        {"conditions": [ACCEPTED, COMPLETE | {"reason": "Unknown"}]},
    ),
    "more attempts than are kept": (
        {"attempts": [RUNS | {"number": number} for number in range(1, 13)]},
        {"attempts": [RUNS | {"number": number} for number in range(3, 13)]},
    ),
    "several at once": (
        {
            "mood": "good",
            "conditions": [ACCEPTED | {"type": "Blessed", "by": "x"}, ACCEPTED | {"by": "x"}],
            "attempts": [{"stage": "distill", "watts": 1}, ENDED | {"reason": "Overheated", "watts": 1}, RUNS],
        },
        {"conditions": [ACCEPTED], "attempts": [ENDED | {"reason": "Unknown"}, RUNS]},
    ),
    "all of it": ({"conditions": "none"}, {}),
}


@pytest.mark.parametrize(("given", "understood"), UNKNOWN.values(), ids=UNKNOWN)
def test_only_what_is_unknown_is_left_out(given: dict[str, Any], understood: dict[str, Any]) -> None:
    assert read_status(given) == FineTuneJobStatus.model_validate(understood, by_alias=True, by_name=False)


def test_what_is_no_status_says_nothing() -> None:
    assert read_status("none") == FineTuneJobStatus()  # type: ignore[arg-type]
