"""``python -m tests.fuzz TARGET CASES [SEED]``: throw cases at one target until one crashes it, guided by coverage.

Without arguments it names the targets.

The last line says how many cases ran. A crash ends with a traceback and the input that caused it, in hexadecimal.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["finetune_api", "finetune_cli", "finetune_operator", "finetune_trainer"]):
    from tests.fuzz.target import TARGETS, seeds

SECONDS_PER_CASE = 10
LONGEST = 4096


def main() -> None:
    if len(sys.argv) == 1:
        sys.stdout.write("".join(f"{name}\n" for name in TARGETS))
        return
    name, cases, *rest = sys.argv[1:]
    seed = rest[0] if rest else "1"
    target, count = TARGETS[name], 0

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        try:
            target(data)
        except BaseException:
            sys.stderr.write(f"{name} was crashed by {data.hex()}\n")
            raise
        if count == int(cases):
            # libFuzzer ends the process without another word.
            sys.stdout.write(f"{name}: {count} cases\n")
            sys.stdout.flush()

    with tempfile.TemporaryDirectory() as folder:
        settings = [f"-runs={cases}", f"-seed={seed}", f"-timeout={SECONDS_PER_CASE}", f"-max_len={LONGEST}"]
        options = ["-rss_limit_mb=4096", "-verbosity=0", "-print_final_stats=0", f"-artifact_prefix={folder}/"]
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, content in enumerate(seeds(name)):
            (corpus / str(number)).write_bytes(content)
        atheris.Setup([str(Path(__file__)), *settings, *options, str(corpus)], one)
        atheris.Fuzz()


main()
