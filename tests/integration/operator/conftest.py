"""Integration level of the operator: a real API server (etcd and kube-apiserver, no nodes, no controllers), seconds.

Inputs: both programs, built by tests/cluster into its cache. Outputs: folders under pytest's temporary directory. What
kubelet, scheduler and the Job controller would do is done by the tests themselves.
"""

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ...cluster.folder import BIN
from .api_server import PROGRAMS, ApiServer
from .operator_process import Home, OperatorProcess
from .workload import Workload

ROOT = Path(__file__).resolve().parents[3]
logger = logging.getLogger(__name__)

StartOperator = Callable[..., OperatorProcess]
CRD_FILE = ROOT / "crds" / "finetune.dev_finetunejobs.yaml"


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A running API server that knows FineTuneJobs. Who stops it starts it again."""
    if missing := [program for program in PROGRAMS if not (BIN / program).is_file()]:
        message = f"{missing} are not in {BIN}; `python -m tests.cluster` builds them"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    server = ApiServer(BIN, tmp_path_factory.mktemp("api-server"))
    try:
        server.start()
        install_crd(server)
        yield server
    finally:
        server.stop()


@pytest.fixture
def namespace(api_server: ApiServer) -> str:
    """A fresh namespace; nothing ever removes it, the server is thrown away."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    api_server.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    return name


def install_crd(server: ApiServer) -> None:
    """Create the definition of FineTuneJob and wait until it is served."""
    definition = yaml.safe_load(CRD_FILE.read_text(encoding="utf-8"))
    server.request("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
    server.await_path("/apis/finetune.dev/v1alpha1/finetunejobs")


@pytest.fixture
def home(api_server: ApiServer) -> Home:
    """A namespace for the operator itself."""
    name = f"operator-{uuid.uuid4().hex[:8]}"
    api_server.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    return Home(api_server, name)


@pytest.fixture
def start_operator(home: Home, namespace: str, tmp_path: Path) -> Iterator[StartOperator]:
    """A function that starts an operator, which looks after ``namespace`` alone; whatever still runs is stopped."""
    started: list[OperatorProcess] = []

    def start(name: str = "operator-0", wait: bool = True, **settings: Any) -> OperatorProcess:
        operator = OperatorProcess(home, tmp_path, name, **{"watchNamespaces": [namespace], **settings})
        started.append(operator)
        operator.start(wait)
        return operator

    try:
        yield start
    finally:
        for operator in started:
            operator.kill()
            logger.info("%s said:\n%s", operator.name, operator.log())


@pytest.fixture
def workload(api_server: ApiServer, namespace: str) -> Workload:
    """The jobs of ``namespace``, and who plays their pods."""
    return Workload(api_server, namespace)
