"""Training on several workers: the same numbers as on one, whatever is spread, however it is interrupted.

Inputs: the tiny model. Ray and its worker processes take half a minute to start, so one pair of them trains most of
what is compared here, one training after the other. Everything is float32 on the CPU.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune_api.job import FineTuneJob
from finetune_api.report import ExitCode, Progress, Stage, TrainingReport
from finetune_api.stage_result import StageResult
from finetune_trainer import stages
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.run import Run
from finetune_trainer.stages import PodOptions, train_stage
from finetune_trainer.worker import Assignment
from finetune_trainer.workspace import Workspace

from .jobs import tiny_job

# The same sums in another order, float32, eight steps of AdamW, whose first steps divide by |gradient| and so blow up
# rounding where gradients are near zero. Measured: 5e-7 in the loss, 2e-6 in a weight, which moves by up to 8e-2.
SAME_LOSS = 2e-5
SAME_WEIGHT = 1e-4
RATE = 1e-3

pytestmark = pytest.mark.timeout(600)  # the first test waits for all trainings of one group of processes


class Silence:
    def report(self, progress: Progress) -> None:
        pass


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    resumed_from: int | None
    weights: dict[str, Tensor]


def losses(report: TrainingReport) -> list[float]:
    return [point.loss for point in report.curve if point.loss is not None]


def trained(report: TrainingReport, workspace: Workspace) -> Trained:
    [file] = workspace.tuned.glob("*.safetensors")
    return Trained(losses(report), report.resumed_from_step, load_file(file))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes of Ray on this machine; both workers fit on the first, as on a laptop."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    yield
    ray.shutdown()
    nodes.shutdown()


FULL: dict[str, Any] = {"method": {"type": "full"}, "training__learningRate": RATE}
LORA: dict[str, Any] = {"method": {"type": "lora", "lora": {"rank": 4, "dropout": 0.0}}}
SMALL = {"training__microBatchSize": 1}


def zero(stage: int, offload: str = "none") -> dict[str, Any]:
    return {"compute__deepspeed": {"stage": stage, "offload": offload}}


TRAININGS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "full, rows one by one": FULL | SMALL,
    "full, ZeRO 0": FULL | zero(0),
    "full, ZeRO 1": FULL | zero(1),
    "full, ZeRO 2": FULL | zero(2),
    "full, ZeRO 2, rows one by one": FULL | zero(2) | SMALL,
    "full, ZeRO 2, offloaded": FULL | zero(2, "cpu"),
    "full, ZeRO 3": FULL | zero(3),
    "full, ZeRO 3, offloaded": FULL | zero(3, "cpu"),
    "lora": LORA,
    "lora, ZeRO 2": LORA | zero(2),
    "lora, ZeRO 3": LORA | zero(3),
}
INTERRUPTED = ("full", "full, ZeRO 2", "full, ZeRO 3", "lora, ZeRO 3")


def on_two(model: Path, folder: Path, **changes: Any) -> FineTuneJob:
    return tiny_job(model, folder, compute__workers=2, compute__gpusPerWorker=0, **changes)


def encoded(job: FineTuneJob, workspace: Workspace) -> Assignment:
    """Return what `train_stage` would hand to its workers."""
    caught: list[Assignment] = []

    def catch(assignment: Assignment, *_: Any) -> TrainingReport:
        caught.append(assignment)
        raise _CaughtError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_trainer.worker_group.train_on_workers", catch)
        workspace.root.mkdir()
        with pytest.raises(_CaughtError):
            train_stage(Run(job, workspace, Silence(), StopFlag()))
    return caught[0]


class _CaughtError(Exception):
    pass


@pytest.fixture(scope="module")
def on_two_workers(cluster: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """What two workers made of all `TRAININGS`; of those `INTERRUPTED` also under the name with ``resumed``."""
    folder = tmp_path_factory.mktemp("two-workers")
    assignments = {
        name: encoded(on_two(tiny_model_dir, folder, **changes), Workspace(folder / name))
        for name, changes in TRAININGS.items()
    }
    for name in INTERRUPTED:
        job = on_two(tiny_model_dir, folder, **TRAININGS[name])
        assignments[f"{name}, resumed"] = encoded(job, Workspace(folder / f"{name}, resumed"))

    def work_on_all(parcel: dict[str, Any]) -> None:
        # Defined here, so that it travels by value: workers do not know this file.
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        from finetune_trainer.errors import Preempted
        from finetune_trainer.worker import take_part

        for name, assignment in ray.get(parcel["assignments"]).items():
            desk = parcel["desk"]
            if name.endswith("resumed"):
                ray.get(desk.stop_in.remote(5))
                try:
                    take_part(assignment, desk)
                except Preempted:
                    ray.get(desk.stop_in.remote(None))
                unset_hf_deepspeed_config()
            report = take_part(assignment, desk)
            # A process of the product trains once; ZeRO 3 would be on for whatever is loaded next.
            unset_hf_deepspeed_config()
            if report is not None:
                ray.get(desk.leave.remote((name, report)))

    class StoppingDesk:
        """Asks for a stop in a given step, to the step."""

        def __init__(self) -> None:
            self.reports: list[Any] = []
            self.step: int | None = None

        def leave(self, letter: Any) -> None:
            if isinstance(letter, tuple):
                self.reports.append(letter)

        def all_reports(self) -> list[Any]:
            return self.reports

        def stop_in(self, step: int | None) -> None:
            self.step = step

        def is_stop_asked(self) -> bool:
            if self.step is None:
                return False
            self.step -= 1
            return self.step <= 0

    desk = ray.remote(StoppingDesk).options(num_cpus=0).remote()
    TorchTrainer(
        work_on_all,
        train_loop_config={"assignments": ray.put(assignments), "desk": desk},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=0)),
    ).fit()
    reports = dict(ray.get(desk.all_reports.remote()))
    return {name: trained(reports[name], assignment.workspace) for name, assignment in assignments.items()}


@pytest.fixture(scope="module")
def on_one_worker(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """What one process makes of the same job."""
    folder = tmp_path_factory.mktemp("one-worker")
    results = {}
    for name, changes in {"full": FULL, "lora": LORA}.items():
        workspace = Workspace(folder / name)
        workspace.root.mkdir()
        report = train_stage(Run(tiny_job(tiny_model_dir, folder, **changes), workspace, Silence(), StopFlag()))
        results[name] = trained(report, workspace)
    return results


@pytest.mark.parametrize("name", TRAININGS)
def test_two_workers_train_as_one_does(
    on_one_worker: dict[str, Trained], on_two_workers: dict[str, Trained], name: str
):
    """One worker = two; ZeRO 0 = 1 = 2 = 3; micro-batch x accumulation: all are held against one process."""
    one, two = on_one_worker[name.partition(",")[0]], on_two_workers[name]
    assert two.losses == pytest.approx(one.losses, abs=SAME_LOSS)
    assert two.weights.keys() == one.weights.keys()
    for key, tensor in two.weights.items():
        assert tensor.dtype is torch.float32
        torch.testing.assert_close(tensor, one.weights[key], atol=SAME_WEIGHT, rtol=0)


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_run_goes_on_to_the_same_end(on_two_workers: dict[str, Trained], name: str):
    straight, resumed = on_two_workers[name], on_two_workers[f"{name}, resumed"]
    assert (straight.resumed_from, resumed.resumed_from) == (None, 5)
    # Order, optimiser and schedule all go on. A process's first training differs by 1e-6 from its later ones, from the
    # first steps on: not the very same numbers.
    assert resumed.losses == pytest.approx(straight.losses, abs=SAME_LOSS)
    for key, tensor in straight.weights.items():
        torch.testing.assert_close(resumed.weights[key], tensor, atol=SAME_WEIGHT, rtol=0)


# --- as in pods: every attempt begins with an empty disk, and the output store is all that they share. Ray tells nodes
# apart by address, so that both workers here store one part; of several parts test_shared_state.py tells.


class Listener:
    """Does something, once, when a step has been made."""

    def __init__(self, step: int | None = None, act: Callable[[], None] = lambda: None) -> None:
        self._step = step
        self._act = act

    def report(self, progress: Progress) -> None:
        if self._step is not None and (progress.step or 0) >= self._step:
            self._step = None
            self._act()


def stop_this_program() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill_a_worker() -> None:
    workers = [one for one in psutil.Process().children(recursive=True) if "RayTrainWorker" in one.name()]
    workers[-1].kill()


def attempt(job: FineTuneJob, folder: Path, listener: Listener | None = None) -> StageResult:
    return stages.run_one(Stage.TRAIN, job, folder, listener or Listener(), PodOptions())


STEPS = 60
"""Far more than pass between the report of a step and what is done about it."""


def test_attempts_on_other_nodes_go_on_from_what_lost_and_stopped_ones_have_stored(
    cluster: None, tiny_model_dir: Path, tmp_path: Path
):
    job = on_two(tiny_model_dir, tmp_path, **FULL, **zero(2), training__maxSteps=STEPS, checkpoint__everySteps=2)
    lost = attempt(job, tmp_path / "first", Listener(10, kill_a_worker))
    assert (lost.exit_code, lost.exit_code.is_retryable) == (ExitCode.WORKER_LOST, True), lost.message
    assert "a worker is gone" in lost.message

    stopped = attempt(job, tmp_path / "second", Listener(30, stop_this_program))
    assert stopped.exit_code is ExitCode.PREEMPTED, stopped.message
    assert stopped.resumed_from_step == lost.checkpoints[0].step > 0
    assert 30 <= stopped.checkpoints[0].step < STEPS

    trained = attempt(job, tmp_path / "third")
    assert trained.exit_code is ExitCode.OK, trained.message
    assert trained.resumed_from_step == stopped.checkpoints[0].step
    [prefix] = (tmp_path / "output" / "default").iterdir()
    assert (prefix / "state" / "tuned" / "COMPLETE").is_file()
    assert not list((prefix / "checkpoints").glob("**/*")), "they are of no use any more"


def test_an_error_of_a_worker_is_the_programs_own(cluster: None, tiny_model_dir: Path, tmp_path: Path):
    overflowing = tmp_path / "overflowing"
    shutil.copytree(tiny_model_dir, overflowing)
    weights = load_file(overflowing / "model.safetensors")
    save_file(
        {name: tensor * 1e30 for name, tensor in weights.items()}, overflowing / "model.safetensors", {"format": "pt"}
    )
    failed = attempt(on_two(overflowing, tmp_path, **FULL), tmp_path / "attempt")
    assert failed.exit_code is ExitCode.DIVERGED, failed.message
    assert "spec.model.dtype: float32" in failed.message
