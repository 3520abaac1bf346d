"""Tell a person who pressed Ctrl-C at once that it was heard; the trainer stops only at the end of its step.

The trainer's handler cannot do it: Python runs handlers between two bytecodes of the main thread, which may be inside
one long operation of torch. The wake-up descriptor is written to when the signal arrives, and a thread reads it.
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

FIRST = "Stopping behind the current step; what is done is kept. Ctrl-C again ends at once."
_STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_notice(say: Callable[[str], None]) -> Iterator[None]:
    """Within the block, ``say`` is called once, from a thread, when the first stop signal arrives.

    Must be entered on the main thread, as everything about signals.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=_listen, args=(reader, say), name="stop-notice", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            writer.shutdown(socket.SHUT_WR)
            thread.join()


def _listen(reader: socket.socket, say: Callable[[str], None]) -> None:
    has_spoken = False
    while numbers := reader.recv(16):
        if not has_spoken and any(number in _STOPPING for number in numbers):
            has_spoken = True
            say(FIRST)
