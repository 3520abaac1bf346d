"""Get the base model: fetch its files, refuse what must not be run, load tokenizer and weights.

Code from a model repository is never executed: no ``trust_remote_code``, no pickled weights. What is wrong with a
model is found from its small files before the large ones are downloaded.
"""

import errno
import fnmatch
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_api.spec import ModelSpec, OutputSpec
from finetune_trainer.durable import disk_errors
from finetune_trainer.encoder_decoder import FAMILY
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.hub import Hub, Wanted, retry
from finetune_trainer.location import Mounts
from finetune_trainer.manifest import file_hashes
from finetune_trainer.memory import memory_errors
from finetune_trainer.quantization import four_bit_config, require_four_bits
from finetune_trainer.storage import Storage

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
"""Endings of weights that run code when they are read, or that torch cannot read."""
TOKENIZERS = (
    {"tokenizer.json"},
    {"tokenizer.model"},
    {"spiece.model"},
    {"sentencepiece.bpe.model"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
)
"""Any one of these sets of files makes a tokenizer."""

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*")
_WEIGHT_FILES = ("model*.safetensors",)
_BELOW = "*/*"
"""Folders inside a repository hold other formats (onnx, original): never fetched."""

_SHOWN_TENSORS = 3
"""A model with other weights than its config says differs in hundreds of tensors."""

# What transformers raises while it builds a model from numbers and names that do not go together.
_BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A base model on the local disk, checked."""

    path: Path
    revision: str
    """Commit of a hub model (40 hex digits), or sha256 over the files of a local folder (64 hex digits)."""


def fetch_model(
    model: ModelSpec,
    cache: Path,
    *,
    storage: Storage | None = None,
    environment: Mapping[str, str] = os.environ,
    sleep: Callable[[float], None] = time.sleep,
) -> ModelFiles:
    """Bring the model to the local disk and check its files; a complete copy in ``cache`` is used as it is.

    ``environment`` gives HF_ENDPOINT (another hub) and, unless ``storage`` finds a Secret, HF_TOKEN (for private and
    gated models); no token is taken from anywhere else.

    Raises:
        SpecError: no such model, no right to it, or a form that is refused.
        DataError: files are missing or broken.
        StorageError: the hub or the disk does not answer.
    """
    if model.trust_remote_code:
        raise SpecError("spec.model.trustRemoteCode must stay false: code that comes with a model is never run.")
    storage = storage or Storage(OutputSpec(uri="file:///"), Mounts.from_environment(environment))
    if not model.source.startswith("hf://"):
        folder = storage.fetch_model_folder(
            model.source, model.secret_ref, cache, lambda names: _check_names(names, model.source)
        )
        return _open_folder(model, folder)
    hub = Hub.from_environment(storage.hub_token(model.secret_ref, environment), cache, environment)
    return retry(lambda: _fetch_from_hub(model, hub), sleep)


def fetch_small_files(
    model: ModelSpec,
    cache: Path,
    storage: Storage,
    *,
    environment: Mapping[str, str] = os.environ,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Return a folder with the model's config and tokenizer; weights are not brought where they are not.

    Raises:
        As `fetch_model`.
    """

    def check(names: Collection[str]) -> None:
        _check_names(names, model.source)

    if model.source.startswith("hf://"):
        hub = Hub.from_environment(storage.hub_token(model.secret_ref, environment), cache, environment)
        return retry(lambda: _fetch_small_from_hub(_wanted(model), hub), sleep)
    folder = storage.fetch_model_folder(model.source, model.secret_ref, cache, check, is_small_file)
    if not folder.is_dir():
        raise SpecError(f"spec.model.source: {folder} is no folder. Write the folder that holds the model.")
    # What was copied has no weights, and their absence is no fault then.
    with disk_errors("list", folder):
        _require_config([file.name for file in folder.iterdir()], model.source)
    _check_configs(folder)
    return folder


def is_small_file(name: str) -> bool:
    """Whether a file of a model is config, tokenizer or text: anything but weights."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _SMALL_FILES)


def load_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """Load the tokenizer; it has an end token, and a padding token (the end token where it brings none).

    Raises:
        DataError: its files are broken, it has no end token, or it knows more tokens than the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises bare Exception for a broken file; anything unnamed goes on.
        if type(error) is not Exception and not isinstance(error, (OSError, ValueError, KeyError, TypeError)):
            raise
        raise DataError(
            f"the tokenizer in {files.path} cannot be read: {_first_line(error)}. "
            "Copy its files again from where the model came from."
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {files.path} has no end token, so a model tuned with it would never stop. "
            "Set eos_token in tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    vocabulary = getattr(read_config(files), "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise DataError(
            f"the tokenizer in {files.path} knows {len(tokenizer):,} tokens, the model only {vocabulary:,}: "
            "they do not belong together. Copy both from the same place."
        )
    return tokenizer


def load_model(
    files: ModelFiles, dtype: torch.dtype, attention: str | None, *, four_bit: bool = False
) -> PreTrainedModel:
    """Load the weights as ``dtype``.

    Args:
        files: the model.
        dtype: type of all weights.
        attention: a name that transformers' AttentionInterface knows; None for the model's own choice.
        four_bit: whether linear layers are quantised to 4 bits while they are loaded, onto the GPU.

    Raises:
        SpecError: the architecture is no language model that can be tuned, or 4 bits cannot be had here.
        DataError: the weights lack tensors, hold others, or have other shapes than config.json says.
        OutOfMemoryError: they are larger than the memory.
    """
    _check_weights(files.path)
    quantised: dict[str, object] = {}
    if four_bit:
        require_four_bits(gpu=True)
        quantised["quantization_config"] = four_bit_config()
    with memory_errors(
        f"the model in {files.path}", "choose a smaller model, set spec.model.dtype: bfloat16, or give it more memory"
    ):
        return _load(files, dtype=dtype, attn_implementation=attention, **quantised)


def outline_model(files: ModelFiles) -> PreTrainedModel:
    """Return the model without its weights, whose names and shapes are compared with what config.json says.

    Takes a fraction of a second and no memory, whatever the model's size.

    Raises:
        SpecError: the architecture is no language model that can be tuned.
        DataError: no model can be built from config.json, or the weights are of another one.
    """
    _check_weights(files.path)
    try:
        return _load(files, device_map="meta")
    except _BUILD_ERRORS as error:
        raise DataError(
            f"no model can be built from {files.path / CONFIG}: {type(error).__name__} {_reason(error)}. "
            "Copy the file again from where the model came from."
        ) from error


def position_limit(config: PretrainedConfig) -> int | None:
    """Return how many tokens the model can tell the places of; None where it has no such limit."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def read_config(files: ModelFiles) -> PretrainedConfig:
    """Return what `read_config_in` gives for the model's folder."""
    return read_config_in(files.path)


def read_config_in(folder: Path) -> PretrainedConfig:
    """Return a model's config.json as transformers understands it.

    Raises:
        SpecError: it describes no model that transformers knows.
        DataError: a value in it is of the wrong kind.
    """
    file = folder / CONFIG
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (StrictDataclassError, ArithmeticError) as error:
        raise DataError(
            f"{file} holds a wrong value: {_reason(error)}. Copy the file again from where the model came from."
        ) from error
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(
            f"{file} describes no model that this version of transformers knows: {_first_line(error)}. "
            "Choose a model with a known model_type."
        ) from error
    return cast(PretrainedConfig, config)


def build_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the language model that ``config`` describes, with random weights."""
    return cast(PreTrainedModel, _auto_class(config).from_config(config, dtype=dtype))


def _auto_class(config: PretrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def find_broken_tensors(files: ModelFiles, most: int = _SHOWN_TENSORS) -> list[str]:
    """Return the names of the first ``most`` tensors that hold NaN or infinity; reads the weights until then."""
    broken: list[str] = []
    for file in _weight_files(files.path):
        with disk_errors("read", file), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if not bool(tensors.get_tensor(name).isfinite().all()):
                    broken.append(name)
                if len(broken) == most:
                    return broken
    return broken


def _load(files: ModelFiles, **how: object) -> PreTrainedModel:
    config = read_config(files)
    _refuse_architecture(config, files.path)
    try:
        model, loaded = cast(
            tuple[PreTrainedModel, dict[str, Collection[object]]],
            _auto_class(config).from_pretrained(
                files.path,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **how,
            ),
        )
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise MemoryError from error
        raise DataError(
            f"the weights in {files.path} cannot be read: {_first_line(error)}. Fetch the model again."
        ) from error
    _refuse_gaps(loaded, files.path)
    return model


def find_licence(files: ModelFiles) -> str | None:
    """Return the licence that the model's own card states in its front matter, if there is one."""
    card = files.path / "README.md"
    if not card.is_file():
        return None
    with disk_errors("read", card):
        text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return None
    try:
        facts = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return None
    licence = facts.get("license") if isinstance(facts, dict) else None
    return licence if isinstance(licence, str) else None


# --- local folders


def _open_folder(model: ModelSpec, path: Path) -> ModelFiles:
    with disk_errors("read", path):
        if not path.exists():
            raise SpecError(f"spec.model.source: {path} does not exist. Write the folder that holds the model.")
        if not path.is_dir():
            raise SpecError(f"spec.model.source: {path} is a file. Write the folder that holds the model.")
        names = {entry.name for entry in path.iterdir() if entry.is_file()}
    _check_names(names, str(path))
    _check_configs(path)
    _check_weights(path)
    revision = _folder_revision(path, names)
    if model.revision not in (None, "main", revision):
        raise DataError(
            f"spec.model.revision is {model.revision!r}, but the files in {path} have the revision {revision!r}: "
            "they are not those that were meant. Correct the revision or leave it out."
        )
    return ModelFiles(path, revision)


def _folder_revision(path: Path, names: Collection[str]) -> str:
    """Return a sha256 over names and contents of all files that decide what the model does.

    Measured: 269 MB take 0.2 to 0.5 s, so nothing is cached.
    """
    digest = hashlib.sha256()
    deciding = [name for name in sorted(names) if name.endswith((".json", ".txt", ".model", ".jinja", ".safetensors"))]
    for name, content in zip(deciding, file_hashes(path / name for name in deciding), strict=True):
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


# --- the hub


def _fetch_from_hub(model: ModelSpec, hub: Hub) -> ModelFiles:
    wanted = _wanted(model)
    path = _fetch_small_from_hub(wanted, hub)
    commit = path.name
    hub.fetch(wanted, (*_SMALL_FILES, *_WEIGHT_FILES), [_BELOW], revision=commit)
    _check_weights(path)
    return ModelFiles(path, commit)


def _fetch_small_from_hub(wanted: Wanted, hub: Hub) -> Path:
    path = hub.fetch(wanted, _SMALL_FILES, [_BELOW])
    _check_names({name for name in hub.names(wanted, path) if "/" not in name}, wanted.where)
    _check_configs(path)
    return path


def _wanted(model: ModelSpec) -> Wanted:
    return Wanted(
        kind="model",
        field="spec.model.source",
        source=model.source,
        repository=model.source.removeprefix("hf://").strip("/"),
        revision=model.revision or "main",
        secret_field="spec.model.secretRef",
    )


# --- what is refused


def _check_names(names: Collection[str], where: str) -> None:
    """Refuse a model by the names of its files."""
    found = f"It holds {_listed(names)}."
    if "adapter_config.json" in names and CONFIG not in names:
        raise SpecError(
            f"{where} is a PEFT adapter, not a whole model. {found} Name its base model in spec.model.source."
        )
    if not any(name.endswith(".safetensors") for name in names):
        if any(name.endswith(".gguf") for name in names):
            raise SpecError(
                f"{where} has its weights only as GGUF, which is a format for running, not for tuning. {found} "
                "Name the original safetensors model, or convert it: load it with "
                "AutoModelForCausalLM.from_pretrained(folder, gguf_file=...) and save it again."
            )
        pickled = sorted(name for name in names if name.endswith(PICKLED))
        if pickled:
            raise SpecError(
                f"{where} has its weights only as {_listed(pickled)}; such files can run code when they are read and "
                "are refused. Name a revision with safetensors, or convert it: load it where you trust it, then "
                "model.save_pretrained(folder)."
            )
    _require_config(names, where)
    if WEIGHTS not in names and WEIGHTS_INDEX not in names:
        raise DataError(f"{where} has neither {WEIGHTS} nor {WEIGHTS_INDEX}. {found} Save it with save_pretrained.")
    if not any(files <= set(names) for files in TOKENIZERS):
        raise DataError(
            f"{where} has no tokenizer. {found} Save it beside the model with tokenizer.save_pretrained(folder); "
            "one of " + ", ".join("+".join(sorted(files)) for files in TOKENIZERS) + " is needed."
        )


def _require_config(names: Collection[str], where: str) -> None:
    if CONFIG not in names:
        raise DataError(f"{where} has no {CONFIG}, so it is no transformers model. It holds {_listed(names)}.")


def _check_configs(path: Path) -> None:
    """Refuse by what the small files say: custom code, or weights that are already quantised."""
    config = _read_json(path / CONFIG)
    for name in (CONFIG, "tokenizer_config.json", "generation_config.json"):
        if (path / name).is_file() and "auto_map" in _read_json(path / name):
            raise SpecError(
                f"{path / name} has an auto_map: the model wants to run code of its own, which is never done here. "
                "Use a model whose architecture transformers knows, or one converted to it (without auto_map)."
            )
    if "quantization_config" in config:
        quantisation = config["quantization_config"]
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise SpecError(
            f"{path / CONFIG} says that the weights are quantised ({method!r}). Name the original, unquantised model."
        )


def _check_weights(path: Path) -> None:
    """Find missing, truncated and malformed weight files before anything large is read."""
    for file in _weight_files(path):
        try:
            with disk_errors("read", file), safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise DataError(
                f"{file} is truncated or no safetensors file ({file.stat().st_size:,} bytes): {_first_line(error)}. "
                "Fetch the model again."
            ) from error


def _weight_files(path: Path) -> Iterator[Path]:
    index = path / WEIGHTS_INDEX
    files = [path / WEIGHTS]
    if not files[0].is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise DataError(f"{index} has no weight_map from tensors to files. Fetch the model again.")
        files = [path / name for name in sorted(set(shards.values()))]
    for file in files:
        if file.parent != path or not file.is_file():
            raise DataError(f"{index} names {file.name!r}, which is not there. Fetch the model again.")
        yield file


def _refuse_architecture(config: PretrainedConfig, path: Path) -> None:
    names = list(config.architectures or [])
    if config.is_encoder_decoder:
        if config.model_type in FAMILY and not any(name.endswith("EncoderModel") for name in names):
            _refuse_deep_decoder(config, path)
            return
        raise SpecError(
            f"{path} is an encoder-decoder model ({', '.join(names) or config.model_type}) that cannot be tuned so "
            f"far. Choose one whose model_type is {', '.join(FAMILY)}, or whose architecture ends in ForCausalLM."
        )
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (names and not causal & set(names)):
        raise SpecError(
            f"{path} is no causal language model: its architecture is {', '.join(names) or config.model_type}. "
            "Choose a model whose architecture ends in ForCausalLM."
        )


def _refuse_deep_decoder(config: PretrainedConfig, path: Path) -> None:
    # transformers makes room in its cache for as many layers as the encoder has, and generation ends in an IndexError.
    if config.num_decoder_layers > config.num_layers:
        raise SpecError(
            f"{path / CONFIG} says num_decoder_layers {config.num_decoder_layers} and num_layers {config.num_layers}: "
            "this version of transformers cannot generate with a decoder deeper than its encoder. Choose another model."
        )


def _refuse_gaps(loaded: Mapping[str, Collection[object]], path: Path) -> None:
    """Raise for tensors that transformers would have filled with random numbers or thrown away in silence."""
    gaps = {
        "lack": [str(name) for name in loaded["missing_keys"]],
        "hold, unknown to the architecture,": [str(name) for name in loaded["unexpected_keys"]],
        "have in another shape": [_describe_mismatch(entry) for entry in loaded["mismatched_keys"]],
    }
    said = [f"{verb} {_listed(names, _SHOWN_TENSORS)}" for verb, names in gaps.items() if names]
    if said:
        raise DataError(
            f"the weights in {path} do not fit its {CONFIG}: they {'; they '.join(said)}. "
            "Copy weights and config from the same place."
        )


def _describe_mismatch(entry: object) -> str:
    name, found, expected = cast(tuple[str, torch.Size, torch.Size], entry)
    return f"{name} ({list(found)} instead of {list(expected)})"


def _read_json(path: Path) -> dict[str, object]:
    try:
        with disk_errors("read", path):
            content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is truncated or no JSON: {_first_line(error)}. Fetch the model again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object. Fetch the model again.")
    return content


def _listed(names: Collection[str], most: int = 12) -> str:
    shown = ", ".join(sorted(names)[:most])
    return (shown + (f" and {len(names) - most} more" if len(names) > most else "")) or "no files"


def _reason(error: BaseException) -> str:
    """Return what a library says is wrong; a strict dataclass names the field and its value in the cause alone."""
    return _first_line(error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
