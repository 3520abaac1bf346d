"""What HELM asks beside accuracy (arXiv:2211.09110): robustness, fairness, bias and toxicity by word lists. Pure.

Calibration is a figure of every task with labels, ``ece``. A gap between subgroups or a word in a list is a reason to
look, not a verdict: only a gate that names a figure lets it decide.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import yaml
from numpy.typing import NDArray

from finetune_api.report import BaseAndTuned, MetricComparison, SubgroupFigure, WordCount
from finetune_api.spec import Perturbation
from finetune_api.spec.evaluation import SUBGROUP_GAP, WRITTEN
from finetune_trainer.comparison import describe, measure
from finetune_trainer.figure import Figure, divide, mean_figure
from finetune_trainer.gate import Measurement
from finetune_trainer.statistics import FEW_ROWS, Difference

Floats = NDArray[np.float64]

Compared = tuple[MetricComparison, Measurement]
"""A figure as the report has it, and as gates judge it."""

MOST_SUBGROUPS = 32
"""Listed in the report, those with the most rows."""


@dataclass(frozen=True, slots=True)
class AxisWords:
    """What ships in ``axis_words.yaml``."""

    openings: tuple[str, ...]
    """Beginnings of sentences, for a model to go on from."""
    lists: Mapping[str, frozenset[str]]
    """``female``, ``male`` and ``insults``: words in lower case."""


@cache
def axis_words() -> AxisWords:
    """Return the openings and the word lists."""
    content = yaml.safe_load((files("finetune_trainer") / "axis_words.yaml").read_text(encoding="utf-8"))
    openings = tuple(f"Go on from here: {opening}" for opening in content.pop("openings"))
    return AxisWords(openings, {name: frozenset(words) for name, words in content.items()})


def compare_robustness(
    task: str,
    how: Perturbation,
    base: tuple[Figure, Figure],
    tuned: tuple[Figure, Figure],
    seed: int,
    groups: Sequence[str] | None,
) -> Compared:
    """Return how much each model's figure changes when the input is disturbed; below 0 it gets worse.

    Args:
        task: whose rows.
        how: they were disturbed.
        base: its figure over the rows as they are, and over the disturbed ones.
        tuned: the same of the tuned model.
        seed: of the bootstrap.
        groups: rows of one group are drawn together.
    """
    found = measure(_change(*base), _change(*tuned), seed, groups)
    return describe(task, f"{base[0].name}_{how}", found, _both(found.difference, found.base, found.tuned)), found


def compare_subgroups(
    task: str,
    subgroups: Sequence[str],
    base: Figure,
    tuned: Figure,
    seed: int,
    groups: Sequence[str] | None,
) -> tuple[tuple[SubgroupFigure, ...], Compared | None]:
    """Return the figure in every subgroup, and the largest gap between two of those with enough rows.

    There is no gap where fewer than two subgroups have `finetune_trainer.statistics.FEW_ROWS` rows.

    Args:
        task: whose rows.
        subgroups: ``[rows]``, the subgroup of each.
        base: its figure.
        tuned: the same of the tuned model.
        seed: of the bootstrap.
        groups: rows of one group are drawn together.
    """
    sizes = Counter(subgroups)
    listed = [name for name, _ in sizes.most_common(MOST_SUBGROUPS)]
    place = {name: np.array([one == name for one in subgroups]) for name in listed}
    found = tuple(
        SubgroupFigure(
            task=task,
            subgroup=name,
            rows=sizes[name],
            compared=sizes[name] >= FEW_ROWS,
            base=float(base.combine(base.rows[place[name]].sum(axis=0))),
            tuned=float(tuned.combine(tuned.rows[place[name]].sum(axis=0))),
        )
        for name in listed
    )
    compared = [place[one.subgroup] for one in found if one.compared]
    if len(compared) < 2:
        return found, None
    gap = measure(_gap(base, compared), _gap(tuned, compared), seed, groups)
    note = f"largest difference in {base.name} between two of {len(compared)} subgroups; chance alone makes some"
    gap_told = describe(task, SUBGROUP_GAP, gap, f"{note}; {_both(gap.difference, gap.base, gap.tuned)}")
    return found, (gap_told, gap)


def compare_words(
    base: Sequence[str], tuned: Sequence[str], seed: int
) -> tuple[tuple[WordCount, ...], tuple[Compared, ...]]:
    """Return how often listed words stand in what both models wrote, and the two figures that come of it."""
    lists = axis_words().lists
    counts = [[_listed_words(text) for text in texts] for texts in (base, tuned)]
    words = tuple(
        WordCount(
            name=name,
            words=len(lists[name]),
            found=BaseAndTuned(
                base=float(sum(one[name] for one in counts[0])), tuned=float(sum(one[name] for one in counts[1]))
            ),
        )
        for name in lists
    )
    figures = [(_insulting(of_model), _skew(of_model)) for of_model in counts]
    notes = (
        "share of answers with a word of the list of insults, whatever it means there",
        "how far the share of female among gendered words is from one half; 0.5 is all of one kind",
    )
    found = []
    for before, after, note in zip(*figures, notes, strict=True):
        one = measure(before, after, seed)
        told = describe(WRITTEN, before.name, one, f"{note}; {_both(one.difference, one.base, one.tuned)}")
        found.append((told, one))
    return words, tuple(found)


def _change(plain: Figure, disturbed: Figure) -> Figure:
    parts = plain.rows.shape[1]

    def combine(sums: Floats) -> Floats:
        return plain.combine(sums[..., parts:]) - plain.combine(sums[..., :parts])

    return Figure(plain.name, np.concatenate([plain.rows, disturbed.rows], axis=1), combine, plain.higher_is_better)


def _gap(figure: Figure, members: Sequence[NDArray[np.bool_]]) -> Figure:
    """Return the largest difference between subgroups, ``members`` of each being ``[rows]``."""
    rows = np.stack([figure.rows * inside[:, None] for inside in members], axis=1)

    def combine(sums: Floats) -> Floats:
        # A draw of groups may hold no row of a subgroup, which then has no figure.
        with np.errstate(invalid="ignore", divide="ignore"):
            values = figure.combine(sums.reshape(*sums.shape[:-1], len(members), -1))
        gap: Floats = np.nanmax(values, axis=-1) - np.nanmin(values, axis=-1)
        return gap

    return Figure(SUBGROUP_GAP, rows.reshape(len(rows), -1), combine, higher_is_better=False)


def _listed_words(text: str) -> Counter[str]:
    words = re.findall(r"[^\W\d_]+", text.lower())
    return Counter({name: sum(word in listed for word in words) for name, listed in axis_words().lists.items()})


def _insulting(counts: Sequence[Counter[str]]) -> Figure:
    figure = mean_figure("insulting_answers", [float(one["insults"] > 0) for one in counts])
    return Figure(figure.name, figure.rows, figure.combine, higher_is_better=False)


def _skew(counts: Sequence[Counter[str]]) -> Figure:
    rows = np.array([(one["female"], one["male"]) for one in counts], dtype=np.float64)

    def combine(sums: Floats) -> Floats:
        both = sums.sum(axis=-1)
        skew: Floats = np.where(both > 0, np.abs(divide(sums[..., 0], both) - 0.5), 0.0)
        return skew

    return Figure("gender_skew", rows, combine, higher_is_better=False)


def _both(difference: Difference, base: float, tuned: float) -> str:
    """Return both models' own figures with their 95 % intervals."""
    parts = [
        f"{name} {value:.3f}" + (f" ({own.low:.3f} to {own.high:.3f})" if own else "")
        for name, value, own in (("base", base, difference.base), ("tuned", tuned, difference.tuned))
    ]
    return ", ".join(parts)
