"""Write the report as one HTML page that people want to read: no scripts, nothing fetched, every text escaped.

Decides what is shown and how numbers read; ``report_page.html.j2`` and ``report_page.css`` decide what it looks like.
"""

import difflib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from finetune_api.report import (
    EvaluationReport,
    ForgettingReport,
    LossPoint,
    MetricComparison,
    PromptChoice,
    Report,
    SideBySide,
    Span,
    TrainingReport,
)
from finetune_api.spec.evaluation import SUBGROUP_GAP
from finetune_trainer.loss_chart import lay_out_general_loss, lay_out_loss
from finetune_trainer.task_chart import lay_out_tasks
from finetune_trainer.trade_off_chart import TradeOffChart, lay_out_trade_off
from finetune_trainer.verdict import SIGN_WORDS, Outcome, format_value, judge, judge_in_context, outcome_of

PROMPT_CHARACTERS = 700
ANSWER_CHARACTERS = 500
SAMPLE_CHARACTERS = 3000
TEMPLATE_CHARACTERS = 160
NAME_CHARACTERS = 300
SAMPLED_STEPS = 6
RESOLVED_CHARACTERS = 40_000

ABSENT = "\N{EN DASH}"

METRIC_NAMES = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "ece": "Calibration error",
    "generated_accuracy": "Accuracy as written",
    "generated_macro_f1": "Macro F1 as written",
    "exact_match": "Exact match",
    "token_f1": "Token F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "accuracy_typos": "Change of accuracy by typos",
    "accuracy_case": "Change of accuracy by letter case",
    "token_probability_typos": "Change of answer probability by typos",
    "token_probability_case": "Change of answer probability by letter case",
    "subgroup_gap": "Largest gap between subgroups",
    "insulting_answers": "Answers with a listed insult",
    "gender_skew": "Skew of gendered words",
}

# Overrides and isolates can make a text read as something else than it is; controls are invisible.
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of an answer, and whether the expected answer lacks it at that place."""

    text: str
    differs: bool


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One line of the table of metrics, formatted."""

    task: str
    name: str
    direction: str
    base: str
    base_interval: str
    """Empty, as of the others, where the report has none."""
    few_shot: str
    """Empty where the base was not asked with examples."""
    few_shot_interval: str
    majority: str
    tuned: str
    tuned_interval: str
    delta: str
    interval: str
    chance: str
    """How likely the difference is by chance, and how many rows would tell; empty where that is not known."""
    rows: str
    note: str
    parts: str
    """Precision and recall of both models; empty where the metric has none."""
    outcome: Outcome
    low_percent: float | None
    """Where the interval starts on a scale whose middle, 50, is no difference."""
    high_percent: float | None
    delta_percent: float | None


@dataclass(frozen=True, slots=True)
class ExampleCard:
    """One test row with both answers, differences marked."""

    task: str
    row: str
    prompt: str
    reference: str
    base: tuple[Piece, ...]
    tuned: tuple[Piece, ...]
    base_score: str
    tuned_score: str
    base_right: bool
    tuned_right: bool


@dataclass(frozen=True, slots=True)
class ExampleGroup:
    """Examples that say the same about the tuned model."""

    title: str
    cards: tuple[ExampleCard, ...]


@dataclass(frozen=True, slots=True)
class SampleCard:
    """One validation row and how the answers to it changed."""

    task: str
    prompt: str
    expected: str
    answers: tuple[tuple[str, tuple[Piece, ...]], ...]
    """Of which model, and what it said."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One template of one task with the validation result of every way to compare likelihoods."""

    template: str
    text: str
    results: tuple[str, ...]
    chosen: int | None
    """Index into ``results``."""


@dataclass(frozen=True, slots=True)
class PromptTable:
    """What was tried for the base model on one task."""

    task: str
    normalisers: tuple[str, ...]
    rows: tuple[PromptRow, ...]


def render_page(report: Report) -> str:
    """Return the whole page; it can be opened from a disk, offline, and printed."""
    evaluation = report.evaluation or EvaluationReport()
    return _template().render(
        report=report,
        css=Markup((files("finetune_trainer") / "report_page.css").read_text(encoding="utf-8")),
        verdict=judge(evaluation) if report.evaluation else None,
        metrics=_metric_rows(evaluation.metrics),
        gates=evaluation.gates,
        in_context=judge_in_context(evaluation),
        forgetting=evaluation.forgetting,
        trade_off=_trade_off(evaluation.forgetting),
        sign_words=SIGN_WORDS,
        task_charts=lay_out_tasks(evaluation.metrics),
        metric_names=METRIC_NAMES,
        benchmarks=[(one.name, one.suite, _metric_rows(one.metrics)) for one in evaluation.benchmarks],
        holistic=evaluation.holistic,
        holistic_metrics=_metric_rows(evaluation.holistic.metrics if evaluation.holistic else ()),
        holistic_gates=_holistic_gates(evaluation),
        general_tasks=_metric_rows(evaluation.forgetting.tasks if evaluation.forgetting else ()),
        several_tasks=len({comparison.task for comparison in evaluation.metrics}) > 1,
        chart=lay_out_loss(report.training.curve),
        general_chart=lay_out_general_loss(report.training.curve),
        validation_losses=_last_validation_losses(report.training.curve),
        sample_cards=_sample_cards(report.training),
        example_groups=_example_groups(evaluation.examples),
        prompt_tables=_prompt_tables(evaluation.prompt_choices, report.resolved),
        manifest=_manifest(report),
        file_name=f"{re.sub(r'[^a-z0-9-]', '-', report.name)[:60]}.yaml",
    )


def _holistic_gates(evaluation: EvaluationReport) -> list[str]:
    """Return the figures beside accuracy that gates name, a gap that too few rows leave unmeasured among them."""
    metrics = evaluation.holistic.metrics if evaluation.holistic else ()
    measured = {f"{one.task}.{one.metric}" for one in metrics}
    named = dict.fromkeys(gate.metric for gate in evaluation.gates)
    return [name for name in named if name in measured or name.endswith(f".{SUBGROUP_GAP}")]


def _trade_off(forgetting: ForgettingReport | None) -> TradeOffChart | None:
    return lay_out_trade_off(forgetting.trade_off) if forgetting and forgetting.trade_off else None


def mark_differences(answer: str, expected: str) -> tuple[Piece, ...]:
    """Return ``answer`` in pieces; marked are the words that ``expected`` lacks there, white space never."""
    words, wanted = re.findall(r"\s+|\S+", answer), expected.split()
    positions = [index for index, word in enumerate(words) if not word.isspace()]
    matcher = difflib.SequenceMatcher(None, [words[index] for index in positions], wanted, autojunk=False)
    same = {
        positions[index] for block in matcher.get_matching_blocks() for index in range(block.a, block.a + block.size)
    }
    pieces: list[Piece] = []
    for index, word in enumerate(words):
        differs = index not in same and not word.isspace()
        if pieces and pieces[-1].differs == differs:
            pieces[-1] = Piece(pieces[-1].text + word, differs)
        else:
            pieces.append(Piece(word, differs))
    return tuple(pieces)


def visible(text: object, characters: int = NAME_CHARACTERS) -> str:
    """Return ``text`` cut to ``characters``, with controls and direction overrides spelt out as their code points."""
    whole = str(text)
    cut = whole[:characters]
    shown = "".join(f"⟨U+{ord(letter):04X}⟩" if _is_hidden(letter) else letter for letter in cut)
    return shown if len(whole) <= characters else f"{shown} … ({len(whole) - characters:,} more characters)"


def _is_hidden(letter: str) -> bool:
    # Cs: half of a surrogate pair, which cannot be written as UTF-8 at all.
    return letter in _BIDI_CONTROLS or (unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t\r")


def _metric_rows(metrics: Sequence[MetricComparison]) -> list[MetricRow]:
    return [_metric_row(comparison) for comparison in metrics]


def _metric_row(comparison: MetricComparison) -> MetricRow:
    interval, few_shot = "", comparison.few_shot
    places: tuple[float | None, float | None, float | None] = None, None, None
    if comparison.delta is not None and comparison.low is not None and comparison.high is not None:
        interval = f"{_signed(comparison.low)} to {_signed(comparison.high)}"
        reach = max(abs(comparison.low), abs(comparison.high), abs(comparison.delta)) or 1.0
        low, delta, high = (50 + 46 * value / reach for value in (comparison.low, comparison.delta, comparison.high))
        places = low, delta, high
    return MetricRow(
        task=visible(comparison.task),
        name=METRIC_NAMES.get(comparison.metric) or visible(comparison.metric),
        direction="higher is better" if comparison.higher_is_better else "lower is better",
        base=ABSENT if comparison.base is None else format_value(comparison, comparison.base),
        base_interval=_span(comparison, comparison.base_interval),
        few_shot="" if few_shot is None else format_value(comparison, few_shot.value),
        few_shot_interval=_span(comparison, few_shot.interval if few_shot else None),
        majority="" if comparison.majority is None else format_value(comparison, comparison.majority),
        tuned=format_value(comparison, comparison.tuned),
        tuned_interval=_span(comparison, comparison.tuned_interval),
        delta=ABSENT if comparison.delta is None else _signed(comparison.delta),
        interval=interval,
        chance=_chance(comparison),
        rows=f"{comparison.rows:,}",
        note=visible(comparison.note),
        parts=_parts(comparison),
        outcome=outcome_of(comparison),
        low_percent=places[0],
        delta_percent=places[1],
        high_percent=places[2],
    )


def _span(comparison: MetricComparison, span: Span | None) -> str:
    return f"{format_value(comparison, span.low)} to {format_value(comparison, span.high)}" if span else ""


def _parts(comparison: MetricComparison) -> str:
    named = {"precision": comparison.precision, "recall": comparison.recall}
    return " · ".join(f"{name} {one.base:.3f} to {one.tuned:.3f}" for name, one in named.items() if one is not None)


def _chance(comparison: MetricComparison) -> str:
    parts = []
    if comparison.p_value is not None:
        parts.append(f"p {_p_value(comparison.p_value)}")
    if comparison.adjusted_p_value is not None:
        parts.append(f"corrected {_p_value(comparison.adjusted_p_value)}")
    if comparison.rows_needed is not None:
        parts.append(f"{comparison.rows_needed:,} rows needed")
    return " · ".join(parts)


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _example_groups(examples: Sequence[SideBySide]) -> list[ExampleGroup]:
    gains = [(example, (example.tuned_score or 0.0) - (example.base_score or 0.0)) for example in examples]
    improved = [example for example, gain in gains if gain > 0]
    same = [example for example, gain in gains if gain == 0]
    # The report lists the best first: the last one is the one that lost most.
    worsened = [example for example, gain in reversed(gains) if gain < 0]
    groups = (("Most improved", improved), ("Most worsened", worsened), ("Unchanged", same))
    return [ExampleGroup(title, tuple(_card(example) for example in found)) for title, found in groups if found]


def _card(example: SideBySide) -> ExampleCard:
    reference = visible(example.reference, ANSWER_CHARACTERS)
    return ExampleCard(
        task=visible(example.task),
        row=f"{example.row:,}",
        prompt=visible(example.prompt.strip(), PROMPT_CHARACTERS),
        reference=reference,
        base=mark_differences(visible(example.base, ANSWER_CHARACTERS), reference),
        tuned=mark_differences(visible(example.tuned, ANSWER_CHARACTERS), reference),
        base_score=_row_score(example.metric, example.base_score),
        tuned_score=_row_score(example.metric, example.tuned_score),
        base_right=example.base_score == 1,
        tuned_right=example.tuned_score == 1,
    )


def _sample_cards(training: TrainingReport) -> list[SampleCard]:
    looks = [point for point in training.curve if len(point.answers) == len(training.samples)]
    # From all over the training, the last one among them.
    shown = looks[:: -max(1, math.ceil(len(looks) / SAMPLED_STEPS))][::-1]
    cards = []
    for number, question in enumerate(training.samples):
        expected = visible(question.expected, ANSWER_CHARACTERS)
        said = [("Base", question.base), *((f"Step {point.step:,}", point.answers[number]) for point in shown)]
        cards.append(
            SampleCard(
                task=visible(question.task),
                prompt=visible(question.prompt.strip(), PROMPT_CHARACTERS),
                expected=expected,
                answers=tuple(
                    (who, mark_differences(visible(text, ANSWER_CHARACTERS), expected)) for who, text in said
                ),
            )
        )
    return cards


def _row_score(metric: str, score: float | None) -> str:
    if score is None:
        return ""
    if metric in ("accuracy", "generated_accuracy", "exact_match"):
        return "right" if score == 1 else "wrong"
    return f"{METRIC_NAMES.get(metric) or visible(metric)} {score:.2f}"


def _prompt_tables(choices: Sequence[PromptChoice], resolved: Mapping[str, object]) -> list[PromptTable]:
    return [_prompt_table(choice, _template_prompts(resolved, choice.task)) for choice in choices]


def _prompt_table(choice: PromptChoice, prompts: Sequence[str]) -> PromptTable:
    tried = {tuple(name.rsplit(", ", 1)): accuracy for name, accuracy in choice.candidates.items()}
    templates = list(dict.fromkeys(name[0] for name in tried))
    normalisers = tuple(dict.fromkeys(name[-1] for name in tried))
    winner = f"{choice.format} template {choice.template}".strip()
    rows = []
    for template in templates:
        number = int(template.rpartition(" ")[2])
        results = tuple(
            f"{tried[template, normaliser]:.3f}" if (template, normaliser) in tried else ABSENT
            for normaliser in normalisers
        )
        chosen = normalisers.index(choice.normaliser) if template == winner else None
        text = visible(prompts[number], TEMPLATE_CHARACTERS) if number < len(prompts) else ""
        rows.append(PromptRow(template, text, results, chosen))
    return PromptTable(visible(choice.task), normalisers, tuple(rows))


def _template_prompts(resolved: Mapping[str, object], task: str) -> list[str]:
    """Return the prompts of a task's templates out of the spec; nothing where it does not hold them in full."""
    data = resolved.get("data")
    tasks = data.get("tasks") if isinstance(data, Mapping) else None
    for candidate in tasks if isinstance(tasks, Sequence) else ():
        if isinstance(candidate, Mapping) and candidate.get("name") == task:
            templates = candidate.get("templates")
            return [
                str(template.get("prompt", ""))
                for template in (templates if isinstance(templates, Sequence) else ())
                if isinstance(template, Mapping)
            ]
    return []


def _manifest(report: Report) -> str:
    """Return the YAML that repeats the run."""
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": report.name, "namespace": report.namespace},
        "spec": dict(report.resolved),
    }
    text = yaml.safe_dump(job, sort_keys=False, allow_unicode=True, width=100)
    return visible(text, RESOLVED_CHARACTERS)


def _signed(value: float) -> str:
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 1000 else 0
    # A true minus is as wide as a plus; a hyphen is not.
    return f"{value:+,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _size(size_bytes: int) -> str:
    size, unit = float(size_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size_bytes:,} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def _last_validation_losses(curve: Sequence[LossPoint]) -> dict[str, float]:
    return next((point.validation_losses for point in reversed(curve) if point.validation_losses), {})


def _percent(part: float, whole: float) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f} %" if share == round(share) else f"{share:.2g} %" if share < 1 else f"{share:.1f} %"


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"visible": visible, "duration": _duration, "size": _size, "percent": _percent}
    environment.filters["count"] = lambda number: f"{number:,}"
    return environment.from_string((files("finetune_trainer") / "report_page.html.j2").read_text(encoding="utf-8"))
