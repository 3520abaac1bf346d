"""Whether a job got through a chaos run as it should have. Pure: what was seen goes in, complaints come out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from finetune_api.report import Stage
from finetune_api.status import Attempt, ConditionType, FineTuneJobStatus, Phase, Reason

from .fault import Fate, PlannedJob
from .faulty_store import Write

ENDS = {Fate.PUBLISHED: Phase.SUCCEEDED, Fate.KEPT_BACK: Phase.SUCCEEDED, Fate.BAD_DATA: Phase.FAILED}
MARKER = "COMPLETE"
CHECKPOINT = re.compile(r"checkpoints/step-(\d+)/COMPLETE$")


@dataclass(frozen=True, slots=True)
class Story:
    """All that is known of one job in the end."""

    planned: PlannedJob
    phases: tuple[Phase, ...]
    """As they were seen, one after the other."""
    status: FineTuneJobStatus | None
    """None when the object is gone."""
    children: tuple[str, ...]
    """Names of its Jobs that are still there."""
    active_pods: tuple[str, ...]
    """Names of its pods that have not ended."""
    writes: tuple[Write, ...]
    """To its folder of the store, with keys below that folder."""
    reached: Mapping[int, int]
    """The last step that the status told of, by attempt at training."""
    steps_wanted: int
    steps_reported: int | None = None
    """By the published report."""


def complaints(story: Story) -> list[str]:
    """Return everything that is wrong with how a job went, in sentences."""
    return [f"{story.planned.name}: {one}" for one in _complaints(story)]


def _complaints(story: Story) -> Iterator[str]:
    if story.active_pods:
        yield f"pods run on: {', '.join(story.active_pods)}"
    if story.planned.fate is Fate.WITHDRAWN:
        if story.status is not None:
            yield "it is still there"
        if story.children:
            yield f"it left {', '.join(story.children)}"
    elif story.status is None:
        yield "it is gone"
    else:
        yield from _of_end(story, story.status)
        yield from _of_children(story, story.status)
        yield from _of_resumption(story, story.status)
    yield from _of_publication(story)
    yield from _of_checkpoints(story)


def _of_end(story: Story, status: FineTuneJobStatus) -> Iterator[str]:
    ends = [phase for phase in story.phases if phase.is_terminal]
    if ends != [ENDS[story.planned.fate]]:
        yield f"ended {[phase.value for phase in ends]} and should have ended {ENDS[story.planned.fate].value} once"
    if story.phases[-1:] != tuple(ends[-1:]):
        yield f"went on to {story.phases[-1].value} behind its end"
    reasons = {one.type: one.reason for one in status.conditions}
    kind, reason = {
        Fate.PUBLISHED: (ConditionType.PUBLISHED, Reason.PUBLISHED),
        Fate.KEPT_BACK: (ConditionType.PUBLISHED, Reason.GATES_NOT_PASSED),
        Fate.BAD_DATA: (ConditionType.FAILED, Reason.BAD_DATA),
    }[story.planned.fate]
    if reasons.get(kind) is not reason:
        yield f"{kind.value} has reason {reasons.get(kind)} and should have {reason.value}"
    if story.planned.fate is not Fate.BAD_DATA and story.steps_reported != story.steps_wanted:
        yield f"its report tells of {story.steps_reported} steps, not {story.steps_wanted}"


def _of_children(story: Story, status: FineTuneJobStatus) -> Iterator[str]:
    known = {attempt.child for attempt in status.attempts}
    if strangers := sorted(set(story.children) - known):
        yield f"no attempt knows {', '.join(strangers)}"
    for stage in Stage:
        numbers = [attempt.number for attempt in status.attempts if attempt.stage is stage]
        # The oldest of many are not kept.
        if numbers != list(range(numbers[0], numbers[0] + len(numbers)) if numbers else ()):
            yield f"attempts at {stage.value} are numbered {numbers}"
        ends = [one for one in status.attempts if one.stage is stage and one.reason is Reason.STAGE_SUCCEEDED]
        if len(ends) > 1:
            yield f"{stage.value} succeeded {len(ends)} times"


def _of_publication(story: Story) -> Iterator[str]:
    for folder in ("model", "report"):
        times = len(_done(story, f"{folder}/{MARKER}"))
        is_due = story.planned.fate is Fate.PUBLISHED or (story.planned.fate is Fate.KEPT_BACK and folder == "report")
        if times != is_due:
            yield f"{folder} was completed {times} times, and {int(is_due)} was due"


def _done(story: Story, key: str) -> list[Write]:
    return [one for one in story.writes if (one.method, one.key) == ("PUT", key) and one.is_done]


def _of_checkpoints(story: Story) -> Iterator[str]:
    steps = [step for _, step in stored_checkpoints(story.writes)]
    if steps != sorted(set(steps)):
        yield f"checkpoints were stored in the order {steps}: steps were done again"


def stored_checkpoints(writes: Sequence[Write]) -> list[tuple[float, int]]:
    """Return when checkpoints became complete, and their steps."""
    done = ((one, CHECKPOINT.fullmatch(one.key)) for one in writes if one.method == "PUT" and one.is_done)
    return [(one.at, int(found[1])) for one, found in done if found]


def _of_resumption(story: Story, status: FineTuneJobStatus) -> Iterator[str]:
    for attempt in resumable(status):
        assert attempt.start_time is not None
        # Whole seconds: a checkpoint of the very second may have come too late.
        before = [step for at, step in stored_checkpoints(story.writes) if at < attempt.start_time.timestamp()]
        newest = max(before, default=0)
        if (attempt.resumed_from_step or 0) < newest:
            yield f"attempt {attempt.number} went on from step {attempt.resumed_from_step}, and {newest} was stored"


def resumable(status: FineTuneJobStatus) -> list[Attempt]:
    """Return the later attempts at training of which it is known where they began: they have ended by themselves."""
    return [
        one
        for one in status.attempts
        if one.stage is Stage.TRAIN and one.number > 1 and one.start_time is not None and one.exit_code is not None
        if one.resumed_from_step is not None or one.reason is Reason.STAGE_SUCCEEDED
    ]


def steps_done_again(story: Story) -> int:
    """Return how many steps were done twice, as far as the status told of them."""
    if story.status is None:
        return 0
    return sum(
        max(0, story.reached.get(one.number - 1, 0) - (one.resumed_from_step or 0)) for one in resumable(story.status)
    )
