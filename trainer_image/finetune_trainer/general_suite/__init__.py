"""The general suite: what a tuned model should not have lost, in rows that belong to no training set.

Three tasks of a closed choice, scored by likelihood, prose for the loss, and questions for the form of answers. All
rows are made from the files beside this module, always the same ones in the same order. Every second group of
alike rows is of the development half, on which a remedy may be chosen; the other half decides.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

CHOICES = 4
"""Answers beside each other at most, the right one among them."""

SHIPPED = "general"
"""Source of the rows that ship with the image."""

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@dataclass(frozen=True, slots=True)
class GeneralRow:
    """A sentence to be continued, and the ways to continue it."""

    task: str
    group: str
    """Rows of one group are alike: a relation, a subject."""
    prompt: str
    choices: tuple[str, ...]
    """Continuations with the blank before them."""
    right: int
    """Index of the right one."""
    source: str = SHIPPED
    """Rows of one source are judged together."""


@dataclass(frozen=True, slots=True)
class GeneralSuite:
    """What general ability is measured on."""

    rows: tuple[GeneralRow, ...]
    texts: tuple[str, ...]
    open_questions: tuple[str, ...] = ()
    """Whose answers are generated, and looked at for their form."""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every prompt with each of its choices, row by row, then every text, parted: what a model is asked."""
        choices = [(row.prompt, choice) for row in self.rows for choice in row.choices]
        return [*choices, *map(text_parts, self.texts)]

    @property
    def size(self) -> int:
        """Rows, texts and questions together."""
        return len(self.rows) + len(self.texts) + len(self.open_questions)

    @property
    def questions(self) -> dict[str, list[str]]:
        """Everything that is asked, by source; a row with its right answer."""
        asked: dict[str, list[str]] = {SHIPPED: [*self.texts, *self.open_questions]}
        for row in self.rows:
            asked.setdefault(row.source, []).append(row.prompt + row.choices[row.right])
        return asked

    def development(self) -> "GeneralSuite":
        """Return the rows on which something may be chosen."""
        return GeneralSuite(self._half(0), ())

    def deciding(self) -> "GeneralSuite":
        """Return what nothing was chosen on."""
        return GeneralSuite(self._half(1), self.texts, self.open_questions)

    def _half(self, number: int) -> tuple[GeneralRow, ...]:
        """Return every second group of each task: rows that are alike stay together."""
        seen: dict[tuple[str, str], list[str]] = {}
        kept = []
        for row in self.rows:
            groups = seen.setdefault((row.source, row.task), [])
            if row.group not in groups:
                groups.append(row.group)
            if groups.index(row.group) % 2 == number:
                kept.append(row)
        return tuple(kept)


def text_parts(text: str) -> tuple[str, str]:
    """Return the first word of a text, which nothing predicts, and the rest, whose likelihood is measured."""
    before, blank, after = text.partition(" ")
    return before, blank + after


@cache
def general_rows() -> tuple[GeneralRow, ...]:
    """Return all rows with a closed choice: knowledge, grammar and counting."""
    return (*_knowledge(), *_grammar(), *_counting())


@cache
def general_texts() -> tuple[str, ...]:
    """Return prose whose loss is measured, a paragraph each."""
    return tuple(_load("texts.yaml"))


@cache
def open_questions() -> tuple[str, ...]:
    """Return short questions that belong to no task."""
    return tuple(_load("questions.yaml"))


def _knowledge() -> list[GeneralRow]:
    rows = []
    for relation in _load("knowledge.yaml"):
        answers = list(relation["pairs"].values())
        for position, (subject, answer) in enumerate(relation["pairs"].items()):
            # Neighbours in the list, so that every answer is as often wrong as it is right.
            others = [answers[(position + step) % len(answers)] for step in range(CHOICES)]
            rotated = others[position % CHOICES :] + others[: position % CHOICES]
            prompt = relation["prompt"].format(subject=subject)
            rows.append(_row("knowledge", relation["relation"], prompt, rotated, answer))
    return rows


def _grammar() -> list[GeneralRow]:
    content = _load("grammar.yaml")
    rows = []
    for subject in content["subjects"]:
        for number, other in (("one", "many"), ("many", "one")):
            for attractor in content["attractors"][other]:
                for verb in content["verbs"]:
                    prompt = f"{subject[number]} {attractor}"
                    rows.append(_row("grammar", subject["one"], prompt, [verb["one"], verb["many"]], verb[number]))
    return rows


def _counting() -> list[GeneralRow]:
    rows = []
    for first in range(1, 7):
        for second in range(1, 7):
            total = first + second
            prompt = (
                f"One plus one is two. Two plus three is five. {NUMBERS[first].capitalize()} plus {NUMBERS[second]} is"
            )
            near = [NUMBERS[value] for value in (total - 2, total - 1, total, total + 1) if 0 <= value < len(NUMBERS)]
            rows.append(_row("counting", NUMBERS[first], prompt, near, NUMBERS[total]))
    return rows


def _row(task: str, group: str, prompt: str, choices: list[str], answer: str) -> GeneralRow:
    return GeneralRow(task, group, prompt, tuple(f" {choice}" for choice in choices), choices.index(answer))


def _load(name: str) -> Any:
    return yaml.safe_load(files(__name__).joinpath(name).read_text("utf-8"))
