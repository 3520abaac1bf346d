"""The figures of a report as `evaluate.Metric` modules, to be had without a hub: ``Rouge().compute(predictions=…)``.

Nothing is computed here: every module calls what evaluation itself calls. Imported by whoever wants the modules and by
no stage, because the `evaluate` library takes seconds to import.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import evaluate  # type: ignore[import-untyped]
import numpy as np
from datasets import Features, Value
from datasets import Sequence as Listed
from evaluate import MetricInfo

from finetune_trainer.figure import (
    Figure,
    bits_per_byte_figure,
    bleu_figure,
    calibration_figure,
    chrf_figure,
    confusion_matrix,
    macro_f1_figure,
    mean_figure,
    mean_of,
    perplexity_figure,
    signatures,
    token_f1,
)
from finetune_trainer.metrics import ROUGE_NAMES, exact_match, rouge

_TEXTS = Features({"predictions": Value("string"), "references": Value("string")})
_LOGPROBS = Listed(Value("float64"))


class FigureModule(evaluate.Metric):  # type: ignore[misc]
    """A module whose value is one figure, named as in the report."""

    meaning: ClassVar[str]
    columns: ClassVar[Features] = _TEXTS
    measure: ClassVar[Callable[..., Figure]]
    """Takes the columns in their order, then the module's settings by name."""

    def _info(self) -> MetricInfo:
        return MetricInfo(description=self.meaning, citation="", features=self.columns)

    def _compute(self, **given: Any) -> dict[str, float | str]:
        columns = [given.pop(name) for name in self.columns]
        figure = type(self).measure(*columns, **given)
        return {figure.name: figure.value}


class SignedModule(FigureModule):
    """A module whose figure is sacrebleu's, beside it its signature: without it no two such figures can be compared."""

    def _compute(self, **given: Any) -> dict[str, float | str]:
        found = super()._compute(**given)
        return found | {f"{name}_signature": signatures()[name] for name in found}


class Accuracy(FigureModule):
    """``predictions`` and ``references`` are labels."""

    meaning = "Share of rows whose label is the expected one."
    measure = partial(mean_of, operator.eq, "accuracy")


class MacroF1(FigureModule):
    """``predictions`` and ``references`` are labels; ``labels`` are all there are."""

    meaning = "Mean over all labels of their F1; a label that nobody expects or predicts has 0."
    measure = staticmethod(macro_f1_figure)


class ConfusionMatrix(evaluate.Metric):  # type: ignore[misc]
    """``predictions`` and ``references`` are labels; ``labels`` are all there are."""

    def _info(self) -> MetricInfo:
        meaning = "Rows by expected and predicted label: a list for each expected one, both in the order of labels."
        return MetricInfo(description=meaning, citation="", features=_TEXTS)

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], labels: Sequence[str]
    ) -> dict[str, list[list[int]]]:
        return {"confusion_matrix": confusion_matrix(predictions, references, labels).tolist()}


class ExactMatch(FigureModule):
    """``predictions`` and ``references`` are texts."""

    meaning = "Share of texts equal to the reference, white space around them aside."
    measure = partial(mean_of, exact_match, "exact_match")


class TokenF1(FigureModule):
    """``predictions`` and ``references`` are texts."""

    meaning = "Mean F1 of words shared with the reference, as SQuAD scores (arXiv:1606.05250)."
    measure = partial(mean_of, token_f1, "token_f1")


class Bleu(SignedModule):
    """``predictions`` and ``references`` are texts."""

    meaning = "Corpus BLEU from 0 to 1, as sacrebleu computes it (aclanthology.org/W18-6319)."
    measure = staticmethod(bleu_figure)


class Chrf(SignedModule):
    """``predictions`` and ``references`` are texts."""

    meaning = "chrF2 from 0 to 1, as sacrebleu computes it (aclanthology.org/W15-3049)."
    measure = staticmethod(chrf_figure)


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """``predictions`` and ``references`` are texts; each F1 comes with its precision and recall."""

    def _info(self) -> MetricInfo:
        meaning = "Mean ROUGE-1, ROUGE-2 and ROUGE-L with clipping, no stemming (aclanthology.org/W04-1013)."
        return MetricInfo(description=meaning, citation="", features=_TEXTS)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        scores = [rouge(*pair) for pair in zip(predictions, references, strict=True)]
        return {
            f"{name}{suffix}": mean_figure(name, [getattr(score[name], part) for score in scores]).value
            for name in ROUGE_NAMES
            for suffix, part in (("", "f1"), ("_precision", "precision"), ("_recall", "recall"))
        }


class Perplexity(FigureModule):
    """``predictions`` are each row's log-probabilities of its tokens, in nats."""

    meaning = "exp of the mean negative log-probability of a token; every token weighs the same."
    columns = Features({"predictions": _LOGPROBS})

    @staticmethod
    def measure(logprobs: Sequence[Sequence[float]]) -> Figure:
        """Return the figure of the module."""
        return perplexity_figure([np.asarray(row, dtype=np.float64) for row in logprobs])


class BitsPerByte(FigureModule):
    """``predictions`` as for perplexity; ``references`` are the texts that were scored."""

    meaning = "Bits that a byte of UTF-8 costs: comparable between tokenizers, which perplexity is not."
    columns = Features({"predictions": _LOGPROBS, "references": Value("string")})

    @staticmethod
    def measure(logprobs: Sequence[Sequence[float]], texts: Sequence[str]) -> Figure:
        """Return the figure of the module."""
        return bits_per_byte_figure([np.asarray(row, dtype=np.float64) for row in logprobs], texts)


class CalibrationError(FigureModule):
    """``predictions`` are the probabilities of the labels named, ``references`` whether each was the expected one."""

    meaning = "Expected calibration error: mean gap between confidence and accuracy, 15 bins (arXiv:1706.04599)."
    columns = Features({"predictions": Value("float64"), "references": Value("bool")})
    measure = staticmethod(calibration_figure)
