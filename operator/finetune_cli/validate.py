"""``finetune validate``: say everything that is wrong with jobs. Loads no model and no rows, imports no torch."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.job import InvalidJobError
from finetune_api.plain_text import printable
from finetune_api.report import ExitCode
from finetune_cli.manifest import read_job, source_name
from finetune_trainer.errors import SpecError


@dataclass(frozen=True, slots=True)
class Finding:
    """What one file is worth."""

    file: str
    messages: tuple[str, ...] = ()
    """All that is wrong, for people; nothing when the job is valid."""
    fields: tuple[dict[str, object], ...] = ()
    """The same for programs: path, value, problem and remedy."""


def validate(files: Sequence[Path], as_json: bool) -> ExitCode:
    """Print what is wrong with each file, valid ones to standard output, errors to standard error."""
    findings = [inspect_file(file) for file in files]
    if as_json:
        sys.stdout.write(json.dumps(_document(findings)) + "\n")
    else:
        for finding in findings:
            _print(finding)
    return ExitCode.BAD_SPEC if any(finding.messages for finding in findings) else ExitCode.OK


def inspect_file(file: Path) -> Finding:
    """Return what is wrong with one file."""
    try:
        read_job(file)
    except InvalidJobError as error:
        fields = tuple(dataclasses.asdict(field) for field in error.errors)
        return Finding(source_name(file), tuple(str(error).splitlines()), fields)
    except SpecError as error:
        unreadable: dict[str, object] = {"path": "", "value": "", "problem": str(error), "remedy": ""}
        return Finding(source_name(file), (str(error),), (unreadable,))
    return Finding(source_name(file))


def _print(finding: Finding) -> None:
    if not finding.messages:
        sys.stdout.write(f"{printable(finding.file)}: valid\n")
        sys.stdout.flush()
    for message in finding.messages:
        sys.stderr.write(f"error: {printable(message)}\n")


def _document(findings: Sequence[Finding]) -> dict[str, object]:
    return {
        "valid": not any(finding.messages for finding in findings),
        "files": [
            {"file": finding.file, "valid": not finding.messages, "errors": finding.fields} for finding in findings
        ],
    }
