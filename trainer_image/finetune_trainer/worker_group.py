"""The program's side of training on several workers: find places for them with Ray, hear them, end as they did.

Ray tries nothing but a start again: attempts are the operator's. Nothing of Ray's own checkpoints is used.
"""

import contextlib
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

# What ray.train has under that name; type checkers see an older one there.
from ray.train.v2.api.config import FailureConfig
from torch import distributed

from finetune_api.report import Progress, TrainingReport
from finetune_api.spec import ComputeSpec
from finetune_api.spec.compute import gpus, processes, zero_stage
from finetune_trainer.desk import Letter, Stored, open_desk
from finetune_trainer.errors import FineTuneError, OutOfMemoryError, SpecError, WorkerLostError
from finetune_trainer.progress import Sink
from finetune_trainer.settings_map import plan_steps
from finetune_trainer.training_input import Flag
from finetune_trainer.worker import Assignment, work

_PAUSE_SECONDS = 0.25
"""Between two looks at the desk; the sink wants a few reports a second at most."""

MOST_STARTS = 10
"""Of the workers' processes, each a minute at most: a pod that is lost in the meantime comes back, or does not."""


def train_on_workers(
    assignment: Assignment, sink: Sink, stop: Flag, on_stored: Callable[[int, int], None]
) -> TrainingReport:
    """Train on as many workers as the spec asks for; raises what `finetune_trainer.train.train` raises.

    Args:
        assignment: for all workers.
        sink: hears the first worker.
        stop: asks all of them to save and end.
        on_stored: told the step of a checkpoint of which every node has stored its part, and the number of nodes.

    Raises:
        WorkerLostError: a worker or its node is gone.
    """
    compute = assignment.job.spec.compute
    with _ray(compute):
        desk = open_desk()
        parcel = {"assignment": ray.put(assignment), "desk": desk}
        trainer = TorchTrainer(
            work,
            train_loop_config=parcel,
            scaling_config=_places(compute, spread=assignment.prefix is not None),
            run_config=ray.train.RunConfig(
                # A name that was used before would make Ray go on from its own records.
                name=uuid.uuid4().hex,
                storage_path=str(assignment.workspace.root / "ray"),
                failure_config=FailureConfig(
                    max_failures=0, max_preemption_failures=0, controller_failure_limit=MOST_STARTS - 1
                ),
            ),
        )
        # On a thread, where it leaves the signals alone.
        with ThreadPoolExecutor(1, "ray-train") as pool:
            training = pool.submit(trainer.fit)
            _listen(training, desk, sink, stop, on_stored)
        return _outcome(ray.get(desk.outcome.remote()), training.exception(), assignment)


def _listen(training: Future[Any], desk: Any, sink: Sink, stop: Flag, on_stored: Callable[[int, int], None]) -> None:
    """Pass on what workers say until training ends."""
    parts: dict[int, set[int]] = {}
    over = False
    while not over:
        over = bool(wait([training], _PAUSE_SECONDS).done)
        letters: list[Letter] = ray.get(desk.collect.remote(stop.is_set()))
        for letter in letters:
            match letter:
                case Progress():
                    sink.report(letter)
                case Stored(step, node, nodes):
                    parts.setdefault(step, set()).add(node)
                    if len(parts[step]) == nodes:
                        on_stored(step, nodes)


def _micro_batch(assignment: Assignment) -> int:
    """Return how many rows a worker takes at a time, which one that was killed could not tell."""
    spec, longest = assignment.job.spec, max(len(row.ids) for row in assignment.train)
    rows = assignment.mixture.epoch_length
    return plan_steps(spec.training, rows, longest, processes(spec.compute), zero_stage(spec.compute)).micro_batch


def _outcome(
    said: TrainingReport | FineTuneError | None, error: BaseException | None, assignment: Assignment
) -> TrainingReport:
    """Return the report, or raise what ended training: the workers' own word before Ray's."""
    if isinstance(said, FineTuneError):
        raise said
    if error is not None:
        raise _named(error, _micro_batch(assignment)) from error
    assert said is not None, "a worker that ends has said how"
    return said


def _named(error: BaseException, micro_batch: int) -> BaseException:
    """Return a lost worker's error by its name; a defect as it is."""
    if _tells_of_no_start(error):
        return WorkerLostError(
            f"the workers did not start in {MOST_STARTS} tries: one of their pods or nodes is gone or is too slow. "
            "Running again asks for new ones; look at the events of the pods, and raise spec.compute.resources.memory "
            "if one was killed for using more than its limit.",
            micro_batch,
        )
    failures = list(error.worker_failures.values()) if isinstance(error, ray.train.WorkerGroupError) else []
    if any(isinstance(_found_by_ray(failure), ray.exceptions.OutOfMemoryError) for failure in failures):
        return OutOfMemoryError(
            "the memory of a worker's node or pod was nearly used up, so Ray ended the worker; raise "
            "spec.compute.resources.memory, or lower spec.training.microBatchSize or spec.data.maxLength.",
            micro_batch,
        )
    is_preempted = isinstance(error, ray.train.PreemptionError)
    if (
        is_preempted
        or any(map(_tells_of_a_dead_worker, failures))
        or (failures and all(map(_tells_of_a_lost_peer, failures)))
    ):
        return WorkerLostError(
            "a worker is gone: its process or its node died, or was killed for using more memory than its limit. "
            "Running again goes on from the last complete checkpoint; raise spec.compute.resources.memory if it "
            "happens again.",
            micro_batch,
        )
    return error


def _tells_of_no_start(error: BaseException) -> bool:
    cause = error.controller_failure if isinstance(error, ray.train.ControllerError) else None
    return isinstance(cause, (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError))


def _tells_of_a_dead_worker(failure: BaseException) -> bool:
    return isinstance(_found_by_ray(failure), RayActorError)


def _found_by_ray(failure: BaseException) -> BaseException:
    """Return what Ray's look after a worker came upon, which is wrapped once more."""
    found: BaseException = getattr(failure, "health_check_failure", failure)
    return found


def _tells_of_a_lost_peer(failure: BaseException) -> bool:
    # Gloo tells of it in the text of a RuntimeError alone.
    return isinstance(failure, distributed.DistError) or "gloo/transport" in str(failure)


@contextlib.contextmanager
def _ray(compute: ComputeSpec) -> Iterator[None]:
    """Be part of the Ray cluster that runs this program; where there is none, of one on this machine."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Standard output is progress for programs to read; what workers print stays in their own logs.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    here: dict[str, Any] = {"num_cpus": processes(compute), "include_dashboard": False}
    with _signals_kept():
        ray.init(**quiet, **({} if "RAY_ADDRESS" in os.environ else here))
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Undo that Ray takes SIGTERM for itself."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _places(compute: ComputeSpec, spread: bool) -> ray.train.ScalingConfig:
    """Return what Ray shall find for the workers.

    Args:
        compute: how many, and with what.
        spread: every worker has a pod of its own; by CPUs alone Ray would put several processes into one.

    Raises:
        SpecError: this machine has fewer GPUs.
    """
    count = processes(compute)
    if spread:
        on_gpus = gpus(compute) > 0
    else:
        there = int(ray.cluster_resources().get("GPU", 0))
        on_gpus = bool(compute.gpus_per_worker) or (compute.gpus_per_worker is None and there >= count)
        if on_gpus and there < count:
            raise SpecError(
                f"spec.compute.gpusPerWorker ({compute.gpus_per_worker}): {count} GPUs are asked for, and this machine "
                f"has {there}. Set gpusPerWorker: 0 to train on the CPU, or run the job in a cluster."
            )
    return ray.train.ScalingConfig(
        num_workers=count,
        use_gpu=on_gpus,
        placement_strategy="STRICT_SPREAD" if spread and not on_gpus and count > 1 else "PACK",
    )
