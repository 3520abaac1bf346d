"""When validation has got no better for long enough, and which step was the best."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune_api.spec import TrainingSpec
from finetune_trainer.best_weights import BestWeights, Standing, find_standing, schedule_note
from finetune_trainer.process_group import ProcessGroup


def history(*losses: float) -> list[dict[str, float]]:
    return [entry for step, loss in enumerate(losses, 1) for entry in ({"step": step, "loss": 9.0}, at(step, loss))]


def at(step: int, loss: float) -> dict[str, float]:
    return {"step": step, "validation_loss": loss}


STANDINGS = {
    "nothing was measured": ([{"step": 1, "loss": 2.0}], None),
    "the first is the best": (history(1.0), Standing(1, 0)),
    "it gets better": (history(3.0, 2.0, 1.0), Standing(3, 0)),
    "it got worse twice": (history(3.0, 1.0, 2.0, 1.5), Standing(2, 2)),
    "as good is no gain": (history(2.0, 1.0, 1.0), Standing(2, 1)),
    "a task's figure counts, not the loss": (
        [at(1, 1.0) | {"watched": 0.5}, at(2, 2.0) | {"watched": 0.75}, at(3, 0.5) | {"watched": 0.75}],
        Standing(2, 1),
    ),
    "no number is no gain": (history(float("nan"), 1.0, float("nan")), Standing(2, 1)),
}


@pytest.mark.parametrize("losses, expected", STANDINGS.values(), ids=STANDINGS)
def test_the_best_step_has_the_lowest_loss_or_the_highest_figure_and_is_the_first_of_equals(
    losses: Any, expected: Standing | None
):
    assert find_standing(losses) == expected


def test_the_best_weights_come_back_and_training_ends_in_time(tmp_path: Path):
    model = nn.Linear(1, 1, bias=False)
    best = BestWeights(model, 2, ProcessGroup())
    state, control, args = TrainerState(), TrainerControl(), TrainingArguments(output_dir=str(tmp_path))
    for step, loss in enumerate((3.0, 1.0, 2.0, 1.5), 1):
        assert not control.should_training_stop
        nn.init.constant_(model.weight, step)
        state.global_step = step
        state.log_history.append(at(step, loss))
        best.on_step_end(args, state, control)
    assert (control.should_training_stop, best.has_ended, best.step) == (True, True, 2)
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    best.on_save(args, state, control)

    again = nn.Linear(1, 1, bias=False)
    resumed = BestWeights(again, 2, ProcessGroup())
    resumed.on_train_begin(args, state, control)
    resumed.restore()
    assert (again.weight.item(), resumed.step) == (2.0, 2)
    best.restore()
    assert torch.equal(model.weight, again.weight)


@pytest.mark.parametrize("schedule, is_said", [("cosine", True), ("linear", True), ("constant", False)])
def test_a_falling_learning_rate_under_early_stopping_is_said(schedule: str, is_said: bool):
    stopping = TrainingSpec.model_validate({"schedule": schedule, "earlyStopping": {}})
    assert ("schedule: constant" in schedule_note(stopping)) is is_said
    assert schedule_note(TrainingSpec.model_validate({"schedule": schedule})) == ""
