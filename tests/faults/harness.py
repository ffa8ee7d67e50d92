"""Runs of the real command line in forked processes, and what must hold after one of them died.

The parent has imported everything and has one thread, so a child starts in milliseconds and a whole run takes a second.
"""

import gc
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import train_loop  # imported once, here, for all children
from benchmarks.kill_resume import metrics as rows
from qlora.cli import train as command_line
from qlora.eval import generate
from qlora.run import checkpoint
from qlora.run.files import verify
from tests.helpers import tensors

LIMIT = 2  # of checkpoints kept
ANSWER_LIMIT = generate.answer_limit  # as programs have it, before tests/conftest.py makes answers shorter


def fork(function: Callable[[], int], output: Path) -> int:
    """Process id of a child that runs `function`, ends with the code it returns, and writes to the file `output`."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70  # of a traceback
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(descriptor, number)
            setattr(sys, name, io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), line_buffering=True))
        code = function()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """How it ended: its exit code, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def all_pass(trials: dict[str, Callable[[], None]], scratch: Path) -> None:
    """Run trials in processes of their own, as many at once as there are cores; fails with the output of those that fail."""
    waiting, running, failed = dict(trials), {}, []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            name = next(iter(waiting))
            trial = waiting.pop(name)
            output = scratch / f"{name}.txt"
            running[fork(lambda trial=trial: trial() or 0, output)] = (name, output)
        child, status = os.wait()
        name, output = running.pop(child)
        if status:
            failed.append(f"--- {name}\n{output.read_text()[-3000:]}")
    assert not failed, f"{len(failed)} of {len(trials)} failed\n" + "\n".join(failed[:5])


class Case:
    """A run to be disturbed: its flags, and what it leaves when it is not.

    Attributes:
        seconds: that it takes alone.
        oracle: step -> digests of adapter and trainer state, from a run that kept all its checkpoints.
    """

    def __init__(self, flags: list[str], scratch: Path):
        gc.collect()
        gc.freeze()  # what there is by now is shared with the children; their collections need not write to it
        self.flags = flags
        self.straight = scratch / "straight"
        start = time.perf_counter()
        assert wait(self.start(self.straight)) == 0, log(self.straight).read_text()
        self.seconds = time.perf_counter() - start
        everything = scratch / "everything"
        assert wait(self.start(everything, "--save-total-limit", "1000")) == 0
        self.oracle = {step: tensors(folder) for step, folder in checkpoint.by_step(everything / "checkpoints").items()}
        assert list(self.oracle) == list(range(2, 13, 2)), "the run is not the one that these tests are written for"

    def start(self, folder: Path, *more: str, before: Callable[[], None] = lambda: None) -> int:
        """Process id of the run in `folder`. `before` runs in the child first.

        No report is drawn, which takes as long as the rest; it comes when the run is complete and on disk.
        """

        def run() -> int:
            train_loop.html.after_training = lambda folder: "left out"
            generate.answer_limit = ANSWER_LIMIT
            before()
            return command_line([*self.flags, "--output-dir", str(folder), *more])

        return fork(run, log(folder))

    def check_what_is_there(self, folder: Path) -> list[int]:
        """After a death at any moment: every checkpoint in sight is whole and holds what it should."""
        found = checkpoint.by_step(folder / "checkpoints")
        for step, path in found.items():
            assert checkpoint.problem_of(path) is None, checkpoint.problem_of(path)
            assert tensors(path) == self.oracle[step], f"step {step}"
        return list(found)

    def check_finished(self, folder: Path, was_complete: bool = False) -> None:
        """The run has ended as the one that was never disturbed: tensors, metrics, answers, and no trace of the rest.

        If it was complete before, its answers may be missing: they are generated afterward, and not again.
        """
        ours, theirs = self.check_what_is_there(folder), checkpoint.by_step(self.straight / "checkpoints")
        assert ours == list(theirs), f"{ours}, and {list(theirs)} in the run that was not disturbed"
        assert len(ours) == LIMIT and 12 in ours
        answers = [] if was_complete and not (folder / "samples.jsonl").exists() else ["samples.jsonl"]
        for name in ("adapter/adapter_model.safetensors", *answers):
            assert (folder / name).read_bytes() == (self.straight / name).read_bytes(), name
        assert verify(folder / "adapter") is None
        assert rows(folder) == rows(self.straight)
        assert json.loads((folder / "finished.json").read_text())["step"] == 12
        assert not list(folder.rglob("*.tmp"))

    def finish(self, folder: Path, *more: str) -> None:
        """Run it again, to its end, and compare."""
        was_complete = (folder / "finished.json").exists()
        child = self.start(folder, *more)
        code = wait(child)
        assert code == 0, log(folder).read_text()[-3000:]
        self.check_finished(folder, was_complete)


def log(folder: Path) -> Path:
    """What the runs in a folder have said."""
    return folder.with_name(f"{folder.name}.log")


def wait_for(checkpoint_folder: Path) -> None:
    """Wait until a checkpoint, which a thread writes, has its name."""
    while not checkpoint_folder.exists():
        time.sleep(0.002)


def killed_after(child: int, seconds: float) -> bool:
    """Kill a process after a while; whether it was still there."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return wait(child) == -signal.SIGKILL


def stop_at(step: int) -> None:
    """Make the run that follows send itself SIGTERM in the given step."""
    train_step, calls = train_loop.train_step, []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args, **kwargs)

    train_loop.train_step = counted
