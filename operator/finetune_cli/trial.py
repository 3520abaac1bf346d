"""``finetune try``: ask one base and several adapters the same, side by side, in one process."""

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.plain_text import printable
from finetune_api.report import ExitCode
from finetune_api.spec import OutputSpec
from finetune_cli.library_output import diverted_to
from finetune_cli.wording import aligned
from finetune_trainer.errors import SpecError

if TYPE_CHECKING:
    from finetune_trainer.adapter_set import AdapterSet, Question

ADAPTERS = "--adapters"


def try_adapters(
    places: Sequence[str], question: str | None, model: str | None, max_new_tokens: int, output: str
) -> ExitCode:
    """Print what the base and every adapter answer.

    Args:
        places: folders or URIs of published adapters.
        question: what to ask; absent: every line of standard input, as it comes.
        model: URI of the base, where it is not where it was when the adapters were tuned.
        max_new_tokens: longest answer.
        output: ``text``, or ``json`` for one object a question.

    Raises:
        SpecError: an adapter or the base is not there, or they do not belong together.
        DataError: files are damaged, or a row lacks a column.
    """
    questions = (question,) if question is not None else _lines(sys.stdin)
    shown = sys.stdout
    with tempfile.TemporaryDirectory(prefix="finetune-try-") as scratch, diverted_to(Path(scratch)):
        adapters = _opened(places, model, Path(scratch))
        for asked in questions:
            answers = {name: adapters.answer(name, parsed(asked), max_new_tokens) for name in adapters.names}
            shown.writelines(f"{line}\n" for line in described(asked, answers, output))
            shown.flush()
    return ExitCode.OK


def _opened(places: Sequence[str], model: str | None, cache: Path) -> "AdapterSet":
    # Imported here: torch takes seconds.
    from finetune_trainer.adapter_set import AdapterSet, load_base
    from finetune_trainer.location import Mounts
    from finetune_trainer.published_model import open_published
    from finetune_trainer.storage import Storage

    storage = Storage(OutputSpec(uri="file:///"), Mounts.from_environment())
    published = [open_published(as_uri(place), ADAPTERS, storage, cache) for place in places]
    base = load_base(published, model, storage, cache)
    return AdapterSet(base, dict(zip(names_of(places), published, strict=True)))


def as_uri(place: str) -> str:
    """Return the URI of a folder that is named by one already, or by its path."""
    return place if "://" in place else Path(place).resolve().as_uri()


def names_of(places: Sequence[str]) -> list[str]:
    """Return what the answers are called by: the job's folder, and a number where that names two of them."""
    names: list[str] = []
    for place in places:
        parts = [part for part in place.rstrip("/").split("/") if part]
        name = parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]
        same = sum(1 for other in names if other == name or other.startswith(f"{name}#"))
        names.append(name if not same else f"{name}#{same + 1}")
    return names


def parsed(asked: str) -> "Question":
    """Return a row where ``asked`` is a JSON object, else the prompt that it is.

    Raises:
        SpecError: it begins like an object and is none.
    """
    if not asked.lstrip().startswith("{"):
        return asked
    try:
        row = json.loads(asked)
    except ValueError as error:
        raise SpecError(f"{asked[:80]!r} begins like a row and is no JSON: {error}. Correct it.") from error
    assert isinstance(row, dict)
    return row


def described(asked: str, answers: Mapping[str, str], output: str) -> Iterator[str]:
    """Yield the lines that show the answers to one question."""
    if output == "json":
        yield json.dumps({"question": asked, "answers": answers}, ensure_ascii=False)
        return
    yield f"> {printable(asked)}"
    rows = [(name, printable(answer).replace("\n", "\\n")) for name, answer in answers.items()]
    yield from aligned(rows, texts=2)
    yield ""


def _lines(stream: Iterable[str]) -> Iterator[str]:
    return (line.rstrip("\n") for line in stream if line.strip())
