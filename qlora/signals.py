"""SIGINT and SIGTERM: the first ends the run when nothing would be lost by it, the second at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A first signal that may take effect; a KeyboardInterrupt, since libraries clean up after that."""


class Signals:
    """Handles both signals while it is entered as a context.

    Where nothing is to be saved (loading, evaluating, generating) the first signal raises Stopped on the spot. Within
    `deferred` it is only noted in `received`, for the loop to finish its step, save, and leave. The second always ends the
    process, without cleaning up: what is on disk is sound at any moment.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.advice: Callable[[], str] = lambda: "Nothing was to be saved yet; the same command starts again."
        self._deferred = False

    def __enter__(self) -> "Signals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python handles signals there alone
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), b"\x1b[?25h")  # the cursor, which a progress bar hides
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if not self._deferred:
            raise Stopped

    def raise_if_received(self) -> None:
        """Leave now, if a signal has been noted."""
        if self.received is not None:
            raise Stopped

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as a shell would report it."""
        assert self.received is not None
        return 128 + self.received

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A block in which a first signal is noted, and raised at its end at the latest."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.raise_if_received()

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """A block within `deferred` in which it is raised after all, also if it came just before."""
        self._deferred = False
        try:
            self.raise_if_received()
            yield
        finally:
            self._deferred = True
