"""Kubernetes, kind and the servers that tests need, built from Go modules and kept under the home folder."""

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from .command import ClusterUnavailableError, CommandError, run
from .folder import BIN

logger = logging.getLogger(__name__)

BUILD_SECONDS = 2400
"""Kubernetes takes about five minutes on two free cores; a busy machine more."""

LINKER_FLAGS = "-s -w"
KUBERNETES_VERSION = "1.34.2"
"""The last minor release that runs on cgroup v1."""


@dataclass(frozen=True, slots=True)
class GoModule:
    """One module and the programs that it gives us."""

    path: str
    version: str
    packages: dict[str, str]
    """Program to its package, relative to the module; "" is the module's root."""

    installable: bool = True
    """False for a module whose go.mod holds replace directives: `go install` refuses it."""

    is_own_main: bool = False
    """Built in a copy of its sources, by its own go.sum: the public checksum database lacks something it needs."""

    sibling_version: str = ""
    """The version under which modules are published that this one replaces by folders of its own."""

    linker_flags: str = LINKER_FLAGS

    changes: tuple[tuple[str, str, str], ...] = ()
    """What is other in the copy of the sources: file, text that is there once, text in its place."""

    @property
    def pin(self) -> str:
        """Everything that decides what the programs are; a built program is kept as long as this stays."""
        return " ".join((f"{self.path}@{self.version} {self.linker_flags}", *("|".join(one) for one in self.changes)))


KUBERNETES = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
    "kubeadm",
)

PROMETHEUS = "github.com/prometheus-operator/prometheus-operator"
KUBEFLOW = "github.com/kubeflow/trainer/v2"
KUBEFLOW_VERSION = "v2.0.0"
KUBEFLOW_MAIN = "cmd/trainer-controller-manager"

MODULES = (
    GoModule(
        "k8s.io/kubernetes",
        f"v{KUBERNETES_VERSION}",
        {name: f"cmd/{name}" for name in KUBERNETES},
        installable=False,
        sibling_version=f"v0.{KUBERNETES_VERSION.removeprefix('1.')}",
        linker_flags=f"{LINKER_FLAGS} "
        f"-X k8s.io/component-base/version.gitVersion=v{KUBERNETES_VERSION} "
        f"-X k8s.io/component-base/version.gitMajor={KUBERNETES_VERSION.split('.')[0]} "
        f"-X k8s.io/component-base/version.gitMinor={KUBERNETES_VERSION.split('.')[1]}",
    ),
    GoModule("go.etcd.io/etcd/server/v3", "v3.6.5", {"etcd": ""}, installable=False),
    GoModule("github.com/coredns/coredns", "v1.12.1", {"coredns": ""}),
    GoModule("github.com/rancher/local-path-provisioner", "v0.0.30", {"local-path-provisioner": ""}),
    GoModule("sigs.k8s.io/kind", "v0.33.0", {"kind": ""}),
    GoModule("helm.sh/helm/v3", "v3.22.0", {"helm": "cmd/helm"}),
    GoModule("github.com/zegl/kube-score", "v1.20.0", {"kube-score": "cmd/kube-score"}),
    GoModule("github.com/versity/versitygw", "v1.8.0", {"versitygw": "cmd/versitygw"}),
    GoModule("github.com/ray-project/kuberay/ray-operator", "v1.6.2", {"kuberay-operator": ""}, is_own_main=True),
    GoModule("sigs.k8s.io/kueue", "v0.15.0", {"kueue-manager": "cmd/kueue"}, is_own_main=True),
    GoModule("sigs.k8s.io/kwok", "v0.7.0", {"kwok": "cmd/kwok"}),
    GoModule("sigs.k8s.io/jobset", "v0.8.2", {}),
    GoModule(PROMETHEUS, "v0.85.0", {}),
    GoModule(KUBEFLOW, KUBEFLOW_VERSION, {"kubeflow-trainer": KUBEFLOW_MAIN}),
    GoModule(
        KUBEFLOW,
        KUBEFLOW_VERSION,
        {"kubeflow-trainer-unlimited": KUBEFLOW_MAIN},
        is_own_main=True,
        changes=(
            (
                f"{KUBEFLOW_MAIN}/main.go",
                "mgr, err := ctrl.NewManager(ctrl.GetConfigOrDie(), ",
                "raised := ctrl.GetConfigOrDie()\n\traised.QPS, raised.Burst = 500, 1000\n"
                "\tmgr, err := ctrl.NewManager(raised, ",
            ),
            (f"{KUBEFLOW_MAIN}/main.go", "ctrlpkg.Options{}", "ctrlpkg.Options{MaxConcurrentReconciles: 10}"),
        ),
    ),
)
"""One row per module; a changed row builds its programs again. Add what a test needs here."""

PAUSE_SOURCE = Path(__file__).with_name("node") / "pause.go"
PAUSE = "pause"

NODE = (*KUBERNETES, "etcd", "coredns", "local-path-provisioner", PAUSE)
"""What a node image made here holds."""

TOOLS = ("kind", "kubectl", "helm", "versitygw", "kuberay-operator", "kueue-manager")
"""What every cluster needs, whoever made its node image."""

CHECKS = ("kube-score",)
"""What tests without a cluster need."""


def ensure_binaries(names: Collection[str]) -> None:
    """Build those of ``names`` that are not there in the pinned version.

    Raises:
        ClusterUnavailableError: There is something to build and no Go to build it with.
    """
    BIN.mkdir(parents=True, exist_ok=True)
    known = {PAUSE, *(name for module in MODULES for name in module.packages)}
    if unknown := set(names) - known:
        raise KeyError(f"no module gives {sorted(unknown)}; add a row to MODULES in {__file__}")
    for module in MODULES:
        for name in [name for name in module.packages if name in names and not _is_built(name, module.pin)]:
            _check_go()
            logger.info("building %s from %s@%s", name, module.path, module.version)
            with tempfile.TemporaryDirectory(dir=BIN) as work:
                _keep(name, _way_to_build(module)(module, name, Path(work)), module.pin)
    pause_pin = PAUSE_SOURCE.read_text(encoding="utf-8")
    if PAUSE in names and not _is_built(PAUSE, pause_pin):
        _check_go()
        with tempfile.TemporaryDirectory(dir=BIN) as work:
            built = Path(work) / PAUSE
            _go("build", *_flags(LINKER_FLAGS), "-o", built, PAUSE_SOURCE, folder=Path(work))
            _keep(PAUSE, built, pause_pin)


def module_pins(names: Collection[str]) -> list[str]:
    """Return what decides how the programs ``names`` behave: another text means other programs."""
    pins = [module.pin for module in MODULES if set(module.packages) & set(names)]
    return [*pins, PAUSE_SOURCE.read_text(encoding="utf-8")] if PAUSE in names else pins


def source_folder(path: str) -> Path:
    """Return the sources of the pinned module ``path``, downloading them when they are not there."""
    _check_go()
    version = next(module.version for module in MODULES if module.path == path)
    return Path(json.loads(_go("mod", "download", "-json", f"{path}@{version}"))["Dir"])


def _is_built(name: str, pin: str) -> bool:
    stamp = BIN / f"{name}.version"
    return (BIN / name).is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == pin


def _keep(name: str, built: Path, pin: str) -> None:
    stamp = BIN / f"{name}.version"
    stamp.unlink(missing_ok=True)
    built.replace(BIN / name)
    stamp.write_text(pin, encoding="utf-8")


def _check_go() -> None:
    if shutil.which("go") is None:
        raise ClusterUnavailableError(
            "no `go` on PATH: install Go 1.21 or newer (it fetches the toolchain that a module asks for), "
            f"or bring the built programs in {BIN}"
        )
    version = re.search(r"go1\.(\d+)", run(["go", "version"], timeout=60))
    if version is None or int(version[1]) < 21:
        raise ClusterUnavailableError("`go` on PATH is older than 1.21: install a newer one")


def _go(*arguments: str | Path, folder: Path | None = None, **environment: str) -> str:
    try:
        return run(
            ["go", *arguments], timeout=BUILD_SECONDS, folder=folder, environment={"CGO_ENABLED": "0", **environment}
        )
    except CommandError as error:
        raise ClusterUnavailableError(f"cannot build from Go modules: {error}") from error


def _flags(linker_flags: str) -> tuple[str, ...]:
    return ("-trimpath", "-buildvcs=false", "-ldflags", linker_flags)


def _package(module: GoModule, name: str) -> str:
    return f"{module.path}/{module.packages[name]}".rstrip("/")


def _way_to_build(module: GoModule) -> Callable[[GoModule, str, Path], Path]:
    if module.is_own_main:
        return _build_in_place
    return _install if module.installable else _build_as_dependency


def _build_in_place(module: GoModule, name: str, work: Path) -> Path:
    sources, built = work / "sources", work / name
    # What Go downloads may not be written to; the build writes nothing, but the folder has to go again.
    shutil.copytree(source_folder(module.path), sources, copy_function=shutil.copyfile)
    for folder in (sources, *(path for path in sources.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    for file, before, after in module.changes:
        text = (sources / file).read_text(encoding="utf-8")
        if text.count(before) != 1:
            raise ClusterUnavailableError(f"{module.path}@{module.version}: {before!r} is not once in {file}")
        (sources / file).write_text(text.replace(before, after), encoding="utf-8")
    _go("build", *_flags(module.linker_flags), "-o", built, f"./{module.packages[name]}", folder=sources)
    return built


def _install(module: GoModule, name: str, work: Path) -> Path:
    _go("install", *_flags(module.linker_flags), f"{_package(module, name)}@{module.version}", GOBIN=str(work))
    (built,) = work.iterdir()
    return built


def _build_as_dependency(module: GoModule, name: str, work: Path) -> Path:
    """Build ``name`` in a module of our own that requires ``module``; its replace directives do not count there."""
    (work / "go.mod").write_text("module build\n", encoding="utf-8")
    _go("mod", "edit", f"-require={module.path}@{module.version}", folder=work)
    if module.sibling_version:
        downloaded = json.loads(_go("mod", "download", "-json", f"{module.path}@{module.version}"))
        described = json.loads(_go("mod", "edit", "-json", downloaded["GoMod"]))
        siblings = [entry["Old"]["Path"] for entry in described["Replace"] if entry["New"]["Path"].startswith(".")]
        _go("mod", "edit", *(f"-replace={path}={path}@{module.sibling_version}" for path in siblings), folder=work)
    built = work / name
    _go("build", "-mod=mod", *_flags(module.linker_flags), "-o", built, _package(module, name), folder=work)
    return built
