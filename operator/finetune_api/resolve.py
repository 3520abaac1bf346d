"""Fill in every default that follows from the job alone, so that what runs can be read off the object. Pure."""

from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.spec import LoraSpec, MethodSpec, MethodType, PromptTuningSpec

LEARNING_RATES = {
    # Full fine-tuning of language models: 1e-5 to 5e-5 is common practice (arXiv:2210.11416, section 2, uses 1e-4 to
    # 1e-3 with Adafactor for T5; decoder models take less with AdamW).
    MethodType.FULL: 2e-5,
    MethodType.LORA: 2e-4,  # arXiv:2106.09685, appendix D
    MethodType.QLORA: 2e-4,  # arXiv:2305.14314, appendix B
    MethodType.PROMPT_TUNING: 2e-2,  # arXiv:2104.08691 uses 0.3 with Adafactor; PEFT's examples 3e-2 with AdamW
    MethodType.PREFIX_TUNING: 5e-3,
    MethodType.IA3: 3e-3,  # arXiv:2205.05638, section 3.4
    MethodType.ADAPTER: 5e-4,  # arXiv:1902.00751, section 3.1: 3e-4 to 3e-3
    MethodType.SELECTIVE: 1e-3,  # arXiv:2106.10199, appendix A
}


def resolve(job: FineTuneJob) -> FineTuneJob:
    """Return ``job`` with its defaults filled in; resolving again changes nothing."""
    spec = job.spec
    training = spec.training
    if training.learning_rate is None:
        training = training.model_copy(update={"learning_rate": LEARNING_RATES[spec.method.type]})
    return job.model_copy(
        update={"spec": spec.model_copy(update={"method": _resolve_method(spec.method), "training": training})}
    )


def _resolve_method(method: MethodSpec) -> MethodSpec:
    update: dict[str, Any] = {}
    match method.type:
        case MethodType.LORA | MethodType.QLORA:
            lora = method.lora or LoraSpec()
            update["lora"] = lora.model_copy(update={"alpha": lora.alpha or 2 * lora.rank})
        case MethodType.PROMPT_TUNING:
            update["prompt_tuning"] = method.prompt_tuning or PromptTuningSpec()
    return method.model_copy(update=update)
