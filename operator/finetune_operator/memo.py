"""What is remembered of one job and no watch tells. Losing it costs requests, never a wrong step."""

from dataclasses import dataclass, field
from datetime import datetime

from finetune_api.job import FineTuneJob


@dataclass(slots=True)
class Memo:
    """Of one FineTuneJob, by its UID."""

    uid: str
    resolved: FineTuneJob | None = None
    """Content of the pinned ConfigMap; absent while it has not been read."""
    trust_hash: str | None = None
    trust_is_known: bool = False
    """Whether ``trust_hash`` is what the cluster holds: no trust ConfigMap has no hash either."""
    taken: dict[str, datetime] = field(default_factory=dict)
    """Names that somebody else holds, and since when that is known."""
    refused: dict[str, str] = field(default_factory=dict)
    """Names that could not be created, and what the API server said."""
