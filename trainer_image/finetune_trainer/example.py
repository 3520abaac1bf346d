"""The two forms a row takes on its way to the model, text, then tokens, and the bytes that either is on a disk."""

import pickle
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Example:
    """One row of one task after its template, before the chat format and the tokenizer."""

    task: str
    row: int
    """0-based number of the row in its source, for messages and reports."""
    prompt: str
    completion: str
    template: int
    """Index of the template that rendered it, in ``spec.data.tasks[].templates``."""
    key: str
    """Hash of the normalised input (no label, task or template in it): decides the split."""
    values: Mapping[str, object]
    """The row itself: what a template renders; needed to render it another way or shortened."""
    shown: tuple["Example", ...] = ()
    """Other rows that the model sees answered before this one."""
    earlier: tuple[tuple[str, str], ...] = ()
    """Role and text of the turns of a chat that come before the prompt."""
    cluster: int | None = None
    """Number of the rows that stay with this one in one split; known where rows of its task are shown to others."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example; the model learns and is scored on ``ids[prompt_length:]``, in a chat also on more."""

    ids: tuple[int, ...]
    prompt_length: int
    truncated: bool = False
    answers: tuple[tuple[int, int], ...] = ()
    """Start and end of what else is learnt: the assistant's earlier turns in a chat's prompt."""
    decoder_start: int | None = None
    """Of an encoder-decoder model, whose encoder reads the prompt alone: what its decoder begins a completion with."""

    @property
    def learnt(self) -> Sequence[int]:
        """Places in ``ids`` of the tokens that are learnt; nothing predicts the first one."""
        last = range(max(self.prompt_length, 1), len(self.ids))
        if not self.answers:
            return last
        return [place for start, end in self.answers for place in range(max(start, 1), end)] + [*last]

    @property
    def read_ids(self) -> tuple[int, ...]:
        """The tokens that a decoder-only model reads: nothing is predicted from the last one."""
        return self.ids[: max(1, len(self.ids) - 1)]

    @property
    def completion_ids(self) -> tuple[int, ...]:
        """The tokens to be learnt, the end token included."""
        return self.ids[self.prompt_length :]

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens before them."""
        return self.ids[: self.prompt_length]

    def without_beginning(self, tokens: int) -> "Encoded":
        """Return what is left without the first ``tokens``; an encoder keeps one to read."""
        if self.decoder_start is not None:
            tokens = min(tokens, self.prompt_length - 1)
        return replace(self, ids=self.ids[tokens:], prompt_length=max(0, self.prompt_length - tokens), answers=())


_NO_DECODER = -1
_HEADER_LENGTH = 4


def pack_example(example: Example) -> bytes:
    """Return ``example`` as bytes for this process and those it starts."""
    # Keeps dates and decimals what they are. Safe: what is read back lay in a file without a name (`RecordFile`), which
    # nobody else can have written.
    return pickle.dumps(
        (
            example.task,
            example.row,
            example.prompt,
            example.completion,
            example.template,
            example.key,
            example.values,
            example.shown,
            example.earlier,
            example.cluster,
        ),
        pickle.HIGHEST_PROTOCOL,
    )


def unpack_example(record: bytes) -> Example:
    """Return what `pack_example` was given."""
    return Example(*pickle.loads(record))


def pack_encoded(item: Encoded) -> bytes:
    """Return ``item`` as 32-bit numbers in this machine's byte order."""
    decoder_start = _NO_DECODER if item.decoder_start is None else item.decoder_start
    answers = [place for answer in item.answers for place in answer]
    header = (item.prompt_length, item.truncated, decoder_start, len(answers))
    return array("i", (*header, *answers, *item.ids)).tobytes()


def unpack_encoded(record: bytes) -> Encoded:
    """Return what `pack_encoded` was given."""
    numbers = array("i")
    numbers.frombytes(record)
    prompt_length, truncated, decoder_start, places = numbers[:_HEADER_LENGTH]
    ids = numbers[_HEADER_LENGTH + places :]
    flat = iter(numbers[_HEADER_LENGTH : _HEADER_LENGTH + places])
    return Encoded(
        tuple(ids),
        prompt_length,
        bool(truncated),
        tuple(zip(flat, flat, strict=True)),
        None if decoder_start == _NO_DECODER else decoder_start,
    )
