"""Show a run in a pipe: plain lines for people and logs, or one JSON object a line for programs."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from finetune_api.plain_text import one_line
from finetune_api.report import Progress, Report, Stage
from finetune_cli.outcome import describe_outcome
from finetune_cli.wording import aligned, comparison_table, numbers, subject

SECONDS_BETWEEN_LINES = 5.0
"""An hour of training is 720 lines of log."""


class _Stream:
    """Writes whole lines. When the reader has gone away the run goes on: it is worth more than its log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_open = True

    def write_line(self, line: str) -> None:
        """Write ``line`` at once, in one piece: other threads write lines too."""
        if not self._is_open:
            return
        try:
            self._stream.write(f"{line}\n")
            self._stream.flush()
        except BrokenPipeError:
            self._is_open = False


class LineDisplay:
    """Plain lines: every new stage and message, in between one per 5 seconds, the end of a stage always."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = _Stream(stream)
        self._clock = clock
        self._shown: tuple[Stage, str] | None = None
        self._last = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def report(self, progress: Progress) -> None:
        """Write a line, if it is time or there is news."""
        now, subject = self._clock(), (progress.stage, progress.message)
        is_news = subject != self._shown or (progress.percent is not None and progress.percent >= 100)
        if is_news or now - self._last >= SECONDS_BETWEEN_LINES:
            self._shown, self._last = subject, now
            self._stream.write_line(_progress_line(progress))

    def notice(self, message: str) -> None:
        """Write a line."""
        self._stream.write_line(one_line(message))

    def finish(self, report: Report, workspace: Path) -> None:
        """Write the table of base against tuned, the verdict, and where everything is."""
        if report.evaluation is not None and report.evaluation.metrics:
            for line in ["", *aligned(comparison_table(report.evaluation)), ""]:
                self._stream.write_line(line)
        for sentence in describe_outcome(report, workspace):
            self._stream.write_line(sentence)


def _progress_line(progress: Progress) -> str:
    percent = "     " if progress.percent is None else f"{progress.percent:3.0f} %"
    rest = ", ".join(part for part in (subject(progress), *numbers(progress)) if part)
    return f"{progress.stage.value:<8}  {percent}  {rest}".rstrip()


class JsonDisplay:
    """One object a line: ``{"progress": ...}``, ``{"notice": ...}`` and, last, ``{"report": ...}``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = _Stream(stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def report(self, progress: Progress) -> None:
        """Write every report."""
        self._stream.write_line(f'{{"progress": {progress.model_dump_json(by_alias=True, exclude_none=True)}}}')

    def notice(self, message: str) -> None:
        """Write the message."""
        self._stream.write_line(json.dumps({"notice": message}))

    def finish(self, report: Report, workspace: Path) -> None:
        """Write the whole report."""
        self._stream.write_line(f'{{"report": {report.model_dump_json(by_alias=True)}}}')
