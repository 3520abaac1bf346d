"""Questions that training rows give away: found by their words, whatever stands around them."""

import json
from pathlib import Path

import pytest

from finetune_api.report import Overlap
from finetune_api.spec import DataSpec
from finetune_trainer.dataset import load_dataset
from finetune_trainer.example import Example
from finetune_trainer.overlap import OVERLAP_WORDS, SHORTEST_QUESTION, find_overlaps, find_shared_passages
from finetune_trainer.split import Split

LONG = "which of these rivers flows through the city of Paris before it comes to the sea the Seine or the Loire"
SHORT = "the capital of the far land is Oslo"


def row(prompt: str, completion: str = "") -> Example:
    return Example(task="t", row=0, prompt=prompt, completion=completion, template=0, key="", values={})


def overlapping(train: str, *questions: str, completion: str = "") -> int:
    (found,) = find_overlaps([row("nothing of the kind"), row(train, completion)], {"general": questions})
    assert found.questions == len(questions)
    assert bool(found.first) is bool(found.overlapping)
    return found.overlapping


def test_a_copied_question_is_found_whatever_stands_around_it():
    assert overlapping(f"Quiz! {LONG.upper()}, or another?", LONG) == 1


def test_enough_words_in_a_row_are_needed():
    words = LONG.split()
    assert overlapping(" ".join(words[:OVERLAP_WORDS]), LONG) == 1
    assert overlapping(" ".join(words[: OVERLAP_WORDS - 1]), LONG) == 0
    assert overlapping(" ".join(reversed(words)), LONG) == 0


def test_a_short_question_must_stand_there_as_a_whole():
    assert len(SHORT.split()) == SHORTEST_QUESTION
    assert overlapping("we learnt that the capital of the far land is oslo.", SHORT) == 1
    assert overlapping("we learnt that the capital of the far land is Rome.", SHORT) == 0
    assert overlapping("yes", "yes") == 0


def test_question_and_answer_may_be_split_over_prompt_and_completion():
    assert overlapping("the capital of the far land is", SHORT, completion="Oslo") == 1


def test_every_turn_of_a_chat_is_searched(tmp_path: Path):
    roles = ("user", "assistant") * 2
    chats = []
    for row in range(60):
        # Chats that are alike would stay together in one split.
        own = " ".join(f"word{row}of{place}" for place in range(60))
        texts = (f"{LONG}? {own}", "The Seine.", "And which of them is longer?", "The Loire.")
        chats.append({"turns": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]})
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))
    task = {"name": "talk", "source": (tmp_path / "chats.jsonl").as_uri(), "messages": "turns"}
    rows = load_dataset(
        DataSpec.model_validate({"tasks": [task], "splits": {"validation": 0.3, "test": 0.3}})
    ).examples(Split.TRAIN)
    assert all(LONG not in row.prompt for row in rows)
    (found,) = find_overlaps(rows, {"general": [LONG, SHORT]})
    assert (found.overlapping, found.given_away, found.first) == (1, 1, LONG.lower())


@pytest.mark.parametrize(
    "rows, given_away",
    [
        ([f"Quiz! {LONG}, or another?"], 1),
        ([" ".join(LONG.split()[:-1])], 0),
        # Each half in a row of its own: neither holds the question.
        ([" ".join(LONG.split()[:15]), " ".join(LONG.split()[3:])], 0),
        ([SHORT], 1),
    ],
    ids=["a long one", "all but its last word", "over two rows", "a short one"],
)
def test_a_question_is_given_away_by_a_row_that_holds_all_of_it(rows: list[str], given_away: int):
    # Many questions may begin alike, and one may be asked twice.
    (found,) = find_overlaps(map(row, rows), {"general": [f"{LONG} today", LONG, SHORT, "Oslo"]})
    assert found.given_away == given_away
    if given_away:
        assert found.first == (SHORT if rows == [SHORT] else LONG).lower()


FORM = "below is an instruction that describes a task with an input that gives more context to it"


def test_another_question_on_the_same_passage_is_found_and_what_most_rows_say_is_not():
    trained = [f"{FORM} {number}" for number in range(40)] + [f"what is it? {LONG}"] * 2
    rows = {"t.testSource": [f"{FORM} when {LONG}", FORM, SHORT], "t.validationSource": []}
    test, validation = find_shared_passages(trained, rows)
    assert (test.overlapping, test.given_away, test.questions) == (1, 0, 3)
    assert test.first in LONG.lower()
    assert validation == Overlap(source="t.validationSource", questions=0, overlapping=0)


def test_of_a_long_text_a_passage_is_found_wherever_it_stands():
    passage = " ".join(f"word{number}" for number in range(60))
    words = [f"other{number}" for number in range(3000)]
    for place in (0, 1571, 3000):
        text = " ".join([*words[:place], passage, *words[place:]])
        (found,) = find_shared_passages([passage], {"t.testSource": [text]})
        assert found.overlapping == 1


def test_every_source_is_counted_for_itself():
    found = list(find_overlaps([row(SHORT), row(LONG)], {"general": [SHORT, SHORT + " today", "x"], "own": ["y"]}))
    assert found == [
        Overlap(source="general", questions=3, overlapping=1, given_away=1, first=SHORT.lower()),
        Overlap(source="own", questions=1, overlapping=0),
    ]
