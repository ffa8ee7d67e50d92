"""One function over many chunks, in as many processes as there are cores, with the results in order."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from qlora.errors import EnvironmentProblem

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

AHEAD = 4  # chunks per process that may be done before they are asked for: what bounds the memory


def num_cores() -> int:
    """Cores that this process may use; 1 where it cannot fork: on macOS and Windows, and in a daemonic process."""
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    return len(os.sched_getaffinity(0)) if can_fork else 1


def map_in_order(function: Callable[[Chunk], Result], chunks: Iterator[Chunk], num_processes: int) -> Iterator[Result]:
    """The results of `function` for each chunk, in order.

    A process starts when a chunk finds all others busy. It is a fork, so `function` may hold what cannot be pickled, such as
    a tokenizer and compiled templates; chunks and results are pickled.

    Args:
        function: raises nothing that the caller wants to know of.
        chunks: read as processes become free.
        num_processes: at most; with 1, everything runs in this process.

    Raises:
        EnvironmentProblem: if a process ends before its time, as when memory runs out.
    """
    if num_processes == 1:
        yield from map(function, chunks)
        return
    with contextlib.closing(_Pool(function, num_processes)) as pool:
        sent = asked = 0
        for chunk in chunks:
            pool.send(sent, chunk)
            sent += 1
            while asked in pool.done or sent - asked >= AHEAD * num_processes:
                yield pool.take(asked)
                asked += 1
        for number in range(asked, sent):
            yield pool.take(number)


class _Pool:
    """Processes that each work on one chunk at a time.

    Attributes:
        done: number of a chunk -> its result, until it is taken.
    """

    def __init__(self, function: Callable[[Any], Any], num_processes: int):
        self.done: dict[int, Any] = {}
        self._function = function
        self._num_processes = num_processes
        self._workers: dict[Connection, BaseProcess] = {}
        self._idle: list[Connection] = []

    def send(self, number: int, chunk: object) -> None:
        """Give a chunk to a process that is idle, to a new one, or to the next that becomes idle."""
        if not self._idle and len(self._workers) < self._num_processes:
            try:
                worker, process = _start(self._function)
            except OSError as error:
                text = f"No process could be started to tokenize the data: {error.strerror}."
                raise EnvironmentProblem(text, hint="Use fewer cores: taskset --cpu-list 0 COMMAND.") from None
            self._workers[worker] = process
            self._idle.append(worker)
        while not self._idle:
            self._collect()
        worker = self._idle.pop()
        try:
            worker.send((number, chunk))
        except OSError:
            raise _died(self._workers[worker]) from None

    def take(self, number: int) -> Any:
        """The result of a chunk that was sent."""
        while number not in self.done:
            self._collect()
        return self.done.pop(number)

    def _collect(self) -> None:
        for ready in multiprocessing.connection.wait([worker for worker in self._workers if worker not in self._idle]):
            assert isinstance(ready, Connection)
            try:
                number, result = ready.recv()
            except (EOFError, OSError):
                raise _died(self._workers[ready]) from None
            self.done[number] = result
            self._idle.append(ready)

    def close(self) -> None:
        """End all processes."""
        for worker, process in self._workers.items():
            worker.close()
            process.terminate()
            process.join()


def _start(function: Callable[[Any], Any]) -> tuple[Connection, BaseProcess]:
    """A process that waits for chunks, and the pipe to it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, theirs, ours), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; those of here hold no lock
        process.start()
    theirs.close()
    return ours, process


def _serve(function: Callable[[Any], Any], chunks: Connection, of_the_parent: Connection) -> None:
    # Ctrl-C reaches all processes of a terminal. The parent decides; if it is killed, the pipe ends, and so does this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else tokenizers warns of the fork
    of_the_parent.close()
    while True:
        try:
            number, chunk = chunks.recv()
        except (EOFError, OSError):
            return
        with contextlib.suppress(OSError):
            chunks.send((number, function(chunk)))


def _died(process: BaseProcess) -> EnvironmentProblem:
    process.join(1.0)
    code = process.exitcode
    if code == -signal.SIGKILL:
        hint = "The machine may have run out of memory. Use fewer cores: taskset --cpu-list 0-3 COMMAND."
        return EnvironmentProblem("A tokenizing process was killed.", hint=hint)
    return EnvironmentProblem(f"A tokenizing process exited early, with code {code}.", hint="Its error is printed above.")
