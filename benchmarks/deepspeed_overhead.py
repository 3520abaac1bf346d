"""What DeepSpeed costs where it is not needed: ZeRO 2 on two CPU workers against plain data parallelism.

    python benchmarks/deepspeed_overhead.py --model DIR --rows reviews.jsonl [--steps 30] [--batch 16]
        [--micro-batch 8] [--rounds 2]

Both train all weights of the same model on the same rows, through the product's own training stage. The last line is
JSON: rows per second of each (best round), and how much longer ZeRO 2 takes. At most 1.15 is wanted. ZeRO 2 exchanges
gradients behind every micro-batch, plain data parallelism behind the last one of a step.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from training_job import Silence, add_inputs, training_job

from finetune_trainer.interrupt import StopFlag
from finetune_trainer.run import Run
from finetune_trainer.train_stage import train_stage
from finetune_trainer.workspace import Workspace

SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "zero2": {"deepspeed": {"stage": 2}}}


def main() -> None:
    """Train by turns and print what came out."""
    options = _parse()
    rates = {name: 0.0 for name in SETTINGS}
    for number in range(options.rounds):
        for name, compute in SETTINGS.items():
            rate = rows_per_second(options, compute)
            rates[name] = max(rates[name], rate)
            print(f"round {number}: {name} {rate:.2f} rows/s", flush=True)
    print(json.dumps({"rows_per_second": rates, "ratio": round(rates["plain"] / rates["zero2"], 3)}))


def rows_per_second(options: argparse.Namespace, compute: dict[str, Any]) -> float:
    """Return the speed of one training."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = training_job(
            options,
            folder,
            "float32",
            method={"type": "full"},
            training={
                "maxSteps": options.steps,
                "globalBatchSize": options.batch,
                "precision": "fp32",
                **({"microBatchSize": options.micro_batch} if options.micro_batch else {}),
            },
            compute={"workers": 2, "gpusPerWorker": 0, **compute},
        )
        return train_stage(Run(job, Workspace(folder), Silence(), StopFlag())).rows_per_second


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser, "Review: {{ text }}\nSentiment:")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--micro-batch", type=int, help="rows that a worker takes at once; else as the product chooses")
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
