"""What to run when a job's rows or model are not there yet and its folder holds a script that makes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_api.job import FineTuneJob
from finetune_api.problem import written
from finetune_cli.manifest import STANDARD_INPUT
from finetune_operator.location import uris
from finetune_trainer.errors import FineTuneError

SCRIPT = "prepare.py"


@contextmanager
def preparation_named(job: FineTuneJob, file: Path) -> Iterator[None]:
    """Add to an error about what is not there that the script beside ``file``, the job's, may make it."""
    try:
        yield
    except FineTuneError as error:
        script = file.absolute().parent / SCRIPT
        if file != STANDARD_INPUT and script.is_file() and any(str(path) in str(error) for path in _absent(job)):
            error.add_note(f"{SCRIPT} beside the job may make it: python {script}")
        raise


def _absent(job: FineTuneJob) -> Iterator[Path]:
    # Imported here: it brings what reads rows, and most jobs fail otherwise or not at all.
    from finetune_trainer.source import fetch_local

    for place, uri in uris(job.spec):
        if uri.startswith("file://") and "output" not in place:
            path = fetch_local(uri, written(place))
            if not path.exists():
                yield path
