"""Single test rows with what both models said to them: those to look at, and all of them as a table."""

from collections.abc import Mapping

import numpy as np

from finetune_api.report import SideBySide
from finetune_trainer.examiner import Answers
from finetune_trainer.figure import Figure
from finetune_trainer.paper import Paper
from finetune_trainer.verdict import LEADING_METRICS

EXAMPLES_EACH = 6
"""Most improved, most worsened and still wrong rows of each task that the report shows."""


EXAMPLE_CHARACTERS = 4000


def pick_examples(
    paper: Paper, base: Answers, tuned: Answers, figures: Mapping[str, tuple[Figure, Figure]]
) -> list[SideBySide]:
    """Return the rows that moved most either way and some that stay wrong, best first; none by perplexity alone."""
    metric = next(name for name in LEADING_METRICS if name in figures)
    if metric == "perplexity":
        return []
    base_scores, tuned_scores = (figure.of_each_row for figure in figures[metric])
    change = tuned_scores - base_scores
    # Rows that moved equally far are ordered by how much likelier the expected answer became.
    likelihood = np.array(
        [float(t.mean() - b.mean()) for b, t in zip(base.logprobs, tuned.logprobs, strict=True)], dtype=np.float64
    )
    order = sorted(range(len(change)), key=lambda row: (-change[row], -likelihood[row]))
    improved = [row for row in order if change[row] > 0][:EXAMPLES_EACH]
    worsened = [row for row in order if change[row] < 0][-EXAMPLES_EACH:]
    still_wrong = [row for row in order if change[row] == 0 and tuned_scores[row] < 1][: EXAMPLES_EACH // 2]
    said = (base.labels, tuned.labels) if metric == "accuracy" else (base.texts, tuned.texts)
    return [
        SideBySide(
            task=paper.task,
            row=tuned.examples[row].row,
            prompt=_shortened(tuned.examples[row].prompt),
            reference=_shortened(tuned.references[row]),
            base=_shortened((said[0] or [])[row]),
            tuned=_shortened((said[1] or [])[row]),
            metric=metric,
            base_score=float(base_scores[row]),
            tuned_score=float(tuned_scores[row]),
        )
        for row in [*improved, *still_wrong, *worsened]
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "…"


def prediction_rows(paper: Paper, base: Answers, tuned: Answers, few_shot: Answers | None) -> list[dict[str, object]]:
    """Return one flat row per test row; the columns are the same for every task."""
    return [
        {
            "task": paper.task,
            "row": example.row,
            "prompt": example.prompt,
            "reference": example.completion.strip(),
            "base_template": base.examples[index].template,
            "tuned_template": example.template,
            "base": base.texts[index] if base.texts else None,
            "tuned": tuned.texts[index] if tuned.texts else None,
            "base_label": base.labels[index] if base.labels else None,
            "tuned_label": tuned.labels[index] if tuned.labels else None,
            "base_confidence": _confidence(base, index),
            "tuned_confidence": _confidence(tuned, index),
            "base_logprob": float(base.logprobs[index].sum()),
            "tuned_logprob": float(tuned.logprobs[index].sum()),
            "base_tokens": len(base.logprobs[index]),
            "tuned_tokens": len(tuned.logprobs[index]),
        }
        | _few_shot_columns(few_shot, index)
        | ({} if paper.groups is None else {"group": paper.groups[index]})
        for index, example in enumerate(tuned.examples)
    ]


def _confidence(answers: Answers, index: int) -> float | None:
    return None if answers.confidences is None else float(answers.confidences[index])


def _few_shot_columns(few_shot: Answers | None, index: int) -> dict[str, object]:
    if few_shot is None:
        return {}
    return {
        "few_shot": few_shot.texts[index] if few_shot.texts else None,
        "few_shot_label": few_shot.labels[index] if few_shot.labels else None,
    }
