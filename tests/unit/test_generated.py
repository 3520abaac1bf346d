"""What is generated from the contract is what is checked in."""

from pathlib import Path

import pytest

from finetune_api.__main__ import drifted_files, generated_files, main
from finetune_api.report import ExitCode

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_has_drifted() -> None:
    assert drifted_files(ROOT) == [], "run: make generate"


def test_all_generated_files_are_known() -> None:
    assert [str(file.relative_to(ROOT)) for file in (ROOT / "crds").iterdir()] == [
        "crds/finetune.dev_finetunejobs.yaml"
    ]
    assert set(generated_files()) == {
        "charts/finetune-operator/files/finetune.dev_finetunejobs.yaml",
        "crds/finetune.dev_finetunejobs.yaml",
        "docs/spec.md",
        "docs/report.schema.json",
        "docs/templates.md",
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def test_generating_twice_changes_nothing(project: Path) -> None:
    assert main(["--root", str(project)]) is ExitCode.OK
    assert main(["--check", "--root", str(project)]) is ExitCode.OK


def test_the_check_names_what_has_drifted(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--root", str(project)])
    (project / "docs/spec.md").write_text("changed by hand", encoding="utf-8")
    (project / "docs/report.schema.json").unlink()
    assert main(["--check", "--root", str(project)]) is ExitCode.BAD_SPEC
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["docs/spec.md", "docs/report.schema.json"]
    assert all("make generate" in line for line in lines)


def test_the_check_writes_nothing(project: Path) -> None:
    assert main(["--check", "--root", str(project)]) is ExitCode.BAD_SPEC
    assert [file.name for file in project.iterdir()] == ["pyproject.toml"]


def test_another_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--root", str(tmp_path)])
    assert "is not the project's folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
