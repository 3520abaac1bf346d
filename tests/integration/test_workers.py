"""Training on several workers: the same numbers as on one, whatever is spread, however it is interrupted.

Inputs: the tiny model. Ray and its worker processes take half a minute to start, so one pair of them trains most of
what is compared here, one training after the other. Everything is float32 on the CPU.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from peft import PeftModel
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from finetune_api.job import FineTuneJob
from finetune_api.report import ExitCode, Progress, Stage, TrainingReport
from finetune_api.stage_result import StageResult
from finetune_trainer import stages
from finetune_trainer.check_stage import check_stage
from finetune_trainer.checkpoint import newest_complete
from finetune_trainer.desk import Desk, Stored
from finetune_trainer.errors import SpecError
from finetune_trainer.evaluate_stage import evaluate_stage
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.pod_stop import PROGRAM_LOCK
from finetune_trainer.run import Run, output_prefix
from finetune_trainer.shared_state import SharedState
from finetune_trainer.stages import PodOptions
from finetune_trainer.storage import Storage
from finetune_trainer.train_stage import train_stage
from finetune_trainer.worker import Assignment
from finetune_trainer.workspace import Workspace

from .conftest import TINY, make_tokenizer, save_random_model, save_tiny_encoder_decoder
from .jobs import Silence, tiny_job
from .ports import free_port
from .test_tracker import read_event_files

# The same sums in another order, float32, eight steps of AdamW. Measured: 5e-7 in the loss, 2e-6 in nearly every
# weight, which moves by up to 8e-2. AdamW's first steps divide by |gradient|: where that is next to nothing, as in a
# new LoRA, whose product begins at zero, roundings decide about a step. Measured there: up to 1.6e-4, in one weight of
# two hundred; elsewhere once as much, in four of 8,192 that a rare token has. Rows that only one of them sees made 0.5.
# A pull of strength 100 multiplies what weights are apart: 2e-5 in the loss.
SAME_LOSS = 5e-5
SAME_WEIGHT = 1e-4
UNSURE_WEIGHT = 1e-3
UNSURE_SHARE = {True: 0.01, False: 0.001}
"""Of weights, by whether they are a LoRA's; one of a small tensor, as what chooses among experts."""
RATE = 1e-3

STALLED = 300
"""Seconds after which one of them, which takes two, counts as one that never ends."""

pytestmark = pytest.mark.timeout(3000)  # the first test waits for all trainings of one group of processes


@dataclass(frozen=True)
class Trained:
    report: TrainingReport
    workspace: Workspace

    @property
    def losses(self) -> list[float]:
        return [point.loss for point in self.report.curve if point.loss is not None]

    @property
    def general_losses(self) -> list[float]:
        return [point.general_loss for point in self.report.curve if point.general_loss is not None]

    @property
    def answers(self) -> dict[int, int]:
        """How many sample questions were answered behind which step."""
        return {point.step: len(point.answers) for point in self.report.curve if point.answers}

    @property
    def resumed_from(self) -> int | None:
        return self.report.resumed_from_step

    @property
    def weights(self) -> dict[str, Tensor]:
        [file] = self.workspace.tuned.glob("*.safetensors")
        return load_file(file)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes of Ray on this machine; both workers fit on the first, as on a laptop."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    yield
    ray.shutdown()
    nodes.shutdown()


FULL: dict[str, Any] = {"method": {"type": "full"}, "training__learningRate": RATE, "evaluation__forgetting": {}}
LORA: dict[str, Any] = {"method": {"type": "lora", "lora": {"rank": 4, "dropout": 0.0}}}
SELECTIVE: dict[str, Any] = {
    "method": {"type": "selective", "selective": {"train": "lastLayers", "lastLayers": 1}},
    "training__learningRate": RATE,
}
ADAPTER: dict[str, Any] = {"method": {"type": "adapter", "adapter": {"bottleneck": 8}}}
SMALL = {"training__microBatchSize": 1}
TWO_EPOCHS: dict[str, Any] = {"data__mixing": {"maxExamplesPerTask": 25}, "training__microBatchSize": 2}
"""Of 25 rows, three steps and one row."""
SEQ2SEQ: dict[str, Any] = {"model__task": "seq2seq-lm"}


def zero(stage: int, offload: str = "none") -> dict[str, Any]:
    return {"compute__deepspeed": {"stage": stage, "offload": offload}}


PULLS = ("l2sp", "ewc", "kl")


def full_with(pull: str) -> dict[str, Any]:
    """Return a full fine-tuning that feels its base strongly."""
    return FULL | {"method": {"type": "full", "regularization": {"type": pull, "strength": 100.0}}}


GOES_ON_FROM = "model__startFrom"
"""The name of one of the jobs in ``published``, until `located` puts its place there."""

STOPPED_EARLY = LORA | {
    "training__learningRate": 0.03,
    "training__schedule": "constant",
    "training__evalEverySteps": 1,
    "training__maxSteps": 40,
    "training__earlyStopping": {"patience": 2},
}
"""So high a rate that the first steps help and later ones harm, and not so high that it blows roundings up."""

TRAININGS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "full, rows one by one": FULL | SMALL,
    "full, activations computed twice": FULL | {"training__gradientCheckpointing": "always"},
    "full in two epochs": FULL | TWO_EPOCHS,
    "full in two epochs, ZeRO 2": FULL | TWO_EPOCHS | zero(2),
    "full with kl in two epochs": full_with("kl") | TWO_EPOCHS | SMALL,
    "seq2seq full in two epochs": SEQ2SEQ | FULL | TWO_EPOCHS,
    "full of fewer rows than a step has": FULL | {"data__mixing": {"maxExamplesPerTask": 7}},
    "full, ZeRO 0": FULL | zero(0),
    "full, ZeRO 1": FULL | zero(1),
    "full, ZeRO 2": FULL | zero(2),
    "full, ZeRO 2, rows one by one": FULL | zero(2) | SMALL,
    "full, ZeRO 2, offloaded": FULL | zero(2, "cpu"),
    "full, ZeRO 3": FULL | zero(3),
    "full, ZeRO 3, offloaded": FULL | zero(3, "cpu"),
    "selective": SELECTIVE,
    "selective, ZeRO 2": SELECTIVE | zero(2),
    "lora": LORA | {"training__reportTo": {"tensorboard": True}},
    "lora, ZeRO 2": LORA | zero(2),
    "lora, ZeRO 3": LORA | zero(3),
    # The first finds products in float32 as fast, the second those in bfloat16 faster.
    "lora, measured apart": LORA | {"model__dtype": "auto"},
    "adapter": ADAPTER,
    "adapter, ZeRO 3": ADAPTER | zero(3),
    "lora again": LORA | {GOES_ON_FROM: "lora"},
    "full again": FULL | {GOES_ON_FROM: "full"},
    "full again, ZeRO 3": FULL | {GOES_ON_FROM: "full"} | zero(3),
    "experts full": FULL,
    "experts full, rows one by one": FULL | SMALL,
    "experts full with l2sp": full_with("l2sp"),
    "seq2seq full": SEQ2SEQ | FULL,
    "seq2seq full, ZeRO 2": SEQ2SEQ | FULL | zero(2),
    "seq2seq full, ZeRO 3": SEQ2SEQ | FULL | zero(3),
    "seq2seq lora": SEQ2SEQ | LORA,
    "seq2seq selective": SEQ2SEQ | SELECTIVE,
    **{f"full with {pull}": full_with(pull) for pull in PULLS},
    **{f"full with {pull}, ZeRO 2": full_with(pull) | zero(2) for pull in PULLS},
    "lora until it gets worse": STOPPED_EARLY,
    "lora until it gets worse, ZeRO 2": STOPPED_EARLY | zero(2),
    "lora until it names no more labels": STOPPED_EARLY
    | {"training__earlyStopping": {"metric": "sentiment.accuracy", "patience": 2}},
}
LORA_IN_BFLOAT16 = LORA | {"model__dtype": "bfloat16"}
IN_BFLOAT16: dict[str, dict[str, Any]] = {
    "full in bfloat16": FULL | {"training__precision": "bf16"},
    "lora in bfloat16": LORA_IN_BFLOAT16,
    "lora in bfloat16, ZeRO 2": LORA_IN_BFLOAT16 | zero(2),
    "lora in bfloat16, ZeRO 3": LORA_IN_BFLOAT16 | zero(3),
}
"""The first computes products in it, the others keep frozen weights in it; what is trained is float32."""

INTERRUPTED = (
    "full",
    "full, ZeRO 2",
    "full, ZeRO 3",
    "lora, ZeRO 3",
    "adapter, ZeRO 3",
    "lora until it gets worse, ZeRO 2",
)


def located(changes: dict[str, Any], published: dict[str, Path]) -> dict[str, Any]:
    if GOES_ON_FROM not in changes:
        return changes
    return changes | {GOES_ON_FROM: {"source": published[changes[GOES_ON_FROM]].as_uri()}}


def assert_same(key: str, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=UNSURE_WEIGHT, rtol=0)
    apart = (actual - expected).abs() > SAME_WEIGHT
    share = UNSURE_SHARE["lora_" in key]
    assert apart.sum() <= max(1, share * apart.numel()), f"{int(apart.sum())} of {apart.numel()} weights are another"


def on_two(model: Path, folder: Path, **changes: Any) -> FineTuneJob:
    return tiny_job(model, folder, compute__workers=2, compute__gpusPerWorker=0, **changes)


@contextmanager
def unchecked() -> Iterator[None]:
    """Train without the check, which takes longer than all else before tiny trainings and is the same for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_trainer.train_stage.check_stage", lambda _: None)
        yield


def encoded(job: FineTuneJob, workspace: Workspace) -> Assignment:
    """Return what `train_stage` would hand to its workers."""
    caught: list[Assignment] = []

    def catch(assignment: Assignment, *_: Any) -> TrainingReport:
        caught.append(assignment)
        raise _CaughtError

    with pytest.MonkeyPatch.context() as patch, unchecked():
        patch.setattr("finetune_trainer.worker_group.train_on_workers", catch)
        workspace.root.mkdir()
        with pytest.raises(_CaughtError):
            train_stage(Run(job, workspace, Silence(), StopFlag()))
    return caught[0]


class _CaughtError(Exception):
    pass


def save_tiny_experts(folder: Path) -> Path:
    """Write a random model of experts, one of whose weights chooses among them and never has a gradient."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2}
    return save_random_model(
        folder, Ernie4_5_MoeForCausalLM, Ernie4_5_MoeConfig, make_tokenizer(None), **(TINY | sizes)
    )


@pytest.fixture(scope="module")
def model_of(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Say which model a training of that name tunes."""
    # Without dropout, which each worker draws for itself.
    others = {
        "seq2seq": save_tiny_encoder_decoder(tmp_path_factory.mktemp("encoder-decoder"), dropout=0.0),
        "experts": save_tiny_experts(tmp_path_factory.mktemp("experts")),
    }
    return lambda name: others.get(name.partition(" ")[0], tiny_model_dir)


@pytest.fixture(scope="module")
def published(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What jobs before have published, by their method."""
    models = {}
    for name, method in {"lora": LORA, "full": FULL}.items():
        folder = tmp_path_factory.mktemp(name)
        changes = method | {"evaluation": {"metrics": ["perplexity"], "maxExamples": 4}, "output__publishOn": "always"}
        stages.run(tiny_job(tiny_model_dir, folder, **changes), folder / "workspace", Silence())
        [models[name]] = (folder / "output").glob("*/*/model")
    return models


@pytest.fixture(scope="module")
def on_two_workers(
    cluster: None,
    model_of: Callable[[str], Path],
    published: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Trained]:
    """What two workers made of all `TRAININGS`; of those `INTERRUPTED` also under the name with ``resumed``."""
    folder = tmp_path_factory.mktemp("two-workers")
    assignments = {
        name: encoded(on_two(model_of(name), folder, **located(changes, published)), Workspace(folder / name))
        for name, changes in (TRAININGS | IN_BFLOAT16).items()
    }
    for name in INTERRUPTED:
        job = on_two(model_of(name), folder, **TRAININGS[name])
        assignments[f"{name}, resumed"] = encoded(job, Workspace(folder / f"{name}, resumed"))

    # A process that DeepSpeed has once been in does not get rid of it.
    assignments = dict(sorted(assignments.items(), key=lambda item: ("ZeRO" in item[0], "ZeRO 3" in item[0])))
    first_of_zero_3 = next(name for name in assignments if "ZeRO 3" in name)

    def work_on_all(parcel: dict[str, Any]) -> None:
        # Defined here, so that it travels by value: workers do not know this file.
        import faulthandler

        from ray.train import get_context
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        from finetune_trainer import precision
        from finetune_trainer.errors import Preempted
        from finetune_trainer.worker import take_part

        precision.multiplies_bfloat16 = lambda: get_context().get_world_rank() == 1

        def hold_to_parts() -> None:
            """Let DeepSpeed take no model onto a device that is not spread already."""
            from deepspeed.runtime.engine import DeepSpeedEngine

            place = DeepSpeedEngine._configure_distributed_model

            def place_parts(engine: Any, model: Any) -> None:
                assert all(hasattr(parameter, "ds_id") for parameter in model.parameters()), "it is whole"
                place(engine, model)

            DeepSpeedEngine._configure_distributed_model = place_parts

        rank = get_context().get_world_rank()
        stacks = (parcel["stacks"] / str(rank)).open("w")
        for name, assignment in ray.get(parcel["assignments"]).items():
            desk = parcel["desk"]
            print(name, file=stacks, flush=True)
            faulthandler.dump_traceback_later(parcel["stalled"], exit=True, file=stacks)
            if name == first_of_zero_3:
                hold_to_parts()
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
        faulthandler.cancel_dump_traceback_later()

    class StoppingDesk(Desk):
        """Asks for a stop in a given step, to the step."""

        def __init__(self) -> None:
            super().__init__()
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
    stacks = folder / "stacks"
    stacks.mkdir()
    trainer = TorchTrainer(
        work_on_all,
        train_loop_config={
            "assignments": ray.put(assignments),
            "desk": desk,
            "stacks": stacks,
            "stalled": STALLED,
        },
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=0)),
    )
    try:
        trainer.fit()
    except Exception as error:
        for file in sorted(stacks.iterdir()):
            error.add_note(f"worker {file.name}, its trainings and where it stalled:\n{file.read_text()}")
        raise
    reports = dict(ray.get(desk.all_reports.remote()))
    return {name: Trained(reports[name], assignment.workspace) for name, assignment in assignments.items()}


@pytest.fixture(scope="module")
def on_one_worker(
    model_of: Callable[[str], Path], published: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trained]:
    """What one process makes of the same job."""
    folder = tmp_path_factory.mktemp("one-worker")
    results = {}
    trainings = TRAININGS | IN_BFLOAT16
    for name in sorted({name.partition(",")[0] for name in trainings}):
        workspace = Workspace(folder / name)
        workspace.root.mkdir()
        results[name] = on_one(tiny_job(model_of(name), folder, **located(trainings[name], published)), workspace)
    return results


def on_one(job: FineTuneJob, workspace: Workspace) -> Trained:
    with unchecked():
        return Trained(train_stage(Run(job, workspace, Silence(), StopFlag())), workspace)


@pytest.mark.parametrize("name", TRAININGS)
def test_two_workers_train_as_one_does(
    on_one_worker: dict[str, Trained], on_two_workers: dict[str, Trained], name: str
):
    """One worker = two; ZeRO 0 = 1 = 2 = 3; micro-batch x accumulation: all are held against one process."""
    one, two = on_one_worker[name.partition(",")[0]], on_two_workers[name]
    assert two.losses == pytest.approx(one.losses, abs=SAME_LOSS)
    assert two.general_losses == pytest.approx(one.general_losses, abs=SAME_LOSS)
    # The base's answers among them; those of what was trained may differ by a rounding.
    assert two.report.samples == one.report.samples
    assert two.answers == one.answers
    assert set(one.answers.values()) == {len(one.report.samples)}
    assert (two.report.steps, two.report.best_step) == (one.report.steps, one.report.best_step)
    assert two.weights.keys() == one.weights.keys()
    for key, tensor in two.weights.items():
        assert tensor.dtype is torch.float32
        assert_same(key, tensor, one.weights[key])


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_two_workers_train_as_one_does_in_bfloat16(
    on_one_worker: dict[str, Trained], on_two_workers: dict[str, Trained], name: str
):
    """Sums are rounded to 8 bits, in another order for every division: a loss of 4 moves by some hundredths."""
    one, two = on_one_worker[name.partition(",")[0]], on_two_workers[name]
    assert two.losses == pytest.approx(one.losses, abs=0.03)
    assert {key: tensor.dtype for key, tensor in two.weights.items()} == {
        key: tensor.dtype for key, tensor in one.weights.items()
    }


def test_deepspeed_trains_what_asks_for_it_and_nothing_else(on_two_workers: dict[str, Trained]):
    for name, trained in on_two_workers.items():
        assert bool(list(trained.workspace.checkpoints.glob("*/global_step*"))) == ("ZeRO" in name), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_workers_begin_with_what_another_job_has_published(on_two_workers: dict[str, Trained], method: str):
    # Of the same rows, before anything is learnt from them.
    assert on_two_workers[f"{method} again"].losses[0] < on_two_workers[method].losses[0] - 100 * SAME_LOSS


def test_the_first_of_two_workers_alone_tells_a_tracker(on_two_workers: dict[str, Trained]):
    two = on_two_workers["lora"]
    points = {point.step: point.loss for point in two.report.curve if point.loss is not None}
    drawn = read_event_files(two.workspace.tuned / "tensorboard")["train/loss"]
    assert [step for step, _ in drawn] == list(points)
    assert dict(drawn) == pytest.approx(points)


@pytest.mark.parametrize("pull", PULLS)
def test_a_pull_is_felt_on_two_workers(on_two_workers: dict[str, Trained], pull: str):
    free, pulled = on_two_workers["full"].weights, on_two_workers[f"full with {pull}"].weights
    assert max((free[name] - pulled[name]).abs().max() for name in free) > 10 * SAME_WEIGHT


def test_two_workers_stop_early_and_keep_their_best_weights(on_two_workers: dict[str, Trained]):
    report = on_two_workers["lora until it gets worse"].report
    assert report.best_step is not None and report.best_step + 2 == report.steps < 40


@pytest.mark.parametrize("name", ["lora", "lora, ZeRO 3"])
def test_what_two_workers_trained_is_published_merged_with_the_adapters_logits(
    on_two_workers: dict[str, Trained], tiny_model_dir: Path, tmp_path: Path, name: str
):
    trained = on_two_workers[name]
    job = on_two(tiny_model_dir, tmp_path, **TRAININGS[name], output__merge=True)
    run = Run(job, trained.workspace, Silence(), StopFlag())
    check_stage(run)
    run.remember("training", trained.report)
    evaluate_stage(run)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "output" / output_prefix(job) / "model")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), trained.workspace.tuned)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, actual = (model(input_ids=ids).logits for model in (adapted, merged))
    # Products are added before they are rounded instead of after it: float32, sums over some dozens of numbers.
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def given_checkpoint(trained: Trained, folder: Path) -> Workspace:
    """Return a workspace with nothing but the newest checkpoint of ``trained``."""
    workspace = Workspace(folder)
    checkpoint = newest_complete(trained.workspace.checkpoints)
    assert checkpoint is not None
    shutil.copytree(checkpoint, workspace.checkpoints / checkpoint.name)
    return workspace


@pytest.mark.parametrize("name", ["full", "lora"])
def test_one_worker_goes_on_from_a_checkpoint_of_two(
    on_two_workers: dict[str, Trained], tiny_model_dir: Path, tmp_path: Path, name: str
):
    two = on_two_workers[name]
    one = on_one(tiny_job(tiny_model_dir, tmp_path, **TRAININGS[name]), given_checkpoint(two, tmp_path / "one"))
    assert one.resumed_from == 6
    assert one.losses == pytest.approx(two.losses, abs=SAME_LOSS)
    for key, tensor in one.weights.items():
        assert_same(key, tensor, two.weights[key])


def test_what_deepspeed_has_spread_over_two_workers_is_refused_by_another_number_of_them(
    on_two_workers: dict[str, Trained], tiny_model_dir: Path, tmp_path: Path
):
    workspace = given_checkpoint(on_two_workers["full, ZeRO 2"], tmp_path / "one")
    with pytest.raises(SpecError, match=r"spec\.compute: .*step 6 .* 2 processes, and this is a run of 1"):
        on_one(tiny_job(tiny_model_dir, tmp_path, **FULL), workspace)


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_run_goes_on_to_the_same_end(on_two_workers: dict[str, Trained], name: str):
    straight, resumed = on_two_workers[name], on_two_workers[f"{name}, resumed"]
    assert (straight.resumed_from, resumed.resumed_from) == (None, 5)
    assert resumed.report.best_step == straight.report.best_step
    # Order, optimiser and schedule all go on. A process's first training differs by 1e-6 from its later ones, from the
    # first steps on: not the very same numbers.
    assert resumed.losses == pytest.approx(straight.losses, abs=SAME_LOSS)
    for key, tensor in straight.weights.items():
        assert_same(key, resumed.weights[key], tensor)


# --- as on two nodes with two GPUs each: torch's launchers say by variables which processes share a disk


NODES = 2
PER_NODE = 2
STOPPED_AT = 5


def stop_in_step(step: int | None) -> Any:
    """Return a desk that asks for a stop there."""

    class Stopping(Desk):
        def __init__(self) -> None:
            super().__init__()
            self.asked = 0

        def is_stop_asked(self) -> bool:
            self.asked += 1
            return self.asked == step

    return ray.remote(Stopping).options(num_cpus=0).remote()


@pytest.fixture(scope="module")
def four_seats(cluster: None) -> Iterator[list[Any]]:
    """Processes that train what they are given, one assignment after another."""

    # Defined here, so that it travels by value: workers do not know this file.
    @ray.remote(num_cpus=0)
    class Seat:
        def __init__(self, rank: int, port: int) -> None:
            import datetime

            from torch import distributed

            node, local_rank = divmod(rank, PER_NODE)
            places = {"RANK": rank, "LOCAL_RANK": local_rank, "NODE_RANK": node}
            sizes = {"WORLD_SIZE": NODES * PER_NODE, "LOCAL_WORLD_SIZE": PER_NODE}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in (places | sizes | address).items()})
            distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=STALLED))

        def take_part(self, assignment: Assignment, desk: Any) -> TrainingReport | None:
            """Train; None also where all were asked to stop."""
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            from finetune_trainer.errors import Preempted
            from finetune_trainer.worker import take_part

            try:
                return take_part(assignment, desk)
            except Preempted:
                return None
            finally:
                unset_hf_deepspeed_config()

    port = free_port()
    seats = [Seat.remote(rank, port) for rank in range(NODES * PER_NODE)]
    yield seats
    for seat in seats:
        ray.kill(seat)


# Behind each other in the same processes, and DeepSpeed stays in a process that it was in.
@pytest.mark.parametrize("name", ["full in two epochs", "lora", "full, ZeRO 2", "full, ZeRO 3"])
def test_four_processes_on_two_nodes_go_on_as_one_does_from_the_parts_that_each_node_has_stored(
    four_seats: list[Any], on_one_worker: dict[str, Trained], tiny_model_dir: Path, tmp_path: Path, name: str
):
    job = on_two(tiny_model_dir, tmp_path, **TRAININGS[name])
    given = encoded(job, Workspace(tmp_path / "program"))
    store = SharedState(Storage(job.spec.output, given.mounts).open_output(), "four", given.workspace)

    def attempt(folder: str, desk: Any) -> list[TrainingReport | None]:
        workspace = Workspace(tmp_path / folder)
        workspace.root.mkdir()
        assignment = dataclasses.replace(given, workspace=workspace, prefix=store.prefix)
        return ray.get([seat.take_part.remote(assignment, desk) for seat in four_seats], timeout=STALLED)

    desk = stop_in_step(STOPPED_AT)
    assert attempt("first", desk) == [None] * NODES * PER_NODE
    letters = [letter for letter in ray.get(desk.collect.remote(False)) if isinstance(letter, Stored)]
    assert {letter.node for letter in letters if letter.step == STOPPED_AT} == {0, 1}
    store.complete_parts(STOPPED_AT, NODES, keep=1)

    [report, *others] = attempt("second", stop_in_step(None))
    assert others == [None] * 3
    assert report is not None and report.resumed_from_step == STOPPED_AT
    one = on_one_worker[name.partition(",")[0]]
    assert [point.loss for point in report.curve if point.loss] == pytest.approx(one.losses, abs=SAME_LOSS)
    store.pull_tuned()
    four = Trained(report, given.workspace)
    for key, tensor in four.weights.items():
        assert_same(key, tensor, one.weights[key])


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


def stop_the_pod(workspace: Path) -> subprocess.Popen[bytes]:
    """Do what Kubernetes does first when it ends a pod."""
    return subprocess.Popen([sys.executable, "-m", "finetune_trainer.pod_stop", str(workspace)])


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


def test_workers_whose_pod_is_to_go_have_stored_their_last_step_when_it_goes(
    cluster: None, tiny_model_dir: Path, tmp_path: Path
):
    job = on_two(tiny_model_dir, tmp_path, **FULL, training__maxSteps=STEPS, checkpoint__everySteps=10 * STEPS)
    hooks: list[subprocess.Popen[bytes]] = []

    def stop_now() -> None:
        # Their workspace's lock is this program's as well, which would be asked by a signal.
        (tmp_path / "first" / PROGRAM_LOCK).unlink()
        hooks.append(stop_the_pod(tmp_path / "first"))

    stopped = attempt(job, tmp_path / "first", Listener(5, stop_now))
    assert hooks[0].wait(30) == 0
    assert stopped.exit_code is ExitCode.PREEMPTED, stopped.message
    [checkpoint] = stopped.checkpoints
    assert f"stopped at step {checkpoint.step} of {STEPS}" in stopped.message
    assert 5 <= checkpoint.step < STEPS

    resumed = attempt(job, tmp_path / "second")
    assert (resumed.exit_code, resumed.resumed_from_step) == (ExitCode.OK, checkpoint.step), resumed.message


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
