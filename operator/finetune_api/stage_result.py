"""How one stage ended, in at most 4096 bytes: what the kubelet keeps of a pod's last words.

Built from the classes of the status, so that the operator copies it there as it is.
"""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from finetune_api.model import ApiModel
from finetune_api.report import CONTRACT_VERSION, ExitCode, Stage
from finetune_api.status import (
    LONGEST_MESSAGE,
    Checkpoint,
    Count,
    DataStatus,
    EvaluationStatus,
    MetricValue,
    PlanStatus,
    PublishedArtifact,
    Sha256,
    Summary,
    Text,
)

# The kubelet truncates termination messages beyond this.
MOST_BYTES = 4096
_SHORT = 32
"""Characters that are left of words on the rows where there is no room for all."""


class StageResult(ApiModel):
    """What a stage leaves behind, also when it failed."""

    contract_version: int = CONTRACT_VERSION
    """Of the trainer that wrote it."""
    stage: Stage
    """Which one ended."""
    exit_code: ExitCode
    """Of the process."""
    message: Annotated[str, Field(max_length=LONGEST_MESSAGE)] = ""
    """What the user is told: why the stage failed, or what else they may care about; empty when all went well."""
    resumed_from_step: Count | None = None
    """Step that training went on from: a checkpoint's, or the last one where it was done already."""
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rows of a forward pass that did not fit into memory, or was cut off with its worker."""
    checkpoints: Annotated[tuple[Checkpoint, ...], Field(max_length=5)] = ()
    """The newest five complete ones, newest first."""
    latest_metrics: Annotated[tuple[MetricValue, ...], Field(max_length=32)] = ()
    """Of training: steps, losses, speed."""
    data: DataStatus | None = None
    """What the rows looked like."""
    plan: PlanStatus | None = None
    """What the check stage expects of the run."""
    evaluation: EvaluationStatus | None = None
    """The base model against the tuned one."""
    artifacts: Annotated[tuple[PublishedArtifact, ...], Field(max_length=8)] = ()
    """What was published."""
    summary: Summary | None = None
    """Metric and delta for the columns of ``kubectl get``, and the verdict in a sentence."""
    model_revision: Annotated[str, Field(max_length=128)] | None = None
    """Commit of the base model, or sha256 over its files."""
    report_sha256: Sha256 | None = None
    """Of the published report's MANIFEST.json."""
    published: bool | None = None
    """Whether the model was published; absent before that is decided."""
    why_not_published: Text = ""
    """Why the model was kept back, in a sentence."""


def bounded(result: StageResult, most_bytes: int = MOST_BYTES) -> bytes:
    """Return ``result`` as JSON of at most ``most_bytes``; what matters least is left out first.

    Args:
        result: as complete as its writer can make it.
        most_bytes: at least 512, so that there is room for the stage, the exit code and a sentence.
    """
    content = _to_json(result)
    for shorten in _SHORTENINGS:
        while len(content) > most_bytes and (shorter := shorten(result)) != result:
            result, content = shorter, _to_json(shorter)
    return content


def _to_json(result: StageResult) -> bytes:
    return result.model_dump_json(by_alias=True, exclude_none=True).encode()


_Shortening = Callable[[StageResult], StageResult]
"""Returns a result with less in it, or an equal one when there is nothing left to leave out."""


def _evaluation_list(name: str, keep: int = 0) -> _Shortening:
    def shorten(result: StageResult) -> StageResult:
        if result.evaluation is None:
            return result
        items = getattr(result.evaluation, name)
        fewer = items[: max(keep, len(items) // 2)]
        return result.model_copy(update={"evaluation": result.evaluation.model_copy(update={name: fewer})})

    return shorten


def _shorter_data(shorten: Callable[[DataStatus], dict[str, object]]) -> _Shortening:
    """Return a shortening that puts what ``shorten`` returns in the place of fields of the data."""

    def shorter(result: StageResult) -> StageResult:
        data = result.data
        return result.model_copy(update={"data": data and data.model_copy(update=shorten(data))})

    return shorter


def _fewer_tasks(data: DataStatus) -> dict[str, object]:
    return {"tasks": data.tasks[: len(data.tasks) // 2]}


def _shorter_words(data: DataStatus) -> dict[str, object]:
    told = data.rehearsal
    rehearsal = told and told.model_copy(update={"why_not": told.why_not[:_SHORT]})
    return {"layout": data.layout[:_SHORT], "rehearsal": rehearsal}


def _no_overlaps(data: DataStatus) -> dict[str, object]:
    return {"overlaps": ()}


def _without_reasons(result: StageResult) -> StageResult:
    if result.evaluation is None:
        return result
    gates = tuple(gate.model_copy(update={"why": ""}) for gate in result.evaluation.gates)
    return result.model_copy(update={"evaluation": result.evaluation.model_copy(update={"gates": gates})})


def _without_warnings(result: StageResult) -> StageResult:
    plan = result.plan and result.plan.model_copy(update={"warnings": ()})
    return result.model_copy(update={"plan": plan})


def _newest_checkpoint(result: StageResult) -> StageResult:
    return result.model_copy(update={"checkpoints": result.checkpoints[:1]})


def _cleared(name: str) -> _Shortening:
    empty = StageResult.model_fields[name].default
    return lambda result: result.model_copy(update={name: empty})


def _shorter_message(result: StageResult) -> StageResult:
    return result.model_copy(update={"message": result.message[: len(result.message) * 3 // 4]})


_SHORTENINGS: tuple[_Shortening, ...] = (
    _newest_checkpoint,
    _evaluation_list("benchmarks"),
    _evaluation_list("forgetting"),
    _shorter_data(_fewer_tasks),
    _shorter_data(_shorter_words),
    _without_warnings,
    _shorter_data(_no_overlaps),
    _cleared("latest_metrics"),
    _evaluation_list("tasks", keep=8),
    _without_reasons,
    _evaluation_list("gates", keep=8),
    _evaluation_list("tasks"),
    _evaluation_list("gates"),
    _cleared("checkpoints"),
    _cleared("artifacts"),
    _cleared("plan"),
    _cleared("summary"),
    _shorter_message,
    _cleared("why_not_published"),
)
"""Least important first."""
