"""What one model's answers to a task amount to."""

import operator

import numpy as np

from finetune_api.report import BaseAndTuned
from finetune_trainer.examiner import Answers
from finetune_trainer.figure import (
    Figure,
    bits_per_byte_figure,
    bleu_figure,
    calibration_figure,
    chrf_figure,
    macro_f1_figure,
    mean_figure,
    mean_of,
    perplexity_figure,
    token_f1,
    token_probability_figure,
)
from finetune_trainer.metrics import ROUGE_NAMES, exact_match, rouge
from finetune_trainer.paper import Paper


def figures_of(paper: Paper, answers: Answers) -> list[Figure]:
    """Return what one model's answers amount to, the most telling first."""
    figures: list[Figure] = []
    expected = answers.references
    if "accuracy" in paper.metrics:
        said = answers.labels or []
        figures.append(mean_of(operator.eq, "accuracy", said, expected))
        figures.append(macro_f1_figure(said, expected, paper.labels))
        right = [one == reference for one, reference in zip(said, expected, strict=True)]
        figures.append(calibration_figure([] if answers.confidences is None else answers.confidences, right))
    texts = answers.texts or []
    if "generated_accuracy" in paper.metrics:
        written = [text.strip() for text in texts]
        figures.append(mean_of(exact_match, "generated_accuracy", texts, expected))
        figures.append(macro_f1_figure(written, expected, paper.labels, "generated_macro_f1"))
    if "rouge" in paper.metrics:
        scores = [rouge(text, reference) for text, reference in zip(texts, expected, strict=True)]
        figures += [mean_figure(name, [score[name].f1 for score in scores]) for name in ROUGE_NAMES]
    if "exact_match" in paper.metrics:
        figures.append(mean_of(exact_match, "exact_match", texts, expected))
    if "token_f1" in paper.metrics:
        figures.append(mean_of(token_f1, "token_f1", texts, expected))
    if "bleu" in paper.metrics:
        figures.append(bleu_figure(texts, expected))
    if "chrf" in paper.metrics:
        figures.append(chrf_figure(texts, expected))
    return [*figures, perplexity_figure(answers.logprobs), bits_per_byte_figure(answers.logprobs, expected)]


def task_figure(paper: Paper, answers: Answers) -> Figure:
    """Return what a task gains by without generation, 0 to 1: accuracy, or how likely the expected tokens are."""
    if answers.labels is not None:
        return mean_of(operator.eq, "accuracy", answers.labels, answers.references)
    return token_probability_figure(answers.logprobs)


def commonest_figures(paper: Paper) -> dict[str, float]:
    """Return what saying the commonest label always would reach."""
    if not paper.labels:
        return {}
    expected = [example.completion.strip() for example in paper.test]
    said = [paper.commonest] * len(expected)
    accuracy = mean_of(operator.eq, "accuracy", said, expected).value
    macro_f1 = macro_f1_figure(said, expected, paper.labels).value
    # However it is said: as the likeliest label or in writing.
    return {
        f"{how}{name}": value
        for how in ("", "generated_")
        for name, value in (("accuracy", accuracy), ("macro_f1", macro_f1))
    }


def rouge_parts(paper: Paper, base: Answers, tuned: Answers) -> dict[str, dict[str, BaseAndTuned]]:
    """Return the mean precision and recall behind each ROUGE figure."""
    if "rouge" not in paper.metrics:
        return {}
    scores = [
        [rouge(text, reference) for text, reference in zip(one.texts or [], one.references, strict=True)]
        for one in (base, tuned)
    ]

    def means(name: str, part: str) -> BaseAndTuned:
        of_base, of_tuned = (float(np.mean([getattr(score[name], part) for score in one])) for one in scores)
        return BaseAndTuned(base=of_base, tuned=of_tuned)

    return {name: {part: means(name, part) for part in ("precision", "recall")} for name in ROUGE_NAMES}
