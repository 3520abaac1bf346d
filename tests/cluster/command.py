"""Run other programs: arguments as a list, always with a time limit, errors with what the program said."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

SAID = 6000
"""Characters of a program's last words that an error repeats: all of the longest refusal by a policy, of 5 kB."""


class ClusterUnavailableError(RuntimeError):
    """This machine lacks something that a cluster needs; the message says what and what to do."""


class CommandError(RuntimeError):
    """A program failed; the message holds its last words."""


def run(
    command: Sequence[str | Path],
    *,
    timeout: float,
    stdin: str | bytes | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """Run ``command`` and return its standard output as text; see ``read``."""
    return read(command, timeout=timeout, stdin=stdin, environment=environment, folder=folder).decode()


def read(
    command: Sequence[str | Path],
    *,
    timeout: float,
    stdin: str | bytes | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> bytes:
    """Run ``command`` and return its standard output.

    Raises:
        CommandError: It ended with another code than 0, or not within ``timeout`` seconds.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            # An empty input rather than ours: no program here may wait for a key.
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            env={**os.environ, **(environment or {})},
            cwd=folder,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace")[-SAID:]
        raise CommandError(f"not done within {timeout:.0f} s: {' '.join(words)}\n{said}") from error
    if done.returncode:
        said = (done.stdout[-SAID:] + done.stderr[-SAID:]).decode(errors="replace")
        raise CommandError(f"exit code {done.returncode}: {' '.join(words)}\n{said}")
    return done.stdout


def pipe(
    producer: Sequence[str | Path], consumer: Sequence[str | Path], *, timeout: float, environment: Mapping[str, str]
) -> str:
    """Run ``producer | consumer`` and return what the consumer printed; an error of either is an error."""
    merged = {**os.environ, **environment}
    with subprocess.Popen(
        list(map(str, producer)), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=merged
    ) as source:
        try:
            done = subprocess.run(
                list(map(str, consumer)),
                stdin=source.stdout,
                capture_output=True,
                env=merged,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            source.kill()
            raise CommandError(f"not done within {timeout:.0f} s: {' '.join(map(str, consumer))}") from error
        assert source.stdout
        source.stdout.close()
        if source.wait(timeout=60) or done.returncode:
            said = done.stderr[-SAID:].decode(errors="replace")
            raise CommandError(f"failed: {' '.join(map(str, producer))} | {' '.join(map(str, consumer))}\n{said}")
    return done.stdout.decode()
