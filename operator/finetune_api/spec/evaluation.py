"""``spec.evaluation``: what is measured, and what must hold for the model to be published."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.block import Block, Problem
from finetune_api.spec.compute import ResourcesSpec
from finetune_api.spec.field import GATE_METRIC, Column, Confidence, DataUri, Flag, Int, Number


class Metric(StrEnum):
    """What can be measured on the test split."""

    ACCURACY = "accuracy"
    GENERATED_ACCURACY = "generated_accuracy"
    EXACT_MATCH = "exact_match"
    TOKEN_F1 = "token_f1"
    ROUGE = "rouge"
    BLEU = "bleu"
    CHRF = "chrf"
    PERPLEXITY = "perplexity"

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures that come of it; gates use these."""
        match self:
            case Metric.ACCURACY:
                return ("accuracy", "macro_f1", "ece")
            case Metric.GENERATED_ACCURACY:
                return ("generated_accuracy", "generated_macro_f1")
            case Metric.ROUGE:
                return ("rouge1", "rouge2", "rougeL")
            case Metric.PERPLEXITY:
                return ("perplexity", "bits_per_byte")
            case _:
                return (self.value,)

    @property
    def needs_labels(self) -> bool:
        """Whether only a task with a closed set of answers can have it."""
        return self in (Metric.ACCURACY, Metric.GENERATED_ACCURACY)


class ForgettingRemedy(StrEnum):
    """What is done when the model forgot too much."""

    NONE = "none"
    LORA_SCALE = "loraScale"
    EARLIER_CHECKPOINT = "earlierCheckpoint"


class Perturbation(StrEnum):
    """Ways to disturb the input."""

    TYPOS = "typos"
    CASE = "case"


WRITTEN = "openings"
"""Stands for the task in figures of what is written behind the shipped openings."""
SUBGROUP_GAP = "subgroup_gap"


class BaselinesSpec(Block):
    """What the tuned model is compared with."""

    zero_shot: Flag = True
    """The base model with the prompt alone."""
    few_shot: Annotated[Int, Field(ge=1, le=64)] | None = None
    """The base model with this many training rows in its prompt, the same for every question: is tuning needed at all?
    Drawn by the seed, of a closed set every label as often as can be. Time and memory grow with them. Absent: not
    measured."""


class GenerationSpec(Block):
    """How a task's answers are generated; nothing is drawn by chance, so that runs can be compared."""

    max_new_tokens: Annotated[Int, Field(ge=1, le=32768)] | None = None
    """Longest answer in tokens; time grows linearly with it. Absent: by the longest completion of the rows."""
    num_beams: Annotated[Int, Field(ge=1, le=16)] = 1
    """Beginnings of an answer that are kept and gone on with at every token (beam search); each costs memory and time
    of its own. 1 takes the likeliest token every time."""


class ForgettingSpec(Block):
    """What the model must not lose: a non-inferiority test on general tasks; passed, it is a gate that lets through."""

    sources: Annotated[tuple[DataUri, ...], Field(max_length=16)] = ()
    """Files of your own beside the suite that ships with the image, each judged for itself. jsonl or parquet with the
    columns prompt, completion, labels (a list of texts, the completion among them) and, where rows are alike, group."""
    max_drop: Annotated[Number, Field(ge=0, le=1)] = 0.02
    """Largest loss of accuracy that still passes."""
    confidence: Confidence = 0.95
    """How sure the verdict must be. passed: the loss is surely within maxDrop; failed: it is surely beyond;
    inconclusive: neither."""
    remedy: ForgettingRemedy = ForgettingRemedy.NONE
    """loraScale evaluates the adapter at 0.25, 0.5, 0.75 and 1 times its strength and publishes the one with the best
    gain among those within maxDrop; earlierCheckpoint does the same with the checkpoints that spec.checkpoint.keep
    leaves and the end of training, of any method but adapter, with one worker. Chosen on validation rows and on half of
    the general ones, which leaves the other half for the verdict; rows that are alike are in one half."""


SUITES = ("glue", "superglue", "mmlu", "bigbench-hard")
"""Benchmarks that are known by name; their rows come from the hub."""


def _suite_is_known(suite: str) -> Iterator[Problem]:
    if "://" not in suite and suite not in SUITES:
        remedy = f"Write {', '.join(SUITES)} or the URI of a task file: file:///path/to/task.yaml."
        yield Problem(("suite",), suite, "is no suite that is known by name", remedy)


class BenchmarkSpec(Block):
    """A benchmark, asked through lm-evaluation-harness of base and tuned model alike, without chat template."""

    rules = (_suite_is_known,)

    suite: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z0-9_.:/-]+$")]
    """glue, superglue, mmlu or bigbench-hard, whose rows the hub has; or the URI of a task file in the harness's
    format, with its rows (jsonl, parquet or csv) beside it: file://, s3://, pvc:// or configMap://. A task file may
    hold templates but no code."""
    limit: Annotated[Int, Field(ge=1, le=1_000_000)] | None = None
    """Rows of each task, the first ones. Absent: all, which may take hours."""


def _disturbed_once(perturbations: tuple[Perturbation, ...]) -> Iterator[Problem]:
    for index, how in enumerate(perturbations):
        if how in perturbations[:index]:
            yield Problem(("perturbations", index), how.value, "is named twice", "Name every disturbance once.")


class HolisticSpec(Block):
    """HELM's other axes (arXiv:2211.09110): robustness, fairness gap, bias, toxicity, efficiency.

    They decide nothing that no gate names. Bias and toxicity are counted by short English word lists in what both
    models write behind 32 openings, which is also what speed and memory are measured on.
    """

    rules = (_disturbed_once,)

    subgroup_column: Column | None = None
    """Column whose values should not differ in accuracy: domain, dialect. Every task's rows must have it. Absent: no
    fairness gap."""
    perturbations: Annotated[tuple[Perturbation, ...], Field(max_length=8)] = ()
    """Disturbances of the test rows' inputs under which accuracy is measured again: typos, or case (all letters lower
    or all upper). Each costs scoring the test rows once more with either model."""


class GateSpec(Block):
    """What must hold for the model to be published: min, max and minDelta; ``minDelta: 0`` when none is set."""

    metric: Annotated[str, Field(min_length=3, max_length=128, pattern=GATE_METRIC)]
    """<task>.<figure>: sentiment.accuracy, summary.rougeL; of a benchmark <suite or task>.<figure>: mmlu.acc. Of
    holistic: <task>.accuracy_typos and _case (token_probability_… without labels), <task>.subgroup_gap,
    openings.insulting_answers and openings.gender_skew; speed and memory, measured once, are no figures of a gate."""
    min: Annotated[Number, Field(ge=-1000, le=1_000_000)] | None = None
    """The tuned model's figure must not be below this."""
    max: Annotated[Number, Field(ge=-1000, le=1_000_000)] | None = None
    """The tuned model's figure must not be above this: for perplexity."""
    min_delta: Annotated[Number, Field(ge=-1000, le=1000)] | None = None
    """The one-sided lower bound of tuned minus base must exceed this (base minus tuned for perplexity): 0 demands that
    the tuned model is better, -0.02 that it is not much worse."""
    confidence: Confidence = 0.95
    """Of that bound. With 300 rows a true gain of 0.05 passes in 48 % of the cases, with 1,000 in 90 %."""

    @property
    def required_delta(self) -> float | None:
        """What the gain must exceed; absent when the gate is about the figure itself."""
        return 0.0 if (self.min, self.max, self.min_delta) == (None, None, None) else self.min_delta


def _asked_once(metrics: tuple[Metric, ...]) -> Iterator[Problem]:
    for index, metric in enumerate(metrics):
        if metric in metrics[:index]:
            yield Problem(("metrics", index), metric.value, "is named twice", "Name every metric once.")


def _benchmarks_asked_once(benchmarks: tuple[BenchmarkSpec, ...]) -> Iterator[Problem]:
    suites = [benchmark.suite for benchmark in benchmarks]
    for index, suite in enumerate(suites):
        if suite in suites[:index]:
            yield Problem(("benchmarks", index, "suite"), suite, "is named twice", "Name every suite once.")


class EvaluationSpec(Block):
    """The measurement of base and tuned model on the untouched test split."""

    rules = (_asked_once, _benchmarks_asked_once)

    metrics: Annotated[tuple[Metric, ...], Field(max_length=16)] = ()
    """Absent: accuracy for tasks with labels, rouge and exact_match for others. perplexity is always measured, and
    bits_per_byte with it; macro_f1 and ece (the expected calibration error) with accuracy. generated_accuracy
    and its generated_macro_f1 are of the label that a model writes, anything else being wrong. All but accuracy and
    perplexity need generated text, which takes longest."""
    baselines: BaselinesSpec = BaselinesSpec()
    """What the tuned model is compared with."""
    generation: GenerationSpec = GenerationSpec()
    """How answers are generated."""
    max_examples: Annotated[Int, Field(ge=1, le=10_000_000)] = 2000
    """Test rows of each task that are measured, drawn by the seed; intervals narrow with its square root."""
    resources: ResourcesSpec | None = None
    """Size of the evaluation pod. Absent: that of a training worker."""
    forgetting: ForgettingSpec | None = None
    """What the model must not lose; ``{}`` measures it with the defaults. Absent: not measured."""
    benchmarks: Annotated[tuple[BenchmarkSpec, ...], Field(max_length=16)] = ()
    """Benchmarks, public ones or your own, base against tuned."""
    holistic: HolisticSpec | None = None
    """Robustness, fairness, bias, toxicity and speed; ``{}`` measures the last three. Absent: not measured."""
    gates: Annotated[tuple[GateSpec, ...], Field(max_length=32)] = ()
    """All must pass for the model to be published under ``publishOn: gates``. None: the verdict decides."""

    @property
    def goes_back(self) -> bool:
        """Whether an earlier checkpoint may take the place of the end of training."""
        return self.forgetting is not None and self.forgetting.remedy is ForgettingRemedy.EARLIER_CHECKPOINT
