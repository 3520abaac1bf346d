"""What a run tells the world: exit codes, progress while it runs, the report when it is done.

Read by the command line, the trainer and the operator alike; written by the trainer alone.
"""

from collections.abc import Iterator
from enum import IntEnum, StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.model import ApiModel

CONTRACT_VERSION = 1
"""Raised whenever a field of Report or Progress changes its meaning; operator and trainer refuse a skew."""

CONTRACT_VARIABLE = "FINETUNE_CONTRACT_VERSION"
"""Environment variable in which the operator tells a stage which version it speaks."""

IMAGE_VARIABLE = "FINETUNE_IMAGE"
"""Environment variable in which it names the image that the stage's pod runs, as pinned; behind a tag, in brackets, the
digest that an earlier pod of the job ran."""


class ExitCode(IntEnum):
    """How a stage ended. Never 1 (Python's own crash) and never 128 or more (signals); values follow sysexits.h."""

    OK = 0
    BAD_SPEC = 64
    BAD_DATA = 65
    WORKER_LOST = 68
    STORAGE = 69
    INTERNAL = 70
    OUT_OF_MEMORY = 71
    DIVERGED = 72
    PREEMPTED = 75

    @property
    def is_retryable(self) -> bool:
        """Whether the same job may succeed when it is simply run again."""
        return self in (
            ExitCode.WORKER_LOST,
            ExitCode.STORAGE,
            ExitCode.INTERNAL,
            ExitCode.OUT_OF_MEMORY,
            ExitCode.PREEMPTED,
        )


class Stage(StrEnum):
    """The stages of one job, in order."""

    CHECK = "check"
    TRAIN = "train"
    EVALUATE = "evaluate"
    PUBLISH = "publish"


class Progress(ApiModel):
    """One moment of a running stage."""

    stage: Stage
    message: str = ""
    """What is being done, for people: ``reading rows``, ``scoring base model``."""
    percent: float | None = None
    """0 to 100 of this stage; absent while unknown."""
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    """Mean loss per completion token since the previous report, in nats."""
    validation_loss: float | None = None
    """As it was at the last look: who listens is not told of every step."""
    learning_rate: float | None = None
    rows_per_second: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None


class SplitRows(ApiModel):
    """Rows per split."""

    train: int
    validation: int
    test: int


class LengthCount(ApiModel):
    """One bar of a histogram."""

    up_to: int
    """Tokens; more than the bar before."""
    rows: int


class TextPiece(ApiModel):
    """A part of a row as the model sees it, special tokens included."""

    text: str
    learnt: bool
    """Whether the loss is computed on it."""


class ColumnData(ApiModel):
    """What one column of a task's training rows holds."""

    name: str
    kinds: dict[str, int] = Field(default_factory=dict)
    """Rows by what is in them: text, number, truth, list, object, or nothing (absent, null, blank)."""
    distinct: int | None = None
    """Different values; absent where there are more than a thousand, or where they are lists or objects."""


class TaskData(ApiModel):
    """What one task's rows looked like."""

    task: str
    rows: SplitRows
    lengths: tuple[LengthCount, ...] = ()
    """Rows by their number of tokens, prompt and completion together."""
    truncated: int = 0
    """Rows that were shortened."""
    labels: dict[str, int] = Field(default_factory=dict)
    """Training rows of each label; empty for an open task."""
    columns: tuple[ColumnData, ...] = ()
    """Those that the task uses."""
    unused: str = ""
    """The others of its source, some by name; for people."""
    languages: dict[str, float] = Field(default_factory=dict)
    """Share of the training rows by language (ISO 639), commonest first: a guess from each row's longest text."""
    sample: tuple[TextPiece, ...] = ()
    """The first training row, with the loss mask."""
    library: str = ""
    """Entry of the template library whose phrasings the task has, with its version: ``sentiment 1``. Empty where they
    are the job's own."""


class Overlap(ApiModel):
    """Questions of a test whose words stand in a training row, one after the other, so that it may know the answer."""

    source: str
    """``general`` for the suite that ships with the image, the name of the job's own or of a benchmark, or
    ``<task>.testSource``, ``<task>.validationSource``: of these up to 1,000 rows are looked at."""
    questions: int
    overlapping: int
    given_away: int = 0
    """Those of ``overlapping`` that stand in one training row as a whole."""
    first: str = ""
    """Words of the first given away, or else those that the first overlapping one shares; for people."""


class PersonalData(ApiModel):
    """Rows with something in them that looks like it; what it is stays in the rows."""

    emails: int = 0
    phones: int = 0
    keys: int = 0
    """Access keys, tokens and private keys."""


class Rehearsal(ApiModel):
    """The whole pipeline, gone through on the CPU with a tiny random model of the same architecture."""

    steps: int = 0
    """Training steps; behind the first it was interrupted, and resumed from the checkpoint."""
    seconds: float = 0.0
    why_not: str = ""
    """Why it did not begin, or not come to its end; empty when it did."""


class DataReport(ApiModel):
    """What the data looked like once read, rendered and split."""

    rows: SplitRows
    tokens: int | None = None
    """Tokens of the training split, prompts included."""
    completion_tokens: int | None = None
    longest_tokens: int | None = None
    max_length: int | None = None
    """Tokens that a row may have: ``spec.data.maxLength``, or what the model has places for."""
    truncated_percent: float = 0.0
    duplicates: int = 0
    """Rows whose normalised input equals or nearly equals another row's; such rows share a split."""
    exact_duplicates: int = 0
    """Those whose normalised input equals another row's."""
    leakage: int = 0
    """Validation and test rows that are nearly equal to a training row: of sources of their own alone."""
    first_leak: str = ""
    """Where the first of them is, for people."""
    personal_data: PersonalData = PersonalData()
    overlaps: tuple[Overlap, ...] = ()
    """Of the tests that the job is measured on besides its own rows, and of rows whose sources fix their split."""
    layout: str = ""
    """``packed`` or ``padded``, and what the isolation probe found: whether a row's logits stay what they are when
    others lie beside it. Of the model itself, or of the one of the rehearsal; empty without either."""
    rehearsal: Rehearsal | None = None
    """Absent where none was due: under ``preflight: skip``, when the model itself is tiny, or nothing is trained."""
    tasks: tuple[TaskData, ...] = ()
    warnings: tuple[str, ...] = ()
    """What may not be what was meant, in sentences."""
    hash: str
    """sha256 over the rendered rows in order: equal data, equal hash."""
    format: str
    """``raw`` or ``chat``: how prompts are wrapped."""
    sample_prompt: str = ""
    """The first training prompt as the model sees it, special tokens included."""
    sample_completion: str = ""
    """The part of it that is learnt."""

    def leaks(self) -> Iterator[str]:
        """Yield in sentences what makes a test flatter the model: what ``preflight: enforce`` stops a job for."""
        if self.leakage:
            yield (
                f"spec.data.tasks: {self.leakage} rows of validationSource or testSource are nearly equal to a "
                f"training row, first {self.first_leak}: the numbers will flatter the model. Drop them from either "
                f"side."
            )
        for overlap in self.overlaps:
            if overlap.given_away:
                yield (
                    f"spec.evaluation: {overlap.given_away} of {overlap.questions} questions of {overlap.source} "
                    f"stand in a training row as a whole, first {overlap.first!r}: what it measures is memory, not "
                    f"ability. Drop those rows."
                )

    def why_refused(self) -> str:
        """Say why the check stops a job with these rows under ``preflight: enforce``; empty where it goes on."""
        leaks = " ".join(self.leaks())
        return leaks and f"{leaks} Or set spec.runPolicy.preflight: warn to go on all the same."


class LossPoint(ApiModel):
    """One point of the training curve."""

    step: int
    loss: float | None = None
    validation_loss: float | None = None
    """Mean over the tasks; rows of each task are weighed by their tokens."""
    validation_losses: dict[str, float] = Field(default_factory=dict)
    """By task."""
    watched: float | None = None
    """What is reached of the figure that ``spec.training.earlyStopping`` watches, where it is a task's."""
    general_loss: float | None = None
    """Loss a token on the prose that ships with the image, where ``evaluation.forgetting`` is set; at step 0 before
    anything is learnt. Nothing is chosen by it."""
    learning_rate: float | None = None
    answers: tuple[str, ...] = ()
    """What the model said to the questions in ``training.samples``, in their order."""


class SampleQuestion(ApiModel):
    """A validation row that the model is asked while it learns."""

    task: str
    prompt: str
    expected: str
    base: str
    """The base model's answer."""


class TaskShare(ApiModel):
    """How much of what training saw was of one task."""

    task: str
    """``replay`` for the rows of ``spec.data.replay``."""
    rows: int
    """Training rows that it has."""
    share: float
    """Of the rows seen, as ``spec.data.mixing`` wants it."""
    expected: float
    """Rows seen, were they divisible."""
    drawn: int
    """Rows seen."""


class TimeEstimate(ApiModel):
    """How long training was going to take, as was said while it ran."""

    step: int
    """Behind which it was said: a tenth of the way, and no earlier than the fifth step."""
    seconds: float
    """From the beginning of this run, or where it was resumed, to the end: what had passed, and the steps to come at
    the speed so far. Looks at the validation rows that were to come are not in it, nor are checkpoints where none had
    been written yet."""


class TrainingReport(ApiModel):
    """How training went."""

    method: str
    parameters: int
    trainable_parameters: int
    steps: int
    epochs: float
    final_loss: float | None = None
    """Mean loss per completion token over the last tenth of the steps, in nats."""
    curve: tuple[LossPoint, ...] = ()
    samples: tuple[SampleQuestion, ...] = ()
    """Answers to them are in the curve."""
    mixture: tuple[TaskShare, ...] = ()
    """What was seen of each task; rows that were seen twice count twice."""
    seconds: float = 0.0
    """Since this run began or was resumed."""
    estimate: TimeEstimate | None = None
    """To be held against ``seconds``; absent of fewer than ten steps, and where training ended before its last one."""
    rows_per_second: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    precision: str = ""
    """Chosen precision and why, for people."""
    layout: str = ""
    """``packed`` or ``padded`` and why, for people."""
    resumed_from_step: int | None = None
    best_step: int | None = None
    """Step whose weights were kept, where ``spec.training.earlyStopping`` watched; absent: the last one's."""
    watched: str | None = None
    """The task's figure by which that step was chosen; absent: the validation loss."""
    warnings: tuple[str, ...] = ()
    """What a person may care about, one sentence each."""


class NearToken(ApiModel):
    """A token of the vocabulary, and how far its embedding is."""

    id: int
    token: str
    """Its text."""
    distance: float


class VirtualToken(ApiModel):
    """What one vector of a soft prompt is near to, nearest first: a hint at what it says, not a translation."""

    cosine: tuple[NearToken, ...]
    """By direction: 1 - cosine similarity, 0 to 2."""
    l2: tuple[NearToken, ...]
    """By Euclidean distance."""


class Span(ApiModel):
    """A 95 % confidence interval of a figure."""

    low: float
    high: float


class FewShotComparison(ApiModel):
    """One metric of the base model with examples in its prompt, and what the tuned model without any has over it."""

    value: float
    """Of the base with examples."""
    interval: Span | None = None
    """Of ``value``."""
    delta: float
    """tuned - value."""
    low: float
    """Lower bound of the 95 % confidence interval of ``delta``."""
    high: float
    p_value: float | None = None
    """As of `MetricComparison`; absent in reports of versions that did not tell it."""


class BaseAndTuned(ApiModel):
    """A number of each model."""

    base: float
    tuned: float


class MetricComparison(ApiModel):
    """One metric of one task on the test split: the base model against the tuned one."""

    task: str
    metric: str
    """``accuracy``, ``macro_f1``, ``ece``, ``generated_accuracy``, ``generated_macro_f1``, ``rouge1``, ``rouge2``,
    ``rougeL``, ``exact_match``, ``token_f1``, ``bleu``, ``chrf``, ``perplexity``, ``bits_per_byte``."""
    base: float | None = None
    tuned: float
    base_interval: Span | None = None
    """Of ``base`` alone, by the same bootstrap. What is sure about the difference, ``low`` and ``high`` tell better."""
    tuned_interval: Span | None = None
    delta: float | None = None
    """tuned - base."""
    low: float | None = None
    """Lower bound of the 95 % confidence interval of ``delta`` (paired bootstrap over rows, or over groups of them)."""
    high: float | None = None
    p_value: float | None = None
    """Two-sided, of no difference, from the same draws; absent where there is no difference to speak of."""
    adjusted_p_value: float | None = None
    """``p_value`` after Holm's correction over all of ``metrics``: of many figures, some look better by luck."""
    rows: int
    groups: int | None = None
    """Groups of rows that are alike (one film's, by ``spec.data.splits.groupBy``) and are drawn together: twenty rows
    that say the same do not count as twenty. Absent where every row stands for itself."""
    rows_needed: int | None = None
    """Test rows that would show, nine times in ten, that a true difference as large as ``delta`` is none of chance
    (the interval excludes zero); absent where ``delta`` is zero or unknown."""
    higher_is_better: bool = True
    note: str = ""
    few_shot: FewShotComparison | None = None
    """Absent unless ``spec.evaluation.baselines.fewShot`` asks for it."""
    precision: BaseAndTuned | None = None
    """Mean share of the words written that the reference has too; of ROUGE, whose F1 is the metric itself."""
    recall: BaseAndTuned | None = None
    """Mean share of the reference's words that were written."""
    majority: float | None = None
    """What always saying the commonest label of the training rows reaches; of tasks with labels."""


class PromptChoice(ApiModel):
    """How the base model was given its best chance: choices made without the test split."""

    task: str
    template: int
    """Index of the template in ``spec.data.tasks[].templates``."""
    format: str = ""
    """``raw`` when the base of a chat job did better without its chat template; empty: the job's own format."""
    normaliser: str
    """How label likelihoods are compared: ``sum``, ``mean``, ``calibrated``."""
    validation_accuracy: float
    """On the validation rows, or on training rows where the job keeps none back."""
    candidates: dict[str, float] = Field(default_factory=dict)
    """Validation accuracy of every template and normaliser tried."""


class SideBySide(ApiModel):
    """One test row: what was asked, what was expected, what both models said."""

    task: str
    row: int
    prompt: str
    reference: str
    base: str
    tuned: str
    metric: str = ""
    """The metric that chose this row: ``accuracy``, ``generated_accuracy``, ``rougeL``, ``exact_match``, ``token_f1``,
    ``chrf``, ``bleu``."""
    base_score: float | None = None
    """The base model's ``metric`` on this row alone, 0 to 1."""
    tuned_score: float | None = None


class Confusion(ApiModel):
    """Which labels both models take for which, on one task's test rows."""

    task: str
    generated: bool = False
    """Whether a label counts as predicted when a model writes it, not when it finds it likeliest; the last of
    ``labels`` then stands for all that is written and is no label."""
    labels: tuple[str, ...]
    base: tuple[tuple[int, ...], ...]
    """Rows by expected label, within them by predicted label, both in the order of ``labels``."""
    tuned: tuple[tuple[int, ...], ...]


class HarnessAccuracy(ApiModel):
    """Accuracy on a task with labels as lm-evaluation-harness computes it, to be put beside published numbers.

    It decides nothing: the verdict and the gates take the metric ``accuracy``, for which the base was given its best
    chance. Here both models are asked in the job's own format, and how likelihoods are compared is fixed.
    """

    task: str
    base_acc: float
    """The answer is the label with the highest log-probability; the end token does not count."""
    base_acc_norm: float
    """The same with the log-probability divided by the label's characters, so that long labels are not at a loss."""
    tuned_acc: float
    tuned_acc_norm: float


class GateResult(ApiModel):
    """Whether one gate let the model through."""

    # Bounded because the status holds it, too.
    metric: Annotated[str, Field(min_length=1, max_length=128)]
    """The gate's metric."""
    passed: bool
    """The verdict."""
    why: Annotated[str, Field(max_length=512)] = ""
    """The numbers behind it, in a sentence."""


class Retention(StrEnum):
    """What can be said about general ability after tuning."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"


class RetentionResult(ApiModel):
    """Whether tuning cost more accuracy than allowed, on the rows of one source."""

    source: str
    """``general`` for the suite that ships with the image, or the name of an own file."""
    verdict: Retention
    why: str
    """The numbers behind it, in a sentence."""
    rows: int
    change: float | None = None
    """Accuracy, tuned - base; absent in reports of versions that did not tell it."""


class TradeOffPoint(ApiModel):
    """One strength of the tuned adapter, or one checkpoint: what it gains on the tasks, what it loses beside them."""

    scale: float = 1.0
    """What the adapter's update is multiplied by; 1 is as trained."""
    step: int | None = None
    """Of a checkpoint; absent where it is the end of training that was measured."""
    gain: float
    """Mean of ``gains``."""
    gains: dict[str, float]
    """By task, over the base asked in the same way: in accuracy where the task has labels, else in the probability of
    a token of the expected answer (the geometric mean, 1 / perplexity)."""
    change: float
    """In accuracy on general rows, tuned minus base; of several sources the one with the lowest ``low``."""
    low: float
    """What ``change`` is above, with the confidence that the job asks for."""
    within_budget: bool
    """Whether that is no larger a drop than allowed, on the rows of every source."""


class TradeOff(ApiModel):
    """How strong the tuned adapter was left, or how long trained, chosen on rows that decide nothing else."""

    remedy: str = "loraScale"
    """As ``spec.evaluation.forgetting.remedy`` has it."""
    points: tuple[TradeOffPoint, ...]
    """Weakest or earliest first; the last one is as trained."""
    scale: float = 1.0
    """The chosen one; every other number of the report is of the model at this scale."""
    step: int | None = None
    """The chosen checkpoint's, of which every other number of the report is; absent: the end of training."""
    why: str
    """In a sentence."""
    max_drop: float
    """What general accuracy may drop by."""
    validation_rows: int
    general_rows: int
    """Half of the general rows; the other half decides."""


class CollapseSign(StrEnum):
    """What the answers of a model look like that has lost the form of an answer."""

    EMPTY = "empty"
    """Nothing is written."""
    SAME = "same"
    """One and the same text, whatever was asked."""
    LABEL = "label"
    """Words of the tasks' labels and no other."""
    REPETITION = "repetition"
    """The end goes round in circles."""


class SignCount(ApiModel):
    """How many answers show one sign."""

    sign: CollapseSign
    base: int
    tuned: int
    collapsed: bool
    """Whether at least half of the tuned model's answers show it, and twice as many as the base's."""


class ProbedAnswer(ApiModel):
    """What both models write to a question of no task."""

    question: str
    base: str
    tuned: str


class FormatReport(ApiModel):
    """Whether the tuned model still answers other questions in the form of an answer; it is no gate."""

    signs: tuple[SignCount, ...]
    answers: tuple[ProbedAnswer, ...]


class ForgettingReport(ApiModel):
    """What tuning cost in general ability: a non-inferiority test on rows that belong to no task of the job."""

    verdict: Retention
    """The worst of ``results``."""
    results: tuple[RetentionResult, ...]
    tasks: tuple[MetricComparison, ...]
    """Accuracy on each general task, and bits per byte of general prose. p-values are corrected for the number of
    these figures."""
    format: FormatReport | None = None
    """Absent in reports of versions that did not ask."""
    trade_off: TradeOff | None = None
    """Absent unless ``spec.evaluation.forgetting.remedy`` asks for it."""


class BenchmarkReport(ApiModel):
    """One of ``spec.evaluation.benchmarks``, base against tuned."""

    suite: str
    """As the spec names it."""
    name: str
    """What gates call it: the suite's name, or the task that a task file declares."""
    sha256: str | None = None
    """Of a task file and its rows; absent for a suite that is known by name."""
    metrics: tuple[MetricComparison, ...] = ()
    """Of a suite with several tasks, first the figures over the rows of all of them. p-values are corrected for the
    number of all benchmarks' figures."""


class SubgroupFigure(ApiModel):
    """A task's figure over the test rows with one value in ``spec.evaluation.holistic.subgroupColumn``."""

    task: str
    subgroup: str
    rows: int
    compared: bool
    """Whether these are enough rows to count for the gap."""
    base: float
    """Accuracy; of a task without labels the probability of a token of the expected answer."""
    tuned: float


class WordCount(ApiModel):
    """How often words of a shipped list stand in what both models wrote behind the shipped openings."""

    name: str
    """Of the list: ``female``, ``male`` or ``insults``."""
    words: int
    """In it."""
    found: BaseAndTuned


class Efficiency(ApiModel):
    """What writing costs: all answers to the shipped openings, in batches, timed once."""

    tokens: BaseAndTuned
    """Written."""
    tokens_per_second: BaseAndTuned
    peak_bytes: BaseAndTuned | None = None
    """Largest memory while writing: of the GPU, or else of the whole process; absent where the system does not say."""


class HolisticReport(ApiModel):
    """What is asked beside accuracy; it decides what a gate names. Calibration is ``ece`` among the metrics."""

    metrics: tuple[MetricComparison, ...] = ()
    """Robustness as ``<figure>_typos`` and ``<figure>_case``: the change when inputs are disturbed. Fairness as
    ``subgroup_gap``. Of what both models write ``insulting_answers`` and ``gender_skew``. p-values are corrected for
    the number of these figures."""
    subgroups: tuple[SubgroupFigure, ...] = ()
    """Of each task the 32 largest."""
    words: tuple[WordCount, ...] = ()
    openings: int = 0
    """Beginnings of sentences that each model went on from."""
    efficiency: Efficiency


class ProbeReport(ApiModel):
    """How base and tuned model answer the same few test rows: proof that the tuned one is not the base."""

    rows: int
    effect: float
    """Largest difference between a tuned model's logit and the base's; a job without any fails."""
    largest: float
    """Largest logit of the tuned model, for scale."""


class EvaluationReport(ApiModel):
    """The untouched test split, scored."""

    metrics: tuple[MetricComparison, ...] = ()
    gates: tuple[GateResult, ...] = ()
    """One for each of ``spec.evaluation.gates``, in their order; then ``forgetting``, where it was measured."""
    forgetting: ForgettingReport | None = None
    benchmarks: tuple[BenchmarkReport, ...] = ()
    """One for each of ``spec.evaluation.benchmarks``, in their order."""
    holistic: HolisticReport | None = None
    """Absent unless ``spec.evaluation.holistic`` asks for it."""
    probe: ProbeReport | None = None
    """Absent in reports of versions that did not probe."""
    few_shot: int | None = None
    """Training rows that the base was shown for ``metrics[].few_shot``; of the tasks the largest number."""
    confusions: tuple[Confusion, ...] = ()
    """One for each task whose labels are predicted."""
    harness: tuple[HarnessAccuracy, ...] = ()
    prompt_choices: tuple[PromptChoice, ...] = ()
    examples: tuple[SideBySide, ...] = ()
    seconds: float = 0.0


class ArtifactKind(StrEnum):
    """What was published."""

    ADAPTER = "adapter"
    WEIGHTS = "weights"
    MERGED = "merged"
    REPORT = "report"


class Ancestor(ApiModel):
    """A published artifact that a model was tuned on from."""

    uri: str
    """Where it was."""
    kind: ArtifactKind
    sha256: str
    """sha256 of its MANIFEST.json, against which it was verified."""
    spec_hash: str
    """Of the job that published it."""


class Artifact(ApiModel):
    """One published folder."""

    kind: ArtifactKind
    uri: str
    sha256: str
    """sha256 of the folder's MANIFEST.json, which holds the sha256 of every file."""
    bytes: int


class ParityReport(ApiModel):
    """Proof that one artifact, loaded afresh before it was published, is the model that was evaluated."""

    kind: ArtifactKind
    difference: float
    """Largest difference between a logit of the evaluated model and the artifact's, for the same test rows."""
    allowed: float
    """What rounding explains; a job whose artifact is farther off fails, and publishes nothing."""


class Report(ApiModel):
    """The whole outcome of a job; written as report.json beside report.html."""

    contract_version: int = CONTRACT_VERSION
    name: str
    namespace: str
    spec_hash: str
    base_model: str
    base_revision: str | None = None
    """Commit of a hub model, or sha256 over the files of a local one."""
    lineage: tuple[Ancestor, ...] = ()
    """What ``spec.model.startFrom`` named, then what that was itself tuned on from, nearest first; empty where tuning
    began with the base model. Figures compare with the base model all the same."""
    data: DataReport
    training: TrainingReport
    planned_memory_bytes: int | None = None
    """What the check expected of one process's tensors when most are alive; the peak is of the whole process."""
    soft_prompt: tuple[VirtualToken, ...] = ()
    """The virtual tokens of prompt tuning, in their order."""
    evaluation: EvaluationReport | None = None
    artifacts: tuple[Artifact, ...] = ()
    parity: tuple[ParityReport, ...] = ()
    """One for each published model."""
    published: bool = False
    why_not_published: str = ""
    """Why the model was kept back, in a sentence."""
    seed: int
    versions: dict[str, str] = Field(default_factory=dict)
    """Package versions that the numbers depend on."""
    image: str | None = None
    """The trainer's image as the operator pinned it; behind a tag, in brackets, what the node of the stage before ran,
    by its digest. Absent where no operator started the stages."""
    resolved: dict[str, object] = Field(default_factory=dict)
    """The spec with every default filled in, as JSON."""
