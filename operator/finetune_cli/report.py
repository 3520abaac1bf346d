"""``finetune report``: fetch what evaluation wrote from the store it lies in, check it, show it."""

import json
import shlex
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from finetune_api.plain_text import one_line
from finetune_api.report import ExitCode, Stage
from finetune_cli.cluster_job import ClusterJob, JobName
from finetune_cli.job_api import JobApi, JsonObject
from finetune_cli.job_status import fetch
from finetune_cli.logs import pod_labels
from finetune_operator import naming
from finetune_operator.pod import USER
from finetune_trainer.errors import DataError, SpecError, StorageError

FOLDER = "report"
PAGE = "report.html"

_PATIENCE_SECONDS = 15.0
"""A person waits; a stage of a job waits longer."""
_CREDENTIALS = "your own AWS credentials (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job's report is."""

    uri: str
    """The job's folder, in which the report has one of its own."""
    endpoint: str | None
    """Of an S3-compatible store, as pods see it."""
    sha256: str | None
    """Of the report's manifest, where the status has it."""


def show_report(
    api: JobApi,
    name: JobName,
    folder: Path | None,
    endpoint: str | None,
    open_page: Callable[[str], bool] = webbrowser.open,
) -> ExitCode:
    """Fetch the report of a job.

    Args:
        api: the cluster.
        name: the job.
        folder: put it there, and open nothing. Absent: a temporary folder, and the page is opened.
        endpoint: address of the S3 store as seen from here. Absent: the job's.
        open_page: shows a page's URI to the user; False when it cannot.

    Raises:
        SpecError: there is no report, or it cannot be reached from here; says how else.
        DataError: it is not what the job published.
        StorageError: the store does not answer.
    """
    job = fetch(api, name)
    place = find_report(job)
    target = folder or Path(tempfile.mkdtemp(prefix=f"{job.name.name}-")) / FOLDER
    _fetch(api, job, place, endpoint, target)
    page = (target / PAGE).resolve()
    _say(f"Report: {page}")
    if folder is None and not open_page(page.as_uri()):
        _say("There is no browser to open it here.")
    return ExitCode.OK


def find_report(job: ClusterJob) -> Place:
    """Return where the report of ``job`` is.

    Raises:
        SpecError: there is none yet, or never will be.
    """
    path = job.status.resolved.output_path if job.status.resolved else None
    evaluated = next((stage for stage in job.status.stages if stage.stage is Stage.EVALUATE), None)
    if path is None or evaluated is None or evaluated.exit_code != ExitCode.OK:
        phase = job.status.phase.value if job.status.phase else "not looked at yet"
        why = shlex.join(["finetune", "status", job.name.name, "-n", job.name.namespace])
        raise SpecError(f"FineTuneJob {job.name} has no report: it is {phase}, and evaluation writes it. See {why}")
    endpoint = (job.spec.get("output") or {}).get("endpoint")
    return Place(one_line(path), endpoint, evaluated.report_sha256)


def _fetch(api: JobApi, job: ClusterJob, place: Place, endpoint: str | None, target: Path) -> None:
    # Imported here: boto3 takes half a second.
    from finetune_trainer.file_store import FileStore
    from finetune_trainer.location import bucket_and_key, local_path
    from finetune_trainer.manifest import read_manifest
    from finetune_trainer.s3_client import S3Access, S3Client
    from finetune_trainer.s3_store import S3Store
    from finetune_trainer.store import Store

    store: Store
    match urlsplit(place.uri).scheme:
        case "s3":
            bucket, key = bucket_and_key(place.uri, "status.resolved.outputPath")
            access = S3Access(endpoint or place.endpoint, None, "--endpoint, spec.output.endpoint", _CREDENTIALS)
            store = S3Store(S3Client(bucket, access, patience_seconds=_PATIENCE_SECONDS), key)
        case "file":
            store = FileStore(local_path(place.uri))
        case "pvc":
            raise SpecError(explain_volume(job, place.uri, api.pods(job.name.namespace, pod_labels(job))))
        case scheme:
            raise SpecError(f"the report is at {place.uri}, and nothing here reads {scheme}://. Copy it by hand.")
    try:
        store.get_tree(FOLDER, target)
    except StorageError as error:
        raise StorageError(f"{error}{_explain_endpoint(job, place, endpoint)}") from error
    found = read_manifest(target).sha256
    if place.sha256 is not None and found != place.sha256:
        raise DataError(
            f"the report at {place.uri}/{FOLDER} is not the one that the job published: its manifest has sha256 "
            f"{found[:12]}…, the job's status says {place.sha256[:12]}…. Somebody wrote there since; do not trust it."
        )


def _explain_endpoint(job: ClusterJob, place: Place, endpoint: str | None) -> str:
    """Return how to reach a store that only pods see."""
    host = (urlsplit(place.endpoint).hostname or "") if place.endpoint else ""
    name, _, rest = host.partition(".")
    namespace, _, suffix = rest.partition(".")
    if endpoint is not None or suffix not in ("svc", "svc.cluster.local"):
        return ""
    if urlsplit(place.endpoint or "").scheme == "https":
        return (
            f" Only pods see {host}, and its certificate will not name localhost, to which kubectl port-forward would "
            "bring it: give --endpoint an address of the store that its certificate names."
        )
    port = urlsplit(place.endpoint or "").port or 80
    forward = shlex.join(["kubectl", "-n", namespace, "port-forward", f"svc/{name}", str(port)])
    again = ["finetune", "report", job.name.name, "-n", job.name.namespace, "--endpoint", f"http://localhost:{port}"]
    return f" Only pods see {host}. In another terminal: {forward}; then: {shlex.join(again)}"


_AS_THE_JOB = ("imagePullSecrets", "nodeSelector", "tolerations")
"""What a pod needs to run where those of the job could: the image is theirs, and the volume may be on their node."""


def explain_volume(job: ClusterJob, uri: str, pods: Sequence[JsonObject]) -> str:
    """Return the commands that copy the report out of a volume, which only pods see.

    Args:
        job: whose report it is.
        uri: its folder on the volume.
        pods: those of the job that are still there: they have the administrator's settings too.
    """
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    pod = f"{job.name.name}-report"
    image = (job.status.resolved.image if job.status.resolved else None) or "busybox"
    folder = f"{naming.CLAIMS_FOLDER}/{claim}"
    like = pods[-1]["spec"] if pods else job.spec.get("compute") or {}
    overrides = {
        "spec": {
            **{name: told for name in _AS_THE_JOB if (told := like.get(name))},
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "volumes": [{"name": "output", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}],
            "containers": [
                {
                    "name": pod,
                    "image": image,
                    "command": ["sleep", "600"],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": "output", "mountPath": folder, "readOnly": True}],
                }
            ],
        }
    }
    kubectl = ["kubectl", "-n", job.name.namespace]
    commands = (
        [*kubectl, "run", pod, "--restart=Never", f"--image={image}", f"--overrides={json.dumps(overrides)}"],
        [*kubectl, "wait", f"pod/{pod}", "--for=condition=Ready"],
        [*kubectl, "cp", f"{pod}:{folder}/{path}/{FOLDER}", f"./{FOLDER}"],
        [*kubectl, "delete", "pod", pod],
    )
    lines = "\n".join(f"  {shlex.join(command)}" for command in commands)
    return f"the report is on the volume {claim!r}, which only pods see. Copy it out with a pod of its own:\n{lines}"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
