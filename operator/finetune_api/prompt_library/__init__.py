"""The files of the template library: one task each, several phrasings of it. `finetune_api.library` reads them."""

from functools import cache
from importlib.resources import files


@cache
def library_names() -> tuple[str, ...]:
    """Return the names of all entries, sorted."""
    found = (file.name for file in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml")))


def library_text(name: str) -> str:
    """Return the file of the entry called ``name``, which is one of `library_names`."""
    return files(__name__).joinpath(f"{name}.yaml").read_text("utf-8")
