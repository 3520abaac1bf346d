"""The project's images: built by Docker from the project's Dockerfiles, loaded into the cluster's node.

Docker's own cache decides what is built again. The packages are an image of their own, which the node gets once; after
that an edited source travels alone.
"""

import json
import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .cluster import Cluster
from .command import run
from .daemon import Docker
from .folder import CACHE, ROOT, alone, digest, keep
from .node_image import PUBLIC_BASE_IMAGE, ensure_base_image
from .node_store import load, load_on_top
from .program_image import change

logger = logging.getLogger(__name__)

BUILD_SECONDS = 1800

INSTALL = (
    "python -m venv --without-pip /opt/venv && /mnt/uv pip sync --quiet --require-hashes --compile-bytecode "
    "--link-mode copy --cache-dir /mnt/cache --python /opt/venv/bin/python /mnt/pins.txt"
)

SOURCES = "/app"
"""The one folder that the last stage of our Dockerfiles adds; see them."""


@dataclass(frozen=True, slots=True)
class ProjectImage:
    """One of our images."""

    name: str
    dockerfile: str
    pins: str

    @property
    def dependencies(self) -> str:
        """The image without our sources."""
        repository, tag = self.name.split(":")
        return f"{repository}-dependencies:{tag}"


OPERATOR = ProjectImage("finetune-operator:dev", "operator/Dockerfile", "requirements/operator.txt")
TRAINER = ProjectImage("finetune-trainer:dev", "trainer_image/Dockerfile", "requirements/trainer.txt")


def provide(image: ProjectImage, cluster: Cluster) -> str:
    """Build ``image``, load into ``cluster`` what it lacks of it, and return the image's name."""
    docker = cluster.docker
    if docker is None:
        return image.name
    with alone():
        build(image, docker)
        load(docker, image.dependencies)
        load_on_top(docker, image.name, image.dependencies, SOURCES)
    return image.name


def build(image: ProjectImage, docker: Docker) -> None:
    """Build ``image``; seconds when only sources changed since the last time."""
    logger.info("building %s", image.name)
    base = _with_packages(docker, ensure_base_image(docker), image)
    command = ("build", "--quiet", f"--build-arg=BASE_IMAGE={base}", f"--file={ROOT / image.dockerfile}")
    docker(*command, "--target=dependencies", f"--tag={image.dependencies}", ROOT, timeout=BUILD_SECONDS)
    docker(*command, f"--tag={image.name}", ROOT, timeout=BUILD_SECONDS)


def _with_packages(docker: Docker, base: str, image: ProjectImage) -> str:
    """Return ``base`` with the image's pinned packages, out of the uv cache that filled this environment.

    The Dockerfile installs them too, and finds them there: gigabytes are fetched once for a machine and not again for
    every image, and installed and compiled once. A pulled base image stays as it is: where it comes from, packages come
    quickly too.
    """
    uv = Path(sys.prefix) / "bin" / "uv"
    if base == PUBLIC_BASE_IMAGE or not uv.is_file():
        return base
    pins = ROOT / image.pins
    repository, key = f"{image.name.partition(':')[0]}-packages", digest([base, pins, INSTALL])
    made, kept = f"{repository}:{key}", CACHE / f"{repository}-{key}.tar"
    if docker.has_image(made):
        return made
    if not kept.is_file():
        logger.info("installing %s from the uv cache", image.pins)
        _install(docker, base, uv, pins, kept)
    logger.info("importing %s", made)
    environment = json.loads(docker("image", "inspect", "--format", "{{json .Config.Env}}", base)) or []
    docker("import", *change([f"ENV {variable}" for variable in environment]), kept, made, timeout=BUILD_SECONDS)
    return made


def _install(docker: Docker, base: str, uv: Path, pins: Path, kept: Path) -> None:
    """Write ``base`` with the packages of ``pins`` to ``kept``: to read them takes half as long as to install them."""
    cache = run([uv, "cache", "dir"], timeout=60).strip()
    mounts = (f"{cache}:/mnt/cache", f"{uv}:/mnt/uv:ro", f"{pins}:/mnt/pins.txt:ro")
    volumes = [f"--volume={mount}" for mount in mounts]
    container = docker("create", *volumes, "--entrypoint=sh", base, "-euc", INSTALL).strip()
    try:
        docker("start", "--attach", container, timeout=BUILD_SECONDS)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            archive = Path(work) / "packages.tar"
            docker("export", f"--output={archive}", container, timeout=BUILD_SECONDS)
            keep(archive, kept)
    finally:
        docker("rm", "--force", container)
