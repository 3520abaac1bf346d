"""Full fine-tuning, LoRA and prompt tuning of one model: what each gains over the base, and what it costs.

    make prepare
    python benchmarks/headline/prepare.py
    python benchmarks/headline/run.py [--task headline] [--method lora] [--seed 17]

Each job of news articles to headlines (ROUGE) and of reviews to labels (accuracy) is run by `finetune run`, one after
the other; one that is already published is not run again. Prints a table per task; the last line is JSON.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "examples" / "01-sentiment-lora" / "prepared"
OUTPUT = HERE / "output"

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "full"}, "learningRate": 5e-5},
    "lora": {
        "method": {"type": "lora", "lora": {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": "attention"}},
        "learningRate": 1e-3,
    },
    "promptTuning": {
        "method": {"type": "promptTuning", "promptTuning": {"virtualTokens": 20, "init": "text"}},
        "learningRate": 3e-2,
    },
}

TASKS: dict[str, dict[str, Any]] = {
    "headline": {
        "task": {
            "source": (HERE / "prepared" / "articles.jsonl").as_uri(),
            "templates": [
                {"prompt": "Write a headline for this news article.\n\n{{ article }}", "completion": "{{ headline }}"}
            ],
        },
        "initText": "Write a short headline for this news article",
        "evaluation": {"metrics": ["rouge", "perplexity"], "maxExamples": 200, "generation": {"maxNewTokens": 24}},
        "training": {"maxSteps": 120, "globalBatchSize": 8},
        "metric": "rouge1",
    },
    "sentiment": {
        "task": {
            "source": (DEMO / "reviews.jsonl").as_uri(),
            "labels": ["negative", "positive"],
            "templates": [
                {
                    "prompt": "Is this review positive or negative?\n\n{{ review_body }}\n\nAnswer with one word.",
                    "completion": "{{ label }}",
                }
            ],
        },
        "initText": "Classify the sentiment of this review as positive or negative",
        "evaluation": {"metrics": ["accuracy", "perplexity"]},
        "training": {"maxSteps": 60, "globalBatchSize": 16},
        "metric": "accuracy",
    },
}


class Line(NamedTuple):
    """One row of a table; intervals are of 95 %."""

    method: str
    base: float
    tuned: float
    delta: float
    low: float
    high: float
    rows: int
    trainable: float
    """Share of the model's parameters."""
    seconds: float
    memory: int
    """Bytes, the peak of training."""
    size: int
    """Bytes, of what is published."""


def main() -> int:
    """Run what is asked for and print the tables."""
    options = _parse()
    tables = {task: [run(task, method, options.seed) for method in options.method] for task in options.task}
    for task, lines in tables.items():
        print(f"\n{task} ({TASKS[task]['metric']}, {lines[0].rows} test rows, seed {options.seed})\n")
        print(table(lines))
    print(json.dumps({task: [line._asdict() for line in lines] for task, lines in tables.items()}))
    return 0


def run(task: str, method: str, seed: int) -> Line:
    """Run one job, unless its report is there, and return what it measured."""
    name = f"{task}-{method}-{seed}".lower()
    output = OUTPUT / name
    if not (reports := list(output.rglob("report/report.json"))):
        output.mkdir(parents=True, exist_ok=True)
        manifest = output / "finetunejob.json"
        manifest.write_text(json.dumps(job(task, method, seed, name), indent=2), encoding="utf-8")
        finetune = Path(sys.executable).with_name("finetune")
        subprocess.run([finetune, "run", manifest], check=True)
        reports = list(output.rglob("report/report.json"))
    return read(json.loads(reports[0].read_text(encoding="utf-8")), method, TASKS[task]["metric"])


def job(task: str, method: str, seed: int, name: str) -> dict[str, Any]:
    """Return the manifest: methods differ in what is trained and how fast, and in nothing else."""
    chosen, wanted = METHODS[method], TASKS[task]
    how = json.loads(json.dumps(chosen["method"]))
    if method == "promptTuning":
        how["promptTuning"]["initText"] = wanted["initText"]
    spec = {
        "model": {"source": (DEMO / "model").as_uri()},
        "data": {
            "format": "chat",
            "tasks": [{"name": task, **wanted["task"]}],
            "splits": {"validation": 0.1, "test": 0.1, "seed": seed},
            "maxLength": 256,
        },
        "method": how,
        "training": {**wanted["training"], "learningRate": chosen["learningRate"], "seed": seed},
        "evaluation": wanted["evaluation"],
        "output": {"uri": (OUTPUT / name).as_uri(), "publishOn": "always"},
    }
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}


def read(report: dict[str, Any], method: str, metric: str) -> Line:
    """Return what the report says about one figure."""
    figure = next(one for one in report["evaluation"]["metrics"] if one["metric"] == metric)
    training = report["training"]
    return Line(
        method=method,
        **{name: figure[name] for name in ("base", "tuned", "delta", "low", "high", "rows")},
        trainable=training["trainableParameters"] / training["parameters"],
        seconds=training["seconds"],
        memory=training["peakMemoryBytes"],
        size=report["artifacts"][0]["bytes"],
    )


def table(lines: list[Line]) -> str:
    """Return the lines as a table in Markdown; the gain of full fine-tuning is what the others are held against.

    All from the base that full fine-tuning began with: in bfloat16 it is another one, and answers other things.
    """
    full = next((line for line in lines if line.method == "full"), None)
    head = [
        "method",
        "base",
        "tuned",
        "difference (95 %)",
        "of full's gain",
        "trained",
        "seconds",
        "GB",
        "MB published",
    ]
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in lines:
        cells = [
            line.method,
            f"{line.base:.3f}",
            f"{line.tuned:.3f}",
            f"{line.delta:+.3f} ({line.low:+.3f} to {line.high:+.3f})",
            f"{(line.tuned - full.base) / full.delta:.0%}" if full else "",
            f"{line.trainable:.2%}",
            f"{line.seconds:.0f}",
            f"{line.memory / 1e9:.1f}",
            f"{line.size / 1e6:.1f}",
        ]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=sorted(TASKS), help="all when not named")
    parser.add_argument("--method", action="append", choices=list(METHODS), help="all when not named")
    parser.add_argument("--seed", type=int, default=17, help="of splits and training")
    options = parser.parse_args()
    options.task = options.task or list(TASKS)
    options.method = options.method or list(METHODS)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
