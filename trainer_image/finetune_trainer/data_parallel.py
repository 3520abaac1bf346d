"""What torch's data parallelism has to be told: by transformers' arguments alone it keeps every gradient twice."""

from dataclasses import dataclass

from accelerate.utils import DistributedDataParallelKwargs

from finetune_api.spec import RegularizationSpec, RegularizationType

BUCKET_BYTES = 25 * 2**20
"""From how many bytes on a bucket of gradients is full: torch's default. A larger parameter has one to itself."""

_PULL_ON_WEIGHTS = (RegularizationType.L2SP, RegularizationType.EWC)


@dataclass
class DataParallelism(DistributedDataParallelKwargs):  # type: ignore[misc] # accelerate is untyped
    """Arguments of `torch.nn.parallel.DistributedDataParallel`; Accelerate passes on those that are no default."""

    lazy_bucket_allocation: bool = False
    """Accelerate does not know it yet."""


def data_parallelism(regularization: RegularizationSpec | None) -> DataParallelism:
    """Return how workers exchange gradients, by the resolved ``spec.method.regularization``."""
    return DataParallelism(
        # Gradients are what lies in the buckets that travel, and a bucket is made when its first gradient is there.
        # Made before, it would stand empty beside the gradients of a step's earlier micro-batches.
        gradient_as_bucket_view=True,
        lazy_bucket_allocation=True,
        # Text leaves out what a model sees with, and what corrects its choice of experts never has a gradient. Torch
        # finds that out from the model's outputs; a pull on weights reaches all of them, and not by these.
        find_unused_parameters=regularization is None or regularization.type not in _PULL_ON_WEIGHTS,
    )
