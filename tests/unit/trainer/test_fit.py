"""What the spec asks for against what the base model has: a table of lengths, decided without a model."""

import re
from typing import Any

import pytest

from finetune_api.job import FineTuneJob
from finetune_api.resolve import resolve
from finetune_trainer.errors import SpecError
from finetune_trainer.fit import row_length


def make_job(
    max_length: int | None = None, virtual_tokens: int | None = None, answer: int | None = None
) -> FineTuneJob:
    data: dict[str, Any] = {
        "tasks": [{"name": "a", "source": "file:///rows", "templates": [{"prompt": "{{ x }}", "completion": "y"}]}]
    }
    method: dict[str, Any] = {"type": "lora"}
    if max_length is not None:
        data["maxLength"] = max_length
    if virtual_tokens is not None:
        method = {"type": "promptTuning", "promptTuning": {"virtualTokens": virtual_tokens}}
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "a"},
        "spec": {
            "model": {"source": "file:///model"},
            "data": data,
            "method": method,
            "evaluation": {"generation": {} if answer is None else {"maxNewTokens": answer}},
            "output": {"uri": "file:///out"},
        },
    }
    return resolve(FineTuneJob.model_validate(manifest, by_alias=True, by_name=False))


LENGTHS = {
    "the default fits": (make_job(), 4096, 1024, ""),
    "a model without a limit": (make_job(), None, 1024, ""),
    "what is written fits": (make_job(max_length=512), 512, 512, ""),
    "the default is capped": (make_job(), 512, 512, "rows may have 512 tokens: the model has places for 512"),
    "a soft prompt takes room": (make_job(virtual_tokens=20), 1024, 1004, "virtualTokens takes 20"),
    "a soft prompt beside what is written": (make_job(max_length=492, virtual_tokens=20), 512, 492, ""),
    "a long row for a model without a limit": (make_job(max_length=9000), None, 9000, ""),
}


@pytest.mark.parametrize("job, limit, tokens, note", LENGTHS.values(), ids=LENGTHS.keys())
def test_a_row_is_as_long_as_spec_and_model_allow(job: FineTuneJob, limit: int | None, tokens: int, note: str):
    length = row_length(job.spec, limit)
    assert length.tokens == tokens
    assert note in length.note
    assert bool(note) == bool(length.note)


REFUSED = {
    "a row too long": (make_job(max_length=513), "spec.data.maxLength (513): ", "Set it to 512 or less"),
    "a row too long behind a soft prompt": (
        make_job(max_length=500, virtual_tokens=20),
        "spec.data.maxLength (500): ",
        "virtualTokens takes 20. Set it to 492 or less",
    ),
    "a soft prompt too long": (
        make_job(virtual_tokens=500),
        "virtualTokens (500): ",
        "12 are left for a row, and 16 are needed. Lower it to 496",
    ),
    "an answer too long": (make_job(answer=512), "maxNewTokens (512): ", "none is left for the prompt"),
}


@pytest.mark.parametrize("job, field, remedy", REFUSED.values(), ids=REFUSED.keys())
def test_what_goes_beyond_the_models_places_is_refused(job: FineTuneJob, field: str, remedy: str):
    with pytest.raises(SpecError, match=re.escape(remedy)) as caught:
        row_length(job.spec, 512)
    assert field in str(caught.value)
    assert "places for 512 tokens" in str(caught.value)
