"""``finetune init``: a commented job to start from, which validates as it is printed."""

import json
import sys
from importlib import resources
from string import Template

from finetune_api.job import load_job
from finetune_api.report import ExitCode


def print_starter(name: str, method: str) -> ExitCode:
    """Print a starter job.

    Raises:
        InvalidJobError: ``name`` cannot be the name of a job.
    """
    text = render_starter(name, method)
    load_job(text, "finetune init")
    sys.stdout.write(text)
    return ExitCode.OK


def render_starter(name: str, method: str) -> str:
    """Return the starter job as YAML; in quotes, every name stays text."""
    return Template(_read("starter.yaml")).substitute(name=json.dumps(name), method=_read(f"starter-{method}.yaml"))


def _read(name: str) -> str:
    return resources.files("finetune_cli").joinpath(name).read_text(encoding="utf-8")
