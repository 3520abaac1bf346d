"""`finetune render --serve`: one base and the adapters of several jobs; what cannot be served is said."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.report import ExitCode
from finetune_cli.__main__ import _parser, run_command
from finetune_cli.cluster_command import run_with
from finetune_cli.cluster_job import ClusterJob, cluster_job
from finetune_cli.serving import VLLM_IMAGE, serving_manifests
from finetune_trainer.errors import SpecError

from .cluster_api import NAME, FakeJobApi, make_object

COMMIT = "c" * 40
IN_A_BUCKET = {"uri": "s3://models/tuned", "endpoint": "http://minio:9000", "secretRef": {"name": "s3"}}


def published(name: str = NAME, uri: str = "s3://models/tuned/team/a/model", **spec: Any) -> dict[str, Any]:
    """Return a job that has published an adapter, as an API server tells it."""
    condition = {
        "type": "Published",
        "status": "True",
        "reason": "Published",
        "lastTransitionTime": "2026-01-02T03:04:05Z",
    }
    status = {
        "conditions": [condition],
        "artifacts": [{"kind": "adapter", "uri": uri, "sha256": "a" * 64, "bytes": 1}],
        "resolved": {"modelRevision": COMMIT, "image": "registry.example/trainer:1"},
    }
    document = make_object(status, **({"output": IN_A_BUCKET} | spec))
    document["metadata"]["name"] = name
    return document


def jobs(*documents: dict[str, Any]) -> list[ClusterJob]:
    return [cluster_job(document) for document in documents]


def pod_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    pod: dict[str, Any] = objects[0]["spec"]["template"]["spec"]
    return pod


def test_one_server_has_the_adapters_of_all_jobs():
    on_a_volume = published("dialogues", "pvc://tuned/dialogues/model", method={"type": "lora", "lora": {"rank": 33}})
    pod = pod_of(serving_manifests(jobs(published(), on_a_volume), VLLM_IMAGE))
    (server,) = pod["containers"]
    assert server["command"] == ["vllm", "serve", "acme/tiny"]
    told = " ".join(server["args"])
    assert f"--revision {COMMIT} --served-model-name acme/tiny" in told
    assert "--enable-lora --max-loras 2 --max-lora-rank 64" in told
    assert told.endswith(f"--lora-modules {NAME}=/models/{NAME} dialogues=/mnt/pvc/tuned/dialogues/model")


def test_the_image_is_of_the_release_whose_options_were_read():
    document = (Path(__file__).resolve().parents[2] / "docs" / "chaining.md").read_text(encoding="utf-8")
    assert f"sources of vLLM {VLLM_IMAGE.partition(':v')[2]}, read on" in document


def test_what_lies_in_a_bucket_is_fetched_and_verified_with_the_mounted_secret():
    pod = pod_of(serving_manifests(jobs(published()), VLLM_IMAGE))
    (fetch,) = pod["initContainers"]
    assert fetch["image"] == "registry.example/trainer:1"
    assert fetch["command"][3:] == [
        *("s3://models/tuned/team/a/model", f"/models/{NAME}", "--endpoint", "http://minio:9000"),
        *("--secret", "s3", "--sha256", "a" * 64),
    ]
    mounted = {mount["mountPath"]: mount["name"] for mount in fetch["volumeMounts"]}
    (volume,) = [one for one in pod["volumes"] if one["name"] == mounted["/var/run/secrets/finetune/s3"]]
    assert volume["secret"]["secretName"] == "s3"
    assert not any("secretKeyRef" in str(one) for one in pod["containers"])


def test_the_token_of_a_gated_base_is_a_file():
    model = {"source": "hf://acme/tiny", "secretRef": {"name": "hub"}}
    pod = pod_of(serving_manifests(jobs(published(model=model)), VLLM_IMAGE))
    environment = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    assert environment["HF_TOKEN_PATH"] == "/var/run/secrets/finetune/hub/HF_TOKEN"


def test_a_base_in_a_bucket_is_fetched_as_well():
    pod = pod_of(serving_manifests(jobs(published(model={"source": "s3://models/base"})), VLLM_IMAGE))
    assert pod["initContainers"][0]["command"][3:5] == ["s3://models/base", "/models/base"]
    assert pod["containers"][0]["command"] == ["vllm", "serve", "/models/base"]


REFUSED = {
    "not published": ([make_object()], "has published no adapter"),
    "a soft prompt": ([published(method={"type": "promptTuning"})], "promptTuning adapter, and vLLM serves lora alone"),
    "dora": ([published(method={"type": "lora", "lora": {"useDora": True}})], "a dora adapter"),
    "an encoder": ([published(model={"source": "hf://a/t5", "task": "seq2seq-lm"})], "seq2seq-lm"),
    "another base": ([published(), published("b", model={"source": "hf://acme/other"})], "jobs of one base"),
    "a large rank": ([published(method={"type": "lora", "lora": {"rank": 513}})], "up to rank 512"),
    "a folder": ([published(uri="file:///out/model")], "pods do not see"),
}


@pytest.mark.parametrize("documents, says", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_together_is_said(documents: list[dict[str, Any]], says: str):
    with pytest.raises(SpecError, match=says):
        serving_manifests(jobs(*documents), VLLM_IMAGE)


def test_the_command_says_plainly_that_nobody_has_run_it(capsys: pytest.CaptureFixture[str]):
    options = _parser().parse_args(["render", "--serve", NAME, "--image", "registry.example/vllm:1"])
    assert run_with(FakeJobApi(published()), options) is ExitCode.OK
    output = capsys.readouterr().out
    assert "they were NOT run on a GPU" in output
    deployment, service = yaml.safe_load_all(output)
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == "registry.example/vllm:1"
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_render_wants_a_file_or_jobs(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        run_command(["render"])
    assert caught.value.code == ExitCode.BAD_SPEC
    assert "--serve" in capsys.readouterr().err
