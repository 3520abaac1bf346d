"""``python -m finetune_operator --settings FILE``: watch FineTuneJobs until SIGTERM."""

import argparse
import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from finetune_operator import session
from finetune_operator.cluster import NoClusterError, load_connection
from finetune_operator.handlers import quiet_kopf
from finetune_operator.health import HealthServer
from finetune_operator.metric import Metrics
from finetune_operator.settings import Settings, SettingsError, parse_settings

logger = logging.getLogger("finetune_operator")

BAD_USAGE = 2
LONGEST_PAUSE_SECONDS = 30.0
"""Between two sessions that failed."""
GOOD_SESSION_SECONDS = 300.0
"""A session that lasted as long was no failure to start."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the operator; return the exit code."""
    options = _parser().parse_args(arguments)
    _configure_logging(options.log_level)
    try:
        settings = parse_settings(options.settings.read_text(encoding="utf-8"))
    except (OSError, SettingsError) as error:
        logger.error("cannot start error=%s", error)
        return BAD_USAGE
    return asyncio.run(_run(settings, options.kubeconfig, options.context))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m finetune_operator", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, metavar="FILE", help="what the administrator decides")
    parser.add_argument("--kubeconfig", type=Path, metavar="FILE", help="instead of the pod's service account")
    parser.add_argument("--context", help="of the kubeconfig, instead of its current one")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return parser


def _configure_logging(level: str) -> None:
    # In UTC, as everything in a cluster.
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler])
    quiet_kopf()


async def _run(settings: Settings, kubeconfig: Path | None, context: str | None) -> int:
    try:
        connection = await load_connection(kubeconfig, context)
    except NoClusterError as error:
        logger.error("cannot start error=%s", error)
        return BAD_USAGE
    operator = session.Operator(
        settings=settings,
        connection=connection,
        # The name of the pod, also inside of it.
        identity=os.environ.get("POD_NAME") or socket.gethostname(),
        metrics=Metrics(),
        ready=asyncio.Event(),
        stop=asyncio.Event(),
    )
    session.stop_on_signals(operator.stop)
    async with HealthServer(operator.metrics, operator.ready.is_set, settings.http_port):
        await _run_sessions(operator)
    return 0


async def _run_sessions(operator: session.Operator) -> None:
    pause = 1.0
    while not operator.stop.is_set():
        started = time.monotonic()
        try:
            # A task of its own: whoever ends it by cancelling, a group of tasks or kopf, must not hit this one later.
            await asyncio.create_task(session.run(operator))
        # Whatever it was, watching goes on; the pause grows, the probe says that nothing is watched.
        except Exception:
            logger.exception("session failed seconds=%.0f", time.monotonic() - started)
        session.stop_on_signals(operator.stop)
        pause = 1.0 if time.monotonic() - started > GOOD_SESSION_SECONDS else min(pause * 2, LONGEST_PAUSE_SECONDS)
        await _wait(operator.stop, pause)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


if __name__ == "__main__":
    sys.exit(main())
