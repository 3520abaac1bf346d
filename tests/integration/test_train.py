"""Training: what must not depend on how rows are batched, packed or interrupted, and what ends it early."""

import itertools
import json
import math
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.job import FineTuneJob
from finetune_api.report import ExitCode, Progress, Stage, TrainingReport
from finetune_api.spec import TrainingSpec
from finetune_trainer.adjustment import Adjustment
from finetune_trainer.checkpoint import step_of
from finetune_trainer.dataset import load_dataset
from finetune_trainer.errors import DataError, Preempted, StorageError, TrainingDivergedError
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.manifest import is_complete
from finetune_trainer.progress import Reporter, Sink
from finetune_trainer.run import Run
from finetune_trainer.sample_answers import MOST_QUESTIONS
from finetune_trainer.settings_map import plan_steps
from finetune_trainer.split import Split
from finetune_trainer.stage_summary import train_result
from finetune_trainer.stages import run_one
from finetune_trainer.train import divergence, loss_per_token
from finetune_trainer.train_stage import train_stage
from finetune_trainer.workspace import Workspace

from .jobs import Silence, tiny_job, write_reviews
from .reference_trainer import ROUNDING, reference_losses

# The same sums in another order, float32, eight steps of AdamW at 1e-2, whose first steps divide by |gradient| and so
# blow up rounding where gradients are near zero. Measured: 2e-6 in the loss.
SAME_LOSS = 2e-4


class StopBehindStep(threading.Event):
    """A stop request that comes in the middle of a given step; a sink, to hear when training begins."""

    def __init__(self, step: int, sink: Sink) -> None:
        super().__init__()
        self._sink = sink
        self._refusals = step - 1
        self._has_begun = False

    def report(self, progress: Progress) -> None:
        self._has_begun = self._has_begun or progress.message == "training"
        self._sink.report(progress)

    def is_set(self) -> bool:
        # Asked once behind every step; whoever asked before was not training.
        self._refusals -= self._has_begun
        return self._refusals < 0


def train_until(step: int, job: FineTuneJob, workspace: Workspace, sink: Sink | None = None) -> None:
    """Train and be stopped in ``step``."""
    flag = StopFlag()
    flag.event = stop = StopBehindStep(step, sink or Silence())
    with pytest.raises(Preempted, match=f"step {step} of 8"):
        train_stage(Run(job, workspace, stop, flag))


def train(
    model: Path, folder: Path, workspace: str = "workspace", sink: Sink | None = None, **changes: object
) -> TrainingReport:
    root = Workspace(folder / workspace)
    root.root.mkdir(exist_ok=True)
    return train_stage(Run(tiny_job(model, folder, **changes), root, sink or Silence(), StopFlag()))


def losses(report: TrainingReport) -> list[float]:
    return [point.loss for point in report.curve if point.loss is not None]


def test_training_lowers_the_loss(tiny_model_dir: Path, tmp_path: Path):
    report = train(tiny_model_dir, tmp_path, training__maxSteps=20)
    assert losses(report)[-1] < 0.8 * losses(report)[0]
    looks = [point for point in report.curve if point.validation_loss is not None]
    assert [len(point.answers) for point in looks] == [MOST_QUESTIONS] * len(looks)
    assert {question.expected for question in report.samples} <= {"negative", "positive"}
    assert [question.base for question in report.samples] != list(looks[-1].answers)
    assert report.trainable_parameters < report.parameters


@pytest.mark.parametrize("method, rate", [("full", 1e-3), ("selective", 0.02)], ids=["full", "bias terms"])
def test_training_goes_down_the_curve_of_transformers_own_trainer(
    tiny_model_dir: Path, biased_model_dir: Path, tmp_path: Path, method: str, rate: float
):
    model = biased_model_dir if method == "selective" else tiny_model_dir
    rows = [json.loads(line) for line in write_reviews(tmp_path / "reviews.jsonl", 20).read_text().splitlines()]
    changes: dict[str, Any] = {
        "method": {"type": method},
        "data__splits": {"validation": 0, "test": 0.2},
        "training__learningRate": rate,
        "training__schedule": "constant",
        "training__warmupRatio": 0,
        "training__weightDecay": 0.01,
    }
    spec = tiny_job(model, tmp_path, **changes).spec
    chosen = [rows[example.row] for example in load_dataset(spec.data).examples(Split.TRAIN)]
    # Every step sees all rows, whatever their order.
    report = train(model, tmp_path, training__globalBatchSize=len(chosen), **changes)

    tokenizer = AutoTokenizer.from_pretrained(model)
    features = []
    for row in chosen:
        prompt = tokenizer(f"Review: {row['text']}\nSentiment:").input_ids
        answer = [*tokenizer(f" {row['label']}").input_ids, tokenizer.eos_token_id]
        features.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, parameter in base.named_parameters():
        parameter.requires_grad = method == "full" or name.endswith("bias")
    clipping = spec.training.max_grad_norm
    expected = reference_losses(base, tokenizer, features, tmp_path / "reference", 8, clipping, rate)
    assert losses(report) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("method", ["full", "lora", "promptTuning"])
def test_packed_and_padded_training_agree(tiny_model_dir: Path, tmp_path: Path, method: str):
    same = {"method": {"type": method, **({"lora": {"rank": 4, "dropout": 0.0}} if method == "lora" else {})}}
    packed = train(tiny_model_dir, tmp_path, "packed", **same)
    padded = train(tiny_model_dir, tmp_path, "padded", data__packing=False, **same)
    assert (packed.layout[:6], padded.layout[:6]) == ("packed", "padded")
    assert losses(packed) == pytest.approx(losses(padded), abs=SAME_LOSS)


def test_micro_batch_times_accumulation_is_all_that_counts(tiny_model_dir: Path, tmp_path: Path):
    same = {"method__lora": {"rank": 4, "dropout": 0.0}}
    whole, *split = (
        losses(train(tiny_model_dir, tmp_path, f"micro-{size}", training__microBatchSize=size, **same))
        for size in (8, 4, 1)
    )
    for other in split:
        assert other == pytest.approx(whole, abs=SAME_LOSS)


def test_an_attempt_with_less_memory_goes_on_down_the_same_curve(tiny_model_dir: Path, tmp_path: Path):
    same = {"method__lora": {"rank": 4, "dropout": 0.0}}
    straight = train(tiny_model_dir, tmp_path, "straight", **same)
    job, workspace = tiny_job(tiny_model_dir, tmp_path, **same), Workspace(tmp_path / "broken")
    workspace.root.mkdir()
    train_until(5, job, workspace)
    change = Adjustment(micro_batch_size=2, gradient_checkpointing=True)
    resumed = train_stage(Run(job, workspace, Silence(), StopFlag(), adjustment=change))
    assert resumed.resumed_from_step == 5
    assert losses(resumed) == pytest.approx(losses(straight), abs=SAME_LOSS)


def test_an_interrupted_run_goes_on_to_the_same_end(tiny_model_dir: Path, tmp_path: Path):
    straight = train(tiny_model_dir, tmp_path, "straight")
    job, workspace = tiny_job(tiny_model_dir, tmp_path), Workspace(tmp_path / "broken")
    workspace.root.mkdir()
    train_until(5, job, workspace)
    resumed = train_stage(Run(job, workspace, Silence(), StopFlag()))
    assert resumed.resumed_from_step == 5
    assert resumed.samples == straight.samples
    assert {point.step: point.answers for point in resumed.curve if point.answers} == {
        point.step: point.answers for point in straight.curve if point.answers
    }
    # Order, dropout, optimiser and schedule all go on: the very same numbers.
    assert losses(resumed) == losses(straight)
    first, second = (
        load_file(tmp_path / name / "tuned" / "adapter_model.safetensors") for name in ("straight", "broken")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_unfinished_checkpoint_is_passed_over(tiny_model_dir: Path, tmp_path: Path):
    job, workspace = tiny_job(tiny_model_dir, tmp_path), Workspace(tmp_path / "workspace")
    workspace.root.mkdir()
    train_until(5, job, workspace)
    (workspace.checkpoints / "checkpoint-5" / "COMPLETE").unlink()
    assert train_stage(Run(job, workspace, Silence(), StopFlag())).resumed_from_step == 3


def test_the_test_split_is_not_opened(tiny_model_dir: Path, tmp_path: Path):
    dataset = load_dataset(tiny_job(tiny_model_dir, tmp_path).spec.data, splits=(Split.TRAIN, Split.VALIDATION))
    with pytest.raises(LookupError, match="test split"):
        dataset.examples(Split.TEST)


def test_a_loss_that_is_no_number_ends_training_with_a_remedy(tiny_model_dir: Path, tmp_path: Path):
    overflowing = tmp_path / "overflowing"
    shutil.copytree(tiny_model_dir, overflowing)
    weights = load_file(overflowing / "model.safetensors")
    save_file(
        {name: tensor * 1e30 for name, tensor in weights.items()}, overflowing / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(TrainingDivergedError, match=r"the gradient is nan at the first step.*choose another model"):
        train(overflowing, tmp_path)


def test_a_loss_that_is_no_number_is_seen_before_a_checkpoint_takes_the_place_of_a_sound_one(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    passes = itertools.count(1)

    def breaks_off(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = loss_per_token(outputs, labels, num_items_in_batch)
        return loss * math.nan if next(passes) >= 71 else loss

    monkeypatch.setattr("finetune_trainer.train.loss_per_token", breaks_off)
    # The loss is written down every fifth step, checkpoints every second.
    changes = {"training__maxSteps": 1000, "training__microBatchSize": 8, "training__evalEverySteps": 1000}
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 72"):
        train(tiny_model_dir, tmp_path, checkpoint={"everySteps": 2, "keep": 2}, **changes)
    checkpoints = tmp_path / "workspace" / "checkpoints"
    assert sorted(step_of(path) for path in checkpoints.iterdir()) == [68, 70]


def test_weights_that_are_no_numbers_are_named(tiny_model_dir: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"NaN or infinity \(first in model\.norm\.weight\).*Fetch the model again"):
        train(broken, tmp_path)


BLAME = {
    "broken weights": (1, ["a.weight"], DataError, "first in a.weight"),
    "the first step": (1, [], TrainingDivergedError, "before anything was learnt"),
    "a later step": (7, [], TrainingDivergedError, r"at step 7; lower spec.training.learningRate \(now 0.1\)"),
}


@pytest.mark.parametrize("step, broken, kind, words", BLAME.values(), ids=BLAME.keys())
def test_a_loss_that_is_no_number_is_blamed_on_what_caused_it(
    step: int, broken: list[str], kind: type[Exception], words: str
):
    with pytest.raises(kind, match=words):
        raise divergence("the loss is nan", step, 0.1, Path("/model"), broken)


class Messages:
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def report(self, progress: Progress) -> None:
        self.messages.append(progress.message)


class Checkpoints:
    """Notes which checkpoints are complete whenever something is reported."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seen: list[list[int]] = []

    def report(self, progress: Progress) -> None:
        if self._folder.is_dir():
            self.seen.append(sorted(step_of(path) for path in self._folder.iterdir() if is_complete(path)))


class Moments:
    """Keeps what is told of training, by step."""

    def __init__(self) -> None:
        self.by_step: dict[int, Progress] = {}

    def report(self, progress: Progress) -> None:
        if progress.step is not None:
            self.by_step[progress.step] = progress


def test_every_moment_tells_what_the_last_look_at_validation_rows_found_also_before_it_was_interrupted(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Reporter, "_due", lambda _: True)
    moments = Moments()
    workspace = Workspace(tmp_path / "workspace")
    workspace.root.mkdir()
    train_until(5, tiny_job(tiny_model_dir, tmp_path, training__evalEverySteps=3), workspace, moments)
    report = train(tiny_model_dir, tmp_path, sink=moments, training__evalEverySteps=3)
    looks = {point.step: point.validation_loss for point in report.curve if point.validation_loss is not None}
    assert looks.keys() == {3, 6, 8}
    told = {step: moment.validation_loss for step, moment in moments.by_step.items()}
    assert told == {1: None, 2: None, **dict.fromkeys((3, 4, 5), looks[3]), 6: looks[6], 7: looks[6], 8: looks[8]}


@pytest.mark.parametrize("keep, left", [(1, [4]), (2, [3, 4])], ids=["one", "two"])
def test_as_many_checkpoints_are_kept_as_the_spec_says(
    tiny_model_dir: Path, tmp_path: Path, keep: int, left: list[int]
):
    workspace = Workspace(tmp_path / "workspace")
    workspace.root.mkdir()
    noted = Checkpoints(workspace.checkpoints)
    job = tiny_job(tiny_model_dir, tmp_path, checkpoint={"everySteps": 1, "keep": keep})
    train_until(4, job, workspace, noted)
    assert sorted(step_of(path) for path in workspace.checkpoints.iterdir()) == left
    counts = [len(steps) for steps in noted.seen if steps]
    assert counts == sorted(counts), "never fewer than before"
    assert max(counts) <= keep


def test_computing_activations_twice_changes_nothing_but_memory(tiny_model_dir: Path, tmp_path: Path):
    kept, twice = (
        losses(train(tiny_model_dir, tmp_path, wanted, training__gradientCheckpointing=wanted))
        for wanted in ("auto", "always")
    )
    assert twice == pytest.approx(kept, abs=SAME_LOSS)


def test_activations_are_computed_twice_where_they_would_not_fit(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said = {}
    for available in (1 << 40, 1 << 20):
        monkeypatch.setattr("finetune_trainer.train.available_bytes", lambda available=available: available)
        said[available] = Messages()
        train(tiny_model_dir, tmp_path, str(available), said[available])
    twice = "activations are computed twice, which needs less memory"
    assert [twice in heard.messages for heard in said.values()] == [False, True]


def test_a_learning_rate_that_drives_the_loss_up_is_warned_of(tiny_model_dir: Path, tmp_path: Path):
    said: list[str] = []

    class Listener(Silence):
        def report(self, progress: Progress) -> None:
            said.append(progress.message)

    full = {"method": {"type": "full"}, "training__maxSteps": 24, "training__evalEverySteps": 24}
    usual = train(tiny_model_dir, tmp_path, "usual", Listener(), **full)
    assert usual.warnings == () and not [message for message in said if message.startswith("note:")]
    # Random weights have so much to learn that their loss may be lower soon at any rate.
    learnt = tmp_path / "learnt"
    shutil.copytree(tiny_model_dir, learnt)
    shutil.copy2(Workspace(tmp_path / "usual").tuned / "model.safetensors", learnt)
    absurd = full | {"training__learningRate": 1, "training__warmupRatio": 0}
    report = train(learnt, tmp_path, "absurd", Listener(), **absurd)
    (warning,) = report.warnings
    assert "at a learning rate of" in warning and "spec.training.learningRate" in warning
    assert said.count(f"note: {warning}") == 1
    assert "learning rate" in train_result(report).message


def test_first_steps_and_those_behind_the_warm_up_are_logged_one_by_one(tiny_model_dir: Path, tmp_path: Path):
    report = train(
        tiny_model_dir,
        tmp_path,
        training__maxSteps=400,
        training__globalBatchSize=1,
        training__warmupRatio=0.2,
        training__evalEverySteps=400,
        checkpoint__everySteps=400,
    )
    steps = [point.step for point in report.curve if point.loss is not None]
    assert steps == [*range(1, 21), *range(22, 81, 2), *range(81, 101), *range(102, 401, 2)]


def test_a_stage_that_is_done_is_not_run_again(tiny_model_dir: Path, tmp_path: Path):
    first = train(tiny_model_dir, tmp_path)
    assert train(tiny_model_dir, tmp_path) == first.model_copy(update={"resumed_from_step": first.steps})


def test_a_full_disk_in_training_is_named(tiny_model_dir: Path, tmp_path: Path):
    full = tmp_path / "full"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", full], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system here: a full disk cannot be had")
    try:
        with pytest.raises(StorageError, match=r"cannot write a checkpoint to .*full.*--workspace"):
            train(tiny_model_dir, tmp_path, "full", method={"type": "full"})
    finally:
        # Lazily: the failed writer may still hold its file open.
        subprocess.run(["umount", "--lazy", full], check=True)


def test_memory_that_does_not_do_for_a_step_is_told_with_the_rows_that_did_not_fit(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run_out(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("finetune_trainer.train.loss_per_token", run_out)
    result = run_one(Stage.TRAIN, tiny_job(tiny_model_dir, tmp_path), tmp_path / "workspace", Silence())
    assert (result.exit_code, result.micro_batch_size) == (ExitCode.OUT_OF_MEMORY, 8)
    assert "a training step with 8 rows did not fit into memory; lower" in result.message


def test_a_micro_batch_that_does_not_divide_the_rows_leaves_none_out():
    training = TrainingSpec(epochs=1, global_batch_size=128, micro_batch_size=64)
    steps = plan_steps(training, rows=91, longest_tokens=10)
    assert steps.total * steps.micro_batch * steps.accumulation >= 91
