"""What GPUs do with the product's own training: tokens a second, MFU, and the peak of memory beside the plan's.

    make prepare build/four-bits/.installed
    PYTHONPATH=build/four-bits python benchmarks/gpu_training.py --model DIR --rows reviews.jsonl --peak-tflops 989

Every setting trains in bfloat16 in a process of its own, through the product's check and training stages; zero2 and
zero3 spread full fine-tuning over all GPUs of the machine, and qlora needs bitsandbytes (requirements/gpu.txt). The
last line is JSON. MFU is the share of the GPUs' peak (`--peak-tflops` of each, dense, in bfloat16) that the model's own
arithmetic takes at the measured speed; what rows have in common is computed once and counts for each of them. Without
a GPU there is nothing to measure, and it ends with 1, as it does when a setting fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_job import Silence, add_inputs, training_job

from finetune_api.job import FineTuneJob

LORA: dict[str, Any] = {"rank": 8, "targets": "allLinear"}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "full"}},
    "lora": {"method": {"type": "lora", "lora": LORA}},
    "qlora": {"method": {"type": "qlora", "lora": LORA}},
    "zero2": {"method": {"type": "full"}, "compute": {"deepspeed": {"stage": 2}}},
    "zero3": {"method": {"type": "full"}, "compute": {"deepspeed": {"stage": 3}}},
}


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What decides how much a model has to compute for a token, in numbers of parameters."""

    body: int
    """Of all layers, adapters included; neither embeddings, which are looked up, nor the output layer."""
    trained_body: int
    output: int
    """Of the output layer, which is computed where a token is learnt and nowhere else."""
    trained_output: int
    layers: int
    width: int
    """Of all heads of one layer together."""

    @classmethod
    def of(cls, config: Any, parameters: int, trained: int) -> "Arithmetic":
        """Return that of a causal model whose output layer is trained with all the rest, or not at all."""
        table = config.vocab_size * config.hidden_size
        tables = table if config.tie_word_embeddings else 2 * table
        is_whole, head = trained == parameters, getattr(config, "head_dim", None)
        return cls(
            body=parameters - tables,
            trained_body=trained - tables if is_whole else trained,
            output=table,
            trained_output=table if is_whole else 0,
            layers=config.num_hidden_layers,
            # Where a head's width is not told, heads share the model's.
            width=config.num_attention_heads * head if head else config.hidden_size,
        )

    def flops(self, row_tokens: float, learnt: float) -> float:
        """Return the floating-point operations of one token's forward and backward pass.

        Two for every parameter forward, two more for the gradient of what it read, and two for its own where it is
        trained; 12 * layers * width * row_tokens for attention (Chowdhery et al., PaLM, 2022, appendix B), which counts
        a causal model's whole square.

        Args:
            row_tokens: of a row, all of which are taken to be as long.
            learnt: share of the tokens that are learnt.
        """
        body = 4 * self.body + 2 * self.trained_body
        output = 4 * self.output + 2 * self.trained_output
        return body + learnt * output + 12 * self.layers * self.width * row_tokens


def mfu(tokens_per_second: float, flops_per_token: float, gpus: int, peak_tflops: float) -> float:
    """Return model FLOPs utilisation, of 1: all GPUs' useful operations by what they could do in the same time."""
    return tokens_per_second * flops_per_token / (gpus * peak_tflops * 1e12)


def main() -> None:
    """Measure the settings one after the other, or one in this process."""
    options = _parse()
    if options.setting:
        print(json.dumps(measure(options, options.setting)))
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("no GPU: torch finds none on this machine, and nothing was measured")
    results, failed = {}, []
    for name in options.settings:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--setting", name], check=False, capture_output=True, text=True
        )
        if done.returncode:
            failed.append(name)
            print(f"{name} failed:\n{done.stderr[-3000:]}", flush=True)
            continue
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(
            "{0}: {tokens_per_second:,.0f} tokens/s on {gpus} GPU(s), MFU {mfu:.3f}, peak {peak_gb:.2f} GB, planned "
            "{planned_gb:.2f} GB".format(name, **results[name]),
            flush=True,
        )
    figures = {"gpu": torch.cuda.get_device_name(0), "peak_tflops": options.peak_tflops, "results": results}
    print(json.dumps(figures | {"failed": failed}))
    sys.exit(1 if failed else 0)


def measure(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Check and train in one setting and return its figures."""
    import torch

    from finetune_api.spec.compute import processes
    from finetune_api.status import PlanStatus
    from finetune_trainer.check_stage import inspect_job
    from finetune_trainer.interrupt import StopFlag
    from finetune_trainer.model import fetch_model, read_config
    from finetune_trainer.run import Run
    from finetune_trainer.train_stage import train_stage
    from finetune_trainer.workspace import Workspace

    with tempfile.TemporaryDirectory() as folder:
        job = _job(options, SETTINGS[name], Path(folder), torch.cuda.device_count())
        run = Run(job, Workspace(Path(folder)), Silence(), StopFlag())
        found, _ = inspect_job(run)
        plan = run.workspace.recall("plan", PlanStatus) or PlanStatus()
        report = train_stage(run)
        config = read_config(fetch_model(job.spec.model, run.workspace.models))
    gpus = processes(job.spec.compute)
    tokens = found.tokens or 1
    arithmetic = Arithmetic.of(config, report.parameters, report.trainable_parameters)
    per_token = arithmetic.flops(tokens / max(1, found.rows.train), (found.completion_tokens or 0) / tokens)
    return {
        "gpus": gpus,
        "tokens_per_second": report.tokens_per_second,
        "mfu": mfu(report.tokens_per_second, per_token, gpus, options.peak_tflops),
        "peak_gb": report.peak_memory_bytes / 1e9,
        "planned_gb": (plan.memory_bytes_per_gpu or 0) / 1e9,
    }


def _job(options: argparse.Namespace, setting: dict[str, Any], folder: Path, gpus: int) -> FineTuneJob:
    """Return the job of one setting; what is spread takes all ``gpus`` of the machine."""
    spread = setting.get("compute")
    return training_job(
        options,
        folder,
        "auto",
        method=setting["method"],
        training={"maxSteps": options.steps, "globalBatchSize": options.batch, "precision": "bf16"},
        compute={"gpusPerWorker": gpus, "engine": "ray", **spread} if spread else {"gpusPerWorker": 1},
        runPolicy={"preflight": "skip"},
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser, "Review: {{ review_body }}\nSentiment:")
    parser.add_argument("--peak-tflops", type=float, required=True, help="of one GPU, dense bfloat16: 989 of an H100")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64, help="rows of a step")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
