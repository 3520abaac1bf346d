"""What a trainer posts to the operator while it runs.

The body that ``KubeflowCallback`` of Transformers posts, ``{"trainerStatus": {…}}``, so that any image with it reports
without a line of code; what only our trainer knows stands beside it. Unknown fields are skipped: others may add some.
"""

import math
from datetime import datetime
from typing import Annotated

from pydantic import AwareDatetime, ConfigDict, Field

from finetune_api.model import ApiModel
from finetune_api.plain_text import one_line
from finetune_api.report import Progress, Stage
from finetune_api.status import Count, figure

MOST_BYTES = 64 * 1024
"""Size of a body that is accepted: progress and results alike."""

LONGEST_MESSAGE = 256
"""Characters of what is being done; the rest is not shown."""

MOST = 2**53
"""Larger numbers do not survive JSON."""

Finite = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]

MEASURED = ("loss", "validation_loss", "learning_rate", "rows_per_second", "tokens_per_second")
"""Fields of Progress that are posted as metrics: as text, because JSON has no NaN."""


class PostedMetric(ApiModel):
    """A measured value."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(min_length=1, max_length=64)]
    """``loss``."""
    value: Annotated[str, Field(max_length=64)]
    """As text; what is no number is skipped."""


class TrainerStatus(ApiModel):
    """One moment of a running stage. The first four fields are KubeflowCallback's."""

    model_config = ConfigDict(extra="ignore")

    progress_percentage: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    """Of the stage."""
    estimated_remaining_seconds: Finite | None = None
    """Time to the end of the stage."""
    metrics: Annotated[tuple[PostedMetric, ...], Field(max_length=256)] = ()
    """What was measured; ``current_step``, ``total_steps`` and ``current_epoch`` are KubeflowCallback's words."""
    last_updated_time: AwareDatetime | None = None
    """When this was so, by the trainer's clock."""
    stage: Stage | None = None
    """The stage, where it is not the one of the address: publishing is a part of evaluation."""
    message: str = ""
    """What is being done."""
    step: Count | None = None
    """Optimiser steps done."""
    total_steps: Count | None = None
    """Optimiser steps in all."""
    epoch: Finite | None = None
    """Passes over the training rows."""


class ProgressMessage(ApiModel):
    """The body."""

    model_config = ConfigDict(extra="ignore")

    trainer_status: TrainerStatus = TrainerStatus()
    """One moment."""


def message_of(progress: Progress, now: datetime) -> ProgressMessage:
    """Return what to post about ``progress``, which was so at ``now``."""
    values = {name: getattr(progress, name) for name in MEASURED}
    return ProgressMessage(
        trainer_status=TrainerStatus(
            progress_percentage=_within(progress.percent, 100),
            estimated_remaining_seconds=_within(progress.eta_seconds, MOST),
            metrics=tuple(
                PostedMetric(name=name, value=figure(value)) for name, value in values.items() if value is not None
            ),
            last_updated_time=now,
            stage=progress.stage,
            message=one_line(progress.message)[:LONGEST_MESSAGE],
            step=progress.step,
            total_steps=progress.total_steps,
            epoch=_within(progress.epoch, MOST),
        )
    )


def _within(value: float | None, most: float) -> float | None:
    return None if value is None or not math.isfinite(value) else min(max(value, 0.0), most)
