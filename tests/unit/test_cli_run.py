"""`finetune run` with stages that are stand-ins: what is shown, what is written, how it ends."""

import contextlib
import io
import json
import logging
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.job import FineTuneJob, spec_hash
from finetune_api.report import (
    Artifact,
    ArtifactKind,
    DataReport,
    EvaluationReport,
    ExitCode,
    MetricComparison,
    Progress,
    Report,
    SplitRows,
    Stage,
    TrainingReport,
)
from finetune_cli.__main__ import run_command
from finetune_cli.failure import record_crash
from finetune_cli.init import render_starter
from finetune_cli.stage_runner import StageRunner
from finetune_cli.stop_notice import FIRST, stop_notice
from finetune_trainer.errors import DataError, OutOfMemoryError, Preempted, SpecError, StorageError
from finetune_trainer.interrupt import stopped_at_once
from finetune_trainer.progress import Sink


def make_report(artifacts: tuple[Artifact, ...] = ()) -> Report:
    accuracy = MetricComparison(
        task="sentiment", metric="accuracy", base=0.875, tuned=0.95, delta=0.075, low=0.03, high=0.12, rows=200
    )
    return Report(
        name="reviews",
        namespace="default",
        spec_hash="ab" * 32,
        base_model="file:///model",
        data=DataReport(rows=SplitRows(train=8, validation=1, test=1), hash="0", format="raw"),
        training=TrainingReport(method="lora", parameters=9, trainable_parameters=1, steps=3, epochs=1),
        evaluation=EvaluationReport(metrics=(accuracy,)),
        artifacts=artifacts,
        seed=17,
    )


ADAPTER = Artifact(kind=ArtifactKind.ADAPTER, uri="file:///out/default/reviews-abababab/model", sha256="0", bytes=1)


def stages_that_succeed(job: FineTuneJob, workspace: Path, sink: Sink) -> Report:
    sink.report(Progress(stage=Stage.CHECK, message="reading the rows"))
    sink.report(Progress(stage=Stage.CHECK, message="checked", percent=100))
    for step in (1, 2, 3):
        sink.report(Progress(stage=Stage.TRAIN, message="training", percent=step * 30, step=step, total_steps=3))
    sink.report(Progress(stage=Stage.PUBLISH, message="published", percent=100))
    return make_report((ADAPTER,))


def stages_that_raise(error: BaseException) -> StageRunner:
    def run(job: FineTuneJob, workspace: Path, sink: Sink) -> Report:
        sink.report(Progress(stage=Stage.TRAIN, message="training", percent=10, step=1, total_steps=9))
        raise error

    return run


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text(render_starter("reviews", "lora"))
    return file


def test_a_run_in_a_pipe_prints_lines_a_table_and_where_everything_is(job_file, capsys):
    assert run_command(["run", str(job_file)], stages_that_succeed) == ExitCode.OK
    output = capsys.readouterr().out
    assert output.splitlines() == [
        "check            reading the rows",
        "check     100 %  checked",
        "train      30 %  step 1/3",
        "publish   100 %  published",
        "",
        "task       metric     base  tuned   delta     95 % interval",
        "sentiment  accuracy  0.875  0.950  +0.075  +0.030 to +0.120",
        "",
        "The tuned model is better: accuracy on sentiment went from 0.875 to 0.950 (+0.075, 95 % interval +0.030 to "
        "+0.120, 200 test rows).",
        "Model (adapter): /out/default/reviews-abababab/model",
        "Report: /out/default/reviews-abababab/report/report.html",
    ]


def test_a_model_that_a_gate_keeps_back_is_no_failure_and_the_reason_is_said(job_file, capsys):
    why = "the gate on sentiment.accuracy did not pass: sentiment.accuracy is 0.95, below the least allowed 0.99"

    def stages_that_keep_back(job: FineTuneJob, workspace: Path, sink: Sink) -> Report:
        return make_report().model_copy(update={"why_not_published": why})

    assert run_command(["run", str(job_file)], stages_that_keep_back) == ExitCode.OK
    assert f"The model is not published: {why}; it stays in " in capsys.readouterr().out


def test_every_line_of_json_is_an_object_and_the_last_is_the_report(job_file, capsys):
    assert run_command(["run", str(job_file), "--output", "json"], stages_that_succeed) == ExitCode.OK
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(line) for line in lines] == [{"progress"}] * 6 + [{"report"}]
    assert lines[3]["progress"] == {
        "stage": "train", "message": "training", "percent": 60.0, "step": 2, "totalSteps": 3,
    }  # fmt: skip
    assert Report.model_validate(lines[-1]["report"]) == make_report((ADAPTER,))


def test_the_stages_get_the_resolved_job_and_the_workspace_beside_the_file(job_file):
    seen = []

    def stages(job: FineTuneJob, workspace: Path, sink: Sink) -> Report:
        seen.append((job, workspace))
        return make_report()

    run_command(["run", str(job_file)], stages)
    [(job, workspace)] = seen
    assert workspace == job_file.parent / ".finetune" / f"reviews-{spec_hash(job.spec)[:8]}"
    assert job.spec.training.learning_rate is not None, "defaults are filled in"


def test_a_workspace_can_be_chosen(job_file, tmp_path):
    run_command(["run", str(job_file), "--workspace", str(tmp_path / "mine")], stages_that_succeed)
    assert (tmp_path / "mine" / "log.txt").is_file()
    assert not (tmp_path / ".finetune").exists()


def test_a_model_that_is_not_published_is_said_to_stay_in_the_workspace(job_file, tmp_path, capsys):
    run_command(["run", str(job_file), "--workspace", str(tmp_path)], lambda job, workspace, sink: make_report())
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"The model is not published; it stays in {tmp_path}/tuned",
        f"Report: {tmp_path}/report/report.html",
    ]


# --- what libraries say


def test_what_libraries_print_and_log_goes_into_the_log(job_file, tmp_path, capfd):
    def noisy(job: FineTuneJob, workspace: Path, sink: Sink) -> Report:
        sys.stdout.write("printed\n")
        sys.stderr.write("complained\n")
        logging.getLogger("some_library").warning("logged")
        logging.getLogger("finetune_trainer.train").info("explained")
        return stages_that_succeed(job, workspace, sink)

    assert run_command(["run", str(job_file), "--workspace", str(tmp_path / "w")], noisy) == ExitCode.OK
    output = capfd.readouterr()
    assert output.err == ""
    assert "printed" not in output.out
    log = (tmp_path / "w" / "log.txt").read_text()
    assert [word for word in ("printed", "complained", "logged", "explained") if word not in log] == []


# --- how it ends


ENDS = {
    "bad data": (DataError("no column 'x'"), ExitCode.BAD_DATA, "error: no column 'x'\n"),
    "a bad spec": (SpecError("no such model"), ExitCode.BAD_SPEC, "error: no such model\n"),
    "too little memory": (OutOfMemoryError("too large"), ExitCode.OUT_OF_MEMORY, "error: too large\n"),
    "a store that does not answer": (
        StorageError("no answer"), ExitCode.STORAGE,
        "error: no answer\nFinished stages are kept; once that is mended, run the same command again: "
        "finetune run {file}\n"),
    "a stop with a checkpoint": (
        Preempted("stopped at step 3; the checkpoint is saved."), ExitCode.PREEMPTED,
        "stopped at step 3; the checkpoint is saved.\nTo go on from there, run the same command again: "
        "finetune run {file}\n"),
    "Ctrl-C twice": (
        KeyboardInterrupt(), ExitCode.PREEMPTED,
        "interrupted.\nFinished stages and complete checkpoints are kept; run the same command again: "
        "finetune run {file}\n"),
}  # fmt: skip


@pytest.mark.parametrize("error, code, message", ENDS.values(), ids=ENDS.keys())
def test_an_end_has_its_exit_code_and_a_message_without_a_trace(error, code, message, job_file, capsys):
    assert run_command(["run", str(job_file)], stages_that_raise(error)) == code
    assert capsys.readouterr().err == message.format(file=job_file)


def test_a_program_is_told_the_error_as_the_last_object(job_file, capsys):
    assert run_command(["run", str(job_file), "--output", "json"], stages_that_raise(StorageError("no answer"))) == 69
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: last["error"][name] for name in ("exitCode", "retryable", "message")} == {
        "exitCode": 69, "retryable": True, "message": "no answer",
    }  # fmt: skip


def test_a_crash_leaves_its_trace_in_the_workspace(job_file, tmp_path, capsys):
    code = run_command(
        ["run", str(job_file), "--workspace", str(tmp_path / "w")], stages_that_raise(ZeroDivisionError("x"))
    )
    assert code == ExitCode.INTERNAL
    file = tmp_path / "w" / "crash.txt"
    assert capsys.readouterr().err == (
        f"error: internal error: ZeroDivisionError: x\nThe whole trace is in {file}; please report it.\n"
    )
    assert "raise error\nZeroDivisionError: x\n" in file.read_text()


def test_a_crash_whose_workspace_cannot_be_written_leaves_its_trace_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failure = record_crash(ZeroDivisionError("x \udc80"), Path("/proc/no/workspace"))
    assert len(failure.advice.splitlines()) == 1
    (file,) = tmp_path.glob("finetune-*/crash.txt")
    assert f"The whole trace is in {file}" in failure.advice
    assert "ZeroDivisionError: x " in file.read_text()


def test_a_crash_whose_trace_can_be_written_nowhere_says_it(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc/no")
    failure = record_crash(ZeroDivisionError("x"), Path("/proc/no/workspace"))
    assert failure.exit_code is ExitCode.INTERNAL
    assert "Please report it with this trace:\nZeroDivisionError: x" in failure.advice


def test_a_run_of_a_finished_job_says_what_is_kept(job_file, tmp_path, capsys):
    said = "trained and evaluated before, which is kept; model and report are published again. To do all of it anew, "
    command = ["run", str(job_file), "--workspace", str(tmp_path / "w")]
    assert run_command(command, stages_that_succeed) == ExitCode.OK
    assert said not in capsys.readouterr().out
    (tmp_path / "w" / "evaluation.json").write_text("{}")
    assert run_command(command, stages_that_succeed) == ExitCode.OK
    assert f"{said}delete {tmp_path}/w." in capsys.readouterr().out


def test_a_job_from_standard_input_has_its_workspace_in_the_working_folder(job_file, tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(job_file.read_bytes())))
    seen = []
    run_command(["run", "-"], lambda job, workspace, sink: seen.append(workspace) or make_report())
    assert [workspace.parent for workspace in seen] == [folder / ".finetune"]


def test_a_workspace_that_cannot_be_made_is_named(job_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code = run_command(["run", str(job_file), "--workspace", str(tmp_path / "file" / "w")], stages_that_succeed)
    assert code == ExitCode.STORAGE
    assert f"error: cannot create {tmp_path}/file/w" in capsys.readouterr().err


def test_an_invalid_job_is_not_started(job_file, capsys):
    job_file.write_text(job_file.read_text().replace("rank: 16", "rank: 0").replace("epochs: 3", "epochs: -1"))
    assert run_command(["run", str(job_file)], stages_that_raise(AssertionError("started"))) == ExitCode.BAD_SPEC
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert [path for path in ("spec.method.lora.rank", "spec.training.epochs") if path not in "".join(errors)] == []
    assert not (job_file.parent / ".finetune").exists()


def test_a_message_cannot_move_the_cursor(job_file, capsys):
    run_command(["run", str(job_file)], stages_that_raise(DataError("value \x1b[2J\r in row 3")))
    assert capsys.readouterr().err == "error: value  [2J  in row 3\n"


RUN_WITHOUT_READER = """
import sys
from finetune_api.report import Progress, Stage
from finetune_cli.__main__ import run_command
from finetune_trainer.errors import DataError

def stages(job, workspace, sink):
    for number in range(100):
        sink.report(Progress(stage=Stage.CHECK, message=f"message {number}"))
    raise DataError("the end was reached")

sys.exit(run_command(["run", *sys.argv[1:]], stages))
"""


@pytest.mark.parametrize("output", ["text", "json"])
def test_a_run_whose_reader_leaves_goes_on_to_its_own_end(output, job_file):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", RUN_WITHOUT_READER, str(job_file), "--output", output]
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (ExitCode.BAD_DATA, "error: the end was reached\n")


def test_a_broken_connection_in_a_run_is_no_success(job_file, capsys):
    assert run_command(["run", str(job_file)], stages_that_raise(BrokenPipeError(32, "Broken pipe"))) == 70
    assert "internal error: BrokenPipeError" in capsys.readouterr().err


# --- signals


@pytest.fixture
def ignored_stop_signals() -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("ignored_stop_signals")
def test_a_stop_request_is_confirmed_at_once_and_once(number):
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    with stop_notice(said.put):
        os.kill(os.getpid(), number)
        assert said.get(timeout=10) == FIRST
        os.kill(os.getpid(), number)
    assert said.empty()
    assert signal.set_wakeup_fd(-1) == -1, "what was there before is back"


def test_a_run_without_a_stop_request_confirms_none():
    said: list[str] = []
    with stop_notice(said.append):
        pass
    assert said == []


SLOW_LIBRARIES = """
from finetune_cli import run
from finetune_cli.__main__ import main

def load_slowly():
    # A library that catches whatever goes wrong with what it imports, as some do.
    try:
        while True:
            pass
    except Exception:
        pass

run.load_trainer = load_slowly
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_while_libraries_load_ends_at_once_and_promises_nothing(number, job_file):
    command = [sys.executable, "-c", SLOW_LIBRARIES, "run", str(job_file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("loading torch")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (
        ExitCode.PREEMPTED,
        "stopped while no stage was at work; nothing is lost.\nTo go on from there, run the same command again: "
        f"finetune run {job_file}\n",
    )


def test_a_stop_request_that_a_library_swallows_still_stops():
    rude = contextlib.suppress(BaseException)
    with pytest.raises(Preempted, match="stopped early"), stopped_at_once("stopped early"), rude:
        os.kill(os.getpid(), signal.SIGTERM)
