"""Chats in a column: both layouts read alike, what is no chat is named with its place."""

import json
from typing import Any

import pytest

from finetune_trainer.chat import Chat, ChatColumn
from finetune_trainer.errors import DataError

COLUMN = ChatColumn("turns", "spec.data.tasks[0].messages")


def openai(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def read(value: object) -> Chat:
    return COLUMN.read({"turns": value}, 3)


TALK = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And you?"), ("assistant", "Fine"))


def test_the_last_turn_is_the_answer_and_the_one_before_it_the_question():
    chat = read(openai(*TALK))
    assert chat == Chat(TALK[:3], "And you?", "Fine")
    # Neither the answer nor what all chats share tells this one from others.
    assert chat.asked == "Hi\nHello\nAnd you?"


def test_sharegpt_and_text_of_json_read_as_the_same_chat():
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [{"from": names[role], "value": text} for role, text in TALK]
    assert read(sharegpt) == read(json.dumps(openai(*TALK))) == read(openai(*TALK))


BAD: dict[str, tuple[Any, str]] = {
    "no list": (7, "row 3 .*column 'turns' holds no list of turns but 7"),
    "nothing": (None, "holds no list of turns but None"),
    "an empty list": ([], r"holds no list of turns but \[\]"),
    "text that is no JSON": ("Hi there", "is text that is no JSON list: 'Hi there'"),
    "nested without end": ("[" * 100_000, "is text that is no JSON list"),
    "a turn that is text": (["Hi"], r"\[0\] is no turn but 'Hi'. Write an object with role and content"),
    "a turn with other keys": ([{"speaker": "A", "text": "Hi"}], "is no turn but"),
    "a role nobody knows": (openai(("user", "Hi"), ("wizard", "Ho")), r"\[1\]: the role 'wizard' is not known"),
    "a tool's turn": (openai(("user", "Hi"), ("tool", "3")), "Chats with tools are not supported"),
    "a turn without text": ([{"role": "user"}], r"\[0\]: the content is None"),
    "a turn of spaces": (openai(("user", "Hi"), ("assistant", "  ")), r"\[1\]: the content is '  '"),
    "content in parts": ([{"role": "user", "content": [{"type": "text"}]}], "not a text with something in it"),
    "the assistant begins": (openai(("assistant", "Hi")), r"\[0\] is the assistant's, where the user's turn is"),
    "the user speaks twice": (openai(("user", "a"), ("user", "b")), r"\[1\] is the user's, where the assistant's"),
    "a second system prompt": (openai(TALK[0], TALK[0]), r"\[1\] is the system's, where the user's"),
    "the user has the last word": (openai(("user", "Hi")), "ends with the user, so there is no answer to learn"),
    "a system prompt alone": (openai(("system", "Hi")), "ends with nothing"),
}


@pytest.mark.parametrize("value, words", BAD.values(), ids=BAD.keys())
def test_what_is_no_chat_is_named_with_its_place(value: object, words: str):
    with pytest.raises(DataError, match=words) as caught:
        read(value)
    assert "spec.data.tasks[0].messages: row 3 (counted from 0)" in str(caught.value)
    assert len(str(caught.value)) < 500
