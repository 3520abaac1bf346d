"""The published model that a job goes on from: held against the spec, taken into what is trained.

An adapter is trained on as it is, full weights take the place of the base's; neither turns into the other here, for
that is what ``spec.output.merge`` is for.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from finetune_api.report import ArtifactKind
from finetune_api.spec import (
    BLOCK_OF,
    OWN_WEIGHTS,
    AdapterPlacement,
    AdapterSpec,
    FineTuneJobSpec,
    MethodType,
    ModelSpec,
)
from finetune_trainer import bottleneck
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.methods import prepare_model
from finetune_trainer.model import ModelFiles, outline_model
from finetune_trainer.published_model import PublishedModel, open_published
from finetune_trainer.storage import Storage

START_FIELD = "spec.model.startFrom.source"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_GOES_ON_BY = {
    PeftType.LORA: (MethodType.LORA, MethodType.QLORA),
    PeftType.PROMPT_TUNING: (MethodType.PROMPT_TUNING,),
    PeftType.PREFIX_TUNING: (MethodType.PREFIX_TUNING,),
    PeftType.IA3: (MethodType.IA3,),
}
"""By which methods an adapter of that form can be trained on."""
_ACTS_ON_LAYERS = (MethodType.LORA, MethodType.QLORA, MethodType.IA3)


def fetch_start(model: ModelSpec, storage: Storage, cache: Path) -> PublishedModel | None:
    """Return what ``spec.model.startFrom`` names, every file of it as its manifest says; absent without that block.

    Raises:
        SpecError: it is not there, or no model.
        DataError: it is unfinished, or was changed since it was published.
    """
    if model.start_from is None:
        return None
    uri = model.start_from.source
    if uri is None:
        raise SpecError(
            "spec.model.startFrom.job: a job is known by its name in a cluster alone. Name the folder that it has "
            "published in spec.model.startFrom.source."
        )
    start = open_published(uri, START_FIELD, storage, cache)
    if (wanted := model.start_from.sha256) not in (None, start.sha256):
        raise DataError(
            f"spec.model.startFrom.sha256 is {wanted}, and the manifest at {uri} has {start.sha256}: it is not the "
            "artifact that was meant. Put that one back, or correct the hash."
        )
    return start


# --- does it go with the job


def check_start(start: PublishedModel, spec: FineTuneJobSpec, files: ModelFiles) -> None:
    """Find out whether the job can go on from ``start``.

    Args:
        start: what it names.
        spec: resolved.
        files: the base model.

    Raises:
        SpecError: another base model, another method, or other settings of it.
    """
    _check_base(start, spec.model, files)
    method = spec.method.type
    if start.kind is not ArtifactKind.ADAPTER:
        if method not in OWN_WEIGHTS:
            raise SpecError(
                f"spec.method.type ({method.value}): {start.uri} holds full weights, and an adapter would stand on "
                f"them alone. Name them in spec.model.source, and leave spec.model.startFrom out."
            )
        return
    goes_on_by = _methods_for(start)
    if method not in goes_on_by:
        names = " or ".join(one.value for one in goes_on_by) or "a method that is known here"
        raise SpecError(
            f"spec.method.type ({method.value}): {start.uri} is an adapter made by {names}. Set it to {names}; or, to "
            "go on from a lora with all weights, have its job publish merged weights (spec.output.merge: true) and "
            "name that folder."
        )
    _check_settings(start, spec, files)


def _methods_for(start: PublishedModel) -> tuple[MethodType, ...]:
    if (start.path / bottleneck.CONFIG).is_file():
        return (MethodType.ADAPTER,)
    config = PeftConfig.from_pretrained(str(start.path))
    return _GOES_ON_BY.get(PeftType(config.peft_type), ())


def _check_base(start: PublishedModel, model: ModelSpec, files: ModelFiles) -> None:
    if start.base_revision == files.revision:
        return
    pin = f" or set spec.model.revision: {start.base_revision}" if model.source == f"hf://{start.base}" else ""
    raise SpecError(
        f"{START_FIELD}: {start.uri} was tuned from {start.base} ({start.base_revision[:12]}…), and spec.model.source "
        f"is {model.source} ({files.revision[:12]}…), which has other files. Name the same base model{pin}."
    )


def _check_settings(start: PublishedModel, spec: FineTuneJobSpec, files: ModelFiles) -> None:
    method = spec.method
    if method.type is MethodType.ADAPTER:
        adapter, outline = method.adapter or AdapterSpec(), outline_model(files)
        _compare(start, _bottleneck_settings(start, outline), _wanted_bottlenecks(adapter))
        return
    if method.prefix_tuning is not None and method.prefix_tuning.projection:
        raise SpecError(
            "spec.method.prefixTuning.projection (true): a published prefix has no network any more that could be "
            "trained on. Set it to false."
        )
    if method.type is MethodType.QLORA:
        # In how many bits the base lies is not the adapter's.
        method = method.model_copy(update={"type": MethodType.LORA})
    model = prepare_model(outline_model(files), method, str(files.path))
    assert isinstance(model, PeftModel)
    _compare(start, _settings(PeftConfig.from_pretrained(str(start.path))), _settings(model.active_peft_config))
    if spec.method.type in _ACTS_ON_LAYERS:
        _check_layers(start, model, f"spec.method.{BLOCK_OF[spec.method.type]}")


def _compare(start: PublishedModel, has: Mapping[str, object], wants: Mapping[str, object]) -> None:
    for field, value in has.items():
        if wants[field] != value:
            raise SpecError(
                f"spec.method.{field} ({_written(wants[field])}): the adapter at {start.uri} has {_written(value)}. "
                f"Set it to {_written(value)}: an adapter is trained on in its own form."
            )


def _bottleneck_settings(start: PublishedModel, outline: PreTrainedModel) -> dict[str, object]:
    config = json.loads((start.path / bottleneck.CONFIG).read_bytes())
    placement = next(
        (one.value for one in AdapterPlacement if bottleneck.find_places(outline, one) == config["places"]),
        "places that none of them is",
    )
    return {
        "adapter.bottleneck": config["bottleneck"],
        "adapter.activation": config["activation"],
        "adapter.placement": placement,
    }


def _wanted_bottlenecks(adapter: AdapterSpec) -> dict[str, object]:
    return {
        "adapter.bottleneck": adapter.bottleneck,
        "adapter.activation": adapter.activation.value,
        "adapter.placement": adapter.placement.value,
    }


def _settings(config: Any) -> dict[str, object]:
    """Return, by their names in ``spec.method``, the settings that decide what an adapter's weights mean."""
    match config.peft_type:
        case PeftType.LORA:
            return {
                "lora.rank": config.r,
                "lora.alpha": config.lora_alpha,
                "lora.useDora": config.use_dora,
                "lora.useRslora": config.use_rslora,
            }
        case PeftType.PROMPT_TUNING:
            return {"promptTuning.virtualTokens": config.num_virtual_tokens}
        case PeftType.PREFIX_TUNING:
            return {"prefixTuning.virtualTokens": config.num_virtual_tokens}
        case _:
            return {}


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_layers(start: PublishedModel, model: PeftModel, field: str) -> None:
    wants = {name: list(value.shape) for name, value in _adapter_weights(model).items()}
    with safe_open(start.path / _ADAPTER_WEIGHTS, framework="pt") as tensors:
        has = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - not a dict
    if has == wants:
        return
    own, other = (", ".join(sorted({*_layers(shapes)})) for shapes in (has, wants))
    differs = f", the job on {other}" if own != other else " in other layers or forms than the job"
    raise SpecError(
        f"{field}: the adapter at {start.uri} acts on {own}{differs}. Set targetNames to [{own}], with targets: named "
        "for lora, as its own job had them."
    )


def _adapter_weights(model: PeftModel) -> Mapping[str, Any]:
    # False: "auto" asks the hub for the base's vocabulary.
    weights: Mapping[str, Any] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return weights


def _layers(names: Mapping[str, object]) -> Iterator[str]:
    """Yield the last parts of the layers' names: ``….self_attn.q_proj.lora_A.weight`` acts on q_proj."""
    for name in names:
        layer, _, _ = name.partition(".lora_")
        yield layer.partition(".ia3_")[0].rpartition(".")[2]


# --- into the model


def first_weights(files: ModelFiles, start: PublishedModel | None) -> ModelFiles:
    """Return the whole weights that training begins with: those of the base in ``files``, unless ``start`` has some."""
    if start is None or start.kind is ArtifactKind.ADAPTER:
        return files
    return ModelFiles(start.path, files.revision)


def take_over(model: nn.Module, start: PublishedModel) -> None:
    """Put the weights of an adapter into ``model``, which `prepare_model` has made; whole weights are there already."""
    if start.kind is not ArtifactKind.ADAPTER:
        return
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(start.path), device="cpu"))
    else:
        bottleneck.load_weights(model, start.path)
