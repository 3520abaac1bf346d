"""A real S3 server inside the cluster, reachable from pods by name and from tests through a port of the node.

Its data lie in a folder of the node: the server may be scaled to nothing and back, as a test of an outage does.
"""

import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from .cluster import Cluster, await_condition
from .program_image import provide_program

MANIFEST = Path(__file__).with_name("object_store.yaml")
NAMESPACE = "finetune-storage"
PORT = 7070
HEALTH = "/healthz"
REGION = "us-east-1"
ACCESS_KEY = "finetune-tests"
SECRET_KEY = "finetune-tests-secret"
READY_SECONDS = 180


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """The server and the one account that it knows."""

    cluster: Cluster
    endpoint_in_cluster: str
    endpoint_local: str
    namespace: str = NAMESPACE
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    region: str = REGION

    def client(self) -> Any:
        """Return a boto3 client of this process; boto3's clients have no types."""
        # Names of buckets are no host names here.
        config = Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "max_attempts": 5})
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_local,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=config,
        )

    def bucket(self, name: str) -> str:
        """Make the bucket ``name`` (three characters at least) unless it is there, and return its name."""
        try:
            self.client().create_bucket(Bucket=name)
        except ClientError as error:
            if error.response["Error"]["Code"] != "BucketAlreadyOwnedByYou":
                raise
        return name

    def pod_environment(self) -> list[dict[str, str]]:
        """Return the variables that let boto3 in a pod reach the server without further settings."""
        variables = {
            "AWS_ENDPOINT_URL_S3": self.endpoint_in_cluster,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
        }
        return [{"name": name, "value": value} for name, value in variables.items()]

    def stop(self) -> None:
        """Take the server away; return when nobody answers any more."""
        self._scale(0)
        await_condition(lambda: not self.cluster.list("pods", self.namespace, "app=s3"), "the end of S3", READY_SECONDS)

    def start(self) -> None:
        """Bring the server back with the data that it had; return when it answers."""
        self._scale(1)
        await_condition(self._answers, "an answer of S3", READY_SECONDS)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint_local}{HEALTH}", timeout=5) as answer:
                return bool(answer.status == HTTPStatus.OK)
        except OSError:
            return False

    def _scale(self, replicas: int) -> None:
        self.cluster.kubectl("scale", "deployment/s3", f"--replicas={replicas}", f"--namespace={self.namespace}")


def start_object_store(cluster: Cluster, namespace: str = NAMESPACE) -> ObjectStore:
    """Return the S3 server of ``namespace``, installing it when it is not there."""
    image = provide_program(cluster.docker, "versitygw")
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
    manifest = MANIFEST.read_text(encoding="utf-8")
    manifest = manifest.format(image=image, namespace=namespace, port=PORT, health=HEALTH, **keys)
    cluster.apply(manifest, namespace)
    address = next(
        entry["address"] for entry in cluster.list("nodes")[0]["status"]["addresses"] if entry["type"] == "InternalIP"
    )
    port = cluster.get("service", "s3", namespace)["spec"]["ports"][0]["nodePort"]
    store = ObjectStore(cluster, f"http://s3.{namespace}.svc:{PORT}", f"http://{address}:{port}", namespace)
    store.start()
    return store
