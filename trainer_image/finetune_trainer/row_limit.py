"""How large the rows of a file may be, and how a message names what is too large."""

from collections import Counter
from collections.abc import Sequence

from finetune_trainer.errors import DataError
from finetune_trainer.excerpt import excerpt, listed

Row = dict[str, object]

LONGEST_ROW_BYTES = 8 << 20
"""Of a line, of an entry of a JSON array, and of a value in a column: far beyond any model's context."""
MOST_COLUMNS = 10_000
MOST_UNPACKED = 200
"""Times the size of its file. Text packs to a fifth, tables of repetitive text to a fiftieth; what packs better than
this is made to fill a disk."""
ALWAYS_UNPACKED_BYTES = 16 << 20
BATCH_ROWS = 1024
BATCH_BYTES = 32 << 20
HELD_BYTES = 128 << 20
"""Of what a format makes one read as a whole: a batch that is packed, the lists of a group of rows."""


def refuse_columns(names: Sequence[str], place: str) -> None:
    """Raise where there are too many columns, or two of one name; ``place`` begins the message."""
    if len(names) > MOST_COLUMNS:
        raise DataError(
            f"{place} has {len(names):,} columns; at most {MOST_COLUMNS:,} are read. Leave out those that are not used."
        )
    if repeated := sorted(name for name, times in Counter(names).items() if times > 1):
        raise DataError(f"{place} names columns twice: [{listed([*map(excerpt, repeated)])}]; rename them.")
