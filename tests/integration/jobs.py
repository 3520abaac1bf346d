"""Small jobs for tests: a tiny model, made-up reviews, seconds."""

import json
import random
from pathlib import Path
from typing import Any

from finetune_api.job import FineTuneJob, load_job
from finetune_api.report import Progress
from finetune_api.resolve import resolve

FIGURES = {"accuracy", "macro_f1", "ece", "perplexity", "bits_per_byte"}
"""What is measured on a task with labels when nothing is asked for."""

GOOD = ("wonderful", "great", "clear", "fresh", "friendly", "best")
BAD = ("dull", "worse", "waste", "cold", "sorry", "broke")
THINGS = ("film", "phone", "food", "service", "plot", "battery", "sound", "soup", "product", "acting")


class Silence:
    """Hears progress and does nothing with it."""

    def report(self, progress: Progress) -> None:
        pass


def write_reviews(path: Path, rows: int = 120, seed: int = 1) -> Path:
    """Write ``rows`` made-up reviews whose words give the label away."""
    generator = random.Random(seed)
    lines = []
    for number in range(rows):
        label = "positive" if number % 2 else "negative"
        words = generator.sample(GOOD if number % 2 else BAD, 2)
        things = generator.sample(THINGS, 3)
        text = f"The {things[0]} was {words[0]}, the {things[1]} and the {things[2]} number {number} were {words[1]}."
        lines.append(json.dumps({"text": text, "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_document(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a job document; ``changes`` are dotted paths with ``__`` for dots, such as ``training__maxSteps=4``."""
    rows = folder / "reviews.jsonl"
    if not rows.exists():
        write_reviews(rows)
    document: dict[str, Any] = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"source": model.as_uri(), "dtype": "float32"},
            "data": {
                "tasks": [
                    {
                        "name": "sentiment",
                        "source": rows.as_uri(),
                        "templates": [{"prompt": "Review: {{ text }}\nSentiment:", "completion": " {{ label }}"}],
                        "labels": ["negative", "positive"],
                    }
                ],
                "maxLength": 256,
            },
            "method": {"type": "lora", "lora": {"rank": 4, "dropout": 0.1}},
            "training": {"maxSteps": 8, "globalBatchSize": 8, "learningRate": 0.01, "evalEverySteps": 4},
            "checkpoint": {"everySteps": 3},
            "output": {"uri": (folder / "output").as_uri()},
        },
    }
    for path, value in changes.items():
        *blocks, name = path.split("__")
        block = document["spec"]
        for step in blocks:
            block = block.setdefault(step, {})
        block[name] = value
    return document


def tiny_job(model: Path, folder: Path, **changes: Any) -> FineTuneJob:
    """Return the job of `tiny_document`, resolved."""
    return resolve(load_job(json.dumps(tiny_document(model, folder, **changes)), str(folder / "job.yaml")))
