"""`benchmarks/data_pipeline.py` runs: a few rows through this project's half, in the process that it starts."""

import importlib
import json
import sys
from pathlib import Path

import pytest


def test_rows_are_prepared_and_their_figures_printed(
    tiny_chat_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # As when it is started.
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.setattr(
        sys, "argv", ["data_pipeline", "--model", str(tiny_chat_model_dir), "--rows", "200", "--no-peer"]
    )
    importlib.import_module("data_pipeline").main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["200"]["ours"]
    assert figures["rows_per_second"] > 0 and figures["cpu_seconds"] > 0
    assert figures["tokens"] > 200
