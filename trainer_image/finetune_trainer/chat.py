"""Chats in a column of the rows: read, checked, and cut where the answer begins. Pure.

Two layouts are known by their keys: ``role`` and ``content`` (OpenAI, chat templates), ``from`` and ``value``
(ShareGPT). The last turn is the assistant's and is what the model shall answer; all before it is the prompt.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from finetune_trainer.errors import DataError
from finetune_trainer.excerpt import excerpt

Turn = tuple[str, str]
"""Role (system, user or assistant) and text."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_KEYS = (("role", "content"), ("from", "value"))


@dataclass(frozen=True, slots=True)
class Chat:
    """One conversation that ends with an answer."""

    earlier: tuple[Turn, ...]
    """What was said before the question: a system prompt, then turns in pairs."""
    question: str
    answer: str

    @property
    def asked(self) -> str:
        """All that tells this chat from others but the answer; system prompts are often the same in all."""
        return "\n".join([*(text for role, text in self.earlier if role != "system"), self.question])

    def with_question(self, change: Callable[[str], str]) -> list[dict[str, str]]:
        """Return the turns, as a row has them, with the question changed."""
        turns = (*self.earlier, ("user", change(self.question)), ("assistant", self.answer))
        return [{"role": role, "content": text} for role, text in turns]


@dataclass(frozen=True, slots=True)
class ChatColumn:
    """A column that holds chats; ``field`` is its setting's path, for messages."""

    name: str
    field: str

    @property
    def prompt_columns(self) -> frozenset[str]:
        """The column itself."""
        return frozenset({self.name})

    @property
    def completion_columns(self) -> frozenset[str]:
        """The answer is in the same column."""
        return frozenset()

    @property
    def optional_columns(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def read(self, row: Mapping[str, object], number: int) -> Chat:
        """Return the chat of ``row``, the ``number``-th of its source counted from 0.

        Raises:
            DataError: it is none, or ends with no answer.
        """
        where = f"{self.field}: row {number} (counted from 0), column {self.name!r}"
        turns = [_turn(item, f"{where}[{place}]") for place, item in enumerate(_listed(row.get(self.name), where))]
        talk = turns[1:] if turns and turns[0][0] == "system" else turns
        for place, (role, _) in enumerate(talk, start=len(turns) - len(talk)):
            expected = ("user", "assistant")[(place - len(turns) + len(talk)) % 2]
            if role != expected:
                raise DataError(
                    f"{where}[{place}] is the {role}'s, where the {expected}'s turn is: a chat is an optional system "
                    f"prompt, then user and assistant in turns. Join or drop turns until it is so."
                )
        if not talk or talk[-1][0] != "assistant":
            raise DataError(
                f"{where} ends with {'nothing' if not talk else 'the user'}, so there is no answer to learn. Drop the "
                f"turns behind the last answer, or the row."
            )
        return Chat(tuple(turns[:-2]), turns[-2][1], turns[-1][1])


def _listed(value: object, where: str) -> Sequence[object]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where} is text that is no JSON list: {excerpt(value)}. Write a list of turns."
            ) from error
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where} holds no list of turns but {excerpt(value)}. Write a list of objects with role and content (or "
            f"from and value)."
        )
    return value


def _turn(item: object, where: str) -> Turn:
    keys = next((keys for keys in _KEYS if isinstance(item, Mapping) and keys[0] in item), None)
    if keys is None or not isinstance(item, Mapping):
        raise DataError(f"{where} is no turn but {excerpt(item)}. Write an object with role and content.")
    role, text = item[keys[0]], item.get(keys[1])
    if role not in _ROLES:
        raise DataError(
            f"{where}: the {keys[0]} {excerpt(role)} is not known; use system, user and assistant (or human and gpt). "
            f"Chats with tools are not supported."
        )
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{where}: the {keys[1]} is {excerpt(text)}, not a text with something in it. Fill it in or drop the row."
        )
    return _ROLES[str(role)], text
