"""Whether a tuned model still answers in the form of an answer: signs of collapse, held against the base's. Pure.

Accuracy on general rows is scored by likelihood and does not see it: a model may find the right word the likeliest
among four and yet write ``positive`` whatever it is asked.
"""

import string
from collections import Counter
from collections.abc import Sequence

from finetune_api.report import CollapseSign, FormatReport, ProbedAnswer, SignCount

ANSWER_TOKENS = 40
"""Enough to see an answer go round in circles."""

_LONGEST_STRETCH = 80
_COPIES = 4
_LEAST_REPEATED = 16
"""Characters: shorter, three dots or a laugh would be a repetition."""


def compare_answers(
    questions: Sequence[str], base: Sequence[str], tuned: Sequence[str], labels: Sequence[str]
) -> FormatReport:
    """Return the signs in both models' answers.

    Args:
        questions: what was asked.
        base: its answers, in the same order.
        tuned: the same of the tuned model.
        labels: of all tasks together.
    """
    before, after = (_count_signs(answers, labels) for answers in (base, tuned))
    return FormatReport(
        signs=tuple(
            SignCount(
                sign=sign,
                base=before[sign],
                tuned=after[sign],
                # A base that goes round in circles itself has lost nothing by it.
                collapsed=2 * after[sign] >= len(questions) and after[sign] >= 2 * before[sign],
            )
            for sign in CollapseSign
        ),
        answers=tuple(
            ProbedAnswer(question=question, base=one, tuned=other)
            for question, one, other in zip(questions, base, tuned, strict=True)
        ),
    )


def _count_signs(answers: Sequence[str], labels: Sequence[str]) -> dict[CollapseSign, int]:
    written = [words for answer in answers if (words := _words(answer))]
    of_labels = {word for label in labels for word in _words(label)}
    commonest = max(Counter(written).values(), default=0)
    return {
        CollapseSign.EMPTY: len(answers) - len(written),
        CollapseSign.SAME: commonest if commonest > 1 else 0,
        CollapseSign.LABEL: sum(of_labels.issuperset(words) for words in written),
        CollapseSign.REPETITION: sum(map(ends_in_repetition, answers)),
    }


def ends_in_repetition(text: str) -> bool:
    """Return whether a stretch of up to 80 characters stands four times at the end, the last one perhaps cut."""
    for stretch in range(1, _LONGEST_STRETCH + 1):
        least = max(_COPIES * stretch, _LEAST_REPEATED)
        tail = text[-least:]
        if len(tail) == least and tail[stretch:] == tail[:-stretch]:
            return True
    return False


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for part in text.casefold().split() if (word := part.strip(string.punctuation)))
