"""What the planner wants done, as data. Executed in order, stopping at the first failure."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from finetune_api.status import FineTuneJobStatus, Reason

Manifest = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ref:
    """One object, and which one of that name is meant."""

    kind: str
    """Job, RayJob or ConfigMap."""
    namespace: str
    name: str
    uid: str
    """Empty for a ConfigMap, of which only one that the job controls is meant."""


@dataclass(frozen=True, slots=True)
class Create:
    """Create a child. It may be there already: then its owner decides whether that is right."""

    manifest: Manifest
    why: str


@dataclass(frozen=True, slots=True)
class Replace:
    """Write the whole content of a ConfigMap that may change while the job runs, creating it when it is not there."""

    manifest: Manifest
    why: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete exactly this object; pods get their grace period. Nothing happens when it is gone."""

    ref: Ref
    why: str


@dataclass(frozen=True, slots=True)
class RecordStatus:
    """Write everything but progress; refused by the API server when the job has changed meanwhile."""

    status: FineTuneJobStatus
    why: str


class EventType(StrEnum):
    """As in Kubernetes."""

    NORMAL = "Normal"
    WARNING = "Warning"


@dataclass(frozen=True, slots=True)
class Emit:
    """Tell people by a Kubernetes event."""

    type: EventType
    reason: Reason
    message: str


Action = Create | Replace | Delete | RecordStatus | Emit


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, and when to look again although nothing has happened."""

    actions: tuple[Action, ...] = ()
    wake_at: datetime | None = None
    pinned: str | None = None
    """What the ConfigMap that pins the job holds once the actions are done; need not be read again."""
