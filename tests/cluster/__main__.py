"""python -m tests.cluster {programs,up,down,images,status,lend}: a cluster for development, and what it is made of."""

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from .binary import CHECKS, NODE, TOOLS, ensure_binaries
from .cluster import find_cluster, lend_cluster, start_cluster, stop_cluster
from .command import ClusterUnavailableError, CommandError
from .folder import BIN
from .project_image import OPERATOR, TRAINER, provide

logger = logging.getLogger("cluster")


def main(arguments: list[str]) -> int:
    """Do what ``arguments`` ask for and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("programs", help="build what tests and clusters are made of; kept for the next time")
    commands.add_parser("up", help="start a cluster, or say where the running one is")
    down = commands.add_parser("down", help="remove the cluster and all that was started for it")
    down.add_argument("--keep-images", action="store_true", help="keep Docker's images for the next cluster")
    commands.add_parser("images", help="build the project's images and load them into the cluster")
    commands.add_parser("status", help="say whether there is a cluster; exit code 1 without")
    borrow = commands.add_parser("lend", help="run a command, with a cluster that goes again where none was")
    borrow.add_argument("borrower", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command and its arguments")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    started = time.monotonic()
    try:
        match chosen.command:
            case "programs":
                ensure_binaries({*TOOLS, *NODE, *CHECKS})
                return 0
            case "lend":
                return lend(chosen.borrower)
            case "up":
                start_cluster()
            case "images":
                for image in (OPERATOR, TRAINER):
                    provide(image, start_cluster())
            case "down":
                stop_cluster(keep_images=chosen.keep_images)
        cluster = find_cluster()
    except (ClusterUnavailableError, CommandError) as error:
        logger.error("%s", error)
        # Tests say for themselves what they lack; only CI must have everything.
        return 1 if os.environ.get("CI") or chosen.command != "programs" else 0
    if chosen.command != "status":
        logger.info("%s took %.1f s", chosen.command, time.monotonic() - started)
    if cluster is None:
        logger.info("there is no cluster")
        return 1 if chosen.command == "status" else 0
    sys.stdout.write(f"export KUBECONFIG={cluster.kubeconfig} PATH={BIN}:$PATH\n")
    return 0


def lend(command: Sequence[str]) -> int:
    """Run ``command`` while there is a cluster, and return its exit code.

    Where none can be had it runs all the same, but in CI: tests say for themselves what they lack.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lend_cluster())
        except ClusterUnavailableError as error:
            if os.environ.get("CI"):
                raise
            logger.error("%s", error)
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
