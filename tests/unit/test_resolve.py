"""Defaults that depend on other fields."""

from typing import Any

import pytest

from finetune_api.resolve import LEARNING_RATES, resolve
from finetune_api.spec import GradientCheckpointing, MethodType

from .builders import make_job

METHODS = {
    "full": ({"type": "full"}, 2e-5),
    "lora": ({"type": "lora"}, 2e-4),
    "qlora": ({"type": "qlora"}, 2e-4),
    "promptTuning": ({"type": "promptTuning"}, 3e-2),
    "prefixTuning": ({"type": "prefixTuning"}, 5e-3),
    "ia3": ({"type": "ia3"}, 3e-3),
    "adapter": ({"type": "adapter"}, 5e-4),
    "bias": ({"type": "selective"}, 1e-3),
    "last layers": ({"type": "selective", "selective": {"train": "lastLayers"}}, 2e-5),
}


@pytest.mark.parametrize("method, rate", METHODS.values(), ids=METHODS)
def test_the_learning_rate_is_the_methods_unless_given(method: dict[str, Any], rate: float):
    assert resolve(make_job({"spec.method": method})).spec.training.learning_rate == rate
    given = make_job({"spec.method": method, "spec.training.learningRate": 0.5})
    assert resolve(given).spec.training.learning_rate == 0.5


def test_every_method_has_a_learning_rate_that_comes_from_somewhere():
    assert set(LEARNING_RATES) == set(MethodType)
    assert all(source for _, source in LEARNING_RATES.values())


@pytest.mark.parametrize("method, _rate", METHODS.values(), ids=METHODS)
def test_a_resolved_job_is_valid_and_stays_as_it_is(method: dict[str, Any], _rate: float):
    job = resolve(make_job({"spec.method": method}))
    assert resolve(job) == job
    document = job.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert make_job({"spec": document["spec"]}) == job


def test_the_methods_block_is_written_out_and_no_other():
    lora = resolve(make_job({"spec.method": {"type": "lora"}})).spec.method
    assert lora.lora is not None
    assert (lora.lora.rank, lora.lora.alpha) == (16, 32)
    full = resolve(make_job({"spec.method": {"type": "full"}})).spec.method
    assert full.model_dump(exclude_none=True) == {"type": MethodType.FULL}


def test_the_last_two_layers_are_trained_unless_said_otherwise():
    selective = resolve(make_job({"spec.method": METHODS["last layers"][0]})).spec.method.selective
    assert selective is not None
    assert selective.last_layers == 2


def test_a_prefix_is_never_computed_twice():
    prefix = resolve(make_job({"spec.method": METHODS["prefixTuning"][0]}))
    assert prefix.spec.training.gradient_checkpointing is GradientCheckpointing.NEVER
    assert resolve(make_job()).spec.training.gradient_checkpointing is GradientCheckpointing.AUTO


def test_mixing_by_temperature_has_one():
    assert resolve(make_job({"spec.data.mixing.strategy": "temperature"})).spec.data.mixing.temperature == 2.0
    assert resolve(make_job()).spec.data.mixing.temperature is None


def test_resolving_leaves_the_job_given_alone():
    job = make_job()
    resolve(job)
    assert job == make_job()
