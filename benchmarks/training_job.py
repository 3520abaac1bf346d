"""The job of a benchmark that trains through the product's own stages."""

import argparse
import json
from pathlib import Path
from typing import Any

from finetune_api.job import FineTuneJob, load_job
from finetune_api.resolve import resolve


class Silence:
    """Hears nothing."""

    def report(self, progress: object) -> None:
        """Say nothing."""


def add_inputs(parser: argparse.ArgumentParser, prompt: str) -> None:
    """Let the command line say what is trained on; ``prompt`` is the template when it says none."""
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="jsonl")
    parser.add_argument("--prompt", default=prompt, help="template over the rows' columns")
    parser.add_argument("--completion", default=" {{ label }}", help="likewise")


def training_job(options: argparse.Namespace, folder: Path, dtype: str, **blocks: Any) -> FineTuneJob:
    """Return the resolved job over the inputs in ``options``, which never saves; ``blocks`` are others of its spec."""
    task = {
        "name": "benchmark",
        "source": options.rows.resolve().as_uri(),
        "templates": [{"prompt": options.prompt, "completion": options.completion}],
    }
    spec = {
        "model": {"source": options.model.resolve().as_uri(), "dtype": dtype},
        "data": {"tasks": [task]},
        "checkpoint": {"everySteps": 10_000},
        "output": {"uri": folder.as_uri()},
        **blocks,
    }
    kind = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "benchmark"}}
    return resolve(load_job(json.dumps(kind | {"spec": spec}), "benchmark.json"))
