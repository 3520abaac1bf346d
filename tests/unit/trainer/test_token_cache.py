"""Tokens are made once, under a key that everything they follow from changes."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api.spec import DataSpec, LossOn
from finetune_trainer.dataset import load_dataset
from finetune_trainer.example import Encoded, pack_encoded, unpack_encoded
from finetune_trainer.in_context import as_asked
from finetune_trainer.records import ListRecords, StoredRows
from finetune_trainer.split import Split
from finetune_trainer.token_cache import TokenCache, token_key

SETTINGS: dict[str, Any] = {"format": "raw", "system": None, "max_length": 64}


def key(folder: Path, text: str = "row", template: str = "{{ text }}?", loss_on=LossOn.COMPLETION, **changes: Any):
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": f"{text} {number}", "label": "a"}) + "\n" for number in range(40)))
    task = {
        "name": "t",
        "source": source.as_uri(),
        "templates": [{"prompt": template, "completion": "{{ label }}"}],
        **changes.pop("task", {}),
    }
    dataset = load_dataset(DataSpec.model_validate({"tasks": [task]}))
    model = changes.pop("model", "0" * 40)
    renderer: Any = SimpleNamespace(**(SETTINGS | changes))
    return token_key(as_asked(dataset, Split.TRAIN), dataset.specs, renderer, model, loss_on)


@pytest.mark.parametrize(
    "change",
    [
        {"text": "another row"},
        # Renders alike, but is shortened otherwise.
        {"template": "{{ text[:99] }}?"},
        {"template": "{{ text }}!"},
        {"model": "1" * 40},
        {"format": "chat"},
        {"system": "Be kind."},
        {"max_length": 32},
        {"loss_on": LossOn.ALL},
        {"task": {"labels": ["a", "a longer one"]}},
        {"task": {"fewShot": 2}},
    ],
    ids=str,
)
def test_what_decides_the_tokens_changes_the_key(tmp_path, change):
    assert key(tmp_path, **change) != key(tmp_path)


def test_equal_rows_have_an_equal_key(tmp_path):
    assert key(tmp_path) == key(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    assert key(tmp_path / "elsewhere", task={"weight": 2.0}) == key(tmp_path)


ROWS = [Encoded((1, 2, 3), 2), Encoded((4,), 0, True)]


class Tokeniser:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> StoredRows[Encoded]:
        self.calls += 1
        return StoredRows(ListRecords(map(pack_encoded, ROWS)), unpack_encoded)


def test_the_same_rows_are_tokenised_once(tmp_path):
    tokenise, cache = Tokeniser(), TokenCache(tmp_path / "tokens")
    for _ in range(3):
        assert cache.tokens("key", tokenise, tmp_path) == ROWS
    assert tokenise.calls == 1
    assert cache.tokens("other", tokenise, tmp_path) == ROWS
    assert tokenise.calls == 2


@pytest.mark.parametrize("name", ["tokens", "ends", "MANIFEST.json", "COMPLETE"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_entry_is_made_anew(tmp_path, name, damage):
    tokenise, cache = Tokeniser(), TokenCache(tmp_path / "tokens")
    cache.tokens("key", tokenise, tmp_path)
    file = tmp_path / "tokens" / "key" / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-2] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    assert cache.tokens("key", tokenise, tmp_path) == ROWS
    assert tokenise.calls == 2
    assert cache.tokens("key", tokenise, tmp_path) == ROWS
    assert tokenise.calls == 2


def test_what_was_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune_trainer.token_cache.write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TokenCache(tmp_path / "tokens").tokens("key", Tokeniser(), tmp_path)
    assert not list((tmp_path / "tokens").iterdir())


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    tokenise, folder = Tokeniser(), tmp_path / "tokens"
    size = sum(len(pack_encoded(row)) for row in ROWS) + 8 * len(ROWS)
    cache = TokenCache(folder, most_bytes=2 * size)
    for age, name in ((300, "old"), (200, "older but used"), (100, "new")):
        cache.tokens(name, tokenise, tmp_path)
        os.utime(folder / name, times=(1e9 - age, 1e9 - age))
        if name == "older but used":
            cache.tokens("old", tokenise, tmp_path)
    assert {entry.name for entry in folder.iterdir()} == {"old", "new"}
