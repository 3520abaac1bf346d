"""Ports for the servers that tests start."""

import itertools
import os
import socket

_BLOCK = 1000
"""How many a process has to itself."""
# Below what the kernel hands to connections that go out: a port of that range may be taken between the moment it was
# found free and the moment its server binds it, and the kernel gives the same one out twice.
_first = 20_000 + _BLOCK * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Two test runs on one machine do not begin at the same one.
_candidates = itertools.islice(itertools.cycle(range(_first, _first + _BLOCK)), os.getpid() % _BLOCK, None)


def free_port() -> int:
    """Return a port that nobody listens on and that this process did not get within its last thousand."""
    return next(filter(_is_free, itertools.islice(_candidates, _BLOCK)))


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        # As servers do: connections that linger in TIME_WAIT are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind(("::", port))
        except OSError:
            return False
    return True
