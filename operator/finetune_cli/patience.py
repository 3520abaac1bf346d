"""Give a cluster that has just been there some time to come back: VPNs reconnect, API servers restart."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from finetune_cli.refusal import ClusterError

PAUSES = (1.0, 2.0, 5.0, 10.0, *[30.0] * 10)
"""Seconds between tries: five minutes in all."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """Asks again for five minutes."""

    say: Callable[[str], None]
    """Told when the connection is lost."""
    pause: Callable[[float], None] = field(default=time.sleep)
    """Waits between tries."""

    def ask(self, question: Callable[[], T]) -> T:
        """Return the answer to ``question``.

        Raises:
            ClusterError: there was none for five minutes.
        """
        for seconds in PAUSES:
            try:
                return question()
            except ClusterError:
                self.say("The connection to the cluster is lost; trying again. The job is not affected.")
                self.pause(seconds)
        return question()
