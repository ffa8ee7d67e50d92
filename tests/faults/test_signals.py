"""SIGINT and SIGTERM, once and twice, in every phase of a run: it stops and prints a command, which completes it."""

import copy
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import train_loop
from qlora.cli import train as command_line
from qlora.data import dataset
from qlora.eval import generate
from qlora.run import checkpoint, files
from qlora.run.files import whole_rows
from tests.faults.harness import Case, all_pass, fork, log, wait
from tests.helpers import tensors

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
NUMBERS = (signal.SIGINT, signal.SIGTERM)
SAME_COMMAND = "the same command"


class Phase(NamedTuple):
    """Where the signals come: at the start of a call of `module.name`, the first that `chosen` says yes to.

    Attributes:
        module: holds the function.
        name: of the function.
        chosen: (number of the call, arguments) -> whether it is the one.
        once: steps that have a checkpoint after one signal: any of these lists, as the loop continues while one is written.
        twice: steps that have one after two, likewise.
        argv0: what the process was started as.
        start: the words of that in the command that is printed.
    """

    module: Any
    name: str
    chosen: Callable[..., bool]
    once: list[list[int]]
    twice: list[list[int]]
    argv0: str = "train_loop.py"
    start: tuple[str, ...] = ("python", "train_loop.py")


PHASES = {
    "tokenizing": Phase(dataset, "encode_all", lambda call, *_: call == 1, [[]], [[]]),
    "loading": Phase(train_loop, "load_nf4_model", lambda call, *_: call == 1, [[]], [[]]),
    # Step 5 is no step at which a checkpoint is due: that it has one is the signal's doing.
    "step": Phase(train_loop, "train_step", lambda call, *_: call == 5, [[4, 5]], [[2], [2, 4]]),
    "saving": Phase(
        checkpoint,
        "write_folder",
        lambda _, folder, *__: folder.name == "step-000004",
        [[2, 4], [4, 5], [4, 6]],
        [[2]],
    ),
    "between files": Phase(
        files,
        "_write",
        lambda _, path, *__: path.name == checkpoint.TRAINER_STATE and "step-000006" in path.parent.name,
        [[4, 6], [4, 7], [6, 7], [4, 8], [6, 8]],  # 4 stays if it has the lowest loss so far
        [[2, 4]],
    ),
    "evaluation": Phase(
        train_loop,
        "evaluate_loss",
        lambda call, *_: call == 2,
        [[2, 4]],
        [[2], [2, 4]],
        "x/qlora/__main__.py",
        ("python", "-m", "qlora"),
    ),
    "adapter": Phase(
        train_loop,
        "write_folder",
        lambda _, folder, *__: folder.name == "adapter",
        [[8, 12]],
        [[8, 12]],
        "/venv/bin/qlora-train",
        ("qlora-train",),
    ),
}
ANSWERS = Phase(generate, "_answer", lambda call, *_: call == 1, [[8, 12]], [[8, 12]])


@pytest.fixture(scope="module")
def case(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The same, with digests of odd steps too: those are saved only when a signal comes."""
    folder = tmp_path_factory.mktemp("signals") / "each"
    assert wait(case.start(folder, "--save-steps", "1", "--save-total-limit", "1000")) == 0
    case = copy.copy(case)
    case.oracle = {step: tensors(path) for step, path in checkpoint.by_step(folder / "checkpoints").items()}
    assert list(case.oracle) == list(range(1, 13))
    return case


def send(phase: Phase, first: signal.Signals, second: signal.Signals | None = None) -> Callable[[], None]:
    """What a child does first: see to it that the signals come in the given phase, the second on the heels of the first."""

    def before() -> None:
        sys.argv = [phase.argv0]
        original, calls = getattr(phase.module, phase.name), []

        def signalled(*args: Any, **kwargs: Any) -> Any:
            if phase.chosen(len(calls) + 1, *args):
                try:
                    os.kill(os.getpid(), first)
                finally:  # either the first is only noted, or it is on its way up now
                    in_main = threading.current_thread() is threading.main_thread()
                    if second is not None:
                        time.sleep(0.0 if in_main else 0.5)  # two that wait for the main thread would count as one
                        os.kill(os.getpid(), second)
                        time.sleep(0.0 if in_main else 60.0)  # what is being written stays as it is until the process ends
            calls.append(1)
            return original(*args, **kwargs)

        setattr(phase.module, phase.name, signalled)

    return before


def printed_command(output: str) -> list[str]:
    """The words of the command that a stopped run told."""
    return shlex.split(output.partition("Resume with:\n")[2].splitlines()[0])


def go_on(case: Case, folder: Path, start: tuple[str, ...] = ("python", "train_loop.py")) -> None:
    """Run the very command that was printed, to the end, and compare."""
    output = log(folder).read_text()
    words = printed_command(output)
    assert tuple(words[: len(start)]) == start, words
    assert wait(fork(lambda: command_line(words[len(start) :]), log(folder))) == 0, log(folder).read_text()[-3000:]
    case.check_finished(folder)


def check_stopped(case: Case, folder: Path, number: int, saved: list[list[int]]) -> None:
    """One message with the right advice, no traceback, and the checkpoints that should be there."""
    output = log(folder).read_text()
    assert output.count("Stopped by") == 1 and f"Stopped by {signal.Signals(number).name}. " in output, output
    assert "Traceback" not in output and "Error" not in output and "error" not in output, output
    found = case.check_what_is_there(folder)
    assert found in saved and not (folder / "finished.json").exists()
    if found:
        newest = folder / "checkpoints" / f"step-{found[-1]:06d}"
        assert f"All up to step {found[-1]} is safe in {newest}. Resume with:\n" in output, output
    else:
        assert output.endswith(f"No checkpoint was due yet; {SAME_COMMAND} starts again.\n"), output


@pytest.mark.parametrize("name", PHASES)
def test_one_signal(case: Case, tmp_path, record, name: str):
    start, phase = time.perf_counter(), PHASES[name]

    def trial(number: signal.Signals) -> Callable[[], None]:
        def run() -> None:
            folder = tmp_path / number.name
            assert wait(case.start(folder, before=send(phase, number))) == 128 + number, log(folder).read_text()
            check_stopped(case, folder, number, phase.once)
            if name == "evaluation":  # it ended at once: its result was not recorded
                events = [row["event"] for row in whole_rows(folder / "metrics.jsonl")]
                assert events[-1] == "step", events
            if phase.once != [[]]:
                go_on(case, folder, phase.start)
            else:
                case.finish(folder)

        return run

    all_pass({f"trial-{number.name}": trial(number) for number in NUMBERS}, tmp_path)
    record(f"SIGINT or SIGTERM, once: {name}", len(NUMBERS), start)


@pytest.mark.parametrize("name", PHASES)
def test_two_signals_end_it_at_once(case: Case, tmp_path, record, name: str):
    start, phase = time.perf_counter(), PHASES[name]

    def trial(first: signal.Signals, second: signal.Signals) -> Callable[[], None]:
        def run() -> None:
            folder = tmp_path / second.name
            assert wait(case.start(folder, before=send(phase, first, second))) == 128 + second, log(folder).read_text()
            output = log(folder).read_text()
            assert "Traceback" not in output and "Stopped" not in output, output
            assert case.check_what_is_there(folder) in phase.twice
            case.finish(folder)

        return run

    # The second may be of the other kind, as when a user loses patience with a supervisor.
    pairs = [(NUMBERS[0], NUMBERS[0]), NUMBERS if name == "step" else (NUMBERS[1], NUMBERS[1])]
    all_pass({f"trial-{second.name}": trial(first, second) for first, second in pairs}, tmp_path)
    record(f"SIGINT or SIGTERM, twice: {name}", len(pairs), start)


@pytest.mark.parametrize("second", [None, signal.SIGTERM], ids=["once", "twice"])
def test_a_signal_during_the_sample_answers_leaves_a_complete_run(case: Case, tmp_path, second):
    folder = tmp_path / "run"
    assert wait(case.start(folder, before=send(ANSWERS, signal.SIGTERM, second))) == 143, log(folder).read_text()
    assert case.check_what_is_there(folder) == [8, 12] and not (folder / "samples.jsonl").exists()
    words = f"Stopped by SIGTERM. The run is complete, and {folder / 'adapter'} is final."
    assert (words in log(folder).read_text()) == (second is None)
    case.finish(folder)
    assert "it is complete" in log(folder).read_text() and not (folder / "samples.jsonl").exists()


def test_a_signal_while_imports_run_ends_it_at_once(case: Case, tmp_path):
    """An exception raised in the middle of an import may be taken for a broken package."""

    def before() -> None:
        import qlora.cli as program

        parse = program.parse
        program.parse = lambda argv: os.kill(os.getpid(), signal.SIGTERM) or parse(argv)

    assert wait(case.start(tmp_path / "run", before=before)) == 128 + signal.SIGTERM
    assert log(tmp_path / "run").read_text() == "" and not (tmp_path / "run").exists()


def test_a_signal_that_was_ignored_stays_ignored(case: Case, tmp_path):
    """As nohup and the background jobs of a script want it."""
    step = send(PHASES["step"], signal.SIGINT)

    def before() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        step()

    assert wait(case.start(tmp_path / "run", before=before)) == 0, log(tmp_path / "run").read_text()
    case.check_finished(tmp_path / "run")


def test_the_printed_command_goes_on_whatever_the_run_was_started_with(case: Case, tmp_path, record):
    """--resume never and --resume PATH are about the start of a run, and must not stand in the way of its rest."""
    start = time.perf_counter()
    source = case.straight / "checkpoints" / "step-000008"
    step = PHASES["step"]
    soon = step._replace(chosen=lambda call, *_: call == 2)

    def stopped(phase: Phase, saved: list[list[int]], *flags: str) -> Callable[[], None]:
        def run() -> None:
            folder = tmp_path / f"run-{os.getpid()}"
            assert wait(case.start(folder, *flags, before=send(phase, signal.SIGTERM))) == 143, log(folder).read_text()
            if saved:
                check_stopped(case, folder, signal.SIGTERM, saved)
            output = log(folder).read_text()
            if "Resume with:" in output:
                go_on(case, folder)
            else:
                assert SAME_COMMAND in output, output
                case.finish(folder, *flags)

        return run

    def stopped_again(folder: Path, *flags: str) -> Callable[[], None]:
        def run() -> None:
            assert wait(case.start(folder, before=send(step, signal.SIGTERM))) == 143
            log(folder).unlink()
            assert wait(case.start(folder, *flags, before=send(soon, signal.SIGTERM))) == 143, log(folder).read_text()
            check_stopped(case, folder, signal.SIGTERM, [[4, 7]])
            go_on(case, folder)

        return run

    own, changed = tmp_path / "own", tmp_path / "changed"
    free = ("--override", "gradient_checkpointing", "--gradient-checkpointing", "none")  # which changes no bit
    trials = {
        "own": stopped_again(own, "--resume", str(own / "checkpoints" / "step-000005")),
        "override": stopped_again(changed, *free),
        "never": stopped(step, [[4, 5]], "--resume", "never"),
        "never-early": stopped(PHASES["tokenizing"], [], "--resume", "never"),
        "branch": stopped(soon, [[8, 10]], "--resume", str(source)),
        "branch-early": stopped(PHASES["tokenizing"], [], "--resume", str(source)),
        "branch-loading": stopped(PHASES["loading"], [], "--resume", str(source)),
    }
    all_pass(trials, tmp_path)
    record("SIGINT or SIGTERM, once: with --resume never or PATH, with --override", len(trials), start)


def test_programs_of_their_own_and_their_process_groups(case: Case, tmp_path, record):
    """python train_loop.py, as a shell or a supervisor stops it, then the printed command as it stands."""
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def trial(number: signal.Signals) -> Callable[[], None]:
        def run() -> None:
            cwd = tmp_path / number.name
            cwd.mkdir()
            command = [sys.executable, str(ROOT / "train_loop.py"), *case.flags, "--output-dir", "run folder"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process = subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes)
            while not (cwd / "run folder" / "checkpoints" / "step-000004").exists() and process.poll() is None:
                time.sleep(0.002)
            os.killpg(process.pid, number)
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 128 + number, errors
            assert re.fullmatch(rf"Stopped by {number.name}\. All up to step \d+ is safe in .*\. Resume with:\n  .*\n", errors)
            case.check_what_is_there(cwd / "run folder")
            words = printed_command(errors)
            assert words == ["python", str(ROOT / "train_loop.py"), "--config", "run folder/config.yaml"]
            done = subprocess.run([sys.executable, *words[1:]], cwd=cwd, env=environment, **pipes)
            assert done.returncode == 0, done.stdout + done.stderr
            case.check_finished(cwd / "run folder")

        return run

    all_pass({f"trial-{number.name}": trial(number) for number in NUMBERS}, tmp_path)
    record("SIGINT or SIGTERM, once: process group of python train_loop.py", len(NUMBERS), start)
