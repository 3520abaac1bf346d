"""Write what is generated from the contract, or say what has drifted: ``python -m finetune_api [--check]``."""

import argparse
import json
import sys
from pathlib import Path

from finetune_api.crd import GROUP, PLURAL, crd_yaml
from finetune_api.library import library_table
from finetune_api.reference import spec_reference
from finetune_api.report import ExitCode, Report


def generated_files() -> dict[str, str]:
    """Return the content of every generated file by its path in the project."""
    return {
        f"crds/{GROUP}_{PLURAL}.yaml": crd_yaml(),
        # Helm never upgrades its own crds/ folder, so this is part of a template, which must not be uninstalled.
        f"charts/finetune-operator/files/{GROUP}_{PLURAL}.yaml": crd_yaml({"helm.sh/resource-policy": "keep"}),
        "docs/spec.md": spec_reference(),
        "docs/report.schema.json": report_schema(),
        "docs/templates.md": library_table(),
    }


def report_schema() -> str:
    """Return the JSON schema of report.json."""
    return json.dumps(Report.model_json_schema(by_alias=True, mode="serialization"), indent=2) + "\n"


def drifted_files(root: Path) -> list[str]:
    """Return the generated files below ``root`` that are missing or not what the contract says now."""
    return [
        name
        for name, content in generated_files().items()
        if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != content
    ]


def write_files(root: Path) -> None:
    """Write all generated files below ``root``."""
    for name, content in generated_files().items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")


def main(arguments: list[str] | None = None) -> ExitCode:
    """Run the command; the exit code is `ExitCode.BAD_SPEC` for drifted files."""
    parser = argparse.ArgumentParser(prog="python -m finetune_api", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; name the files that have drifted")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the project (default: this one)")
    options = parser.parse_args(arguments)
    root: Path = options.root
    if not (root / "pyproject.toml").is_file():
        parser.error(f"{root.resolve()} is not the project's folder; say where that is with --root")
    if not options.check:
        write_files(root)
        return ExitCode.OK
    drifted = drifted_files(root)
    for name in drifted:
        sys.stderr.write(f"{name} is not what the contract says now; run: make generate\n")
    return ExitCode.BAD_SPEC if drifted else ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
