"""Read a job from a file, with a message instead of a traceback for a file that cannot be read."""

from pathlib import Path

from finetune_api.job import FineTuneJob, load_job
from finetune_trainer.errors import SpecError


def read_job(file: Path) -> FineTuneJob:
    """Return the job in ``file``.

    Raises:
        SpecError: the file cannot be read.
        InvalidJobError: what it says is no job; all errors at once.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"cannot read {file}: byte {error.start} is not UTF-8. Save it as UTF-8.") from error
    except OSError as error:
        raise SpecError(f"cannot read {file}: {error.strerror}. Check the path and who may read it.") from error
    return load_job(text, str(file))
