"""The node image of kind: pulled where that works, else made of Debian packages and programs from Go modules.

Everything made is kept as a file under the home folder: a machine that made it once only reads it again.
"""

import logging
import os
import shutil
import tempfile
from pathlib import Path

from .binary import KUBERNETES_VERSION, NODE, PAUSE, ensure_binaries, module_pins, source_folder
from .command import ClusterUnavailableError, CommandError, pipe, run
from .daemon import Docker
from .folder import BIN, CACHE, digest, keep
from .program_image import change, import_program

logger = logging.getLogger(__name__)

PUBLIC_NODE_IMAGE = "kindest/node:v1.34.11@sha256:44e222ee2132dab25ff87301682f89eb82c7880ea3a1bf543bfe9708fd08d67d"
"""Of the release notes of the pinned kind; the last minor release of Kubernetes that runs on cgroup v1."""

PUBLIC_BASE_IMAGE = "python:3.11-slim"
PULL_SECONDS = 600

HERE = Path(__file__).parent
NODE_FILES = HERE / "node"

SUITE = "bookworm"
BASE_PACKAGES = ("ca-certificates", "python3", "python3-venv", "wget")
"""What the Dockerfiles need of their base: then nothing but Python packages is fetched for them."""
TRUST_STORE = Path("/etc/ssl/certs/ca-certificates.crt")

REGISTRY = "registry.k8s.io"
CONTROL_PLANE = {
    "kube-apiserver": f"{REGISTRY}/kube-apiserver:v{KUBERNETES_VERSION}",
    "kube-controller-manager": f"{REGISTRY}/kube-controller-manager:v{KUBERNETES_VERSION}",
    "kube-scheduler": f"{REGISTRY}/kube-scheduler:v{KUBERNETES_VERSION}",
    "etcd": f"{REGISTRY}/etcd:3.6.5-0",
    "coredns": f"{REGISTRY}/coredns/coredns:v1.12.1",
    PAUSE: f"{REGISTRY}/pause:3.10.1",
    "local-path-provisioner": "docker.io/finetune/local-path-provisioner:local",
}
"""Programs that run as containers, under the names that kubeadm and our manifests ask for."""

KUBE_PROXY = f"{REGISTRY}/kube-proxy:v{KUBERNETES_VERSION}"
EMPTY_NODE = "finetune/node:empty"
BUSYBOX = "docker.io/finetune/busybox:local"


def ensure_node_image(docker: Docker) -> str:
    """Return the name of a node image that the daemon holds."""
    made = f"finetune/node:{_node_key()}"
    kept = CACHE / f"node-{_node_key()}.tar"
    if docker.has_image(made):
        return made
    if not kept.is_file():
        if docker.has_image(PUBLIC_NODE_IMAGE) or _pulled(docker, PUBLIC_NODE_IMAGE):
            return PUBLIC_NODE_IMAGE
        _make_node(docker, kept)
    logger.info("importing the node image")
    entrypoint = 'ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]'
    docker("import", *change(["ENV container=docker", entrypoint]), kept, made)
    return made


def is_made_here(node_image: str) -> bool:
    """Return whether the image is ours, which brings its own network."""
    return node_image != PUBLIC_NODE_IMAGE


def ensure_base_image(docker: Docker) -> str:
    """Return the name of an image with Python 3.11 from which the project's images can be built here."""
    made = f"finetune/base:{_base_key()}"
    kept = CACHE / f"base-{_base_key()}.tar"
    if docker.has_image(made):
        return made
    if not kept.is_file():
        if docker.has_image(PUBLIC_BASE_IMAGE) or _pulled(docker, PUBLIC_BASE_IMAGE):
            return PUBLIC_BASE_IMAGE
        _make_base(kept)
    certificates = str(TRUST_STORE)
    changes = [f"ENV {name}={certificates}" for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")]
    docker("import", *change(changes), kept, made)
    return made


def _node_key() -> str:
    return digest([*module_pins(NODE), NODE_FILES, HERE / "node_image.py", HERE / "program_image.py", _base_key()])


def _base_key() -> str:
    certificates = [TRUST_STORE] if TRUST_STORE.is_file() else []
    return digest([SUITE, *BASE_PACKAGES, *certificates])


def _pulled(docker: Docker, name: str) -> bool:
    try:
        docker("pull", "--quiet", name, timeout=PULL_SECONDS)
    except CommandError as error:
        logger.info("%s cannot be pulled, so it is made here: %s", name, str(error).strip().splitlines()[-1])
        return False
    return True


def _make_base(kept: Path) -> None:
    if shutil.which("debootstrap") is None:
        raise ClusterUnavailableError(f"{PUBLIC_BASE_IMAGE} cannot be pulled and debootstrap is not installed")
    if os.geteuid() != 0:
        raise ClusterUnavailableError(f"{PUBLIC_BASE_IMAGE} cannot be pulled and only root may make a base image")
    logger.info("making a base image from Debian packages")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        root = Path(work) / "root"
        run(
            ["debootstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}", SUITE, root],
            timeout=1200,
            environment={"DEBIAN_FRONTEND": "noninteractive"},
        )
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        # An index that this machine reaches through a proxy of its own is signed by what this machine trusts.
        if TRUST_STORE.is_file():
            shutil.copyfile(TRUST_STORE, root / TRUST_STORE.relative_to("/"))
        archive = Path(work) / "base.tar"
        unneeded = ("./proc/*", "./sys/*", "./dev/*", "./var/cache/apt/*", "./var/lib/apt/lists/*", "./usr/share/doc/*")
        exclude = [f"--exclude={name}" for name in unneeded]
        run(["tar", "--create", f"--file={archive}", f"--directory={root}", *exclude, "."], timeout=300)
        archive.replace(kept)


def _make_node(docker: Docker, kept: Path) -> None:
    """Make a node's root file system with everything in it that a cluster needs, as one archive."""
    ensure_binaries(NODE)
    base = ensure_base_image(docker)
    logger.info("making a node image")
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        context = Path(work)
        shutil.copytree(NODE_FILES, context, dirs_exist_ok=True)
        shutil.copytree(source_folder("sigs.k8s.io/kind") / "images/base/files", context / "kind")
        # What a module cache holds is read-only.
        run(["chmod", "--recursive", "u+w", context / "kind"], timeout=60)
        for program in ("kube-proxy", "kubeadm", "kubectl", "kubelet"):
            shutil.copy2(BIN / program, context)
        build = ("build", "--quiet", f"--build-arg=BASE_IMAGE={base}", f"--build-arg=VERSION={KUBERNETES_VERSION}")
        for target, image in (("busybox", BUSYBOX), ("kube-proxy", KUBE_PROXY), ("node", EMPTY_NODE)):
            docker(*build, f"--target={target}", f"--tag={image}", context, timeout=1200)
        for program, image in CONTROL_PLANE.items():
            # kubeadm's manifests of CoreDNS and the sandbox give arguments alone.
            entrypoint = [f"/usr/local/bin/{program}"] if program in ("coredns", PAUSE) else []
            import_program(docker, BIN / program, image, entrypoint)
        archive = context / "node.tar"
        _export_filled(docker, archive)
        keep(archive, kept)


def _export_filled(docker: Docker, archive: Path) -> None:
    """Put the containers' images into the node's own store, as kind does, and write the node to ``archive``."""
    images = [*CONTROL_PLANE.values(), KUBE_PROXY, BUSYBOX]
    started = docker("run", "--detach", "--privileged", "--entrypoint=containerd", EMPTY_NODE, "--log-level=error")
    container = started.strip()
    try:
        docker("exec", container, "sh", "-c", "until ctr version >/dev/null 2>&1; do sleep 0.2; done", timeout=60)
        take = ("exec", "--interactive", container, "ctr", "--namespace=k8s.io", "images", "import", "--no-unpack", "-")
        pipe(
            [docker.client, "save", *images],
            [docker.client, *take],
            timeout=600,
            environment=docker.environment,
        )
        docker("stop", container)
        docker("export", f"--output={archive}", container, timeout=600)
    finally:
        docker("rm", "--force", "--volumes", container)
    docker("image", "rm", "--force", EMPTY_NODE, *images)
