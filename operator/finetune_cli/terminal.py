"""Show a run on a terminal: one line per stage with bar, percent, step, loss and time left; at the end a table."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_api.plain_text import one_line
from finetune_api.report import EvaluationReport, Progress, Report, Stage
from finetune_cli.outcome import describe_outcome
from finetune_cli.wording import comparison_table, duration, numbers, subject
from finetune_trainer.verdict import Outcome, outcome_of

_STYLES = {Outcome.BETTER: "green", Outcome.NOT_BETTER: "red", Outcome.WORSE: "red", Outcome.CANNOT_TELL: ""}
_WIDE = 90
"""Columns from which there is room for a long bar."""


@dataclass(frozen=True, slots=True)
class _StageLine:
    """What is known of a stage that has begun."""

    progress: Progress
    """The newest numbers; those that a report leaves out stay from the one before."""
    began: float
    ended: float | None = None
    has_failed: bool = False


class LiveDisplay:
    """Redraws its lines four times a second while entered."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._lines: dict[Stage, _StageLine] = {}
        self._notice = ""
        # What libraries print goes to the log, so there is nothing to catch here.
        self._live = Live(
            get_renderable=self.render,
            console=console,
            redirect_stdout=False,
            redirect_stderr=False,
            refresh_per_second=4,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Ctrl-C may leave only the watching of a job that goes on.
        if kind is not KeyboardInterrupt:
            self._end_stages(before=None, has_failed=kind is not None)
        self._notice = ""
        self._live.stop()

    def report(self, progress: Progress) -> None:
        """Take note; the next redraw shows it."""
        self._notice = self._notice if progress.stage in self._lines else ""
        self._end_stages(before=progress.stage, has_failed=False)
        line = self._lines.get(progress.stage)
        merged = progress if line is None else _merge(line.progress, progress)
        self._lines[progress.stage] = _StageLine(merged, self._clock() if line is None else line.began)

    def notice(self, message: str) -> None:
        """Show ``message`` below the stages until the next one begins."""
        self._notice = one_line(message)

    def finish(self, report: Report, workspace: Path) -> None:
        """Print the table of base against tuned, the verdict, and where everything is."""
        if report.evaluation is not None and report.evaluation.metrics:
            self._console.print()
            self._console.print(_comparison_table(report.evaluation))
            self._console.print()
        for sentence in describe_outcome(report, workspace):
            # Whole paths: a path broken into lines cannot be pasted.
            self._console.print(Text(sentence), soft_wrap=True)

    def render(self) -> RenderableType:
        """Return the lines as they are now."""
        table = Table.grid(padding=(0, 1))
        table.add_column(width=1)
        table.add_column(width=8)
        table.add_column(width=24 if self._console.width >= _WIDE else 10)
        table.add_column(width=5, justify="right")
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for stage in Stage:
            table.add_row(*self._cells(stage))
        return Group(table, Text(self._notice, style="yellow")) if self._notice else table

    def _cells(self, stage: Stage) -> tuple[RenderableType, ...]:
        line = self._lines.get(stage)
        if line is None:
            # The stages run in order: what was passed over had ended in an earlier run.
            if any(later in self._lines for later in list(Stage)[list(Stage).index(stage) :]):
                return Text("✓", style="green"), Text(stage.value), "", "", Text("done before", style="dim")
            return Text("·", style="dim"), Text(stage.value, style="dim"), "", "", ""
        seconds = (self._clock() if line.ended is None else line.ended) - line.began
        if line.ended is None:
            mark = Text("▸", style="cyan")
        else:
            mark = Text("✗", style="red") if line.has_failed else Text("✓", style="green")
        percent = line.progress.percent
        is_waiting = percent is None and line.ended is None
        bar = ProgressBar(
            total=100, completed=_share(line), pulse=is_waiting, animation_time=seconds if is_waiting else None
        )
        return mark, Text(stage.value), bar, _percent(line), Text(_details(line, seconds))

    def _end_stages(self, before: Stage | None, has_failed: bool) -> None:
        for stage, line in self._lines.items():
            if stage is not before and line.ended is None:
                self._lines[stage] = _StageLine(line.progress, line.began, self._clock(), has_failed)


def _merge(known: Progress, new: Progress) -> Progress:
    # Time left is of its own moment only.
    return known.model_copy(update={**new.model_dump(exclude_defaults=True), "eta_seconds": new.eta_seconds})


def _share(line: _StageLine) -> float:
    if line.ended is not None and not line.has_failed:
        return 100
    return min(100.0, max(0.0, line.progress.percent or 0.0))


def _percent(line: _StageLine) -> Text:
    is_known = line.progress.percent is not None or (line.ended is not None and not line.has_failed)
    return Text(f"{_share(line):.0f} %" if is_known else "")


def _details(line: _StageLine, seconds: float) -> str:
    known = numbers(line.progress)
    if line.ended is not None and not line.has_failed:
        known = [part for part in known if not part.endswith(" left")]
    else:
        known = [subject(line.progress), *known]
    return " · ".join([*(part for part in known if part), duration(seconds)])


def _comparison_table(evaluation: EvaluationReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    columns, *rows = comparison_table(evaluation)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=index > 1)
    for metric, row in zip(evaluation.metrics, rows, strict=True):
        cells = [Text(cell) for cell in row]
        cells[4].stylize(_STYLES[outcome_of(metric)])
        table.add_row(*cells)
    return table
