"""What a chaos run does to which jobs, and in which order. Pure: a seed is a schedule, the same one everywhere."""

import random
from dataclasses import dataclass
from enum import StrEnum

JOBS_PER_ROUND = 5


class FaultKind(StrEnum):
    """What goes wrong; a round has each of them once."""

    OPERATOR_KILLED = "operator killed"
    API_SERVER_KILLED = "API server killed"
    POD_DELETED = "pod deleted"
    NODE_REBOOTED = "node rebooted"
    STORE_REFUSES = "store refuses"
    STORE_IS_SLOW = "store is slow"
    STORE_CUTS = "store cuts connections"
    JOB_WITHDRAWN = "job withdrawn"
    """No fault, but the same surprise: its user deletes a job while it trains."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    kind: FaultKind
    after_steps: int
    """Steps that all jobs together must have done since the fault before: a slow machine meets the same run."""
    seconds: float
    """How long the node or the store is as it should not be."""
    aim: float
    """Which of what can be hit, in the order of names: 0 is the first, just below 1 the last."""
    is_gentle: bool
    """Whether a deleted pod is told, and has time to save."""


class Fate(StrEnum):
    """How a job has to end, whatever happens meanwhile."""

    PUBLISHED = "published"
    BAD_DATA = "bad-data"
    KEPT_BACK = "kept-back"
    """By a gate: its report is published, its model is not."""
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One job of a run."""

    name: str
    fate: Fate


@dataclass(frozen=True, slots=True)
class Schedule:
    """A whole run."""

    seed: int
    jobs: tuple[PlannedJob, ...]
    faults: tuple[Fault, ...]


def schedule(seed: int, jobs: int) -> Schedule:
    """Return the run of ``seed`` with ``jobs`` jobs: a round of all faults for every five of them."""
    rng = random.Random(seed)
    rounds = max(1, jobs // JOBS_PER_ROUND)
    fates = [fate for _ in range(rounds) for fate in (Fate.WITHDRAWN, Fate.BAD_DATA, Fate.KEPT_BACK)][:jobs]
    fates += [Fate.PUBLISHED] * (jobs - len(fates))
    rng.shuffle(fates)
    planned = tuple(PlannedJob(f"job-{number:02}-{fate.value}", fate) for number, fate in enumerate(fates, start=1))
    return Schedule(seed, planned, tuple(fault for _ in range(rounds) for fault in _round(rng)))


def _round(rng: random.Random) -> list[Fault]:
    kinds = rng.sample(list(FaultKind), k=len(FaultKind))
    return [
        Fault(
            kind,
            after_steps=rng.randint(2, 12),
            seconds=round(rng.uniform(3, 10), 1),
            aim=rng.random(),
            is_gentle=rng.random() < 0.5,
        )
        for kind in kinds
    ]
