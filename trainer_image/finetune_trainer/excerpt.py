"""What a message shows of long texts and many names: the beginning."""

from collections.abc import Sequence

_CHARACTERS = 80
_NAMES = 10


def beginning(text: str) -> str:
    """Return ``text``, or its first characters and a mark that there was more."""
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "…"


def excerpt(value: object) -> str:
    """Return the beginning of a text in quotes, what cannot be printed escaped; of anything else that of its `repr`."""
    return repr(beginning(value)) if isinstance(value, str) else beginning(repr(value))


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more
