"""What is remembered of one job and no watch tells. Losing it costs requests, never a wrong step."""

from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Taken:
    """A name that somebody else holds."""

    kind: str
    told_from: datetime
    """Until then it may come free by itself."""


@dataclass(slots=True)
class Memo:
    """Of one FineTuneJob, by its UID."""

    uid: str
    pinned: str | None = None
    """Content of the pinned ConfigMap, as text: as objects it takes ten times the memory, and is made of it quickly.
    Absent while it has not been read."""
    trust_hash: str | None = None
    trust_is_known: bool = False
    """Whether ``trust_hash`` is what the cluster holds: no trust ConfigMap has no hash either."""
    taken: dict[str, Taken] = field(default_factory=dict)
    """Names of children that somebody else holds."""
    refused: dict[str, str] = field(default_factory=dict)
    """Names that could not be created, and what the API server said."""
