"""What is written down while a model is trained: the curve, speed, the loss of rows that are looked at, answers."""

import math
import time
from collections.abc import Sequence
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_api.report import LossPoint, Progress, SampleQuestion, Stage, TimeEstimate
from finetune_trainer.example import Encoded
from finetune_trainer.first_losses import find_high_rate, is_looked_at, last_step
from finetune_trainer.mixture import EpochRows
from finetune_trainer.progress import Reporter
from finetune_trainer.sample_answers import SampleAnswers
from finetune_trainer.scoring import Scorer
from finetune_trainer.settings_map import Steps, estimating_step, warm_up_steps
from finetune_trainer.training_input import TrainingInput

VALIDATION_ROWS = 128
"""The validation loss during training guides the eye; the numbers that count come from evaluation."""


class Recorder(TrainerCallback):
    """Keeps the curve, measures speed, scores the validation rows and tells the sink."""

    def __init__(
        self,
        given: TrainingInput,
        epoch: EpochRows[Encoded],
        scorer: Scorer,
        sampled: SampleAnswers | None,
        every: int,
        steps: Steps,
    ) -> None:
        self._reporter = Reporter(given.sink, Stage.TRAIN)
        self._scorer = scorer
        self._sampled = sampled
        self._validation = {
            task: rows for task, items in given.validation.items() if (rows := _spread(items, len(given.validation)))
        }
        self._general = given.general
        self._watched = given.watched
        self._every = every
        self._rows_per_step = steps.rows
        self._warm_up = warm_up_steps(given.job.spec.training, steps)
        self._tokens_per_row = sum(len(epoch[index].ids) for index in range(len(epoch))) / len(epoch)
        self._curve: dict[int, LossPoint] = {}
        self._loss: float | None = None
        self._validation_loss: float | None = None
        self._rate: float | None = None
        self._started = 0.0
        self._first_step = 0
        self._aside = 0.0  # seconds spent on anything but training steps
        self.estimate: TimeEstimate | None = None
        self.rows_per_second = 0.0

    @property
    def seconds(self) -> float:
        """Since training began, looks at the validation rows included."""
        return time.monotonic() - self._started

    @property
    def tokens_per_second(self) -> float:
        """Of the training rows, prompts included."""
        return self.rows_per_second * self._tokens_per_row

    def curve(self, state: TrainerState) -> tuple[LossPoint, ...]:
        """Return the whole curve, what a resumed run had logged before included."""
        for entry in _history(state):
            step = int(entry["step"])
            point = self._curve.get(step, LossPoint(step=step))
            fields: dict[str, Any] = {
                "loss": entry.get("loss", point.loss),
                "learning_rate": entry.get("learning_rate", point.learning_rate),
                "validation_loss": entry.get("validation_loss", point.validation_loss),
                "validation_losses": entry.get("validation_losses", point.validation_losses),
                "watched": entry.get("watched", point.watched),
                "general_loss": entry.get("general_loss", point.general_loss),
                "answers": tuple(entry.get("answers", point.answers)),
            }
            self._curve[step] = point.model_copy(update=fields)
        points = [point for _, point in sorted(self._curve.items())]
        return tuple(point for point in points if point.loss or point.validation_loss or point.general_loss)

    def samples(self, state: TrainerState) -> tuple[SampleQuestion, ...]:
        """Return what the model was asked, with the base's answers."""
        found = next((entry["samples"] for entry in _history(state) if "samples" in entry), ())
        return tuple(SampleQuestion.model_validate(question) for question in found)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask the base what the tuned model will be asked, and start the clock."""
        if self._sampled is not None and state.global_step == 0:
            questions = [question.model_dump(by_alias=True) for question in self._sampled.before_training()]
            # A resumed run cannot ask the base any more.
            _history(state).append({"step": 0, "samples": questions} | self._forgotten())
        self._validation_loss = next(
            (entry["validation_loss"] for entry in reversed(_history(state)) if "validation_loss" in entry), None
        )
        self._started, self._first_step = time.monotonic(), state.global_step

    def warnings(self, state: TrainerState) -> tuple[str, ...]:
        """Return what the losses give reason to warn of."""
        warning = find_high_rate(self.curve(state), self._warm_up)
        return () if warning is None else (warning,)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the newest loss and learning rate, and say early what the first ones give reason to warn of."""
        self._loss = kwargs["logs"].get("loss", self._loss)
        self._rate = kwargs["logs"].get("learning_rate", self._rate)
        # Behind the last step there is a log without a loss as well.
        if "loss" in kwargs["logs"] and state.global_step == min(last_step(self._warm_up), state.max_steps):
            for warning in self.warnings(state):
                self._reporter.say(f"note: {warning}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure speed, look at the validation rows when it is their turn, and tell the sink."""
        if is_looked_at(state.global_step, self._warm_up):
            control.should_log = True
        seconds = self.seconds - self._aside
        done = state.global_step - self._first_step
        self.rows_per_second = done * self._rows_per_step / seconds
        eta = seconds / done * (state.max_steps - state.global_step)
        if state.global_step == estimating_step(self._first_step, state.max_steps):
            self.estimate = TimeEstimate(step=state.global_step, seconds=self.seconds + eta)
        has_looked = self._validate(state)
        self._reporter.tell(
            Progress(
                stage=Stage.TRAIN,
                message="training",
                percent=100 * state.global_step / state.max_steps,
                step=state.global_step,
                total_steps=state.max_steps,
                epoch=state.epoch,
                loss=self._loss,
                validation_loss=self._validation_loss,
                learning_rate=self._rate,
                rows_per_second=self.rows_per_second,
                tokens_per_second=self.tokens_per_second,
                eta_seconds=eta,
            ),
            always=has_looked or state.global_step == state.max_steps,
        )

    def _validate(self, state: TrainerState) -> bool:
        """Look at the validation rows if it is their turn; return whether it was."""
        if not self._validation or (state.global_step % self._every and state.global_step != state.max_steps):
            return False
        started = time.monotonic()
        losses = {task: self._scorer.mean_loss(rows) for task, rows in self._validation.items()}
        # A task counts as one, however many rows or tokens it has.
        self._validation_loss = sum(losses.values()) / len(losses)
        # In the trainer's own history, so that a resumed run knows it.
        measured = {"validation_loss": self._validation_loss, "validation_losses": losses}
        entry = {"step": state.global_step} | measured | self._forgotten()
        if self._watched is not None:
            entry["watched"] = self._watched.measure(self._scorer)
        if self._sampled is not None:
            entry["answers"] = self._sampled.ask()
        self._aside += time.monotonic() - started
        _history(state).append(entry)
        return True

    def _forgotten(self) -> dict[str, Any]:
        return {"general_loss": self._scorer.mean_loss(self._general)} if self._general else {}


def _history(state: TrainerState) -> list[dict[str, Any]]:
    """Return what is kept of every step; more than the numbers that transformers puts there."""
    return cast("list[dict[str, Any]]", state.log_history)


def _spread(items: Sequence[Encoded], tasks: int) -> Sequence[Encoded]:
    """Return a task's part of the rows to look at, from all over them: sources are often sorted."""
    step = max(1, math.ceil(len(items) * tasks / VALIDATION_ROWS))
    return items[::step]
