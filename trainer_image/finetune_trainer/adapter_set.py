"""Several adapters and soft prompts on one base, in one process: each request is answered by the one that it names.

Each stands in modules of its own, around weights that are loaded once. So kinds that would share a layer, or that PEFT
does not know, need no switch.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.report import ArtifactKind
from finetune_api.spec import DType, MethodType, ModelSpec, Precision
from finetune_trainer.encoder_decoder import decoder_start
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.generation import generate
from finetune_trainer.model import fetch_model, load_model
from finetune_trainer.pair import load_adapter
from finetune_trainer.precision import choose_precision
from finetune_trainer.prompt_file import PromptFile
from finetune_trainer.publish import PROMPT_FILE
from finetune_trainer.published_model import PublishedModel
from finetune_trainer.renderer import Renderer
from finetune_trainer.storage import Storage
from finetune_trainer.template import Template

BASE = "base"
"""What the base is called among the answers."""

Question = str | Mapping[str, object]
"""A prompt as it stands, or a row for the template of whoever is asked."""


@dataclass(frozen=True, slots=True)
class _Adapter:
    model: nn.Module
    prompt: PromptFile
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer


class AdapterSet:
    """The base and its adapters, loaded; belongs to one thread."""

    def __init__(self, base: PreTrainedModel, published: Mapping[str, PublishedModel]) -> None:
        """Put every adapter on ``base``.

        Raises:
            DataError: a prompt.json cannot be read.
        """
        self._base = base
        nn.Module.to(base, "cuda" if torch.cuda.is_available() else "cpu").eval()
        self._adapters = {name: self._put_on(one.path) for name, one in published.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Who can be asked: the base, then the adapters in the order given."""
        return (BASE, *self._adapters)

    def answer(self, name: str, question: Question, max_new_tokens: int) -> str:
        """Return what the base, or the adapter of that name, writes, without white space around it.

        The base is asked as the first adapter is.

        Raises:
            DataError: a row lacks a column of the template.
        """
        asked = next(iter(self._adapters.values())) if name == BASE else self._adapters[name]
        ids = asked.renderer.encode_text(_as_prompt(question, asked.prompt))
        (text,) = generate(
            self._base if name == BASE else asked.model,
            asked.tokenizer,
            [ids],
            max_new_tokens,
            asked.renderer.end_token_ids,
            batch_size=1,
            on_progress=lambda done, all_of_them: None,
        )
        return text.strip()

    def _put_on(self, folder: Path) -> _Adapter:
        model = load_adapter(with_the_weights_of(self._base), folder)
        prompt = _read_prompt_file(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        start = decoder_start(self._base.config)
        renderer = Renderer(tokenizer, prompt.format, prompt.system, prompt.max_length, start)
        return _Adapter(model, prompt, tokenizer, renderer)


def with_the_weights_of(base: PreTrainedModel) -> PreTrainedModel:
    """Return modules of their own around the tensors of ``base``, which are in memory once."""
    tensors = (*base.parameters(), *base.buffers())
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def load_base(published: Sequence[PublishedModel], place: str | None, storage: Storage, cache: Path) -> PreTrainedModel:
    """Return the base that all of ``published`` were tuned from.

    Args:
        published: adapters, one at least.
        place: URI of the base where it is not where it was when they were tuned.
        storage: opens it.
        cache: for copies.

    Raises:
        SpecError: one is no adapter, they have several bases, or the base is not that one.
    """
    first = published[0]
    for one in published:
        if one.kind is not ArtifactKind.ADAPTER:
            raise SpecError(f"{one.uri} holds full weights, and only adapters share a base. Name adapters alone.")
        if one.base_revision != first.base_revision:
            raise SpecError(
                f"{one.uri} was tuned from {one.base} ({one.base_revision[:12]}…), {first.uri} from {first.base} "
                f"({first.base_revision[:12]}…). Name adapters of one base."
            )
    source = place or _uri_of(first.base)
    revision = first.base_revision if source.startswith("hf://") else None
    files = fetch_model(ModelSpec(source=source, revision=revision), cache, storage=storage)
    if files.revision != first.base_revision:
        raise SpecError(
            f"the model at {source} ({files.revision[:12]}…) is not the one that {first.uri} was tuned from "
            f"({first.base_revision[:12]}…). Name that one with --model."
        )
    return load_model(files, choose_precision(MethodType.LORA, Precision.AUTO, DType.AUTO).weights, None)


def _uri_of(base: str) -> str:
    """Return the URI of a base from what the artifact calls it: a path, a URI, or the name of a hub model."""
    if base.startswith("/"):
        return Path(base).as_uri()
    return base if "://" in base else f"hf://{base}"


def _read_prompt_file(folder: Path) -> PromptFile:
    try:
        return PromptFile.model_validate_json((folder / PROMPT_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{folder / PROMPT_FILE} cannot be read: {error}. Publish the model again.") from error


def _as_prompt(question: Question, prompt: PromptFile) -> str:
    if isinstance(question, str):
        return question
    task = prompt.tasks[0]
    if not task.templates:
        raise DataError(f"task {task.name} has no template that a row could go through. Ask it in words.")
    template = Template(task.templates[0].prompt, task.templates[0].completion, f"task {task.name}")
    return template.render_prompt(question)
