"""Which definition of FineTuneJob the API server goes by: it turns to another one a moment after it was given it."""

import urllib.error
from typing import Any

from .api_server import ApiServer
from .workload import MERGE

CRD_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.finetune.dev"


def define(server: ApiServer, spec: dict[str, Any]) -> None:
    """Give the server another definition; it goes by the one before until `takes` tells otherwise."""
    server.request("PATCH", CRD_PATH, {"spec": spec}, MERGE)


def takes(server: ApiServer, method: str, path: str, body: Any, content_type: str = "application/json") -> bool | None:
    """Return whether the server would store ``body``, and None where it cannot say just now.

    What serves one definition is stopped a second after another is there, and a request on its way to it that a busy
    machine held for longer finds it "shutting down", 503 (kubernetes/kubernetes#77816). 429: storage is being made.
    """
    try:
        server.request(method, f"{path}?dryRun=All", body, content_type)
    except urllib.error.HTTPError as refusal:
        assert refusal.code in (422, 429, 503), refusal.__notes__
        return False if refusal.code == 422 else None
    return True
