"""From a file of rows to packed batches: ours against `datasets.map` as TRL's SFTTrainer prepares the same rows.

Both read the same JSON lines, render the same chat template, tokenise with the same tokenizer, find out which tokens
are learnt and lay rows out in packs of 2,048 tokens; each runs in a process of its own and on its own on this machine.
TRL's way: `load_dataset`, a map to prompt and completion, a map that applies the chat template and tokenises prompt and
whole, and `pack_dataset`. Ours also checks every row, finds near-duplicates and splits without leaks, which is in its
time. The last line printed is JSON: rows and seconds of wall clock and CPU, peak memory above an idle process, ratios.
Memory is the process's own: pages of files that are mapped into it, which the machine takes back when it needs them,
are not in it. It is looked up every 5 ms.

    python benchmarks/data_pipeline.py --model DIR [--rows 10000 100000] [--words 60] [--no-peer]
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

PROMPT = "Classify this review as positive or negative.\n\n{{ text }}\n\nSentiment:"
PACK_TOKENS = 2048
MAX_LENGTH = 512


def main() -> None:
    """Compare both at every size, or measure one in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with a tokenizer that has a chat template")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--words", type=int, default=60, help="of a row, on average")
    parser.add_argument("--no-peer", action="store_true", help="leave datasets.map out")
    parser.add_argument("--setting", choices=tuple(SETTINGS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setting:
        measure(options.setting, options.model, options.file)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run every setting at every size in a process of its own and print what came out."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in options.rows:
            file = write_rows(Path(folder) / f"{count}.jsonl", count, options.words)
            results[str(count)] = {}
            for setting in ["ours"] if options.no_peer else SETTINGS:
                # As a module: `datasets` hashes the functions it is given, and those of __main__ with all they can see.
                program = "import data_pipeline; data_pipeline.main()"
                command = [sys.executable, "-c", program, "--model", str(options.model), "--setting", setting]
                environment = os.environ | {"HF_HOME": folder, "TMPDIR": folder, "TOKENIZERS_PARALLELISM": "true"}
                environment["PYTHONPATH"] = str(Path(__file__).parent)
                done = subprocess.run(
                    [*command, "--file", str(file)], env=environment, check=False, capture_output=True, text=True
                )
                if done.returncode:
                    sys.exit(f"{setting} failed:\n{done.stderr[-3000:]}")
                found = results[str(count)][setting] = json.loads(done.stdout.splitlines()[-1])
                print(f"{count:>9,} rows, {setting}: {found}", flush=True)
    faster = {count: each for count, each in results.items() if "datasets.map" in each}
    print(
        json.dumps(
            {
                "words": options.words,
                "results": results,
                "speed_to_datasets_map": {count: ratio(each, "seconds") for count, each in faster.items()},
                "speed_to_datasets_map_by_cpu": {count: ratio(each, "cpu_seconds") for count, each in faster.items()},
            }
        )
    )


def ratio(results: dict[str, dict[str, float]], figure: str) -> float:
    """Return how many times faster ours is; by CPU seconds what else the machine does matters less."""
    return round(results["datasets.map"][figure] / results["ours"][figure], 2)


def write_rows(path: Path, count: int, words: int) -> Path:
    """Write made-up reviews of a vocabulary like a language's: few words are common, most are rare."""
    generator = random.Random(1)
    vocabulary = ["".join(generator.choices("aeioubdfgklmnprst", k=generator.randint(2, 9))) for _ in range(20_000)]
    weights = list(accumulate(1 / (rank + 1) for rank in range(len(vocabulary))))
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            length = generator.randint(words // 2, words * 3 // 2)
            text = " ".join(generator.choices(vocabulary, cum_weights=weights, k=length))
            label = ("negative", "positive")[number % 2]
            file.write(json.dumps({"text": f"{text} {number}", "label": label}) + "\n")
    return path


def measure(setting: str, model: Path, file: Path) -> None:
    """Time one setting and print its figures."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    run = SETTINGS[setting](tokenizer, file)
    idle = own_bytes()
    memory = [idle]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            memory[0] = max(memory[0], own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, busy = time.monotonic(), time.process_time()
    rows, tokens = run()
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - busy
    done.set()
    watcher.join()
    print(
        json.dumps(
            {
                "rows_per_second": round(rows / seconds, 1),
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu_seconds, 2),
                "tokens": tokens,
                "memory_mb": round((memory[0] - idle) / 1e6, 1),
            }
        )
    )


def own_bytes() -> int:
    """Return how much memory this process has to itself now."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else sys.exit("no RssAnon in /proc/self/status: this needs Linux 4.5 or later")


Run = Callable[[], tuple[int, int]]
"""Does the work and returns rows and tokens."""


def ours(tokenizer: object, file: Path) -> Run:
    """Load, check, split, render and tokenise as the trainer does; pack as its batches are packed."""
    from finetune_api.spec import DataSpec
    from finetune_trainer.dataset import load_dataset
    from finetune_trainer.packing import pack
    from finetune_trainer.renderer import Renderer, encode_all
    from finetune_trainer.split import Split

    task = {"name": "t", "source": file.as_uri(), "templates": [{"prompt": PROMPT, "completion": "{{ label }}"}]}

    def run() -> tuple[int, int]:
        dataset = load_dataset(DataSpec.model_validate({"tasks": [task]}))
        renderer = Renderer(tokenizer, "chat", None, MAX_LENGTH)  # type: ignore[arg-type]
        rows = tokens = 0
        for split in Split:
            encoded, _ = encode_all(renderer, dataset, dataset.examples(split))
            rows += len(encoded)
            tokens += sum(len(item.ids) for item in encoded)
            batch: list[tuple[int, ...]] = []
            length = 0
            for item in encoded:
                if batch and length + len(item.ids) > PACK_TOKENS:
                    pack(batch)
                    batch, length = [], 0
                batch.append(item.ids)
                length += len(item.ids)
            if batch:
                pack(batch)
        return rows, tokens

    return run


def datasets_map(tokenizer: object, file: Path) -> Run:
    """Prepare the rows as SFTTrainer does for prompts and completions."""
    from datasets import disable_progress_bars, load_dataset
    from trl import pack_dataset

    disable_progress_bars()

    def to_messages(row: dict[str, str]) -> dict[str, object]:
        prompt = PROMPT.replace("{{ text }}", row["text"])
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": row["label"]}],
        }

    def tokenise(row: dict[str, list[dict[str, str]]]) -> dict[str, object]:
        template = tokenizer.apply_chat_template  # type: ignore[attr-defined]
        prompt = template(row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = template(row["prompt"] + row["completion"], tokenize=True, return_dict=True)["input_ids"]
        mask = [0] * len(prompt) + [1] * (len(whole) - len(prompt))
        return {"input_ids": whole[:MAX_LENGTH], "completion_mask": mask[:MAX_LENGTH]}

    def run() -> tuple[int, int]:
        data = load_dataset("json", data_files=str(file), split="train")
        data = data.map(to_messages, remove_columns=["text", "label"])
        data = data.map(tokenise, remove_columns=["prompt", "completion"])
        rows = len(data)
        packed = pack_dataset(data, PACK_TOKENS, "bfd", map_kwargs={})
        return rows, sum(len(ids) for ids in packed["input_ids"])

    return run


SETTINGS: dict[str, Callable[[object, Path], Run]] = {"ours": ours, "datasets.map": datasets_map}


if __name__ == "__main__":
    main()
