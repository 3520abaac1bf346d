"""Which rows and which base model a run began with, so that it does not go on with others unnoticed."""

from finetune_api.model import ApiModel
from finetune_api.report import Ancestor


class Inputs(ApiModel):
    """What decides the result besides the spec."""

    rows: str
    """`Dataset.hash`."""
    model: str
    """`ModelFiles.revision`."""
    lineage: tuple[Ancestor, ...] = ()
    """`PublishedModel.lineage`; empty where training begins with the base."""

    @property
    def start(self) -> str:
        """The sha256 of the artifact that training goes on from; empty where it begins with the base."""
        return self.lineage[0].sha256 if self.lineage else ""


def describe_change(before: Inputs, now: Inputs) -> str:
    """Say what is not as it was; empty when all is."""
    changes = [
        f"{what} changed ({old[:12]}… then, {new[:12]}… now)"
        for what, old, new in (
            ("the rows of spec.data.tasks", before.rows, now.rows),
            ("the base model in spec.model.source", before.model, now.model),
            ("what spec.model.startFrom names", before.start, now.start),
        )
        if old != new
    ]
    return " and ".join(changes)
