"""Help with a name that no job has: which ones are like it."""

import difflib

from finetune_cli.cluster_job import JobName
from finetune_cli.job_api import JobApi
from finetune_cli.refusal import NotFoundError
from finetune_trainer.errors import FineTuneError

_MOST_SHOWN = 5


def with_similar_names(api: JobApi, name: JobName, error: NotFoundError) -> NotFoundError:
    """Return ``error`` with the names of jobs that may have been meant."""
    try:
        names = sorted(document["metadata"]["name"] for document in api.jobs(name.namespace))
    except FineTuneError:
        # Whoever may read one job need not be allowed to list all.
        return error
    return NotFoundError(f"{error} {_suggest(name, names)}")


def _suggest(name: JobName, names: list[str]) -> str:
    near = difflib.get_close_matches(name.name, names, n=1)
    if near:
        return f"Did you mean {near[0]}?"
    if not names:
        return "There is none in this namespace at all; --namespace names another."
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return f"There are {', '.join(names[:_MOST_SHOWN])}{more}; --namespace names another namespace."
