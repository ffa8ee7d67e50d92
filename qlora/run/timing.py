"""Where the wall-clock time of a run goes."""

import time

import psutil

SHORTEST_S = 0.05  # phases below are not worth a word


class PhaseClock:
    """Seconds by phase, from the start of the process on. Each moment belongs to one phase.

    Attributes:
        seconds: phase -> its wall-clock seconds, in the order in which they first ended.
    """

    def __init__(self) -> None:
        """End the first phase, `start`, which began with the process: imports count."""
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter() - max(time.time() - psutil.Process().create_time(), 0.0)
        self.end("start")

    def end(self, phase: str) -> None:
        """Count the time since the last call for `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def summary(self) -> str:
        """One line: the total, and the phases."""
        parts = [f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items() if seconds >= SHORTEST_S]
        return f"{sum(self.seconds.values()):.1f} s ({', '.join(parts)})"
