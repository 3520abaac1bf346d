"""Which rows and which base model a run began with, so that it does not go on with others unnoticed."""

from finetune_api.model import ApiModel


class Inputs(ApiModel):
    """What decides the result besides the spec."""

    rows: str
    """`Dataset.hash`."""
    model: str
    """`ModelFiles.revision`."""


def describe_change(before: Inputs, now: Inputs) -> str:
    """Say what is not as it was; empty when all is."""
    changes = [
        f"{what} changed ({old[:12]}… then, {new[:12]}… now)"
        for what, old, new in (
            ("the rows of spec.data.tasks", before.rows, now.rows),
            ("the base model in spec.model.source", before.model, now.model),
        )
        if old != new
    ]
    return " and ".join(changes)
