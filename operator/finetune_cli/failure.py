"""What a command says when it fails: lines on standard error, one JSON object for programs, and an exit code."""

import contextlib
import dataclasses
import json
import shlex
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

from finetune_api.job import InvalidJobError
from finetune_api.plain_text import printable
from finetune_api.report import ExitCode
from finetune_trainer.errors import FineTuneError

CRASH_FILE = "crash.txt"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a command ends."""

    exit_code: ExitCode
    messages: tuple[str, ...]
    """What is wrong; each may have several lines."""
    advice: str = ""
    """What to do next, where the messages do not say it."""
    fields: tuple[dict[str, object], ...] = ()
    """Faulty fields of a job, for programs."""


def describe_invalid_job(error: InvalidJobError) -> Failure:
    """Return all that is wrong with a job."""
    return Failure(
        ExitCode.BAD_SPEC,
        tuple(str(error).splitlines()),
        fields=tuple(dataclasses.asdict(field) for field in error.errors),
    )


def describe_error(error: FineTuneError, arguments: list[str]) -> Failure:
    """Return what the user is told about ``error``, which ended ``finetune <arguments>``."""
    match error.exit_code:
        case _ if notes := getattr(error, "__notes__", ()):
            advice = "\n".join(notes)
        case _ if arguments[0] != "run":
            advice = ""
        case ExitCode.PREEMPTED:
            advice = f"To go on from there, run the same command again: {_command(arguments)}"
        case ExitCode.STORAGE:
            advice = f"Finished stages are kept; once that is mended, run the same command again: {_command(arguments)}"
        case _:
            advice = ""
    return Failure(error.exit_code, (str(error),), advice)


def describe_interrupt(arguments: list[str]) -> Failure:
    """Return what is said when Ctrl-C ended ``finetune <arguments>`` at once."""
    advice = f"Finished stages and complete checkpoints are kept; run the same command again: {_command(arguments)}"
    return Failure(ExitCode.PREEMPTED, ("interrupted.",), advice if arguments[0] == "run" else "")


def record_crash(error: Exception, workspace: Path | None) -> Failure:
    """Return what is said about an error that nobody foresaw; its trace goes into the workspace.

    Where there is no workspace, or it cannot be written, the folder for temporary files takes it; where that cannot be
    written either, the trace is part of the message. Never raises.
    """
    trace = "".join(traceback.format_exception(error))
    summary = f"internal error: {traceback.format_exception_only(error)[-1].strip()}"
    file = (workspace and _write_trace(workspace, trace)) or _write_temporary_trace(trace)
    if file is None:
        return Failure(ExitCode.INTERNAL, (summary,), f"Please report it with this trace:\n{trace}")
    return Failure(ExitCode.INTERNAL, (summary,), f"The whole trace is in {file}; please report it.")


def _write_temporary_trace(trace: str) -> Path | None:
    try:
        # Looks for a folder that can be written: TMPDIR, /tmp, the working folder.
        return _write_trace(Path(tempfile.mkdtemp(prefix="finetune-")), trace)
    except OSError:
        return None


def _write_trace(folder: Path, trace: str) -> Path | None:
    file = folder / CRASH_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(trace, encoding="utf-8", errors="backslashreplace")
    except OSError:
        return None
    return file


def print_failure(failure: Failure, as_json: bool) -> None:
    """Write ``failure`` to standard error; for programs, also as an object to standard output."""
    # To be stopped is no error, and the checkpoint is there.
    prefix = "" if failure.exit_code is ExitCode.PREEMPTED else "error: "
    for message in failure.messages:
        sys.stderr.write(f"{prefix}{printable(message)}\n")
    if failure.advice:
        sys.stderr.write(f"{printable(failure.advice)}\n")
    sys.stderr.flush()
    if as_json:
        document = {
            "exitCode": int(failure.exit_code),
            "retryable": failure.exit_code.is_retryable,
            "message": "\n".join(failure.messages),
            "advice": failure.advice,
            "fields": failure.fields,
        }
        with contextlib.suppress(BrokenPipeError):  # the exit code is told anyway
            sys.stdout.write(json.dumps({"error": document}) + "\n")
            sys.stdout.flush()


def _command(arguments: list[str]) -> str:
    return shlex.join(["finetune", *arguments])
