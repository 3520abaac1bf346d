"""What the contract has words for but this version cannot do yet. A job that uses it is refused, never half obeyed.

The table shrinks as features arrive; nothing else has to change then.
"""

import re
from collections.abc import Iterator
from typing import Any

from finetune_api.problem import FieldError, shown
from finetune_api.spec import FineTuneJobSpec

_INSTEAD = "Leave it out."
_NOT_YET: dict[str, str] = {
    "model.startFrom": "Start from the base model, or from published full weights as model.source.",
    "model.secretRef": "Set HF_TOKEN in the environment.",
    "data.tasks[].library": "Write templates.",
    "data.tasks[].messages": "Write templates over columns of text.",
    "data.tasks[].secretRef": _INSTEAD,
    "data.mixing.temperature": _INSTEAD,
    "data.mixing.maxExamplesPerTask": "Set maxExamples on each task.",
    "data.splits.stratifyBy": _INSTEAD,
    "data.replay": "Add the rows as another task.",
    "method.regularization": _INSTEAD,
    "training.earlyStopping": "Set maxSteps.",
    "compute.profile": _INSTEAD,
    "compute.image": _INSTEAD,
    "compute.imagePullSecrets": _INSTEAD,
    "compute.priorityClassName": _INSTEAD,
    "compute.gpuResource": _INSTEAD,
    "compute.resources": _INSTEAD,
    "compute.deepspeed": _INSTEAD,
    "compute.sharedMemory": _INSTEAD,
    "compute.cacheVolume": _INSTEAD,
    "compute.pod": _INSTEAD,
    "evaluation.resources": _INSTEAD,
    "evaluation.forgetting": _INSTEAD,
    "evaluation.benchmarks": _INSTEAD,
    "evaluation.holistic": _INSTEAD,
    "evaluation.gates": "Read the numbers in the report; publishOn: never keeps the model back.",
    "output.endpoint": _INSTEAD,
    "output.secretRef": _INSTEAD,
    "runPolicy": _INSTEAD,
}
_ONLY: dict[str, tuple[object, ...]] = {
    "model.task": ("causal-lm",),
    "data.mixing.strategy": ("proportional",),
    "method.type": ("full", "lora", "promptTuning"),
    "compute.engine": ("auto", "job"),
    "compute.workers": (1,),
    "compute.gpusPerWorker": (0, 1),
    "evaluation.metrics[]": ("accuracy", "exact_match", "rouge", "perplexity"),
    "evaluation.baselines.fewShot": (0,),
    "evaluation.baselines.zeroShot": (True,),
    "evaluation.generation.numBeams": (1,),
}
_SCHEMES: dict[str, tuple[str, ...]] = {
    "model.source": ("file", "hf"),
    "data.tasks[].source": ("file",),
    "output.uri": ("file",),
}


def unsupported_fields(spec: FineTuneJobSpec) -> list[FieldError]:
    """Return an error for everything in ``spec`` that was written there and does not work yet."""
    document = spec.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    return [error for path, value in _walk(document) if (error := _refusal(path, value))]


def _refusal(path: str, value: Any) -> FieldError | None:
    name = re.sub(r"\[\d+\]", "[]", path)
    where = f"spec.{path}"
    if name in _NOT_YET:
        return FieldError(where, shown(value), "is not supported yet.", _NOT_YET[name])
    if name in _ONLY and value not in _ONLY[name]:
        possible = ", ".join(str(item).lower() if isinstance(item, bool) else str(item) for item in _ONLY[name])
        return FieldError(where, shown(value), "is not supported yet.", f"Use {possible}.")
    if name in _SCHEMES:
        scheme = str(value).partition("://")[0]
        if scheme not in _SCHEMES[name]:
            possible = " or ".join(f"{item}://" for item in _SCHEMES[name])
            return FieldError(where, shown(value), f"{scheme}:// is not supported yet.", f"Use {possible}.")
    return None


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field, outer before inner, with its path."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _walk(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}[{index}]")
