"""SIGINT and SIGTERM: the first ends the run when nothing would be lost by it, the second at once."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SAME_SIGNAL_S = 30.0  # under torchrun, a second signal so soon is the first one again


class Stopped(KeyboardInterrupt):
    """A first signal that may take effect; a KeyboardInterrupt, since libraries clean up after that."""


class Signals:
    """Handles both signals while it is entered as a context.

    While imports run, where an exception may end anywhere, the first signal ends the process. Once `armed`, it raises Stopped
    on the spot where nothing is to be saved (loading, evaluating, generating); within `deferred` it is only noted in
    `received`, for the loop to finish its step, save, and leave. The second always ends the process, without cleaning up:
    what is on disk is sound at any moment. Whatever exception comes out of the context after a first signal is its doing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.advice: Callable[[], str] = lambda: "Nothing was to be saved yet; the same command starts again."
        self.armed = False
        self._deferred = False
        self._since = 0.0

    def __enter__(self) -> "Signals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python handles signals there alone
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and background jobs of scripts want it
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._deferred = True  # what comes now is too late to raise
        for number, handler in self._before.items():
            signal.signal(number, handler)
        return kind is not None and self.received is not None

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() < self._since + SAME_SIGNAL_S:
            return  # torchrun passes on a signal that the terminal has sent to every process already
        if self.received is not None or not self.armed:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), b"\x1b[?25h")  # the cursor, which a progress bar hides
            os._exit(128 + number)
        self.received, self._since = signal.Signals(number), time.monotonic()
        if not self._deferred:
            raise Stopped

    def raise_for(self, number: int) -> None:
        """Leave now for a signal that this process, or another one of its run, has received; 0 is none."""
        if number:
            if self.received is None:
                self.received, self._since = signal.Signals(number), time.monotonic()
            raise Stopped

    def raise_if_received(self) -> None:
        """Leave now, if a signal has been noted."""
        if self.received is not None:
            raise Stopped

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
    def immediate(self, alone: bool = True) -> Iterator[None]:
        """A block within `deferred` in which it is raised after all, also if it came just before.

        Args:
            alone: if not, others wait for this process, and the signal is still only noted.
        """
        self._deferred = not alone
        try:
            if alone:
                self.raise_if_received()
            yield
        finally:
            self._deferred = True
