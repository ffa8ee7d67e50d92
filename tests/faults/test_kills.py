"""SIGKILL at any moment, a disk full at any byte: nothing that was saved is lost, and the run ends as if undisturbed."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.errors import ExitCode
from qlora.run import files
from qlora.run.files import whole_rows
from qlora.run.folder import RunFolder
from tests.faults.conftest import SEED
from tests.faults.harness import Case, all_pass, killed_after, log, stop_at, wait

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
THOROUGH = "SURVIVAL_JSON" in os.environ  # for the table of the README: all trials, which take half an hour on two cores
TRIALS, CHAINS = (120, 10) if THOROUGH else (24, 6)
WATCHED = (6, 8) if THOROUGH else (6,)  # steps whose saves are killed; each prunes an older checkpoint
CALLS = {
    "open",
    "write",
    "writelines",
    "flush",
    "fsync",
    "close",
    "rename",
    "replace",
    "mkdir",
    "rmdir",
    "unlink",
}  # of the file system


def test_killed_at_random_moments_and_in_chains_of_three(case: Case, tmp_path, record):
    draw = random.Random(SEED)
    start = time.perf_counter()

    def trial(name: str, moments: list[float]) -> Callable[[], None]:
        def run() -> None:
            folder = tmp_path / name
            for moment in moments:
                while not killed_after(case.start(folder), moment * case.seconds):  # it had ended: not a kill, so not counted
                    shutil.rmtree(folder)
                    moment *= 0.7
                if (folder / "checkpoints").exists():
                    case.check_what_is_there(folder)
            case.finish(folder)
            shutil.rmtree(folder)

        return run

    all_pass({f"kill-{i}": trial(f"kill-{i}", [draw.uniform(0, 1.2)]) for i in range(TRIALS)}, tmp_path)
    record("SIGKILL at a random moment", TRIALS, start)
    start = time.perf_counter()
    all_pass({f"chain-{i}": trial(f"chain-{i}", [draw.uniform(0.3, 0.8) for _ in range(3)]) for i in range(CHAINS)}, tmp_path)
    record("SIGKILL three times in a row", CHAINS, start)


def count_calls(kill_at: int | None, told: Path | None) -> Callable[[], None]:
    """What a child does first: count the file-system calls of the watched saves, and die before one of them."""

    def before() -> None:
        calls: list[str] = []
        write = RunFolder._write

        def watch(frame, event, function):
            module = frame.f_code.co_filename
            ours = any(part in module for part in ("checkpoint.py", "files.py", "pathlib", "shutil.py"))
            if event == "c_call" and ours and function.__name__ in CALLS:
                calls.append(function.__name__)
                if len(calls) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        def watched(self, taken, keep, evaluations):
            if taken.step in WATCHED:
                sys.setprofile(watch)  # of the thread that writes; the loop continues beside it
            try:
                write(self, taken, keep, evaluations)
            finally:
                sys.setprofile(None)
                if told is not None:
                    told.write_text(json.dumps(calls))

        RunFolder._write = watched

    return before


def test_killed_before_every_file_system_call_of_a_save_and_its_prune(case: Case, tmp_path, record):
    start = time.perf_counter()
    prepared = tmp_path / "prepared"  # stopped after step 4: each later save removes one that is there
    assert wait(case.start(prepared, before=lambda: stop_at(4))) == 143
    assert case.check_what_is_there(prepared) == [2, 4]
    folder = shutil.copytree(prepared, tmp_path / "counted")
    assert wait(case.start(folder, before=count_calls(None, tmp_path / "calls.json"))) == 0
    calls = json.loads((tmp_path / "calls.json").read_text())
    saves = len(WATCHED)
    assert calls.count("fsync") >= saves * 7 and calls.count("rename") >= saves * 2 and "rmdir" in calls and "unlink" in calls

    def trial(number: int) -> Callable[[], None]:
        def run() -> None:
            folder = shutil.copytree(prepared, tmp_path / f"call-{number}")
            assert wait(case.start(folder, before=count_calls(number, None))) == -signal.SIGKILL
            assert case.check_what_is_there(folder)[-1] >= 4
            case.finish(folder)
            shutil.rmtree(folder)

        return run

    all_pass({f"call-{number}": trial(number) for number in range(1, len(calls) + 1)}, tmp_path)
    record(f"SIGKILL before each file-system call of {saves} saves", len(calls), start)


@pytest.mark.parametrize("deadly", [True, False], ids=["killed", "disk full"])
def test_a_file_that_ends_at_any_byte(case: Case, tmp_path, record, deadly: bool):
    """RLIMIT_FSIZE: the kernel kills the process at a byte of a file, or refuses to write on, as when a disk is full."""
    start = time.perf_counter()
    sizes = {path.name: path.stat().st_size for path in (case.straight / "checkpoints" / "step-000012").iterdir()}
    assert len(sizes) == 5

    def limited(name: str, size: int) -> Callable[[], None]:
        def before() -> None:
            write, save, seen = files._write, RunFolder.save, []
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)

            def limited_write(path: Path, data: bytes) -> None:
                seen.append(path.name)
                if seen.count(name) == 3:  # the third save
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
                    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                try:
                    write(path, data)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

            def save_and_wait(self, model, optimizer, state, keep, evaluations):
                save(self, model, optimizer, state, keep, evaluations)
                self.wait_until_saved()  # the limit is the whole process's, so the loop must not write meanwhile

            files._write, RunFolder.save = limited_write, save_and_wait

        return before

    def trial(name: str, size: int) -> Callable[[], None]:
        def run() -> None:
            folder = tmp_path / f"{name}-{size}"
            code = wait(case.start(folder, before=limited(name, size)))
            output = log(folder).read_text()
            if deadly:
                assert code == -signal.SIGXFSZ, (code, output)
            else:
                assert code == ExitCode.CHECKPOINT and "File too large" in output and "bytes" in output, (code, output)
                assert not list(folder.rglob(".*.tmp")), "what was half written is still there"
            assert case.check_what_is_there(folder) == [2, 4]
            case.finish(folder)
            shutil.rmtree(folder)

        return run

    few = (1, 8) if THOROUGH else ()
    cuts = {(name, cut) for name, size in sizes.items() for cut in (0, *few, size // 2, size - 1)}
    all_pass({f"{name}-{cut}": trial(name, cut) for name, cut in sorted(cuts)}, tmp_path)
    what = "SIGXFSZ in the middle of a file" if deadly else "no room for the rest of a file"
    record(what, len(cuts), start)


def test_a_full_disk_is_noticed_while_training_continues(case: Case, tmp_path, record):
    """The checkpoint of step 6 fails in its thread, some files later than the loop takes another step."""
    start = time.perf_counter()

    def before() -> None:
        write = files._write

        def full(path: Path, data: bytes) -> None:
            if path.parent.name == ".step-000006.tmp" and path.name == "MANIFEST.json":
                time.sleep(0.3)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(path, data)

        files._write = full

    folder = tmp_path / "run"
    assert wait(case.start(folder, before=before)) == ExitCode.CHECKPOINT
    output = log(folder).read_text()
    assert "step-000006 cannot be written: No space left on device" in output and "Traceback" not in output
    assert case.check_what_is_there(folder) == [2, 4] and not list(folder.rglob(".*.tmp"))
    assert max(row["step"] for row in whole_rows(folder / "metrics.jsonl")) in (6, 7, 8)
    case.finish(folder)
    record("a full disk while training continues", 1, start)


def test_killed_as_a_program_of_its_own(case: Case, tmp_path, record):
    """python train_loop.py, killed and started again, without any of the machinery above."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "train_loop.py"), *case.flags, "--output-dir", "run"]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for saved in (4, 8):
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | one_thread, stdout=subprocess.DEVNULL)
        while not (tmp_path / "run" / "checkpoints" / f"step-{saved:06d}").exists() and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | one_thread, capture_output=True, text=True)
    assert done.returncode == 0 and "It resumes bit for bit as if it had not stopped." in done.stdout, done.stdout + done.stderr
    case.check_finished(tmp_path / "run")
    record("SIGKILL of python train_loop.py", 2, start)
