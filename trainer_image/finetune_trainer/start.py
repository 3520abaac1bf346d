"""The published artifact that a job goes on from: fetched, verified, held against the spec, taken into the model.

An adapter is trained on as it is, full weights take the place of the base's; neither turns into the other here, for
that is what ``spec.output.merge`` is for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from pydantic import ValidationError
from safetensors import safe_open
from torch import nn

from finetune_api.model import ApiModel
from finetune_api.report import Ancestor, ArtifactKind
from finetune_api.spec import BLOCK_OF, OWN_WEIGHTS, FineTuneJobSpec, MethodType, ModelSpec
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.manifest import Manifest, is_complete, verify_manifest
from finetune_trainer.methods import prepare_model
from finetune_trainer.model import ModelFiles, outline_model
from finetune_trainer.storage import START_FIELD, Storage

LINEAGE_FILE = "lineage.json"
"""What an artifact was itself tuned from, besides its base; absent where that is nothing."""

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_METHOD_OF = {
    PeftType.LORA: MethodType.LORA,
    PeftType.PROMPT_TUNING: MethodType.PROMPT_TUNING,
    PeftType.PREFIX_TUNING: MethodType.PREFIX_TUNING,
    PeftType.IA3: MethodType.IA3,
}
_ACTS_ON_LAYERS = (MethodType.LORA, MethodType.IA3)


class Lineage(ApiModel):
    """The content of `LINEAGE_FILE`."""

    ancestors: tuple[Ancestor, ...]
    """Nearest first."""


@dataclass(frozen=True, slots=True)
class Start:
    """An artifact on the local disk, verified."""

    path: Path
    lineage: tuple[Ancestor, ...]
    """The artifact itself, then what it was tuned from, nearest first."""
    base: str
    """Its base model, for people."""
    base_revision: str
    """As `ModelFiles.revision`."""

    @property
    def kind(self) -> ArtifactKind:
        """What it holds."""
        return self.lineage[0].kind

    @property
    def uri(self) -> str:
        """As the spec names it."""
        return self.lineage[0].uri


def fetch_start(model: ModelSpec, storage: Storage, cache: Path) -> Start | None:
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
    path = storage.fetch_artifact(uri, cache)
    if not path.is_dir():
        raise SpecError(f"{START_FIELD}: {uri} is no folder. Name the folder model that a job has published.")
    if not is_complete(path) and is_complete(path / "model"):
        raise SpecError(f"{START_FIELD}: {uri} holds a job's results. Write {uri.rstrip('/')}/model.")
    try:
        manifest = verify_manifest(path)
    except DataError as error:
        raise DataError(f"{START_FIELD} ({uri}): {error}") from error
    if (wanted := model.start_from.sha256) not in (None, manifest.sha256):
        raise DataError(
            f"spec.model.startFrom.sha256 is {wanted}, and the manifest at {uri} has {manifest.sha256}: it is not the "
            "artifact that was meant. Put that one back, or correct the hash."
        )
    return _opened(uri, path, manifest)


def _opened(uri: str, path: Path, manifest: Manifest) -> Start:
    about = manifest.about
    if about.get("kind") not in {kind.value for kind in ArtifactKind if kind is not ArtifactKind.REPORT}:
        raise SpecError(
            f"{START_FIELD}: {uri} is no model but {about.get('kind') or 'something else'}. Name the folder model, or "
            "merged, that a job has published."
        )
    if "baseRevision" not in about:
        raise SpecError(
            f"{START_FIELD}: {uri} does not say which base model it was tuned from: an older version published it. "
            "Publish it again."
        )
    ancestor = Ancestor(uri=uri, kind=about["kind"], sha256=manifest.sha256, spec_hash=about.get("specHash", ""))
    return Start(path, (ancestor, *_read_lineage(path)), about.get("base", ""), about["baseRevision"])


def _read_lineage(folder: Path) -> tuple[Ancestor, ...]:
    file = folder / LINEAGE_FILE
    if not file.exists():
        return ()
    try:
        return Lineage.model_validate_json(file.read_bytes()).ancestors
    except ValidationError as error:
        raise DataError(f"{START_FIELD}: {file} is of another version: {error.errors()[0]['msg']}.") from error


# --- does it go with the job


def check_start(start: Start, spec: FineTuneJobSpec, files: ModelFiles) -> None:
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
    config = PeftConfig.from_pretrained(str(start.path))
    made_by = _METHOD_OF.get(PeftType(config.peft_type))
    if made_by is not method:
        name = made_by.value if made_by else config.peft_type
        raise SpecError(
            f"spec.method.type ({method.value}): {start.uri} is an adapter made by {name}. Set it to {name}; or, to "
            "go on from a lora with all weights, have its job publish merged weights (spec.output.merge: true) and "
            "name that folder."
        )
    _check_settings(start, config, spec, files)


def _check_base(start: Start, model: ModelSpec, files: ModelFiles) -> None:
    if start.base_revision == files.revision:
        return
    pin = f" or set spec.model.revision: {start.base_revision}" if model.source == f"hf://{start.base}" else ""
    raise SpecError(
        f"{START_FIELD}: {start.uri} was tuned from {start.base} ({start.base_revision[:12]}…), and spec.model.source "
        f"is {model.source} ({files.revision[:12]}…), which has other files. Name the same base model{pin}."
    )


def _check_settings(start: Start, found: PeftConfig, spec: FineTuneJobSpec, files: ModelFiles) -> None:
    model = prepare_model(outline_model(files), spec.method, str(files.path))
    assert isinstance(model, PeftModel)
    has, wants = _settings(found), _settings(model.active_peft_config)
    for field, value in has.items():
        if wants[field] != value:
            raise SpecError(
                f"spec.method.{field} ({_written(wants[field])}): the adapter at {start.uri} has {_written(value)}. "
                f"Set it to {_written(value)}: an adapter is trained on in its own form."
            )
    if spec.method.type in _ACTS_ON_LAYERS:
        _check_layers(start, model, f"spec.method.{BLOCK_OF[spec.method.type]}")


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


def _check_layers(start: Start, model: PeftModel, field: str) -> None:
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


def first_weights(files: ModelFiles, start: Start | None) -> ModelFiles:
    """Return the whole weights that training begins with: those of the base in ``files``, unless ``start`` has some."""
    if start is None or start.kind is ArtifactKind.ADAPTER:
        return files
    return ModelFiles(start.path, files.revision)


def take_over(model: nn.Module, start: Start) -> None:
    """Put the weights of an adapter into ``model``, which `prepare_model` has made; whole weights are there already."""
    if start.kind is ArtifactKind.ADAPTER:
        assert isinstance(model, PeftModel)
        set_peft_model_state_dict(model, load_peft_weights(str(start.path), device="cpu"))
