"""The base and the tuned model, side by side without paying for both where one load can be both."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from peft import LoraModel, PeftConfig, PeftModel, PeftType, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel

from finetune_api.job import FineTuneJob
from finetune_api.report import ArtifactKind
from finetune_api.spec import OWN_WEIGHTS
from finetune_trainer import bottleneck
from finetune_trainer.adapter_scale import weaken
from finetune_trainer.layout import Layout, load_for_rows
from finetune_trainer.methods import SoftPromptModel, untuned, why_padded
from finetune_trainer.model import ModelFiles
from finetune_trainer.precision import choose_precision


class ModelPair(Protocol):
    """Two models of which one is lent at a time."""

    layout: Layout
    """How both want their rows."""

    def base(self) -> AbstractContextManager[PreTrainedModel]:
        """Lend the model as it was before tuning."""

    def tuned(self) -> AbstractContextManager[PreTrainedModel]:
        """Lend the model as it is after tuning."""

    def weaken(self, scale: float) -> None:
        """Multiply what tuning did by ``scale``, for good.

        Raises:
            TypeError: it is no low-rank adapter.
        """

    def earlier(self, weights: Path) -> AbstractContextManager[PreTrainedModel]:
        """Lend the model with the ``weights`` of a checkpoint of the same training."""

    def go_back(self, weights: Path) -> None:
        """Let the tuned model have the ``weights`` of a checkpoint of the same training, for good."""


def open_pair(job: FineTuneJob, files: ModelFiles, tuned: Path) -> ModelPair:
    """Load what is needed to compare the base model in ``files`` with what training left in ``tuned``."""
    spec = job.spec
    precision = choose_precision(spec.method.type, spec.training.precision, spec.model.dtype)
    padded_because = why_padded(spec)
    if spec.method.type in OWN_WEIGHTS:
        return _TwoLoads(files, ModelFiles(tuned, files.revision), precision.weights, padded_because)
    base, choice = load_for_rows(files, precision.weights, padded_because, four_bit=precision.four_bit)
    return _OneLoad(load_adapter(base, tuned), choice.layout, tuned)


def load_published(job: FineTuneJob, files: ModelFiles, folder: Path, kind: ArtifactKind) -> PreTrainedModel:
    """Load a published folder as the tuned model of `open_pair` was loaded, nothing shared with it."""
    spec = job.spec
    precision = choose_precision(spec.method.type, spec.training.precision, spec.model.dtype)
    if kind is not ArtifactKind.ADAPTER:
        model, _ = load_for_rows(ModelFiles(folder, files.revision), precision.weights, why_padded(spec))
        return model
    base, _ = load_for_rows(files, precision.weights, why_padded(spec), four_bit=precision.four_bit)
    return cast(PreTrainedModel, load_adapter(base, folder))


def load_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel | PeftModel:
    """Return ``base`` with the adapter in ``folder`` switched on, for inference."""
    if (folder / bottleneck.CONFIG).is_file():
        return bottleneck.load_adapters(base, folder)
    config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != PeftType.PROMPT_TUNING or base.config.is_encoder_decoder:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    model = SoftPromptModel(base, config)
    model.load_adapter(str(folder), model.active_adapter)
    return model.eval()


@dataclass(slots=True)
class _OneLoad:
    model: PreTrainedModel | PeftModel
    layout: Layout
    folder: Path
    """Where the adapter was loaded from."""

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        with untuned(self.model):
            yield cast(PreTrainedModel, self.model)

    @contextmanager
    def tuned(self) -> Iterator[PreTrainedModel]:
        yield cast(PreTrainedModel, self.model)

    def weaken(self, scale: float) -> None:
        if not (isinstance(self.model, PeftModel) and isinstance(self.model.base_model, LoraModel)):
            raise TypeError(f"what was added to this {type(self.model).__name__} has no scale")
        weaken(self.model, scale)

    @contextmanager
    def earlier(self, weights: Path) -> Iterator[PreTrainedModel]:
        now = self.folder
        self.go_back(weights)
        try:
            yield cast(PreTrainedModel, self.model)
        finally:
            self.go_back(now)

    def go_back(self, weights: Path) -> None:
        set_peft_model_state_dict(self.model, load_peft_weights(str(weights), device="cpu"))
        self.folder = weights


class _TwoLoads:
    """Whole weights: the two models are in memory one after the other."""

    def __init__(self, base: ModelFiles, tuned: ModelFiles, dtype: torch.dtype, padded_because: str) -> None:
        self._base, self._tuned, self._dtype = base, tuned, dtype
        self.layout = load_for_rows(tuned, dtype, padded_because)[1].layout

    def base(self) -> AbstractContextManager[PreTrainedModel]:
        return self._lend(self._base)

    def tuned(self) -> AbstractContextManager[PreTrainedModel]:
        return self._lend(self._tuned)

    def weaken(self, scale: float) -> None:
        raise TypeError("whole weights have no scale")

    def earlier(self, weights: Path) -> AbstractContextManager[PreTrainedModel]:
        return self._lend(ModelFiles(weights, self._tuned.revision))

    def go_back(self, weights: Path) -> None:
        self._tuned = ModelFiles(weights, self._tuned.revision)

    @contextmanager
    def _lend(self, files: ModelFiles) -> Iterator[PreTrainedModel]:
        model, _ = load_for_rows(files, self._dtype, "" if self.layout is Layout.PACKED else "as the other model's")
        try:
            yield model.eval()
        finally:
            del model
            gc.collect()
