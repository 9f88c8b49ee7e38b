"""SIGTERM and Ctrl-C as a wish to stop: training ends at the next step, with its state saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupted(Exception):
    """Training was asked to stop and has saved its state."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class Wish:
    """`number` is the signal that came, 0 before."""

    number = 0


@contextlib.contextmanager
def on_request() -> Iterator[Wish]:
    """Catches SIGTERM and SIGINT while it is open; the second SIGINT interrupts at once, as usual.

    Only the main thread may: elsewhere (a notebook's worker, say) nothing is caught.
    """
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def note(number, frame):
        wish.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
