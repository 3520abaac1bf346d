"""Fill in every default that depends on other fields. Pure: neither hardware nor rows are looked at.

Constant defaults stand in the spec itself. What is still absent afterwards depends on the model, the rows or the
hardware: ``data.maxLength``, ``training.microBatchSize``, ``training.maxSteps``,
``evaluation.generation.maxNewTokens``.
"""

from typing import Any, NamedTuple

from finetune_api.job import FineTuneJob
from finetune_api.library import written_out
from finetune_api.spec import (
    AdapterSpec,
    FineTuneJobSpec,
    GradientCheckpointing,
    Ia3Spec,
    LoraSpec,
    MethodSpec,
    MethodType,
    Mixing,
    MixingSpec,
    PrefixTuningSpec,
    PromptTuningSpec,
    SelectiveSpec,
    SelectiveTrain,
)


class LearningRate(NamedTuple):
    """A peak learning rate that is taken from literature and experience, not measured here."""

    rate: float
    source: str


LEARNING_RATES = {
    MethodType.FULL: LearningRate(2e-5, "arXiv:2203.02155, and most instruction tuning since"),
    MethodType.LORA: LearningRate(2e-4, "arXiv:2305.14314; small models take up to 0.001"),
    MethodType.QLORA: LearningRate(2e-4, "arXiv:2305.14314"),
    MethodType.PROMPT_TUNING: LearningRate(3e-2, "after arXiv:2104.08691, which uses 0.3 with Adafactor"),
    MethodType.PREFIX_TUNING: LearningRate(5e-3, "arXiv:2101.00190, scaled for AdamW"),
    MethodType.IA3: LearningRate(3e-3, "arXiv:2205.05638"),
    MethodType.ADAPTER: LearningRate(5e-4, "arXiv:1902.00751"),
    MethodType.SELECTIVE: LearningRate(2e-5, "as for full"),
}

BIAS_LEARNING_RATE = LearningRate(1e-3, "arXiv:2106.10199")
"""Bias terms alone bear and need larger steps."""

LAST_LAYERS = 2
MIXING_TEMPERATURE = 2.0


def resolve(job: FineTuneJob) -> FineTuneJob:
    """Return ``job`` with nothing left to choose but what hardware and rows decide. Idempotent."""
    return job.model_copy(update={"spec": resolve_spec(job.spec)})


def resolve_spec(spec: FineTuneJobSpec) -> FineTuneJobSpec:
    """Return ``spec`` as `resolve` does."""
    method = _resolve_method(spec.method)
    training: dict[str, Any] = {}
    if spec.training.learning_rate is None:
        training["learning_rate"] = _learning_rate(method)
    if method.type is MethodType.PREFIX_TUNING:
        training["gradient_checkpointing"] = GradientCheckpointing.NEVER  # see the rule on spec.training
    changed = {
        "method": method,
        "training": spec.training.model_copy(update=training),
        "data": spec.data.model_copy(
            update={
                "mixing": _resolve_mixing(spec.data.mixing),
                # The library may say something else in another version; what is recorded here stays.
                "tasks": tuple(written_out(task) for task in spec.data.tasks),
            }
        ),
    }
    return spec.model_copy(update=changed)


def _learning_rate(method: MethodSpec) -> float:
    if method.selective is not None and method.selective.train is SelectiveTrain.BIAS:
        return BIAS_LEARNING_RATE.rate
    return LEARNING_RATES[method.type].rate


def _resolve_method(method: MethodSpec) -> MethodSpec:
    match method.type:
        case MethodType.FULL:
            return method
        case MethodType.LORA | MethodType.QLORA:
            return method.model_copy(update={"lora": method.lora or LoraSpec()})
        case MethodType.PROMPT_TUNING:
            return method.model_copy(update={"prompt_tuning": method.prompt_tuning or PromptTuningSpec()})
        case MethodType.PREFIX_TUNING:
            return method.model_copy(update={"prefix_tuning": method.prefix_tuning or PrefixTuningSpec()})
        case MethodType.IA3:
            return method.model_copy(update={"ia3": method.ia3 or Ia3Spec()})
        case MethodType.ADAPTER:
            return method.model_copy(update={"adapter": method.adapter or AdapterSpec()})
        case MethodType.SELECTIVE:
            return method.model_copy(update={"selective": _resolve_selective(method.selective or SelectiveSpec())})


def _resolve_selective(selective: SelectiveSpec) -> SelectiveSpec:
    if selective.train is SelectiveTrain.LAST_LAYERS and selective.last_layers is None:
        return selective.model_copy(update={"last_layers": LAST_LAYERS})
    return selective


def _resolve_mixing(mixing: MixingSpec) -> MixingSpec:
    if mixing.strategy is Mixing.TEMPERATURE and mixing.temperature is None:
        return mixing.model_copy(update={"temperature": MIXING_TEMPERATURE})
    return mixing
