"""The files of the template library: one task each, several phrasings of it. `finetune_api.library` reads them."""

from difflib import get_close_matches
from functools import cache
from importlib.resources import files


@cache
def library_names() -> tuple[str, ...]:
    """Return the names of all entries, sorted."""
    found = (file.name for file in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml")))


def suggest(name: str) -> str:
    """Return what to write instead of ``name``, which is in no file, as a sentence."""
    near = get_close_matches(name, library_names(), n=3)
    return f"Did you mean {' or '.join(near)}?" if near else f"It has {', '.join(library_names())}."


def library_text(name: str) -> str:
    """Return the file of the entry called ``name``, which is one of `library_names`."""
    return files(__name__).joinpath(f"{name}.yaml").read_text("utf-8")
