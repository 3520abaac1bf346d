"""Questions that training rows give away: found by their words, whatever stands around them."""

from finetune_api.report import Overlap
from finetune_trainer.example import Example
from finetune_trainer.overlap import OVERLAP_WORDS, SHORTEST_QUESTION, find_overlaps

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


def test_every_source_is_counted_for_itself():
    found = list(find_overlaps([row(SHORT), row(LONG)], {"general": [SHORT, SHORT + " today", "x"], "own": ["y"]}))
    assert found == [
        Overlap(source="general", questions=3, overlapping=1, first=SHORT.lower()),
        Overlap(source="own", questions=1, overlapping=0),
    ]
