"""What a trainer does when the operator that started it speaks another version of the contract."""

from pathlib import Path

import pytest

from finetune_api.report import CONTRACT_VARIABLE, CONTRACT_VERSION, ExitCode, Stage
from finetune_api.stage_result import StageResult
from finetune_trainer.__main__ import main


def run(folder: Path, *more: str) -> tuple[ExitCode, StageResult]:
    """Run the train stage as a pod does; its spec is not there."""
    said = folder / "said"
    files = ("--spec", str(folder / "job.json"), "--workspace", str(folder / "run"), "--termination-log", str(said))
    code = main(["train", *files, *more])
    return code, StageResult.model_validate_json(said.read_bytes())


def test_a_trainer_refuses_an_operator_of_another_version_whatever_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONTRACT_VARIABLE, str(CONTRACT_VERSION + 1))
    code, result = run(tmp_path, "--option-of-tomorrow", "7")
    assert (code, result.exit_code, result.stage) == (ExitCode.BAD_SPEC, ExitCode.BAD_SPEC, Stage.TRAIN)
    assert (
        f"operator speaks contract version {CONTRACT_VERSION + 1} and this trainer {CONTRACT_VERSION}" in result.message
    )
    assert not (tmp_path / "run").exists(), "nothing is begun"


def test_without_an_operator_and_with_one_of_this_version_there_is_no_skew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (None, str(CONTRACT_VERSION)):
        if version is not None:
            monkeypatch.setenv(CONTRACT_VARIABLE, version)
        _, result = run(tmp_path)
        assert "cannot read" in result.message


def test_an_unknown_option_is_a_mistake_where_versions_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "--option-of-tomorrow", "7")
    assert "unrecognized arguments: --option-of-tomorrow 7" in capsys.readouterr().err
