"""Trainers report to a running operator, with tokens, authority and address that a real API server handed out."""

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.integrations.integration_utils import KubeflowCallback

from finetune_api.report import ExitCode, Progress, Stage
from finetune_api.stage_result import StageResult
from finetune_api.status import DataStatus, FineTuneJobStatus, MetricValue, Phase, RowsStatus
from finetune_trainer.progress_client import CA_CERT, TOKEN, URL, ProgressClient, open_client

from .api_server import ApiServer
from .conftest import StartOperator
from .operator_process import await_until
from .workload import Document, Workload

ACCOUNT = "trainer"


@dataclass
class Trainer:
    """What the kubelet gives to the container of one pod: variables, and files below ``folder``."""

    environ: dict[str, str]
    pod: str
    token_file: Path

    def client(self) -> ProgressClient:
        client = open_client(dict(self.environ))
        assert client is not None
        return client

    def post(self, path: str = "") -> int:
        """Post some progress and return the answer's code."""
        headers = {"Authorization": f"Bearer {self.token_file.read_text()}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.environ[URL] + path, b'{"trainerStatus": {}}', headers, method="POST")
        try:
            with urllib.request.urlopen(
                request, timeout=10, context=ssl.create_default_context(cafile=self.environ[CA_CERT])
            ) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refusal:
            return refusal.code


class Kubelet:
    """Starts pods and gives them what their manifests ask for."""

    def __init__(self, server: ApiServer, workload: Workload, folder: Path):
        self.server, self.workload, self.folder = server, workload, folder
        server.request("POST", workload.path("serviceaccounts"), {"metadata": {"name": ACCOUNT}})

    def start(self, stage: Stage, attempt: int = 1, job: str = "reviews") -> Trainer:
        child = self.workload.wait_child(stage, attempt, job)
        pod = self.workload.start_pod(child)
        spec = child["spec"]["template"]["spec"]
        variables = {one["name"]: one["value"] for one in spec["containers"][0]["env"] if "value" in one}
        sources = [
            source
            for volume in spec["volumes"]
            for source in volume.get("projected", {}).get("sources", ())
            if "serviceAccountToken" in source
        ]
        folder = self.folder / pod
        folder.mkdir()
        (folder / "token").write_text(self.token(pod, sources[0]["serviceAccountToken"]["audience"]))
        trust = self.server.request("GET", self.workload.path("configmaps", f"{job}-trust"))
        (folder / "ca.crt").write_text(trust["data"]["ca.crt"])
        environ = {URL: variables[URL], CA_CERT: str(folder / "ca.crt"), TOKEN: str(folder / "token")}
        return Trainer(environ, pod, folder / "token")

    def token(self, pod: str, audience: str) -> str:
        reference = {"kind": "Pod", "apiVersion": "v1", "name": pod}
        spec = {"audiences": [audience], "expirationSeconds": 3600, "boundObjectRef": reference}
        path = f"{self.workload.path('serviceaccounts', ACCOUNT)}/token"
        answer: Document = self.server.request("POST", path, {"spec": spec})
        return str(answer["status"]["token"])


@pytest.fixture
def kubelet(api_server: ApiServer, workload: Workload, tmp_path: Path) -> Kubelet:
    return Kubelet(api_server, workload, tmp_path)


def apply(workload: Workload, name: str = "reviews") -> None:
    workload.apply(name, spec__compute={"pod": {"serviceAccountName": ACCOUNT}})


def metrics_of(status: FineTuneJobStatus) -> dict[str, str]:
    return {metric.name: metric.value for metric in status.latest_metrics}


def test_the_callback_of_transformers_reports_without_any_code(
    start_operator: StartOperator, workload: Workload, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_operator()
    apply(workload)
    workload.play(Stage.CHECK)
    trainer = kubelet.start(Stage.TRAIN)
    for name, value in trainer.environ.items():
        monkeypatch.setenv(name, value)
    callback = KubeflowCallback()
    monkeypatch.setattr(callback, "_MIN_UPDATE_INTERVAL", 0.0)
    # It gives a post up after five seconds, tells nobody, and posts again at the next step.
    often = {"seconds": 60.0, "pause": 1.0}
    state = SimpleNamespace(is_world_process_zero=True, max_steps=10, global_step=0, epoch=0.0)

    def tell(moment: Callable[..., None], **values: Any) -> None:
        moment(None, state, None, **values)

    def is_told(percent: int, moment: Callable[..., None]) -> bool:
        tell(moment)
        said = workload.status().progress
        return said is not None and said.percent == percent

    tell(callback.on_train_begin)
    state.global_step, state.epoch = 4, 1.25
    tell(callback.on_log, logs={"loss": float("nan"), "learning_rate": 2e-5})
    await_until(lambda: is_told(40, callback.on_step_end), "40 %", **often)
    status = workload.status()
    assert status.progress is not None
    assert (status.progress.stage, status.progress.step, status.progress.total_steps) == (Stage.TRAIN, 4, 10)
    assert status.progress.epoch == "1.25"
    assert metrics_of(status) == {"loss": "nan", "learning_rate": "2e-05"}
    assert status.summary is not None
    assert status.summary.progress == "40 %"
    await_until(lambda: is_told(100, callback.on_train_end), "100 %", **often)


def test_a_result_is_in_the_status_before_its_pod_has_ended(
    start_operator: StartOperator, workload: Workload, kubelet: Kubelet
) -> None:
    start_operator()
    apply(workload)
    client = kubelet.start(Stage.CHECK).client()
    rows = DataStatus(rows=RowsStatus(train=8, validation=1, test=1))
    assert client.deliver(StageResult(stage=Stage.CHECK, exit_code=ExitCode.OK, data=rows), patience_seconds=30)
    status = workload.status()
    assert status.data == rows
    assert [(stage.stage, stage.attempt) for stage in status.stages] == [(Stage.CHECK, 1)]
    assert client.deliver(StageResult(stage=Stage.CHECK, exit_code=ExitCode.OK, data=rows), patience_seconds=30)
    client.close()


def test_what_our_trainer_knows_reaches_the_status_within_ten_seconds(
    start_operator: StartOperator, workload: Workload, kubelet: Kubelet
) -> None:
    start_operator()
    apply(workload)
    workload.play(Stage.CHECK)
    client = kubelet.start(Stage.TRAIN).client()

    def report(step: int) -> None:
        client.report(
            Progress(
                stage=Stage.TRAIN,
                message="training",
                percent=10.0 * step,
                step=step,
                total_steps=10,
                epoch=0.1 * step,
                loss=1 / step,
                validation_loss=0.5,
                tokens_per_second=1234.5,
                eta_seconds=90.0,
            )
        )

    # The first one waits for a connection, and for the API server's word on the token.
    report(1)
    workload.wait(lambda status: status.progress and status.progress.step == 1, "step 1")
    for step in range(2, 6):
        report(step)
    status = workload.wait(lambda status: status.progress and status.progress.step == 5, "step 5", seconds=10)
    assert status.progress is not None
    assert status.progress.message == "training"
    assert (status.progress.percent, status.progress.total_steps, status.progress.epoch) == (50, 10, "0.5")
    assert (status.progress.eta_seconds, status.progress.tokens_per_second) == (90, "1234.5")
    assert metrics_of(status) == {"loss": "0.2", "validation_loss": "0.5", "tokens_per_second": "1234.5"}
    assert status.summary is not None
    assert (status.summary.progress, status.summary.eta) == ("50 %", "1m")
    last = (MetricValue(name="loss", value="0.125"),)
    assert client.deliver(StageResult(stage=Stage.TRAIN, exit_code=ExitCode.OK, latest_metrics=last))
    assert metrics_of(workload.status())["loss"] == "0.125"
    client.close()


def test_only_the_pod_of_the_attempt_is_listened_to(
    start_operator: StartOperator, workload: Workload, kubelet: Kubelet, api_server: ApiServer
) -> None:
    start_operator()
    apply(workload)
    apply(workload, "other")
    trainer, other = kubelet.start(Stage.CHECK), kubelet.start(Stage.CHECK, job="other")
    assert trainer.post() == 200

    good = trainer.token_file.read_text()
    trainer.token_file.write_text(other.token_file.read_text())
    assert trainer.post() == 401, "another job's token"
    trainer.token_file.write_text(kubelet.token(trainer.pod, "https://kubernetes.default.svc"))
    assert trainer.post() == 401, "a token for the API server"
    trainer.token_file.write_text(good[:-8] + "AAAAAAAA")
    assert trainer.post() == 401, "a forged token"
    job = workload.get("reviews")["metadata"]
    audience = f"finetune.dev/v1alpha1/namespaces/{workload.namespace}/finetunejobs/reviews/{job['uid']}/check/a1"
    trainer.token_file.write_text(kubelet.token(other.pod, audience))
    assert trainer.post() == 403, "another job's pod with a token for this job"
    trainer.token_file.write_text(good)
    assert trainer.post() == 200


def test_a_token_is_of_no_use_at_the_api_server(
    start_operator: StartOperator, workload: Workload, kubelet: Kubelet, api_server: ApiServer
) -> None:
    start_operator()
    apply(workload)
    trainer = kubelet.start(Stage.CHECK)
    request = urllib.request.Request(
        f"{api_server.url}{workload.path('pods')}",
        headers={"Authorization": f"Bearer {trainer.token_file.read_text()}"},
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, context=ssl.create_default_context(cafile=str(api_server.ca_file)))


def test_an_old_attempt_cannot_speak_any_more(
    start_operator: StartOperator, workload: Workload, kubelet: Kubelet
) -> None:
    start_operator()
    apply(workload)
    trainer = kubelet.start(Stage.CHECK)
    client = trainer.client()
    assert client.deliver(StageResult(stage=Stage.CHECK, exit_code=ExitCode.INTERNAL, message="disk"), 30)
    assert trainer.post() == 409
    client.close()


def test_a_trainer_outlives_a_restart_of_the_operator(
    start_operator: StartOperator, workload: Workload, kubelet: Kubelet
) -> None:
    operator = start_operator()
    apply(workload)
    workload.play(Stage.CHECK)
    client = kubelet.start(Stage.TRAIN).client()
    client.report(Progress(stage=Stage.TRAIN, percent=1))
    workload.wait(lambda status: status.progress and status.progress.percent == 1, "1 %")
    operator.kill()
    client.report(Progress(stage=Stage.TRAIN, percent=2))
    operator.start()
    assert client.deliver(StageResult(stage=Stage.TRAIN, exit_code=ExitCode.OK), patience_seconds=60)
    client.close()
    workload.wait_phase(Phase.EVALUATING)
