"""A few validation rows that the model answers while it learns: they show what a loss does not say."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune_api.report import SampleQuestion
from finetune_trainer.example import Encoded
from finetune_trainer.generation import generate
from finetune_trainer.methods import untuned

MOST_QUESTIONS = 4
"""Of all tasks together: they are asked at every look at the validation rows."""
LONGEST_ANSWER_TOKENS = 48
_MARGIN_TOKENS = 8


class SampleAnswers:
    """The questions, and who is asked."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, validation: Mapping[str, Sequence[Encoded]]
    ) -> None:
        """Choose from the ``validation`` rows of every task, as many of each as there is room for."""
        self._model = model
        self._tokenizer = tokenizer
        self._asked = choose_questions(validation)

    def before_training(self) -> tuple[SampleQuestion, ...]:
        """Return the questions with the base model's answers."""
        return tuple(
            SampleQuestion(
                task=task,
                prompt=self._text(item.prompt_ids),
                expected=self._text(item.completion_ids),
                base=answer,
            )
            for (task, item), answer in zip(self._asked, self.ask(of_base=True), strict=True)
        )

    def ask(self, of_base: bool = False) -> list[str]:
        """Return what the model, as it is now, says to each question; greedy, so no random number is drawn."""
        if not self._asked:
            return []
        rows = [item for _, item in self._asked]
        longest = max(len(item.completion_ids) for item in rows) + _MARGIN_TOKENS
        # Every completion that is trained on ends with the token that ends an answer.
        ends = [*(item.ids[-1] for item in rows), self._tokenizer.eos_token_id]
        was_training = self._model.training
        # What trains the model's own weights has not changed them when the base is asked.
        with untuned(self._model) if of_base else nullcontext():
            answers = generate(
                self._model,
                self._tokenizer,
                [item.prompt_ids for item in rows],
                min(longest, LONGEST_ANSWER_TOKENS),
                list(dict.fromkeys(ends)),
                len(rows),
                lambda done, total: None,
            )
        self._model.train(was_training)
        return answers

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def choose_questions(validation: Mapping[str, Sequence[Encoded]]) -> list[tuple[str, Encoded]]:
    """Return rows from all over each task's, with the tasks they are of; without a row a task asks nothing. Pure."""
    of_each = max(1, MOST_QUESTIONS // max(1, len(validation)))
    asked = [
        (task, rows[place * len(rows) // of_each])
        for task, rows in validation.items()
        for place in range(min(of_each, len(rows)))
    ]
    return asked[:MOST_QUESTIONS]
