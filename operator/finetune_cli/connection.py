"""Talk to a cluster as the user: FineTuneJobs, and their pods and logs. The only module that imports kubernetes."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import urllib3
import yaml
from kubernetes import client, config

from finetune_api.crd import GROUP, PLURAL, VERSION
from finetune_cli.job_api import JsonObject, Target
from finetune_cli.refusal import ClusterError, Request, explain_refusal
from finetune_trainer.errors import SpecError

# Seconds to connect and to wait for an answer: a cluster behind a closed VPN should not hang a terminal.
_PATIENCE = (5, 30)
_WATCH_SECONDS = 60
# The server ends a watch after its time; what is silent for longer has lost its connection.
_WATCH_PATIENCE = (5, _WATCH_SECONDS + 15)
_FOLLOW_PATIENCE = (5, 3600)
# What the client's loader raises for a file that is YAML and no kubeconfig.
_MISSHAPEN = (TypeError, AttributeError, KeyError, ValueError)
_POD_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def connect(target: Target) -> "KubernetesJobApi":
    """Return the connection that ``target`` names; touches no network yet.

    Raises:
        SpecError: there is no usable kubeconfig, no such context, or its login failed.
    """
    files = str(target.kubeconfig) if target.kubeconfig else os.environ.get("KUBECONFIG") or "~/.kube/config"
    paths = [Path(file).expanduser() for file in files.split(os.pathsep) if file]
    settings = client.Configuration()
    # Without it urllib3 tries again by itself and logs each failure; whoever calls decides.
    settings.retries = False
    try:
        if any(path.exists() for path in paths):
            with _login_failures() as failures:
                config.load_kube_config(files, target.context, settings, persist_config=False)
            context = _context(files, target.context)
            where, namespace = context["name"], context["context"].get("namespace") or "default"
            if failures and not (settings.api_key or settings.cert_file):
                raise _not_logged_in(where, files, failures[0])
        elif (_POD_FOLDER / "token").exists() and target.kubeconfig is None and target.context is None:
            config.load_incluster_config(settings)
            where, namespace = "this pod's service account", (_POD_FOLDER / "namespace").read_text().strip()
        else:
            raise SpecError(
                f"there is no kubeconfig at {files}. Set KUBECONFIG or --kubeconfig to the file that your cluster's "
                "administrator gave you; `finetune run` needs no cluster."
            )
    except (config.ConfigException, yaml.YAMLError, OSError, *_MISSHAPEN) as error:
        hint = " `kubectl config get-contexts` lists the contexts that there are." if target.context else ""
        raise SpecError(f"the kubeconfig {files} is not usable: {str(error).rstrip('.')}.{hint}") from error
    if not settings.verify_ssl:
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # the kubeconfig says so, as for kubectl
    return KubernetesJobApi(client.ApiClient(settings), where, target.namespace or namespace)


@contextlib.contextmanager
def _login_failures() -> Iterator[list[str]]:
    """Collect why a login failed: the client's loader writes that into the log and goes on as nobody."""
    failures: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            # On a terminal the login's program writes there itself; the client stumbles over having nothing to repeat.
            is_told = isinstance(sys.exc_info()[1], AttributeError)
            failures.append("" if is_told else " ".join(record.getMessage().split()).rstrip("."))

    listener, root = Listener(), logging.getLogger()
    root.addHandler(listener)
    try:
        yield failures
    finally:
        root.removeHandler(listener)


def _not_logged_in(context: str, files: str, why: str) -> SpecError:
    said = f": {why}" if why else "; what its program said stands above"
    return SpecError(
        f"the login of context {context!r} in {files} failed{said}. Log in again as your cloud or identity provider "
        "has it, or install the program if it is missing. For another user: kubectl config get-contexts, --context."
    )


def _context(files: str, wanted: str | None) -> JsonObject:
    contexts, current = config.list_kube_config_contexts(files)
    return next((one for one in contexts if one["name"] == wanted), current)


class KubernetesJobApi:
    """A `JobApi` over HTTPS."""

    def __init__(self, api: client.ApiClient, where: str, namespace: str) -> None:
        self._api = api
        self._where = where
        self._namespace = namespace

    @property
    def default_namespace(self) -> str:
        """The namespace of the command line, else of the context."""
        return self._namespace

    def create(self, namespace: str, manifest: JsonObject) -> JsonObject:
        """Create a job; unknown fields are refused."""
        name = manifest.get("metadata", {}).get("name", "")
        request = Request("create", PLURAL, namespace, name)
        return self._json(request, "POST", _jobs(namespace), {"fieldValidation": "Strict"}, manifest)

    def get(self, namespace: str, name: str) -> JsonObject:
        """Return a job."""
        return self._json(Request("get", PLURAL, namespace, name), "GET", _jobs(namespace, name))

    def jobs(self, namespace: str) -> list[JsonObject]:
        """Return all jobs of a namespace."""
        items: list[JsonObject] = self._json(Request("list", PLURAL, namespace), "GET", _jobs(namespace))["items"]
        return items

    def patch(self, namespace: str, name: str, change: JsonObject) -> JsonObject:
        """Merge ``change`` into a job."""
        return self._json(Request("patch", PLURAL, namespace, name), "PATCH", _jobs(namespace, name), {}, change)

    def delete(self, namespace: str, name: str, uid: str) -> None:
        """Delete exactly this job; its pods follow by themselves."""
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        self._json(Request("delete", PLURAL, namespace, name), "DELETE", _jobs(namespace, name), {}, body)

    def watch(self, namespace: str, name: str, resource_version: str) -> Iterator[tuple[str, JsonObject]]:
        """Yield ADDED, MODIFIED or DELETED with the job, until the server or the network ends it."""
        query = {"fieldSelector": f"metadata.name={name}", "resourceVersion": resource_version}
        return self._events(Request("watch", PLURAL, namespace, name), _jobs(namespace), query)

    def pods(self, namespace: str, labels: Mapping[str, str]) -> list[JsonObject]:
        """Return the pods with these labels."""
        request = Request("list", "pods", namespace)
        items: list[JsonObject] = self._json(request, "GET", _pods(namespace), _selector(labels))["items"]
        return items

    def events(self, namespace: str) -> list[JsonObject]:
        """Return the events of a namespace."""
        path = _path("/api/v1/namespaces/", namespace, "events", None)
        items: list[JsonObject] = self._json(Request("list", "events", namespace), "GET", path)["items"]
        return items

    def watch_pods(self, namespace: str, labels: Mapping[str, str]) -> Iterator[JsonObject]:
        """Yield pods with these labels, now and as they change, until the server or the network ends it."""
        # Without a resource version the server begins with what there is.
        events = self._events(Request("watch", "pods", namespace), _pods(namespace), _selector(labels))
        return (pod for _, pod in events)

    def log(self, namespace: str, pod: str, container: str, since: str | None, follow: bool) -> Iterator[str]:
        """Yield a pod's log line by line, each with its time in front."""
        query = {"container": container, "timestamps": "true", "follow": "true" if follow else "false"}
        query |= {"sinceTime": since} if since else {}
        request = Request("get", "pods/log", namespace, pod)
        response = self._open(request, "GET", f"{_pods(namespace, pod)}/log", query, None, _FOLLOW_PATIENCE)
        return _lines(response)

    def _events(self, request: Request, path: str, query: Mapping[str, str]) -> Iterator[tuple[str, JsonObject]]:
        query = {**query, "watch": "true", "timeoutSeconds": str(_WATCH_SECONDS)}
        response = self._open(request, "GET", path, query, None, _WATCH_PATIENCE)
        for line in _lines(response):
            event = json.loads(line)
            if event["type"] == "ERROR":
                # Usually 410: the version that was asked for is forgotten. Whoever calls looks again.
                response.close()
                return
            yield event["type"], event["object"]

    def _json(
        self,
        request: Request,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: JsonObject | None = None,
    ) -> JsonObject:
        response = self._open(request, method, path, query or {}, body, _PATIENCE)
        with self._explaining():
            content: JsonObject = json.loads(response.data)
        return content

    def _open(
        self,
        request: Request,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: JsonObject | None,
        patience: tuple[int, int],
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json" if method == "PATCH" else "application/json"
        with self._explaining():
            call = self._api.param_serialize(
                method,
                path,
                query_params=[*query.items()],
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            response: urllib3.BaseHTTPResponse = self._api.call_api(*call, _request_timeout=patience).response
            if response.status >= 400:
                raise explain_refusal(request, response.status, response.data.decode("utf-8", "replace"))
            return response

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except (urllib3.exceptions.HTTPError, client.ApiException, OSError) as error:
            # The client turns TLS errors into an ApiException of status 0.
            reason = error.reason if isinstance(error, client.ApiException) else error
            raise ClusterError(
                f"the cluster of {self._where} does not answer at {self._api.configuration.host}: "
                f"{' '.join(str(reason).split())}. Check the network, the VPN and --context; kubectl version asks "
                "the same server."
            ) from error


def _jobs(namespace: str, name: str | None = None) -> str:
    return _path(f"/apis/{GROUP}/{VERSION}/namespaces/", namespace, PLURAL, name)


def _pods(namespace: str, name: str | None = None) -> str:
    return _path("/api/v1/namespaces/", namespace, "pods", name)


def _path(root: str, namespace: str, plural: str, name: str | None) -> str:
    parts = [namespace, plural] if name is None else [namespace, plural, name]
    return root + "/".join(quote(part, safe="") for part in parts)


def _selector(labels: Mapping[str, str]) -> dict[str, str]:
    return {"labelSelector": ",".join(f"{key}={value}" for key, value in sorted(labels.items()))}


def _lines(response: urllib3.BaseHTTPResponse) -> Iterator[str]:
    """Yield whole lines as they arrive; a connection that breaks ends them."""
    rest = b""
    with contextlib.closing(response), contextlib.suppress(urllib3.exceptions.HTTPError, OSError):
        for chunk in response.stream(amt=None, decode_content=False):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield line.decode("utf-8", "replace")
        if rest:
            yield rest.decode("utf-8", "replace")
