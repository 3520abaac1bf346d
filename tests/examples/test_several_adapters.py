"""Example 18: adapters on one base, asked and served by the commands of its README."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.report import ArtifactKind, ExitCode
from finetune_cli.__main__ import _parser, run_command
from finetune_cli.cluster_command import run_with
from finetune_trainer.errors import SpecError

from ..unit.cluster_api import FakeJobApi
from ..unit.test_cli_serving import published
from .conftest import EXAMPLES, report_of, run_example

EXAMPLE = EXAMPLES / "18-several-adapters"
README = (EXAMPLE / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
JOBS = {"reviews-rslora": "rslora", "requests-lora": "lora", "requests-dora": "dora"}


class Cluster(FakeJobApi):
    """Has published the example's jobs, as a cluster has them: base, rows and output lie in a store."""

    def get(self, namespace: str, name: str) -> dict[str, Any]:
        spec = yaml.safe_load((EXAMPLE / f"{JOBS[name]}.yaml").read_text(encoding="utf-8"))["spec"]
        changes = {"model": {"source": "s3://finetune-demo/models/base"}, "method": spec["method"]}
        return published(name, f"s3://finetune-demo/output/team/{name}-0123abcd/model", **changes)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    """What each job has put out, all in one folder."""
    folder = tmp_path_factory.mktemp("several")
    return {name: run_example(EXAMPLE.name, folder, f"{file}.yaml") for name, file in JOBS.items()}


def words_of(command: str) -> list[str]:
    """Return the words behind ``finetune`` of the README's line with that command."""
    (line,) = re.findall(rf"^(?:\.venv/bin/)?finetune ({command} .*)$", README, re.MULTILINE)
    return shlex.split(line.partition(" > ")[0])


def shown_behind(words: str) -> list[str]:
    """Return the lines of the first block of output behind ``words``."""
    return README.partition(words)[2].partition("```text\n")[2].partition("```")[0].splitlines()


@pytest.mark.parametrize("name", JOBS)
def test_a_form_of_lora_trains_as_many_numbers_as_the_readme_says(outputs: dict[str, Path], name: str) -> None:
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{JOBS[name]}.yaml`")]
    assert row.endswith(f"| {report_of(outputs[name]).training.trainable_parameters:,} |")


def test_all_adapters_are_asked_at_once(outputs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    *words, pattern = words_of("try")
    below = pattern.removeprefix(f"examples/{EXAMPLE.name}/")
    folder = outputs["requests-lora"].parents[2]
    assert run_command([*words, *(str(path) for path in sorted(folder.glob(below)))]) is ExitCode.OK
    question, *lines = capsys.readouterr().out.splitlines()
    shown_question, *shown = shown_behind("finetune try")
    assert question == shown_question
    said = {re.sub(r"-[0-9a-f]{8}$", "-<id>", line.split()[0]): line for line in lines if line}
    assert list(said) == [line.split()[0] for line in shown]
    assert [name for name, line in said.items() if re.search("negative|positive", line)] == ["reviews-rslora-<id>"]


def test_an_adapter_that_no_server_takes_is_published_merged_as_well(outputs: dict[str, Path]) -> None:
    kinds = {name: [artifact.kind for artifact in report_of(output).artifacts] for name, output in outputs.items()}
    assert kinds["requests-dora"] == [ArtifactKind.ADAPTER, ArtifactKind.MERGED]
    assert kinds["reviews-rslora"] == kinds["requests-lora"] == [ArtifactKind.ADAPTER]
    card = (outputs["requests-dora"] / "merged" / "README.md").read_text(encoding="utf-8")
    assert "vllm serve . --served-model-name requests-dora" in card
    assert "vllm" not in (outputs["requests-dora"] / "model" / "README.md").read_text(encoding="utf-8")


def test_the_others_go_behind_one_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(Cluster(), _parser().parse_args(words_of("render"))) is ExitCode.OK
    printed = iter(capsys.readouterr().out.splitlines())
    shown = shown_behind("finetune render")
    assert len(shown) > 10
    # In this order; `in` takes lines from the iterator until it has found one.
    assert [line for line in shown if line not in printed] == []


def test_dora_is_refused_a_server_in_the_words_of_the_readme() -> None:
    said = "a dora adapter, and vLLM serves lora alone"
    assert f"`{said}`" in README
    with pytest.raises(SpecError, match=said):
        run_with(Cluster(), _parser().parse_args([*words_of("render"), "requests-dora"]))
