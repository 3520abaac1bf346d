"""What DeepSpeed costs where it is not needed: ZeRO 2 on two CPU workers against plain data parallelism.

    python benchmarks/deepspeed_overhead.py --model DIR --rows reviews.jsonl [--steps 20] [--batch 16]
        [--micro-batch 8] [--rounds 3]

Both train all weights of the same model on the same rows, through the product's own training stage. The last line is
JSON: rows per second of each in every round, and how many times as long ZeRO 2 takes: the median of the rounds' own
ratios. The two of a round run one behind the other, in another order each time, so what else the machine does in the
course of an hour moves both; a best round of each would compare two different moments. It ends with 1 where the ratio
is above `LIMIT`. ZeRO 2 exchanges gradients behind every micro-batch, plain data parallelism behind the last one of a
step.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from training_job import Silence, add_inputs, training_job

from finetune_trainer.interrupt import StopFlag
from finetune_trainer.run import Run
from finetune_trainer.train_stage import train_stage
from finetune_trainer.workspace import Workspace

SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "zero2": {"deepspeed": {"stage": 2}}}
LIMIT = 1.15
"""How many times as long ZeRO 2 may take."""


def main() -> None:
    """Train by turns, print what came out and hold it against the limit."""
    options = _parse()
    rounds = []
    for number in range(options.rounds):
        in_turn = list(SETTINGS) if number % 2 == 0 else list(reversed(SETTINGS))
        rates = {name: rows_per_second(options, SETTINGS[name]) for name in in_turn}
        rounds.append(rates)
        told = ", ".join(f"{name} {rates[name]:.2f} rows/s" for name in SETTINGS)
        print(f"round {number}: {told}, ratio {_ratio(rates):.3f}", flush=True)
    ratio = statistics.median(map(_ratio, rounds))
    print(json.dumps({"rows_per_second": rounds, "ratio": round(ratio, 3)}))
    if ratio > LIMIT:
        sys.exit(f"ZeRO 2 takes {ratio:.3f} times as long as plain data parallelism, and {LIMIT} is the most it may")


def _ratio(rates: dict[str, float]) -> float:
    return rates["plain"] / rates["zero2"]


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
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--micro-batch", type=int, help="rows that a worker takes at once; else as the product chooses")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
