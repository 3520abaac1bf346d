"""`finetune report` over a real S3 server, with the user's own credentials."""

import pytest

from finetune_api.report import ExitCode
from finetune_cli.report import show_report
from finetune_trainer.errors import StorageError

from ..unit.cluster_api import FakeJobApi
from ..unit.test_cli_report import JOB, job_with_report, published
from .s3_server import S3Server, serve_s3


@pytest.fixture
def server(tmp_path, monkeypatch):
    with serve_s3(tmp_path / "s3") as server:
        for name, value in server.keys.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def api(server: S3Server, tmp_path) -> FakeJobApi:
    """A job whose report is in a bucket, at an address that only pods see."""
    bucket = server.make_bucket()
    sha256 = published(tmp_path / "report-of-the-job")
    for file in (tmp_path / "report-of-the-job" / "report").iterdir():
        server.client().upload_file(str(file), bucket, f"out/team/reviews-1a2b3c4d/report/{file.name}")
    output = {"uri": f"s3://{bucket}/out", "endpoint": "http://s3.storage.svc:7070"}
    return FakeJobApi(job_with_report(f"s3://{bucket}/out/team/reviews-1a2b3c4d", sha256, output=output))


def test_a_report_comes_out_of_a_bucket(api, server, tmp_path):
    assert show_report(api, JOB, tmp_path / "here", server.url) == ExitCode.OK
    assert (tmp_path / "here" / "report.html").read_text() == "<p>better"


def test_wrong_keys_are_told_as_the_users_own(api, server, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"your own AWS credentials"):
        show_report(api, JOB, tmp_path / "here", server.url)
