"""Scoring closed labels against lm-evaluation-harness's own hf model: one task file, one model, the same answers.

Both go through the harness's evaluator, in turns, in one process on one thread; a forward pass of ours has room for as
many questions as one of theirs. The last line printed is JSON: examples per second of the processor's time (median of
the rounds; other programs do not count), accuracy of both, the largest difference between two log-probabilities, and
the ratio.

    python benchmarks/eval_throughput.py --model DIR --rows reviews.jsonl [--limit 200] [--batch-size 16]
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from finetune_trainer.harness import HarnessModel, Tasks, load_task
from finetune_trainer.layout import load_for_rows
from finetune_trainer.model import ModelFiles
from finetune_trainer.scoring import Scorer
from finetune_trainer.task_file import read_task_file

LONGEST = 2048
TASK = {
    "task": "sentiment",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Classify this review as positive or negative.\n\n{{ review_body }}\n\nSentiment:",
    "doc_to_target": "{{ 1 if label == 'positive' else 0 }}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def main() -> None:
    """Measure both and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="jsonl with review_body and label")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shots", type=int, default=0, help="answered rows before every question, the same ones")
    parser.add_argument("--labels", nargs="+", default=["negative", "positive"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(compare(options)))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of both."""
    tasks = open_task(options)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    theirs = HFLM(str(options.model), dtype="float32", max_length=LONGEST, batch_size=options.batch_size, device="cpu")
    model, choice = load_for_rows(ModelFiles(options.model, ""), torch.float32, "")
    budget = round(questions_in_a_pass(options, tokenizer) * tokens_of_a_question(tasks, tokenizer))
    ours = HarnessModel(model.eval(), tokenizer, Scorer(model, choice.layout, batch_tokens=budget), LONGEST)
    seconds: dict[str, list[float]] = {"ours": [], "hf": []}
    results: dict[str, Any] = {}
    for _ in range(options.rounds):
        for name, asked in (("ours", ours), ("hf", theirs)):
            begun = time.process_time()
            results[name] = evaluator.evaluate(
                asked, {"tasks": dict(tasks), "groups": {}}, limit=options.limit, bootstrap_iters=0
            )
            seconds[name].append(time.process_time() - begun)
    logprobs = {name: logprobs_of(result) for name, result in results.items()}
    speed = {name: options.limit / statistics.median(found) for name, found in seconds.items()}
    return {
        "batch_size": options.batch_size,
        "labels": options.labels,
        "shots": options.shots,
        "examples_per_second": {name: round(value, 2) for name, value in speed.items()},
        "acc": {name: result["results"]["sentiment"]["acc,none"] for name, result in results.items()},
        "largest_difference": float(np.abs(logprobs["ours"] - logprobs["hf"]).max()),
        "layout": choice.layout.value,
        "speed_to_hf": round(speed["ours"] / speed["hf"], 2),
    }


def open_task(options: argparse.Namespace) -> Tasks:
    """Return the task over the first rows of the file."""
    shots = {"num_fewshot": options.shots, "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
    content = yaml.safe_dump({**TASK, **shots, "doc_to_choice": options.labels}).encode()
    return load_task(
        read_task_file("file:///task.yaml", content, "--rows", lambda uri, field: options.rows), options.limit
    )


def questions_in_a_pass(options: argparse.Namespace, tokenizer: Any) -> float:
    """Return how many rows the hf model answers in one pass: all labels of a row at once if each is a token."""
    tokens = [len(tokenizer(f" {label}", add_special_tokens=False)["input_ids"]) for label in options.labels]
    return options.batch_size if max(tokens) == 1 else options.batch_size / len(tokens)


def tokens_of_a_question(tasks: Tasks, tokenizer: Any) -> float:
    """Return the tokens read of a row and all its labels, on average: what is only predicted is not read."""
    requests = tasks["sentiment"].instances
    read = {(request.doc_id, *tokenizer(request.args[0] + request.args[1])["input_ids"][:-1]) for request in requests}
    return sum(len(tokens) - 1 for tokens in read) / len({request.doc_id for request in requests})


def logprobs_of(result: Any) -> Any:
    """Return the log-probability of every label of every row."""
    return np.array([resp[0][0] for sample in result["samples"]["sentiment"] for resp in sample["resps"]])


if __name__ == "__main__":
    main()
