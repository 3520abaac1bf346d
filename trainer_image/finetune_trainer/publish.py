"""Turn a tuned model into a folder that stands for itself, and put such folders into the output store.

A published folder holds, besides the weights (safetensors only):

- the tokenizer with its chat template,
- ``prompt.json``: everything that the prompt is built from (``PromptFile`` documents the fields),
- ``README.md``: the model card, with the measured numbers and a loading snippet that the tests run,
- ``lineage.json``, where it was tuned on from another artifact: that one, and what it was itself tuned from,
- ``MANIFEST.json`` and, written last, ``COMPLETE``.

The same model and report give the same bytes: no time and no path of this machine is in them, except the path of a
base model that is itself a local folder.
"""

import copy
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.job import FineTuneJob
from finetune_api.report import Artifact, ArtifactKind, Report
from finetune_trainer.bottleneck import has_adapters, save_adapters
from finetune_trainer.durable import disk_errors, partial_name, sync_folder, write_file
from finetune_trainer.encoder_decoder import text_logits
from finetune_trainer.errors import SpecError, StorageError
from finetune_trainer.location import local_path
from finetune_trainer.manifest import COMPLETE_NAME, MANIFEST_NAME, Manifest, verify_manifest, write_manifest
from finetune_trainer.model_card import BaseReference, CardFacts, MergeCheck, render_card
from finetune_trainer.parity import MERGED_FILES
from finetune_trainer.prompt_file import RendererInfo, make_prompt_file
from finetune_trainer.published_model import LINEAGE_FILE, Lineage
from finetune_trainer.store import Store

logger = logging.getLogger(__name__)

PROMPT_FILE = "prompt.json"
CARD_FILE = "README.md"

_PROBE_TOKENS = 128


def export_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    renderer: RendererInfo,
    job: FineTuneJob,
    report: Report,
    folder: Path,
    *,
    merge: bool = False,
    licence: str | None = None,
) -> None:
    """Write the tuned model to ``folder``, whole or not at all; what stood there is replaced.

    Args:
        model: a PEFT model, or one with bottleneck adapters, gives its adapter, any other model its full weights.
        tokenizer: as the model was trained with.
        renderer: how prompts were built.
        job: the resolved job.
        report: numbers for the model card; its ``base_revision`` is named as the base's revision.
        folder: a local folder of this run.
        merge: write full weights with the adapter merged in (on a copy) instead of the adapter.
        licence: what the base model's own card states.

    Raises:
        SpecError: the method cannot be merged, or merging would change the answers.
        StorageError: the disk refuses.
    """
    base = _name_base(job.spec.model.source, report.base_revision)
    partial = folder.with_name(partial_name(folder.name))
    try:
        with disk_errors("write", folder):
            partial.mkdir(parents=True)
            kind, check = _write_weights(model, tokenizer, job, base, partial, merge=merge)
            _write_tokenizer(tokenizer, partial)
            prompt = make_prompt_file(renderer, job, tokenizer)
            write_file(partial / PROMPT_FILE, _json(prompt.model_dump(mode="json", by_alias=True)))
            facts = CardFacts(kind, base, _dtype_name(model), prompt, check, licence, job.spec.method.lora)
            write_file(partial / CARD_FILE, render_card(report, facts).encode())
            if report.lineage:
                lineage = Lineage(ancestors=report.lineage)
                write_file(partial / LINEAGE_FILE, _json(lineage.model_dump(mode="json", by_alias=True)))
            write_manifest(
                partial,
                {
                    "kind": kind.value,
                    "specHash": report.spec_hash,
                    "base": base.name,
                    "baseRevision": report.base_revision or "",
                },
            )
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
            sync_folder(folder.parent)
    except SafetensorError as error:
        raise _disk_full(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(folder: Path, store: Store, prefix: str) -> Artifact:
    """Put a complete folder into the store; nothing is uploaded when the same content is there already.

    Raises:
        DataError: the folder is unfinished or was changed since its manifest was written.
        StorageError: the store refuses.
    """
    manifest = verify_manifest(folder)
    kind = ArtifactKind(manifest.about["kind"])
    artifact = Artifact(kind=kind, uri=f"{store.uri}/{prefix}", sha256=manifest.sha256, bytes=manifest.total_bytes)
    if _is_published(manifest, store, prefix):
        logger.info("already published kind=%s uri=%s sha256=%s", kind.value, artifact.uri, artifact.sha256)
        return artifact
    store.put_tree(folder, prefix)
    logger.info("published kind=%s uri=%s sha256=%s", kind.value, artifact.uri, artifact.sha256)
    return artifact


def _is_published(manifest: Manifest, store: Store, prefix: str) -> bool:
    marker = f"{prefix}/{COMPLETE_NAME}"
    if not store.exists(marker) or store.get_bytes(marker) != manifest.marker:
        return False
    names = {entry.path for entry in manifest.files} | {MANIFEST_NAME, COMPLETE_NAME}
    return set(store.list(prefix)) == {f"{prefix}/{name}" for name in names}


# --- weights


def _write_weights(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    job: FineTuneJob,
    base: BaseReference,
    folder: Path,
    *,
    merge: bool,
) -> tuple[ArtifactKind, MergeCheck | None]:
    if isinstance(model, PeftModel) and merge:
        merged, check = _merged(model, _probe(tokenizer, job))
        _write_full_weights(merged, folder)
        return ArtifactKind.MERGED, check
    if isinstance(model, PeftModel):
        _write_adapter(model, base, folder)
        return ArtifactKind.ADAPTER, None
    if merge:
        if has_adapters(model):
            raise SpecError("spec.output.merge: bottleneck adapters cannot be merged into weights. Leave it out.")
        raise SpecError("spec.output.merge: there is no adapter to merge when all weights are tuned. Leave it out.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is neither a PEFT nor a transformers model")
    if has_adapters(model):
        save_adapters(model, folder, {"base_model_name_or_path": base.name, "revision": base.revision})
        return ArtifactKind.ADAPTER, None
    _write_full_weights(model, folder)
    return ArtifactKind.WEIGHTS, None


def _write_adapter(model: PeftModel, base: BaseReference, folder: Path) -> None:
    # False: "auto" asks the hub for the base's vocabulary; no method here changes the embeddings as a whole.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_bytes())
    # PEFT writes where the base model lay on this machine, which nobody else can load.
    config |= {"base_model_name_or_path": base.name, "revision": base.revision}
    if "tokenizer_name_or_path" in config:
        config["tokenizer_name_or_path"] = base.name
    # A set in PEFT: without sorting, its order and so the manifest's hash would change from process to process.
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
    write_file(path, _json(config))


def _write_full_weights(model: PreTrainedModel, folder: Path) -> None:
    training_config = model.config
    model.config = copy.deepcopy(training_config)
    try:
        # Training switches the cache off, generation needs it.
        model.config.use_cache = True
        model.save_pretrained(folder)
    finally:
        model.config = training_config
    config = json.loads((folder / "config.json").read_bytes())
    config.pop("_name_or_path", None)
    if "scale_decoder_outputs" in config:
        # transformers 4 reads this fact of a T5, and whether its output layer is tied, from here.
        config["tie_word_embeddings"] = config["scale_decoder_outputs"]
    write_file(folder / "config.json", _json(config))


def _merged(model: PeftModel, probe: Sequence[int]) -> tuple[PreTrainedModel, MergeCheck]:
    """Merge a copy of ``model`` and hold its logits against the adapter's."""
    if not isinstance(model.base_model, LoraModel):
        raise SpecError(
            f"spec.output.merge: a {model.active_peft_config.peft_type.value} adapter cannot be merged into weights, "
            "only lora can. Leave merge out; the adapter is published."
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = text_logits(model, probe).float()
            with model.disable_adapter():
                untuned = text_logits(model, probe).float()
            merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
            actual = text_logits(merged, probe).float()
    finally:
        model.train(was_training)
    check = MergeCheck(
        difference=(expected - actual).abs().max().item(),
        effect=(expected - untuned).abs().max().item(),
        largest=expected.abs().max().item(),
        tokens=len(probe),
    )
    logger.info(
        "merged adapter difference=%g effect=%g largest_logit=%g", check.difference, check.effect, check.largest
    )
    _judge_merge(check, merged.dtype)
    return merged, check


def _judge_merge(check: MergeCheck, dtype: torch.dtype) -> None:
    if not check.difference <= MERGED_FILES[dtype] * check.largest:
        raise SpecError(
            f"spec.output.merge: the merged weights in {dtype} move logits by {check.difference:.3g} (the largest is "
            f"{check.largest:.3g}), more than rounding explains. Set spec.model.dtype: float32, or leave merge out: "
            "the adapter is exact."
        )
    if check.is_lossy:
        logger.warning(
            "rounding to %s undoes much of the adapter in the merged weights difference=%g effect=%g; "
            "publish the adapter, or set spec.model.dtype: float32",
            dtype,
            check.difference,
            check.effect,
        )


def _probe(tokenizer: PreTrainedTokenizerBase, job: FineTuneJob) -> list[int]:
    """Return tokens of a text of the right kind: the first prompt template as it stands, or of a chat any words."""
    templates = [template for task in job.spec.data.tasks for template in task.templates]
    text = templates[0].prompt if templates else "What would you like to know about me, and why do you ask?"
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[:_PROBE_TOKENS]


def _dtype_name(model: nn.Module) -> str:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return str(next(base.parameters()).dtype).removeprefix("torch.")


def _name_base(source: str, revision: str | None) -> BaseReference:
    if source.startswith("hf://"):
        return BaseReference(source.removeprefix("hf://").strip("/"), revision, on_hub=True)
    # In a bucket or on a volume it has no path that holds elsewhere: its URI says where to get it.
    return BaseReference(str(local_path(source)) if source.startswith("file://") else source, None, on_hub=False)


# --- tokenizer


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer without the padding and truncation that the last training batch switched on."""
    plain = copy.deepcopy(tokenizer)
    if plain.is_fast:
        plain.backend_tokenizer.no_padding()
        plain.backend_tokenizer.no_truncation()
    try:
        plain.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        # The tokenizers library has no class of its own for a disk that refuses.
        raise _disk_full(folder, error) from error
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_bytes())
    for name in ("name_or_path", "_name_or_path", "local_files_only", "is_local"):
        config.pop(name, None)
    write_file(path, _json(config))


def _disk_full(folder: Path, error: Exception) -> StorageError:
    return StorageError(f"cannot write {folder}: {error}. Free space there or choose another place.")


def _json(content: object) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
