"""How SQuAD compares answers: without case, punctuation and articles. Stands in for what transformers 5 took away.

ReCoRD, a task of SuperGLUE in lm-evaluation-harness, imports ``transformers.data.metrics.squad_metrics``. The names are
those of that module; the rules are of SQuAD's evaluation (arXiv:1806.03822).
"""

import re
import string
import sys
from collections import Counter
from types import ModuleType

import transformers.data

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def compute_exact(a_gold: str, a_pred: str) -> int:
    """Return 1 where both say the same words in the same order."""
    return int(_words(a_gold) == _words(a_pred))


def compute_f1(a_gold: str, a_pred: str) -> float:
    """Return the harmonic mean of the shares of words that both have, from 0 to 1; of two without words 1."""
    gold, said = _words(a_gold), _words(a_pred)
    if not gold or not said:
        return float(gold == said)
    return 2 * (Counter(gold) & Counter(said)).total() / (len(gold) + len(said))


def _words(answer: str) -> list[str]:
    return _ARTICLES.sub(" ", answer.lower().translate(_WITHOUT_PUNCTUATION)).split()


def stand_in() -> None:
    """Let ``transformers.data.metrics.squad_metrics`` be imported: it is this module."""
    package = ModuleType("transformers.data.metrics")
    package.squad_metrics = sys.modules[__name__]  # type: ignore[attr-defined]
    transformers.data.metrics = package  # type: ignore[attr-defined]
    sys.modules |= {package.__name__: package, f"{package.__name__}.squad_metrics": sys.modules[__name__]}
