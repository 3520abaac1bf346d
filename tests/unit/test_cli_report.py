"""`finetune report`: where a job's report is, that it is the published one, and what to do when it is out of reach."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from finetune_api.report import ExitCode
from finetune_cli.cluster_job import JobName, cluster_job
from finetune_cli.report import explain_volume, find_report, show_report
from finetune_trainer.errors import DataError, SpecError, StorageError
from finetune_trainer.manifest import write_manifest

from .cluster_api import NAME, NAMESPACE, FakeJobApi, make_object

JOB = JobName(NAMESPACE, NAME)


def published(folder: Path) -> str:
    """Write a report where a job would; return the sha256 of its manifest."""
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "report.html").write_text("<p>better")
    (folder / "report" / "report.json").write_text("{}")
    return write_manifest(folder / "report").sha256


def job_with_report(uri: str, sha256: str | None = None, **spec: Any) -> dict[str, Any]:
    stage: dict[str, Any] = {"stage": "evaluate", "attempt": 1, "exitCode": 0}
    stage |= {"reportSha256": sha256} if sha256 else {}
    resolved = {"outputPath": uri, "image": "finetune-trainer:1"}
    return make_object({"phase": "Succeeded", "stages": [stage], "resolved": resolved}, **spec)


def test_the_report_is_fetched_and_opened(tmp_path, capsys):
    sha256 = published(tmp_path)
    opened: list[str] = []

    def browser(page: str) -> bool:
        opened.append(page)
        return True

    api = FakeJobApi(job_with_report(tmp_path.as_uri(), sha256))
    assert show_report(api, JOB, None, None, browser) == ExitCode.OK
    page = Path(opened[0].removeprefix("file://"))
    assert page.read_text() == "<p>better"
    assert capsys.readouterr().out == f"Report: {page}\n"


def test_without_a_browser_the_path_is_enough(tmp_path, capsys):
    api = FakeJobApi(job_with_report(tmp_path.as_uri(), published(tmp_path)))
    assert show_report(api, JOB, None, None, lambda page: False) == ExitCode.OK
    assert "There is no browser to open it here." in capsys.readouterr().out


def test_a_folder_that_is_named_takes_the_files_and_no_browser_is_asked(tmp_path):
    sha256 = published(tmp_path / "store")

    def browser(page: str) -> bool:
        raise AssertionError("not asked for")

    api = FakeJobApi(job_with_report((tmp_path / "store").as_uri(), sha256))
    show_report(api, JOB, tmp_path / "here", None, browser)
    assert {path.name for path in (tmp_path / "here").iterdir()} >= {"report.html", "report.json", "MANIFEST.json"}


def test_another_report_than_the_published_one_is_not_trusted(tmp_path):
    published(tmp_path)
    api = FakeJobApi(job_with_report(tmp_path.as_uri(), "0" * 64))
    with pytest.raises(DataError, match="is not the one that the job published"):
        show_report(api, JOB, tmp_path / "here", None)


def test_a_report_that_was_changed_is_not_trusted(tmp_path):
    sha256 = published(tmp_path)
    (tmp_path / "report" / "report.html").write_text("<p>much better")
    with pytest.raises(DataError, match=r"report\.html: 14 bytes instead of 9"):
        show_report(FakeJobApi(job_with_report(tmp_path.as_uri(), sha256)), JOB, tmp_path / "here", None)
    assert not (tmp_path / "here").exists()


NO_REPORT = {
    "a job nobody has looked at": {},
    "a job that trains": {"phase": "Training", "resolved": {"outputPath": "s3://bucket/x"}},
    "an evaluation that failed": {
        "phase": "Failed",
        "resolved": {"outputPath": "s3://bucket/x"},
        "stages": [{"stage": "evaluate", "attempt": 1, "exitCode": 65}],
    },
}


@pytest.mark.parametrize("status", NO_REPORT.values(), ids=NO_REPORT.keys())
def test_a_job_without_a_report_says_so(status):
    with pytest.raises(SpecError, match=r"has no report: it is .* See finetune status reviews -n team"):
        find_report(cluster_job(make_object(status)))


def test_a_volume_is_read_through_a_pod_of_ones_own():
    uri = "pvc://models/out/team/reviews-1a2b3c4d"
    with pytest.raises(SpecError, match="is on the volume 'models', which only pods see") as raised:
        show_report(FakeJobApi(job_with_report(uri)), JOB, None, None)
    commands = str(raised.value).splitlines()[1:]
    assert [command.split()[3] for command in commands] == ["run", "wait", "cp", "delete"]
    assert "reviews-report:/mnt/pvc/models/out/team/reviews-1a2b3c4d/report ./report" in commands[2]


def test_the_pod_that_reads_a_volume_changes_nothing_in_it():
    job = cluster_job(job_with_report("pvc://models/x"))
    assert '"readOnly": true' in explain_volume(job, "pvc://models/x", [])


def test_the_pod_that_reads_a_volume_runs_where_those_of_the_job_could():
    document = job_with_report("pvc://models/x")
    own, everybodys = [{"name": "own"}], [{"name": "registry"}, {"name": "own"}]
    document["spec"]["compute"] = {**document["spec"].get("compute", {}), "imagePullSecrets": own}
    job = cluster_job(document)
    assert overrides_of(explain_volume(job, "pvc://models/x", []))["imagePullSecrets"] == own
    placed = {"imagePullSecrets": everybodys, "nodeSelector": {"disk": "here"}, "tolerations": [{"operator": "Exists"}]}
    assert placed.items() <= overrides_of(explain_volume(job, "pvc://models/x", [{"spec": placed}])).items()


def overrides_of(explained: str) -> dict[str, Any]:
    """Return the pod's spec of the first command."""
    words = shlex.split(explained.splitlines()[1])
    [overrides] = [word.removeprefix("--overrides=") for word in words if word.startswith("--overrides=")]
    return json.loads(overrides)["spec"]


def test_the_pod_that_reads_a_volume_is_let_in_by_a_restricted_namespace():
    spec = overrides_of(explain_volume(cluster_job(job_with_report("pvc://models/x")), "pvc://models/x", []))
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    [container] = spec["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def told_of_a_store(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what is said of a report in a store that does not answer."""
    monkeypatch.setattr("finetune_cli.report._PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    output = {"uri": "s3://bucket/out", "endpoint": endpoint}
    api = FakeJobApi(job_with_report("s3://bucket/out/team/reviews-1a2b3c4d", output=output))
    with pytest.raises(StorageError) as raised:
        show_report(api, JOB, None, None)
    return str(raised.value)


def test_a_store_that_only_pods_see_is_told_with_the_way_there(monkeypatch):
    told = told_of_a_store("http://s3.storage.svc:7070", monkeypatch)
    assert "kubectl -n storage port-forward svc/s3 7070" in told
    assert "finetune report reviews -n team --endpoint http://localhost:7070" in told


def test_a_store_with_a_certificate_is_not_to_be_asked_for_at_localhost(monkeypatch):
    assert "its certificate will not name localhost" in told_of_a_store("https://s3.storage.svc", monkeypatch)
