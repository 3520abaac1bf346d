"""``finetune plan``: what a job will train and how much memory that takes, from the model's config alone."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from finetune_api.job import FineTuneJob
from finetune_api.report import ExitCode
from finetune_api.resolve import resolve
from finetune_api.spec import evaluates_only
from finetune_api.status import PlanStatus
from finetune_cli.library_output import diverted_to
from finetune_cli.manifest import read_job
from finetune_cli.preparation import preparation_named
from finetune_cli.wording import aligned

_TERMS = {
    "weights": "the whole model",
    "gradients": "of what is trained",
    "optimiser": "two moments of it, and under deepspeed its weights in float32",
    "activations": "kept for the backward pass",
    "logits": "scores of the vocabulary, and their gradient",
    "exchanged": "between workers: gradients at a time, gathered weights",
    "copies": "weights that regularization and early stopping keep",
}

_NOT_OF_ALL = ("exchanged", "copies")


def plan(file: Path, gpu_memory: str | None, output: str) -> ExitCode:
    """Print parameters, memory of one worker by term, and warnings.

    Args:
        file: the job.
        gpu_memory: of one GPU, as a Kubernetes quantity, instead of the job's; what does not fit is warned of.
        output: ``text`` or ``json``.

    Raises:
        InvalidJobError: the file holds no valid job.
        FineTuneError: the model cannot be read, or the job does not fit it.
    """
    job = _with_gpus(resolve(read_job(file)), gpu_memory)
    with (
        tempfile.TemporaryDirectory(prefix="finetune-plan-") as scratch,
        diverted_to(Path(scratch)),
        preparation_named(job, file),
    ):
        from finetune_trainer.plan import plan_from_config

        found = plan_from_config(job, Path(scratch))
    if output == "json":
        sys.stdout.write(found.model_dump_json(by_alias=True, exclude_none=True) + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines(job, found))
    return ExitCode.OK


def _with_gpus(job: FineTuneJob, gpu_memory: str | None) -> FineTuneJob:
    """Return ``job`` with the GPUs that it is planned for: who names the memory of one means one, whatever is here."""
    compute = job.spec.compute
    memory = gpu_memory or compute.gpu_memory
    if memory is None or (gpu_memory is None and compute.gpus_per_worker == 0):
        return job
    asked = {"gpu_memory": memory, "gpus_per_worker": compute.gpus_per_worker or 1}
    spec = job.spec.model_copy(update={"compute": compute.model_copy(update=asked)})
    return job.model_copy(update={"spec": spec})


def lines(job: FineTuneJob, found: PlanStatus) -> list[str]:
    """Return the plan in words."""
    if evaluates_only(job.spec.training):
        return [
            f"{job.metadata.name}: nothing is trained (spec.training.epochs: 0), so no memory of training is planned. "
            f"Evaluation loads the base, {found.parameters:,} parameters, and what was published of it.",
            *(f"warning: {warning}" for warning in found.warnings),
        ]
    where = f"{found.gpus} GPU{'s' if found.gpus != 1 else ''}, each" if found.gpus else "CPU, each worker"
    table: list[tuple[str, ...]] = []
    if found.memory is not None and found.memory_bytes_per_gpu is not None:
        terms = found.memory.model_dump()
        table = [
            (name, meaning, _mebibytes(terms[name]))
            for name, meaning in _TERMS.items()
            if terms[name] or name not in _NOT_OF_ALL
        ]
        table.append(("in all", where, _mebibytes(found.memory_bytes_per_gpu)))
    return [
        f"{job.metadata.name}: {job.spec.method.type.value} trains {found.trainable_parameters:,} of "
        f"{found.parameters:,} parameters ({found.trainable_percent} %), {found.micro_batch_size} rows at a time",
        "",
        *(aligned(table) if table else ()),
        *_gpus_needed(job, found),
        "",
        *(f"warning: {warning}" for warning in found.warnings),
        "For the longest rows that the job allows, all their tokens learnt. The check stage plans with the real ones.",
    ]


def _gpus_needed(job: FineTuneJob, found: PlanStatus) -> Iterator[str]:
    if found.gpus_needed is not None:
        plural = "s" if found.gpus_needed > 1 else ""
        yield (
            f"{found.gpus_needed} GPU{plural} of {job.spec.compute.gpu_memory} needed for the job as it is set up, "
            f"{found.gpus} asked for"
        )


def _mebibytes(size: int) -> str:
    return f"{size / 1024**2:,.1f} MiB"
