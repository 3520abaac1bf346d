"""Early stopping: end training when a figure of validation rows gets no better, and keep the weights of its best point.

Chosen on validation rows alone. The best weights stay in memory and are written into every checkpoint, so that a run
that goes on from one knows them, wherever it goes on.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_api.spec import Schedule, TrainingSpec
from finetune_trainer.checkpoint import folder_of
from finetune_trainer.process_group import ProcessGroup

BEST = "best.safetensors"
"""Name of the file in a checkpoint."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How validation has gone so far."""

    best_step: int
    without_gain: int
    """Evaluations since then."""


def find_standing(history: Iterable[Mapping[str, float]]) -> Standing | None:
    """Return the best step, of equally good ones the first; absent before anything was measured.

    It has the highest ``watched`` figure where a task's is, else the lowest ``validation_loss``.
    """
    losses = [
        (int(entry["step"]), -entry["watched"] if "watched" in entry else entry["validation_loss"])
        for entry in history
        if "validation_loss" in entry
    ]
    if not losses:
        return None
    # What is no number is never better than what is one.
    place = min(range(len(losses)), key=lambda number: math.inf if math.isnan(losses[number][1]) else losses[number][1])
    return Standing(losses[place][0], len(losses) - 1 - place)


def schedule_note(training: TrainingSpec) -> str:
    """Return, for people, what early stopping does not go well with; empty where there is nothing to say."""
    if training.early_stopping is None or training.schedule is Schedule.CONSTANT:
        return ""
    return (
        f"a {training.schedule.value} schedule lowers the learning rate over all planned steps, and early stopping "
        "may leave out the gentle last ones; spec.training.schedule: constant has none"
    )


class BestWeights(TrainerCallback):
    """Watches what validation gives in the trainer's history; to be called behind whoever writes them there."""

    def __init__(self, model: nn.Module, patience: int, group: ProcessGroup) -> None:
        self._trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        self._patience = patience
        self._group = group
        self._kept: dict[str, Tensor] = {}
        self.step: int | None = None
        """Whose weights are kept."""
        self.has_ended = False
        """Whether it was this that ended training."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up what the checkpoint that a run goes on from holds."""
        standing = find_standing(state.log_history)
        if standing is not None:
            self.step = standing.best_step
            self._kept = load_file(folder_of(Path(str(args.output_dir)), state.global_step) / BEST)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the weights where they are the best yet, end training where they have not been for long."""
        standing = find_standing(state.log_history)
        if standing is None:
            return
        if standing.best_step == state.global_step:
            self.step = state.global_step
            self._kept = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._trained.items()}
        # Their losses may differ in the last bit; one that goes on alone would wait for the others for ever.
        if self._group.any(standing.without_gain >= self._patience):
            self.has_ended = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the best weights into the checkpoint, before it is sealed."""
        if self._kept and self._group.is_first_of_node:
            save_file(self._kept, folder_of(Path(str(args.output_dir)), state.global_step) / BEST)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights into the model."""
        for name, kept in self._kept.items():
            self._trained[name].copy_(kept)
