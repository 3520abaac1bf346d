"""`finetune validate`, `crd` and `init`, and the command line itself: what is printed, and the exit codes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api.crd import crd_yaml
from finetune_api.job import load_job
from finetune_api.report import ExitCode
from finetune_cli.__main__ import run_command
from finetune_cli.init import render_starter

METHODS = ("full", "lora", "promptTuning")
HEAVY = {"torch", "kubernetes", "transformers", "ray", "rich", "datasets", "numpy", "pyarrow"}


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    file = tmp_path / "valid.yaml"
    file.write_text(render_starter("reviews", "lora"))
    return file


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    file = tmp_path / "faulty.yaml"
    text = render_starter("reviews", "lora").replace("rank: 16", "rank: 0").replace("epochs: 3", "epochs: -1")
    file.write_text(text)
    return file


# --- validate


def test_a_valid_job_is_called_valid(valid, capsys):
    assert run_command(["validate", str(valid)]) == ExitCode.OK
    assert capsys.readouterr() == (f"{valid}: valid\n", "")


def test_all_errors_of_all_files_are_told(valid, faulty, tmp_path, capsys):
    missing = tmp_path / "missing.yaml"
    assert run_command(["validate", str(faulty), str(valid), str(missing)]) == ExitCode.BAD_SPEC
    output = capsys.readouterr()
    assert output.out == f"{valid}: valid\n"
    lines = output.err.splitlines()
    assert len(lines) == 3
    for expected in ("spec.method.lora.rank", "spec.training.epochs"):
        assert any(line.startswith(f"error: {faulty}:") and expected in line for line in lines)
    assert lines[-1].startswith(f"error: cannot read {missing}: No such file or directory")


def test_programs_get_one_object_with_every_field(valid, faulty, capsys):
    assert run_command(["validate", "--output", "json", str(valid), str(faulty)]) == ExitCode.BAD_SPEC
    output = capsys.readouterr()
    assert output.err == ""
    document = json.loads(output.out)
    assert not document["valid"]
    assert document["files"][0] == {"file": str(valid), "valid": True, "errors": []}
    errors = {error["path"]: error for error in document["files"][1]["errors"]}
    assert set(errors) == {"spec.method.lora.rank", "spec.training.epochs"}
    assert errors["spec.method.lora.rank"]["value"] == "0"
    assert all(error["problem"] and error["remedy"] for error in errors.values())


UNREADABLE = {
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
    "text that is not UTF-8": (lambda path: path.write_bytes(b"name: \xff"), "byte 6 is not UTF-8"),
}


@pytest.mark.parametrize("make, message", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_file_that_cannot_be_read_is_an_error(make, message, tmp_path, capsys):
    make(tmp_path / "job.yaml")
    assert run_command(["validate", str(tmp_path / "job.yaml")]) == ExitCode.BAD_SPEC
    assert message in capsys.readouterr().err


BAD_TEMPLATES = {
    "an open brace": ('"Review: {{ text"', "unexpected end of template"),
    "a filter that is not there": ('"{{ text | shout }}"', "No filter named 'shout'"),
    "an include": ("\"{% include 'x' %}\"", "include is not available in templates"),
    "a mistake in its second line": ('"a\\n{% if %}b"', "is no template, line 2 of it: Expected an expression"),
}


@pytest.mark.parametrize("prompt, problem", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES.keys())
def test_a_template_that_is_no_jinja_is_an_error_with_its_line(prompt, problem, tmp_path, capsys):
    file = tmp_path / "job.yaml"
    lines = render_starter("reviews", "lora").replace("epochs: 3", "epochs: -1").splitlines()
    number = next(number for number, line in enumerate(lines, 1) if "prompt:" in line and "#" not in line)
    lines[number - 1] = f"{lines[number - 1].partition('prompt:')[0]}prompt: {prompt}"
    file.write_text("\n".join(lines))
    assert run_command(["validate", str(file)]) == ExitCode.BAD_SPEC
    template, epochs = sorted(capsys.readouterr().err.splitlines(), key=lambda line: "epochs" in line)
    assert template.startswith(f"error: {file}:{number}: spec.data.tasks[0].templates[0].prompt (")
    assert problem in template
    assert "epochs" in epochs, "no error hides another"


def pipe_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_a_job_is_read_from_standard_input(valid, monkeypatch, capsys):
    pipe_in(monkeypatch, valid.read_bytes())
    assert run_command(["validate", "-"]) == ExitCode.OK
    assert capsys.readouterr().out == "standard input: valid\n"


PIPED = {
    "nothing": (b"", "standard input: the manifest: is empty"),
    "no text": (b"\xff", "cannot read standard input: byte 0 is not UTF-8"),
    "a mistake": (b"kind: Deployment", 'standard input: kind ("Deployment"): is no FineTuneJob'),
}


@pytest.mark.parametrize("content, message", PIPED.values(), ids=PIPED.keys())
def test_errors_name_standard_input(content, message, monkeypatch, capsys):
    pipe_in(monkeypatch, content)
    assert run_command(["validate", "-"]) == ExitCode.BAD_SPEC
    assert message in capsys.readouterr().err


def test_validate_imports_nothing_heavy(valid):
    code = (
        "import sys; from finetune_cli.__main__ import run_command; code = run_command(['validate', sys.argv[1]]); "
        f"found = sorted(set(sys.modules) & {HEAVY!r}); assert not found, found; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(valid)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- crd


def test_crd_prints_the_definition(capsys):
    assert run_command(["crd"]) == ExitCode.OK
    assert capsys.readouterr().out == crd_yaml()


def test_crd_check_is_silent_when_the_file_agrees(tmp_path, capsys):
    file = tmp_path / "crd.yaml"
    file.write_text(crd_yaml())
    assert run_command(["crd", "--check", str(file)]) == ExitCode.OK
    assert capsys.readouterr() == ("", "")


def test_crd_check_shows_where_the_file_drifted(tmp_path, capsys):
    file = tmp_path / "crd.yaml"
    file.write_text(crd_yaml().replace("kind: CustomResourceDefinition", "kind: Other"))
    assert run_command(["crd", "--check", str(file)]) == ExitCode.BAD_SPEC
    error = capsys.readouterr().err
    assert f"Write it again: finetune crd > {file}" in error
    assert "-kind: Other\n+kind: CustomResourceDefinition" in error


def test_crd_check_without_the_file_says_how_to_write_it(tmp_path, capsys):
    assert run_command(["crd", "--check", str(tmp_path / "none.yaml")]) == ExitCode.BAD_SPEC
    assert f"finetune crd > {tmp_path}/none.yaml" in capsys.readouterr().err


# --- init


@pytest.mark.parametrize("method", METHODS)
def test_a_starter_validates(method, tmp_path, capsys):
    assert run_command(["init", "reviews", "--method", method]) == ExitCode.OK
    text = capsys.readouterr().out
    job = load_job(text, str(tmp_path / "job.yaml"))
    assert (job.metadata.name, job.spec.method.type.value) == ("reviews", method)
    assert text.count("#") > 10, "a starter explains itself"


def test_a_starter_has_a_name_and_a_method_without_arguments(tmp_path, capsys):
    assert run_command(["init"]) == ExitCode.OK
    job = load_job(capsys.readouterr().out, str(tmp_path / "job.yaml"))
    assert (job.metadata.name, job.spec.method.type.value) == ("my-job", "lora")


@pytest.mark.parametrize("name", ["null", "no", "true"])
def test_a_name_that_yaml_would_read_as_something_else_stays_text(name, tmp_path, capsys):
    assert run_command(["init", name]) == ExitCode.OK
    assert load_job(capsys.readouterr().out, str(tmp_path / "job.yaml")).metadata.name == name


@pytest.mark.parametrize("name", ["Reviews", "1st", "a" * 41, "a\nkind: Pod", 'a"', "{{ x }}"])
def test_a_name_that_no_job_can_have_is_refused(name, capsys):
    assert run_command(["init", name]) == ExitCode.BAD_SPEC
    output = capsys.readouterr()
    assert output.out == ""
    assert "metadata.name" in output.err


# --- the command line


@pytest.mark.parametrize("arguments", [[], ["tune"], ["validate"], ["run", "--output", "xml", "f"]], ids=" ".join)
def test_a_wrong_command_line_ends_with_64(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(arguments)
    assert ended.value.code == ExitCode.BAD_SPEC
    assert "error: " in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "finetune_cli", "crd"]
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
