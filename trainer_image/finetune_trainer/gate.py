"""Whether the numbers let a model be published: each gate of the job against one measured difference. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from finetune_api.report import EvaluationReport, GateResult
from finetune_api.spec import GateSpec, PublishOn
from finetune_trainer.statistics import FEW_ROWS, Difference, rows_needed
from finetune_trainer.verdict import why_worse


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure of one task, of both models."""

    base: float
    tuned: float
    difference: Difference
    """Tuned minus base."""
    rows: int
    higher_is_better: bool
    groups: int | None = None
    """Of rows that are alike and were drawn together; absent where every row stands for itself."""


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """One figure that the rows were not enough for."""

    why: str


def judge_gates(gates: Sequence[GateSpec], measured: Mapping[str, Measurement | Unmeasured]) -> tuple[GateResult, ...]:
    """Return a verdict for every gate; ``measured`` is keyed by ``<task>.<figure>`` and has all that gates name."""
    return tuple(_judge(gate, measured[gate.metric]) for gate in gates)


def why_kept_back(publish_on: PublishOn, asked: Sequence[GateSpec], evaluation: EvaluationReport) -> str:
    """Return in a sentence why the model is not published; nothing when it is.

    Args:
        publish_on: what the job says.
        asked: the job's gates; where there are none, the verdict decides, and general ability where it is looked after.
        evaluation: all that was measured, with a result for each gate.
    """
    match publish_on:
        case PublishOn.ALWAYS:
            return ""
        case PublishOn.NEVER:
            return "spec.output.publishOn is never"
        case PublishOn.GATES:
            return _gates_missed(evaluation.gates) or ("" if asked else _worse(evaluation))
        case _:
            assert_never(publish_on)


def _gates_missed(gates: Sequence[GateResult]) -> str:
    failed = [gate for gate in gates if not gate.passed]
    if len(failed) == 1:
        return f"the gate on {failed[0].metric} did not pass: {failed[0].why}"
    if failed:
        return f"{len(failed)} of {len(gates)} gates did not pass: {', '.join(gate.metric for gate in failed)}"
    return ""


def _worse(evaluation: EvaluationReport) -> str:
    why = why_worse(evaluation)
    return f"{why}; spec.output.publishOn: always publishes it anyway" if why else ""


def _judge(gate: GateSpec, found: Measurement | Unmeasured) -> GateResult:
    if isinstance(found, Unmeasured):
        return GateResult(metric=gate.metric, passed=False, why=f"{gate.metric} is not measured: {found.why}"[:512])
    reasons = [*_bounds_broken(gate, found), *_gain_missed(gate, found)]
    if reasons:
        return GateResult(metric=gate.metric, passed=False, why="; ".join(reasons)[:512])
    return GateResult(metric=gate.metric, passed=True, why=_met(gate, found))


def _bounds_broken(gate: GateSpec, found: Measurement) -> list[str]:
    reasons = []
    if gate.min is not None and not found.tuned >= gate.min:
        reasons.append(f"{gate.metric} is {found.tuned:.4g}, below the least allowed {gate.min:g}")
    if gate.max is not None and not found.tuned <= gate.max:
        reasons.append(f"{gate.metric} is {found.tuned:.4g}, above the most allowed {gate.max:g}")
    return reasons


def _gain_missed(gate: GateSpec, found: Measurement) -> list[str]:
    required = gate.required_delta
    if required is None:
        return []
    if (found.groups or found.rows) < FEW_ROWS:
        what = "test rows" if found.groups is None else "groups of test rows"
        return [f"{found.groups or found.rows} {what} decide nothing; at least {FEW_ROWS} are needed"]
    bound = _proven_gain(gate, found)
    if bound > required:
        return []
    return [
        f"the gain in {gate.metric} is {_gain(found):+.4g}, of which {bound:+.4g} is certain with "
        f"{gate.confidence:.0%} confidence; more than {required:+g} is asked for{_advice(gate, found, required)}"
    ]


def _met(gate: GateSpec, found: Measurement) -> str:
    if gate.required_delta is None:
        return f"{gate.metric} is {found.tuned:.4g}"
    return (
        f"the gain in {gate.metric} is {_gain(found):+.4g}, at least {_proven_gain(gate, found):+.4g} with "
        f"{gate.confidence:.0%} confidence"
    )


def _gain(found: Measurement) -> float:
    return found.difference.measured if found.higher_is_better else -found.difference.measured


def _proven_gain(gate: GateSpec, found: Measurement) -> float:
    """Return what the gain exceeds with the gate's confidence."""
    if found.higher_is_better:
        return found.difference.lower_bound(gate.confidence)
    return -found.difference.upper_bound(gate.confidence)


def _advice(gate: GateSpec, found: Measurement, required: float) -> str:
    sign = 1 if found.higher_is_better else -1
    towards_better = Difference(sign * found.difference.measured, sign * found.difference.drawn)
    needed = rows_needed(towards_better, found.rows, required, gate.confidence)
    return f"; if the gain is real, about {needed:,} test rows would show it" if needed else ""
