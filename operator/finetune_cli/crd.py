"""``finetune crd``: the CustomResourceDefinition, printed, or compared with the file that is checked in."""

import difflib
import sys
from pathlib import Path

from finetune_api.crd import crd_yaml
from finetune_api.report import ExitCode
from finetune_trainer.errors import SpecError


def print_crd() -> ExitCode:
    """Print the definition as YAML."""
    sys.stdout.write(crd_yaml())
    return ExitCode.OK


def check_crd(file: Path) -> ExitCode:
    """Compare the definition with ``file``.

    Raises:
        SpecError: the file is not what `print_crd` prints, or cannot be read.
    """
    try:
        found = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {file}: {error}. {_remedy(file)}") from error
    expected = crd_yaml()
    if found != expected:
        lines = difflib.unified_diff(found.splitlines(), expected.splitlines(), str(file), "finetune crd", lineterm="")
        difference = "\n".join(list(lines)[:40])
        raise SpecError(f"{file} is not what the contract says now. {_remedy(file)}\n{difference}")
    return ExitCode.OK


def _remedy(file: Path) -> str:
    return f"Write it again: finetune crd > {file}"
