"""Turn SIGTERM and Ctrl-C into a request to stop at the next good moment."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

from finetune_trainer.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """While entered, the first signal sets ``event``; a second Ctrl-C ends the process at once, as usual.

    Must be entered on the main thread: Python allows signal handlers nowhere else.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopFlag":
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type] # what signal.signal itself returned

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.event.set()


class _StopRequest(BaseException):
    """Passes what libraries catch while they are imported."""


@contextlib.contextmanager
def stopped_at_once(message: str) -> Iterator[None]:
    """Within the block, SIGTERM and Ctrl-C end what is done there and then: for all that leaves nothing half done.

    A `StopFlag` entered inside takes over. Must be entered on the main thread.

    Raises:
        Preempted: a signal came; it says ``message``.
    """
    was_asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal was_asked
        was_asked = True
        raise _StopRequest

    previous = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    except BaseException as error:
        # An import that was cut short may end in an error of another kind.
        if was_asked:
            raise Preempted(message) from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if was_asked:  # a library has swallowed the request
        raise Preempted(message)
