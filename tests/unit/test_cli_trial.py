"""`finetune try`: what adapters are called, and what a question is. That they answer, tests/integration shows."""

import pytest

from finetune_cli.trial import as_uri, described, names_of, parsed
from finetune_trainer.errors import SpecError


@pytest.mark.parametrize(
    "places, names",
    [
        (["out/default/nli-0123abcd/model"], ["nli-0123abcd"]),
        (["s3://bucket/team/nli-1/model/", "plain"], ["nli-1", "plain"]),
        (["a/nli/model", "b/nli/model", "c/nli"], ["nli", "nli#2", "nli#3"]),
        (["model"], ["model"]),
    ],
)
def test_an_adapter_is_called_as_its_jobs_folder(places: list[str], names: list[str]):
    assert names_of(places) == names


def test_a_place_is_a_path_or_a_uri():
    assert as_uri("s3://bucket/a/model") == "s3://bucket/a/model"
    assert as_uri("/a/model") == "file:///a/model"


def test_a_json_object_is_a_row_and_anything_else_a_prompt():
    assert parsed('{"text": "good"}') == {"text": "good"}
    assert parsed("[1, 2] are numbers") == "[1, 2] are numbers"
    with pytest.raises(SpecError, match="begins like a row and is no JSON"):
        parsed("{{ text }}")


def test_answers_stand_below_each_other_in_one_line_each():
    lines = list(described("Who?", {"base": "me", "reviews": "you\nand\x1b[2J I"}, "text"))
    assert lines == ["> Who?", "base     me", "reviews  you\\nand [2J I", ""]
