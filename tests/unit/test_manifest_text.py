"""Texts that YAML can hold and a job cannot: each refused in words, with its line, and none brings the reader down."""

import pytest

from finetune_api.job import InvalidJobError
from finetune_api.manifest_text import read_manifest

HEAD = "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("? [a]\n: b\n", r"job.yaml:3: the manifest: has a key that is not text", id="a list as a key"),
        pytest.param("? {a: b}\n: c\n", r"job.yaml:3: .*'a list or map'", id="a map as a key"),
        pytest.param(
            "spec: {1: b}\n", r"job.yaml:3: spec: has a key that is not text: '1'\. Put", id="a number as a key"
        ),
        pytest.param("spec: {no: b}\n", r"has a key that is not text: 'no'", id="a bare no as a key"),
        pytest.param("~: b\n", r"has a key that is not text: '~'", id="null as a key"),
        pytest.param('spec: "\\ud800"\n', r"job.yaml:3: spec: holds half a character", id="an escaped surrogate"),
        pytest.param('"\\ud800": 1\n', r"has a key that is not text: '\\ud800'", id="a surrogate in a key"),
        pytest.param("spec: \udc80\n", r"holds the character U\+DC80", id="a raw surrogate"),
        pytest.param("spec: \x00\n", r"holds the character U\+0000", id="a zero byte"),
        pytest.param("spec: " + "9" * 5000 + "\n", r"holds a value that cannot be read", id="a number of 5000 digits"),
    ],
)
def test_a_text_no_job_can_hold_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidJobError, match=message) as caught:
        read_manifest(HEAD + text, "job.yaml")
    assert str(caught.value).encode(), "the message can be written anywhere"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\ufeff" + HEAD, id="a byte order mark"),
        pytest.param(HEAD.replace("\n", "\r\n"), id="the line ends of Windows"),
        pytest.param("---\n" + HEAD, id="a document mark before it"),
        pytest.param(HEAD + "---\n", id="a document mark behind it"),
        pytest.param(HEAD + "...\n", id="an end mark behind it"),
    ],
)
def test_what_editors_put_around_a_document_does_not_matter(text: str) -> None:
    assert read_manifest(text, "job.yaml").content == {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob"}


def test_a_date_is_a_key_like_any_text() -> None:
    assert read_manifest("2026-01-01: x\n", "job.yaml").content == {"2026-01-01": "x"}
