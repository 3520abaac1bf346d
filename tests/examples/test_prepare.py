"""What the examples fetch and convert, and what they leave behind when that fails."""

import hashlib
import json
import os
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer


def test_rows_without_a_class_are_left_out(sentiment: ModuleType) -> None:
    entries = [{"text": " Fine phone. ", "class": 1}, {"text": "", "class": None}, {"text": "Broke.", "class": 0}]
    assert list(sentiment.rows_of(entries, "amazon")) == [
        {"review_body": "Fine phone.", "label": "positive", "source": "amazon"},
        {"review_body": "Broke.", "label": "negative", "source": "amazon"},
    ]


def test_the_demo_has_1000_rows_of_each_source_half_of_them_positive(prepared: Path) -> None:
    # Some rows hold U+0085, at which str.splitlines would cut.
    rows = [json.loads(line) for line in (prepared / "reviews.jsonl").read_text(encoding="utf-8").split("\n") if line]
    counts = {
        (source, label): sum(row["source"] == source and row["label"] == label for row in rows)
        for source in ("amazon", "imdb", "yelp")
        for label in ("positive", "negative")
    }
    assert counts == dict.fromkeys(counts, 500)
    assert len(rows) == 3000


def test_a_machine_without_npm_gets_the_same_rows(
    sentiment: ModuleType, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    sentiment.put(tmp_path / "reviews.jsonl", sentiment.build_reviews)
    assert (tmp_path / "reviews.jsonl").read_bytes() == (prepared / "reviews.jsonl").read_bytes()


def test_the_demo_model_is_safetensors_with_a_chat_template(prepared: Path) -> None:
    model = prepared / "model"
    with safe_open(model / "model.safetensors", framework="pt") as weights:
        slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118 - no mapping
        sizes = [int(part.get_shape()[0]) * int(([*part.get_shape(), 1])[1]) for part in slices]
        assert {part.get_dtype() for part in slices} == {"BF16"}
    assert sum(sizes) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert asked.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert not [file for file in model.iterdir() if file.suffix in {".bin", ".pt", ".pkl", ".gguf"}]


def test_what_is_there_is_not_fetched_again(
    sentiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sentiment, "PREPARED", tmp_path)
    monkeypatch.setenv("PATH", "")
    (tmp_path / "reviews.jsonl").write_text("{}\n", encoding="utf-8")
    assert sentiment.main(["reviews"]) == 0
    assert "is there" in capsys.readouterr().out


def test_a_failing_client_is_quoted_and_nothing_is_left(
    sentiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_command(tmp_path / "bin" / "npm", "echo no such package >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sentiment, "PREPARED", tmp_path / "prepared")
    assert sentiment.main(["reviews"]) == 69
    assert "cannot fetch sentiment@5.0.2" in (said := capsys.readouterr().err)
    assert "no such package" in said
    assert list((tmp_path / "prepared").iterdir()) == []


def test_a_changed_package_is_refused(
    sentiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_command(tmp_path / "bin" / "npm", 'echo other > "$6/sentiment-5.0.2.tgz"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sentiment, "PREPARED", tmp_path / "prepared")
    assert sentiment.main(["reviews"]) == 69
    assert hashlib.sha256(b"other\n").hexdigest() in capsys.readouterr().err
    assert list((tmp_path / "prepared").iterdir()) == []


def test_an_interrupted_preparation_leaves_nothing(sentiment: ModuleType, tmp_path: Path) -> None:
    def build(result: Path, _: Path) -> None:
        result.mkdir()
        (result / "half").write_text("written", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sentiment.put(tmp_path / "model", build)
    assert list(tmp_path.iterdir()) == []


def test_two_preparations_at_once_leave_one_result(sentiment: ModuleType, tmp_path: Path) -> None:
    def build(result: Path, _: Path) -> None:
        for folder in (result, tmp_path / "model"):
            folder.mkdir()
            (folder / "weights").write_text("equal", encoding="utf-8")

    sentiment.put(tmp_path / "model", build)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_unknown_part_is_named(sentiment: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sentiment.main(["rows"])
    assert "'rows' is not one of reviews, model" in capsys.readouterr().err


def test_equal_texts_give_an_equal_tiny_model(tiny: ModuleType, tmp_path: Path) -> None:
    for name in ("first", "second"):
        tiny.write_model(["Fine phone.\nSentiment: positive", "Broke.\nSentiment: negative"], tmp_path / name)
    names = {file.name for file in (tmp_path / "first").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= names
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_tiny_tokenizer_can_write_any_text(tiny: ModuleType) -> None:
    pieces = tiny.learn_pieces(["Fine phone."])
    text = "Prix : 12 € — ☃\n"
    assert pieces.decode(pieces.encode(text).ids) == text


def write_command(file: Path, script: str) -> None:
    """Put a command of our own where npm is looked for."""
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(0o755)
