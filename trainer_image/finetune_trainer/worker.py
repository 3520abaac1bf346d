"""One of several processes that train: brings what it needs to its node, trains, stores what its node wrote.

A node may be the machine of the program that asked for workers, whose disk they then share, or a pod with an empty one.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import ray
import torch

from finetune_api.job import FineTuneJob
from finetune_api.report import Progress, Stage, TrainingReport
from finetune_trainer.checkpoint import folder_of
from finetune_trainer.checkpoint_upload import CheckpointUpload
from finetune_trainer.desk import DeskSink, Stored
from finetune_trainer.durable import disk_errors
from finetune_trainer.errors import DataError, FineTuneError, Preempted
from finetune_trainer.example import Encoded
from finetune_trainer.inputs import Inputs
from finetune_trainer.location import Mounts
from finetune_trainer.mixture import Mixture
from finetune_trainer.model import ModelFiles, fetch_model
from finetune_trainer.pod_stop import PodStop, pod_held
from finetune_trainer.process_group import ProcessGroup
from finetune_trainer.progress import Reporter, Sink
from finetune_trainer.published_model import PublishedModel
from finetune_trainer.shared_state import SharedState
from finetune_trainer.start import fetch_start
from finetune_trainer.storage import Storage
from finetune_trainer.train import train_here
from finetune_trainer.training_input import TrainingInput
from finetune_trainer.trust import add_private_authorities
from finetune_trainer.watched import Watched
from finetune_trainer.workspace import Workspace

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Assignment:
    """Everything that all workers are given alike; it travels to their nodes."""

    job: FineTuneJob
    inputs: Inputs
    """As the check saw them."""
    train: Sequence[Encoded]
    mixture: Mixture
    validation: Mapping[str, Sequence[Encoded]]
    general: Sequence[Encoded]
    watched: Watched | None
    workspace: Workspace
    mounts: Mounts
    prefix: str | None
    """The job's folder in the output store, when every node has a disk of its own; absent on a laptop."""
    threads: int | None
    """For one worker; absent: as its environment says."""


def work(parcel: dict[str, Any]) -> None:
    """Do one worker's part; Ray runs this in a process of its own on every place that it has found.

    Raises:
        FineTuneError: told to the desk before, for Ray wraps what is raised here and ends the other workers.
    """
    assignment, desk = ray.get(parcel["assignment"]), parcel["desk"]
    with pod_held(assignment.workspace.root):
        _work(assignment, desk)


def _work(assignment: Assignment, desk: Any) -> None:
    try:
        report = take_part(assignment, desk)
    except Preempted as stopped:
        # All stop at the same step, and have stored their parts: nobody must be ended.
        ray.get(desk.end.remote(stopped))
    except FineTuneError as error:
        ray.get(desk.end.remote(error))
        raise
    else:
        if report is not None:
            ray.get(desk.end.remote(report))


def take_part(assignment: Assignment, desk: Any) -> TrainingReport | None:
    """Return how training went, from the first worker."""
    add_private_authorities()
    if assignment.threads is not None:
        torch.set_num_threads(assignment.threads)
    group = ProcessGroup.joined()
    shared = _state_of_node(assignment, group)
    workspace = assignment.workspace if shared is None else shared.workspace
    once = OncePerNode(group, desk)
    files = once.brought(lambda: _fetch_base(assignment, workspace))
    start = once.brought(lambda: _fetch_start(assignment, workspace))
    if shared is not None:
        _fetch_checkpoint(shared, group, once)
    sink: Sink = DeskSink(desk) if group.is_first else _Silence()
    given = TrainingInput(
        assignment.job,
        files,
        assignment.train,
        assignment.mixture,
        assignment.validation,
        workspace,
        sink,
        AgreedStop(group, desk, PodStop(assignment.workspace.root)),
        general=assignment.general,
        watched=assignment.watched,
        start=start,
        group=group,
        mounts=assignment.mounts,
    )
    try:
        report = _train(given, shared, desk)
    except Preempted:
        # Behind the first pod that goes Ray ends all workers, also one that is still storing its part.
        group.wait()
        raise
    if not group.is_first:
        return None
    if shared is not None:
        Reporter(sink, Stage.TRAIN).say("storing the tuned weights")
        shared.push_tuned()
    return report


def _state_of_node(assignment: Assignment, group: ProcessGroup) -> SharedState | None:
    """Return the run's state in the store, with a workspace that the processes of this node share and no others."""
    if assignment.prefix is None:
        return None
    # Several nodes may be on one machine.
    workspace = Workspace(assignment.workspace.root / f"node-{group.node}", assignment.workspace.cache)
    with disk_errors("create", workspace.root):
        workspace.root.mkdir(parents=True, exist_ok=True)
    store = Storage(assignment.job.spec.output, assignment.mounts).open_output()
    return SharedState(store, assignment.prefix, workspace)


def _fetch_base(assignment: Assignment, workspace: Workspace) -> ModelFiles:
    model = assignment.job.spec.model
    if model.source.startswith("hf://"):
        model = model.model_copy(update={"revision": assignment.inputs.model})
    files = fetch_model(model, workspace.models, storage=Storage(assignment.job.spec.output, assignment.mounts))
    if files.revision != assignment.inputs.model:
        raise DataError(
            f"spec.model.source: the files of {model.source} changed while the job began: {files.revision[:12]}, not "
            f"{assignment.inputs.model[:12]}. Put them back, or apply the job under another name."
        )
    return files


def _fetch_start(assignment: Assignment, workspace: Workspace) -> PublishedModel | None:
    storage = Storage(assignment.job.spec.output, assignment.mounts)
    start = fetch_start(assignment.job.spec.model, storage, workspace.models)
    if start is not None and start.lineage != assignment.inputs.lineage:
        raise DataError(
            f"spec.model.startFrom: {start.uri} changed while the job began. Put it back, or apply the job under "
            "another name."
        )
    return start


def _fetch_checkpoint(shared: SharedState, group: ProcessGroup, once: "OncePerNode") -> None:
    """Bring the newest checkpoint that every node can read to all of them."""
    for step in group.from_first(shared.complete_steps()):
        is_whole = once.brought(functools.partial(shared.pull_checkpoint_of, step))
        if not group.any(not is_whole):
            return
        if group.is_first_of_node:
            shutil.rmtree(folder_of(shared.workspace.checkpoints, step), ignore_errors=True)
        if group.is_first:
            shared.drop_checkpoint(step)


def _train(given: TrainingInput, shared: SharedState | None, desk: Any) -> TrainingReport:
    group = given.group
    if shared is None or not group.is_first_of_node:
        return train_here(given)

    def push(folder: Path, step: int) -> None:
        shared.push_part(folder, step, group.node)
        # Waited for: who ends behind this must have said it.
        ray.get(desk.leave.remote(Stored(step, group.node, group.nodes)))

    with CheckpointUpload(given.workspace.uploads, push) as upload:
        return train_here(dataclasses.replace(given, upload=upload))


class OncePerNode:
    """Has the first process of each node bring what all of them need, while the others wait."""

    def __init__(self, group: ProcessGroup, desk: Any) -> None:
        self._group = group
        self._desk = desk

    def brought(self, bring: Callable[[], T]) -> T:
        """Return what the first process of this node has brought; to be called by all of them."""
        of_node = bring() if self._group.is_first_of_node else None
        # Not for each other in torch, which ends what has not come together in half an hour: models are large.
        ray.get(self._desk.meet.remote(self._group.size))
        return cast(T, self._group.from_first_of_node(of_node))


class AgreedStop:
    """A stop request that all workers see behind the same step, whichever of them or of their pods it was made to."""

    def __init__(self, group: ProcessGroup, desk: Any, pod: PodStop) -> None:
        self._group = group
        self._desk = desk
        self._pod = pod

    def is_set(self) -> bool:
        """Whether it has come; to be asked by all of them, behind every step."""
        asked = self._pod.is_set() or (self._group.is_first and ray.get(self._desk.is_stop_asked.remote()))
        return self._group.any(asked)


class _Silence:
    """One worker speaks for all."""

    def report(self, progress: Progress) -> None:
        """Say nothing."""
