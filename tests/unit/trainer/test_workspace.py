"""The workspace: who owns it, who is at work in it, where its downloads are."""

from pathlib import Path

import pytest

from finetune_trainer.errors import SpecError, StorageError
from finetune_trainer.workspace import Workspace


def test_edited_jobs_share_the_downloads_of_the_command_lines_folder():
    assert Workspace(Path("/jobs/.finetune/tiny-1")).models == Workspace(Path("/jobs/.finetune/tiny-2")).models
    assert Workspace(Path("/jobs/.finetune/tiny-1")).models == Path("/jobs/.finetune/models")


def test_a_named_workspace_keeps_its_downloads_to_itself_unless_there_is_a_cache():
    assert Workspace(Path("/mine")).models == Path("/mine/models")
    assert Workspace(Path("/mine"), Path("/cache")).models == Path("/cache/models")


def test_a_second_process_may_try_again_later(tmp_path: Path):
    workspace = Workspace(tmp_path / "workspace")
    with (
        workspace.claim("a"),
        pytest.raises(StorageError, match=r"another process is running this job in .*workspace; wait"),
        workspace.claim("a"),
    ):
        pass
    with workspace.claim("a"):
        pass
    with pytest.raises(SpecError, match="another version"), workspace.claim("b"):
        pass


def test_a_lock_that_cannot_be_opened_is_a_disk_error(tmp_path: Path):
    workspace = Workspace(tmp_path)
    (tmp_path / "lock").mkdir()
    with pytest.raises(StorageError, match=r"cannot open .*lock"), workspace.claim("a"):
        pass
