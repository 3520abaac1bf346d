"""`finetune templates`: the list, an entry, and a job's own rows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_api.library import library_entry
from finetune_api.prompt_library import library_names
from finetune_api.report import ExitCode
from finetune_cli.__main__ import run_command

from .builders import ABSENT, make_manifest


def write_job(folder: Path, rows: list[dict[str, Any]], **task: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {f"spec.data.tasks[0].{name}": value for name, value in task.items()}
    file = folder / "job.yaml"
    file.write_text(json.dumps(make_manifest({"spec.data.tasks[0].source": "file://./rows.jsonl", **changes})))
    return file


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_command(["templates", *arguments]) is ExitCode.OK
    return capsys.readouterr().out


def test_the_list_names_every_entry_with_its_columns(capsys):
    lines = show(capsys).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(library_names())
    assert "premise, hypothesis, label" in next(line for line in lines if line.startswith("nli"))


@pytest.mark.parametrize("name", library_names())
def test_an_entry_is_shown_on_its_example(capsys, name):
    output = show(capsys, name)
    entry = library_entry(name)
    assert output.startswith(f"{name}, version {entry.version}: {entry.purpose}\n")
    assert output.count("\ntemplate ") == len(entry.templates)
    assert "{{" not in output
    for column, value in entry.example.items():
        assert f"  {column}: {entry.columns[column]}" in output
        assert output.count(value.splitlines()[0]) >= len(entry.templates)


def test_an_unknown_entry_is_answered_with_the_nearest(capsys):
    assert run_command(["templates", "sumarize"]) is ExitCode.BAD_SPEC
    assert "'sumarize' is not in the template library. Did you mean summarize" in capsys.readouterr().err


def test_the_jobs_own_templates_are_shown_on_its_rows(capsys, tmp_path):
    rows = [{"text": f"film {number}\x1b[2J", "label": "positive"} for number in range(5)]
    output = show(capsys, "--file", str(write_job(tmp_path, rows)))
    assert "task sentiment, row 0 (counted from 0)\n\ntemplate 0 of 1\n  | Review: film 0 [2J\n" in output
    assert "  | Sentiment:\n  > positive\n" in output
    assert "row 1 " in output and "row 2 " not in output


def test_an_entry_is_tried_on_the_rows_under_the_names_that_they_have(capsys, tmp_path):
    job = write_job(tmp_path, [{"Body": "A fine film.", "label": "good"}], columns={"text": "Body"})
    output = show(capsys, "sentiment", "--file", str(job))
    assert output.count("A fine film.") == len(library_entry("sentiment").templates)
    job = write_job(tmp_path, [{"Body": "A fine film.", "label": "good"}], templates=ABSENT, library="sentiment")
    assert run_command(["templates", "--file", str(job)]) is ExitCode.BAD_DATA
    assert "row 0 (counted from 0; no text)" in capsys.readouterr().err


def test_the_list_needs_nothing_heavy():
    code = (
        "import sys; from finetune_cli.__main__ import run_command; code = run_command(['templates']); "
        "found = sorted(set(sys.modules) & {'torch', 'transformers', 'ray', 'pyarrow', 'numpy', 'kubernetes'}); "
        "assert not found, found; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
