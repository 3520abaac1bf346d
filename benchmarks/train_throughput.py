"""Training throughput against TRL's SFTTrainer and transformers' plain Trainer, all in one go on this machine.

Every setting trains the same LoRA (rank 8 on q, k, v, o) on the same token ids in the same order, with the same
optimiser, learning rate, schedule and clipping, each in a process of its own. The last line printed is JSON: rows per
second (median step), peak memory (resident set), final loss, and the ratios of ours to each.

    python benchmarks/train_throughput.py --model DIR --rows reviews.jsonl [--steps 40] [--format chat]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

BATCH, RATE, WARM_UP, SEED = 8, 3e-4, 4, 17
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROMPT = "Classify this review as positive or negative.\n\n{{ review_body }}\n\nSentiment:"
TRL = ("trl fp32", "trl bf16 autocast", "trl bf16 weights", "trl bf16 weights padding_free")
SETTINGS = (*TRL, "trainer fp32", "ours")


def main() -> None:
    """Compare all settings, or measure one in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="jsonl with review_body and label")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--format", choices=("chat", "raw"), default="chat")
    parser.add_argument("--seed", type=int, default=SEED, help="of the adapter's first values; rows and order stay")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setting:
        measure(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run every setting in a process of its own and print what came out."""
    results = {}
    for setting in SETTINGS:
        print(f"running {setting} ...", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--setting", setting]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{setting} failed:\n{done.stderr[-3000:]}")
        results[setting] = json.loads(done.stdout.splitlines()[-1])
        print(
            "  {rows_per_second:.2f} rows/s, {memory_gb:.2f} GB, loss {loss:.4f}".format(**results[setting]), flush=True
        )
    ours = results["ours"]
    fastest = max(TRL, key=lambda setting: results[setting]["rows_per_second"])

    def ratio(setting: str, figure: str) -> float:
        return round(ours[figure] / results[setting][figure], 3)

    print(
        json.dumps(
            {
                "format": options.format,
                "steps": options.steps,
                "results": results,
                "fastest_trl": fastest,
                "speed_to_fastest_trl": ratio(fastest, "rows_per_second"),
                "speed_to_default_trl": ratio("trl fp32", "rows_per_second"),
                "speed_to_trainer": ratio("trainer fp32", "rows_per_second"),
                "memory_to_fastest_trl": ratio(fastest, "memory_gb"),
                "loss_to_fastest_trl": ratio(fastest, "loss"),
            }
        )
    )


def measure(options: argparse.Namespace) -> None:
    """Train in one setting and print its figures as JSON."""
    import torch
    from transformers import set_seed
    from transformers import trainer as transformers_trainer

    torch.set_num_threads(options.threads)
    clock = step_clock()
    # The same clock in all three trainers, without touching any of them.
    transformers_trainer.DEFAULT_CALLBACKS.append(clock)
    encoded = encode_rows(options)
    in_order = [encoded[place] for place in mixture_of(encoded).epoch(0)]
    # The product seeds itself; the same seed here gives all adapters the same first values.
    set_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        if options.setting == "ours":
            losses = run_ours(options, encoded, Path(folder))
        elif options.setting == "trainer fp32":
            losses = run_trainer(options, in_order, folder)
        else:
            losses = run_trl(options, in_order, folder)
    figures = {
        "rows_per_second": BATCH / statistics.median(clock.seconds[WARM_UP:]),
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "loss": statistics.fmean(losses[len(losses) // 2 :]),
    }
    print(json.dumps(figures))


def step_clock() -> Any:
    """Return a callback class that keeps the seconds of every step in its own ``seconds``."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        seconds: ClassVar[list[float]] = []
        begun = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            StepClock.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            StepClock.seconds.append(time.perf_counter() - StepClock.begun)

    return StepClock


def load_job(options: argparse.Namespace, folder: Path) -> Any:
    """Return the job that our own setting runs; the others get its token ids."""
    from finetune_api import job as api
    from finetune_api.resolve import resolve

    spec = {
        "model": {"source": options.model.resolve().as_uri()},
        "data": {
            "tasks": [
                {
                    "name": "sentiment",
                    "source": options.rows.resolve().as_uri(),
                    "templates": [{"prompt": PROMPT, "completion": " {{ label }}"}],
                }
            ],
            "format": options.format,
            "splits": {"validation": 0.1, "test": 0.1, "seed": SEED},
        },
        "method": {
            "type": "lora",
            "lora": {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": "named", "targetNames": TARGETS},
        },
        "training": {
            "maxSteps": options.steps,
            "globalBatchSize": BATCH,
            "learningRate": RATE,
            "schedule": "constant",
            "warmupRatio": 0.0,
            "seed": options.seed,
        },
        "checkpoint": {"everySteps": 10_000},
        "output": {"uri": folder.as_uri()},
    }
    text = json.dumps(
        {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench"}, "spec": spec}
    )
    return resolve(api.load_job(text, str(folder / "bench.yaml")))


def encode_rows(options: argparse.Namespace) -> list[Any]:
    """Return the training rows of our own data pipeline, as many as the steps need."""
    from finetune_trainer.dataset import load_dataset
    from finetune_trainer.fit import find_row_length
    from finetune_trainer.model import fetch_model, load_tokenizer
    from finetune_trainer.renderer import Renderer, encode_all
    from finetune_trainer.split import Split

    job = load_job(options, Path("/tmp"))
    files = fetch_model(job.spec.model, Path("/tmp"))
    tokenizer = load_tokenizer(files)
    dataset = load_dataset(job.spec.data, splits=(Split.TRAIN,))
    data = job.spec.data
    renderer = Renderer(tokenizer, data.format, data.system, find_row_length(job.spec, files).tokens)
    encoded, _ = encode_all(renderer, dataset, dataset.examples(Split.TRAIN)[: options.steps * BATCH])
    return encoded


def mixture_of(encoded: list[Any]) -> Any:
    """Return the order in which our own training takes the rows; the others get them in it."""
    from finetune_api.spec import MixingSpec
    from finetune_trainer.mixture import TaskRows, plan_mixture

    return plan_mixture([TaskRows("rows", range(len(encoded)))], MixingSpec(), SEED)


def run_ours(options: argparse.Namespace, encoded: list[Any], folder: Path) -> list[float]:
    """Train through the product's own training stage."""
    import threading

    from training_job import Silence

    from finetune_trainer.model import fetch_model
    from finetune_trainer.train import train
    from finetune_trainer.training_input import TrainingInput
    from finetune_trainer.workspace import Workspace

    job = load_job(options, folder)
    workspace = Workspace(folder)
    report = train(
        TrainingInput(
            job,
            fetch_model(job.spec.model, folder),
            encoded,
            mixture_of(encoded),
            {},
            workspace,
            Silence(),
            threading.Event(),
        )
    )
    return [point.loss for point in report.curve]


def base_model(options: argparse.Namespace, dtype: Any) -> Any:
    """Load the base model the way most people do."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)


def lora_config() -> Any:
    """Return the adapter of all settings."""
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")


def shared_arguments(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return the arguments that all trainers get alike."""
    return {
        "output_dir": folder,
        "max_steps": options.steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "seed": options.seed,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def run_trl(options: argparse.Namespace, encoded: list[Any], folder: str) -> list[float]:
    """Train with SFTTrainer; the rows come tokenised, so that all settings see the same ids."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    columns = {
        "input_ids": [list(item.ids) for item in encoded],
        "completion_mask": [[0] * item.prompt_length + [1] * len(item.completion_ids) for item in encoded],
    }
    settings: dict[str, Any] = {"bf16": options.setting == "trl bf16 autocast", "gradient_checkpointing": False}
    if options.setting.endswith("padding_free"):
        settings |= {"padding_free": True, "max_length": None}
    trainer = SFTTrainer(
        model=base_model(options, torch.bfloat16 if "bf16 weights" in options.setting else torch.float32),
        args=SFTConfig(**shared_arguments(options, folder), **settings, completion_only_loss=True),
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=lora_config(),
    )
    trainer.train()
    return losses_of(trainer)


def run_trainer(options: argparse.Namespace, encoded: list[Any], folder: str) -> list[float]:
    """Train with transformers' Trainer and a padding collator."""
    import torch
    from peft import get_peft_model
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rows = [
        {
            "input_ids": list(item.ids),
            "attention_mask": [1] * len(item.ids),
            "labels": [-100] * item.prompt_length + list(item.completion_ids),
        }
        for item in encoded
    ]
    trainer = Trainer(
        model=get_peft_model(base_model(options, torch.float32), lora_config()),
        args=TrainingArguments(**shared_arguments(options, folder), remove_unused_columns=False),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(options.model)),
    )
    trainer.train()
    return losses_of(trainer)


def losses_of(trainer: Any) -> list[float]:
    """Return the loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
