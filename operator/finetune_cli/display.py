"""Who shows a run: chosen once, told everything, never asked."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, Self, TextIO

from finetune_api.report import Progress, Report
from finetune_cli.lines import JsonDisplay, LineDisplay


class Display(AbstractContextManager["Display"], Protocol):
    """Shows a run while entered and its outcome after that. A finetune_trainer `Sink`."""

    def __enter__(self) -> Self:
        """Begin to show."""
        ...

    def report(self, progress: Progress) -> None:
        """Show one moment; never raises."""
        ...

    def notice(self, message: str) -> None:
        """Show what happens beside the stages, such as a request to stop; may come from another thread."""
        ...

    def finish(self, report: Report, workspace: Path) -> None:
        """Show how the run ended; called behind the exit."""
        ...


def open_display(output: str, stream: TextIO) -> Display:
    """Return the display for ``--output``: ``auto``, ``text`` or ``json``."""
    if output == "json":
        return JsonDisplay(stream)
    if output == "auto" and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        # Imported here: nobody else needs rich.
        from rich.console import Console

        from finetune_cli.terminal import LiveDisplay

        return LiveDisplay(Console(file=stream))
    return LineDisplay(stream)
