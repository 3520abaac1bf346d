"""What every other test here takes for granted: pods, names, networks, volumes, S3 and the project's images."""

import hashlib
import json

import pytest

from ..cluster.cluster import Cluster
from ..cluster.object_store import ObjectStore
from .conftest import Images
from .pod import pod_manifest, run_pod

PART_BYTES = 5 * 2**20
"""The least that S3 takes as a part that is not the last."""

ROUND_TRIP = """
import hashlib, boto3
s3 = boto3.client("s3")
body = s3.get_object(Bucket="{bucket}", Key="{key}")["Body"].read()
assert s3.head_object(Bucket="{bucket}", Key="{key}")["ContentLength"] == len(body)
s3.put_object(Bucket="{bucket}", Key="{key}.copy", Body=body, ChecksumAlgorithm="SHA256")
print(hashlib.sha256(body).hexdigest())
"""

RESTRICTED_START = """
import json, os, pathlib, {module}
def refuses(folder):
    try:
        pathlib.Path(folder, "file").write_text("x")
    except OSError:
        return True
    return False
print(json.dumps({{
    "user": os.getuid(), "home": os.path.expanduser("~"), "from": {module}.__file__,
    "compiled": os.path.isfile({module}.__cached__),
    "refusing": [folder for folder in ("/", "/app", "/opt/venv", "/tmp") if refuses(folder)],
}}))
"""

CONTENT = """
import hashlib, json, os, pathlib
files = [file for file in sorted(pathlib.Path("/app").rglob("*")) if file.is_file()]
print(json.dumps({
    "files": {str(file.relative_to("/app")): hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    "folder": os.getcwd(), "user": os.getuid(), "groups": os.getgroups(),
    **{name: os.environ[name] for name in ("HOME", "PATH", "PYTHONPATH")},
}))
"""


def test_a_pod_resolves_the_names_of_services(
    cluster: Cluster, namespace: str, s3: ObjectStore, operator_image: str
) -> None:
    names = ["kubernetes.default.svc", s3.endpoint_in_cluster.split("//")[1].split(":")[0]]
    script = f"import socket\nfor name in {names!r}: print(socket.gethostbyname(name))"
    addresses = run_pod(cluster, namespace, pod_manifest("resolves", operator_image, script)).split()
    assert addresses == [
        cluster.get("service", "kubernetes")["spec"]["clusterIP"],
        cluster.get("service", "s3", "finetune-storage")["spec"]["clusterIP"],
    ]


def test_pods_reach_each_other_by_address_and_by_service(cluster: Cluster, namespace: str, operator_image: str) -> None:
    server = pod_manifest(
        "server",
        operator_image,
        "import http.server; http.server.test(http.server.SimpleHTTPRequestHandler, port=8000)",
    )
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "server"}}
    cluster.apply(server, namespace)
    cluster.apply(
        service | {"spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8000}]}}, namespace
    )
    cluster.wait("pod/server", "condition=Ready", namespace)
    address = cluster.get("pod", "server", namespace)["status"]["podIP"]
    script = f"""
import time, urllib.request
for url in ("http://{address}:8000/", "http://server/"):
    deadline = time.monotonic() + 30
    while True:
        try:
            print(urllib.request.urlopen(url, timeout=5).status)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
"""
    assert run_pod(cluster, namespace, pod_manifest("client", operator_image, script)).split() == ["200", "200"]


def test_a_volume_outlives_the_pod_that_filled_it(cluster: Cluster, namespace: str, operator_image: str) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "kept"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}},
    }
    cluster.apply(claim, namespace)
    write = "open('/volume/file', 'w').write('kept')"
    run_pod(cluster, namespace, pod_manifest("writes", operator_image, write, claim="kept"))
    read = "print(open('/volume/file').read())"
    assert run_pod(cluster, namespace, pod_manifest("reads", operator_image, read, claim="kept")) == "kept\n"


def test_an_object_in_parts_goes_to_a_pod_and_back_unchanged(
    cluster: Cluster, namespace: str, s3: ObjectStore, images: Images
) -> None:
    client, bucket, key = s3.client(), s3.bucket(namespace), "folder/in-parts"
    parts = [bytes([number]) * PART_BYTES for number in range(2)] + [b"the end"]
    upload = client.create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm="SHA256")["UploadId"]
    sent = []
    for number, part in enumerate(parts, start=1):
        answer = client.upload_part(
            Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=part, ChecksumAlgorithm="SHA256"
        )
        sent.append({"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": answer["ChecksumSHA256"]})
    client.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": sent})

    script = ROUND_TRIP.format(bucket=bucket, key=key)
    manifest = pod_manifest("round-trip", images.trainer, script, environment=s3.pod_environment())
    sha256 = hashlib.sha256(b"".join(parts)).hexdigest()
    assert run_pod(cluster, namespace, manifest).strip() == sha256
    assert hashlib.sha256(client.get_object(Bucket=bucket, Key=f"{key}.copy")["Body"].read()).hexdigest() == sha256


@pytest.mark.alone
def test_the_object_store_keeps_its_objects_through_an_outage(namespace: str, s3: ObjectStore) -> None:
    client, bucket = s3.client(), s3.bucket(namespace)
    client.put_object(Bucket=bucket, Key="kept", Body=b"kept")
    s3.stop()
    s3.start()
    assert client.get_object(Bucket=bucket, Key="kept")["Body"].read() == b"kept"


@pytest.mark.parametrize("package", ["finetune_operator", "finetune_trainer"])
def test_an_image_starts_without_root_and_without_writing_to_itself(
    cluster: Cluster, namespace: str, images: Images, package: str
) -> None:
    image = images.operator if package == "finetune_operator" else images.trainer
    script = RESTRICTED_START.format(module=package)
    said = json.loads(run_pod(cluster, namespace, pod_manifest("restricted", image, script)))
    assert said == {
        "user": 65532,
        "home": "/tmp",
        "from": f"/app/{package}/__init__.py",
        "compiled": True,
        "refusing": ["/", "/app", "/opt/venv"],
    }


def test_an_image_runs_its_program(cluster: Cluster, namespace: str, images: Images) -> None:
    said = run_pod(cluster, namespace, pod_manifest("trainer", images.trainer, args=["--help"]))
    assert "finetune_trainer" in said


def test_the_operators_image_is_small(cluster: Cluster, images: Images) -> None:
    if cluster.docker is None:
        pytest.skip("the images of a cluster that is not ours come from elsewhere")
    assert int(cluster.docker("image", "inspect", "--format", "{{.Size}}", images.operator)) < 400 * 10**6


@pytest.mark.parametrize("package", ["finetune_operator", "finetune_trainer"])
def test_the_cluster_runs_the_image_that_docker_built(
    cluster: Cluster, namespace: str, images: Images, package: str
) -> None:
    # The node gets an edited image as one layer on top of what it has, not as Docker would write it.
    image = images.operator if package == "finetune_operator" else images.trainer
    if cluster.docker is None:
        pytest.skip("the images of a cluster that is not ours come from elsewhere")
    in_docker = json.loads(cluster.docker("run", "--rm", "--entrypoint", "python", image, "-c", CONTENT))
    assert f"{package}/__init__.py" in in_docker["files"]
    assert json.loads(run_pod(cluster, namespace, pod_manifest("content", image, CONTENT))) == in_docker
