"""Damage to what is on disk: it is found and named, nothing wrong is trained on, and what is sound is gone on from."""

import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch

import train_loop
from qlora.errors import ExitCode, UserError
from qlora.run import checkpoint, files
from qlora.run.files import MANIFEST, _write, remove_leftovers, write_file, write_folder
from qlora.run.folder import RunFolder
from tests.faults.conftest import SEED
from tests.faults.harness import Case, all_pass, log, rows, stop_at, wait, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
ADAPTER, TRAINER_STATE, STATE, MANIFEST = checkpoint.ADAPTER, checkpoint.TRAINER_STATE, checkpoint.STATE, MANIFEST
FILES = (ADAPTER, "adapter_config.json", TRAINER_STATE, STATE, MANIFEST)
NEWEST = "step-000012"


def digest(folder: Path) -> dict[str, tuple]:
    """Name -> size, time and content of all that is in a folder, itself included."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (path.stat().st_size, path.stat().st_mtime_ns, content)
    return found


# -- a checkpoint, damaged in any way ----------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(case: Case, tmp_path) -> Path:
    """Copies of the last two checkpoints of a run that ended well."""
    copied = shutil.copytree(case.straight / "checkpoints", tmp_path / "checkpoints")
    assert list(checkpoint.by_step(copied))[-1] == 12 and len(checkpoint.by_step(copied)) == 2
    assert {path.name for path in (copied / NEWEST).iterdir()} == set(FILES)
    return copied


@contextlib.contextmanager
def damaged(folder: Path, *names: str) -> Iterator[list[Path]]:
    """Files of the checkpoint to damage; afterward they are as they were."""
    kept = {folder / name: (folder / name).read_bytes() for name in names}
    yield list(kept)
    for path, content in kept.items():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(content)
    assert checkpoint.problem_of(folder) is None


def check_found(checkpoints: Path, words: str, what: str) -> None:
    """The newest is told to be damaged, in the words given; the one before it takes its place, and is never removed."""
    older, newest = checkpoint.by_step(checkpoints).values()
    try:
        problem = checkpoint.problem_of(newest)
        found = checkpoint.newest(checkpoints)
        checkpoint.prune(checkpoints, 2, {})
    except Exception as error:
        error.add_note(f"raised by: {what}")
        raise
    assert problem, f"{what}: nobody noticed"
    assert words in problem and "\n" not in problem, f"{what}: {problem}"
    assert found == (older, {newest: problem}), what
    assert checkpoint.problem_of(older) is None, f"{what}: the sound one was pruned"


@pytest.mark.parametrize("name", FILES)
def test_files_cut_gone_and_swapped(checkpoints, record, name: str):
    start, tried = time.perf_counter(), 0
    older, newest = checkpoint.by_step(checkpoints).values()
    content = (newest / name).read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 1):
        with damaged(newest, name) as [path]:
            path.write_bytes(content[:size])
            check_found(checkpoints, name, f"cut to {size} bytes")
            tried += 1
    with damaged(newest, name) as [path]:
        path.unlink()
        check_found(checkpoints, f"{name} cannot be read: No such file", "deleted")
    with damaged(newest, name) as [path]:
        path.unlink()
        path.mkdir()
        check_found(checkpoints, f"{name} cannot be read: Is a directory", "a folder in its place")
    with damaged(newest, name) as [path]:
        path.write_bytes(content + b"\0")
        check_found(checkpoints, name, "a byte longer")
    tried += 3
    other = (older / name).read_bytes()
    assert (other == content) == (name == "adapter_config.json")
    if other != content:
        with damaged(newest, name) as [path]:
            path.write_bytes(other)
            check_found(checkpoints, MANIFEST, "that of the other checkpoint")
            tried += 1
    if os.geteuid() != 0:  # to whom no file is closed
        with damaged(newest, name) as [path]:
            path.chmod(0)
            check_found(checkpoints, f"{name} cannot be read: Permission denied", "without permission")
            path.chmod(0o644)
            tried += 1
    record(f"file of a checkpoint cut, gone or swapped: {name}", tried, start)


@pytest.mark.parametrize("name", FILES)
def test_single_bits(checkpoints, record, name: str):
    start = time.perf_counter()
    newest = checkpoints / NEWEST
    content = (newest / name).read_bytes()
    draw = random.Random(f"{SEED} {name}")
    tried = same = 0
    for place in (draw.randrange(8 * len(content)) for _ in range(32)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        if name == MANIFEST and same_json(content, bytes(flipped)):
            same += 1  # a space that became a tab: no damage
            continue
        with damaged(newest, name) as [path]:
            path.write_bytes(flipped)
            check_found(checkpoints, "" if name == MANIFEST else name, f"bit {place}")
            tried += 1
    assert tried + same == 32 and tried > 20
    record(f"bit flipped: {name}", tried, start)


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def entries(checkpoints: Path) -> dict:
    return json.loads((checkpoints / NEWEST / MANIFEST).read_bytes())["files"]


def test_manifests_that_were_made_up(checkpoints, record):
    start = time.perf_counter()
    true = entries(checkpoints)
    some = true[STATE]
    made_up = {
        "a list": (b"[]", f"{MANIFEST} is damaged"),
        "null": (b"null", f"{MANIFEST} is damaged"),
        "a number": (b"1", f"{MANIFEST} is damaged"),
        "nothing in it": (b"{}", f"{MANIFEST} is damaged"),
        "deep": (b"[" * 100_000 + b"]" * 100_000, f"{MANIFEST} is damaged"),
        "deep inside": (b'{"files": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", f"{MANIFEST} is damaged"),
        "not UTF-8": (b'{"files": {"\xff\xfe": {}}}', f"{MANIFEST} is damaged"),
        "UTF-16": (json.dumps({"files": true}).encode("utf-16")[:-1], f"{MANIFEST} is damaged"),
        "zeros, as after a power cut": (bytes(500), f"{MANIFEST} is damaged"),
        "files are null": (b'{"files": null}', f"{MANIFEST} is damaged"),
        "files are a list": (json.dumps({"files": list(true)}).encode(), f"{MANIFEST} is damaged"),
        "an entry is null": (json.dumps({"files": {**true, STATE: None}}).encode(), f"{MANIFEST} is damaged"),
        "an entry is a number": (json.dumps({"files": {**true, STATE: 1}}).encode(), f"{MANIFEST} is damaged"),
        "a size is a list": (json.dumps({"files": {**true, STATE: {**some, "size": []}}}).encode(), f"{MANIFEST} is damaged"),
        "a size is text": (json.dumps({"files": {**true, STATE: {**some, "size": "9"}}}).encode(), f"{MANIFEST} is damaged"),
        "a sum is null": (json.dumps({"files": {**true, STATE: {**some, "sha256": None}}}).encode(), STATE),
        "no sum": (json.dumps({"files": {**true, STATE: {"size": some["size"]}}}).encode(), f"{MANIFEST} is damaged"),
        "no files": (b'{"files": {}}', f"{MANIFEST} does not list"),
        "a name with a zero": (json.dumps({"files": {**true, "a\0b": some}}).encode(), f"{MANIFEST} is damaged"),
        "no name": (json.dumps({"files": {**true, "": some}}).encode(), "cannot be read"),
        "half a surrogate": (b'{"files": {"\\ud800": {"size": 1, "sha256": ""}}}', ""),
    }
    for name in (ADAPTER, TRAINER_STATE, STATE):
        rest = {other: entry for other, entry in true.items() if other != name}
        made_up[f"without {name}"] = (json.dumps({"files": rest}).encode(), f"{MANIFEST} does not list {name}")
    for what, (manifest, words) in made_up.items():
        with damaged(checkpoints / NEWEST, MANIFEST) as [path]:
            path.write_bytes(manifest)
            check_found(checkpoints, words, what)
    record("checkpoint made up or misnamed: manifest", len(made_up), start)


def test_manifests_that_name_what_is_outside(checkpoints, record):
    start, true = time.perf_counter(), entries(checkpoints)
    outside = checkpoints.parent / "outside"
    outside.write_bytes(b"secret")
    as_written = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}  # it would verify, if it were opened
    names = ("../../outside", str(outside), "/etc/passwd", "a/../../../outside", "../step-000012/../../outside")
    for name in names:
        with damaged(checkpoints / NEWEST, MANIFEST) as [path]:
            path.write_text(json.dumps({"files": {**true, name: as_written}}))
            check_found(checkpoints, f"{MANIFEST} names {name}, which is not inside", name)
    record("checkpoint made up or misnamed: paths outside", len(names), start)


def test_states_that_were_made_up(checkpoints, record):
    """A manifest that fits does not make sense of them."""
    start, true = time.perf_counter(), entries(checkpoints)
    state = json.loads((checkpoints / NEWEST / STATE).read_bytes())
    made_up = {
        "empty": b"",
        "not JSON": b"{",
        "not UTF-8": b"\xff",
        "null": b"null",
        "a list": b"[]",
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "no step": json.dumps({name: value for name, value in state.items() if name != "step"}).encode(),
        "a step of text": json.dumps({**state, "step": "12"}).encode(),
        "step null": json.dumps({**state, "step": None}).encode(),
        "another step": json.dumps({**state, "step": 11}).encode(),
    }
    for what, content in made_up.items():
        fitting = {**true, STATE: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
        with damaged(checkpoints / NEWEST, MANIFEST, STATE) as (manifest, path):
            manifest.write_bytes(json.dumps({"files": fitting}).encode())
            path.write_bytes(content)
            check_found(checkpoints, STATE, what)
    record("checkpoint made up or misnamed: state", len(made_up), start)


def test_a_folder_under_the_name_of_another_step(checkpoints, record):
    start = time.perf_counter()
    (checkpoints / NEWEST).rename(checkpoints / "step-000013")
    check_found(checkpoints, f"{STATE} is that of step 12", "renamed")
    shutil.rmtree(checkpoints / "step-000013")
    older = next(iter(checkpoint.by_step(checkpoints).values()))
    shutil.copytree(older, checkpoints / NEWEST)
    check_found(checkpoints, f"{STATE} is that of step {int(older.name[5:])}", "a copy of the older")
    record("checkpoint made up or misnamed: folder", 2, start)


# -- the order of writing ----------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, ...]]:
    """What is flushed and renamed, in order; a flush by the inode, which stays the same when a folder is renamed."""
    seen: list[tuple[str, ...]] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))

    def watched_rename(self: Path, target: Path) -> Path:
        seen.append(("rename", str(self), str(target)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    return seen


def test_a_folder_is_flushed_inside_out_before_it_takes_its_name(calls, tmp_path):
    """In any other order a power cut could leave the name without what it stands for."""
    folder, aside = tmp_path / "step-000002", tmp_path / ".step-000002.tmp"
    write_folder(folder, {"a": b"1", "b": b"2"})
    flushed = [("flush", str(path)) for path in (aside / "a", aside / "b", aside / MANIFEST, aside)]
    assert calls == [*flushed, ("rename", str(aside), str(folder)), ("flush", str(tmp_path))]


def test_a_folder_that_is_replaced_stays_until_the_new_one_is_flushed(calls, tmp_path):
    folder, aside = tmp_path / "adapter", tmp_path / ".adapter.tmp"
    write_folder(folder, {"a": b"1"})
    calls.clear()
    write_folder(folder, {"a": b"2"})
    flushed = [("flush", str(path)) for path in (aside / "a", aside / MANIFEST, aside)]
    out_of_sight = ("rename", str(folder), str(tmp_path / ".adapter.old.tmp"))
    assert calls == [*flushed, out_of_sight, ("rename", str(aside), str(folder)), ("flush", str(tmp_path))]
    assert (folder / "a").read_bytes() == b"2" and [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_was_being_replaced_comes_back(tmp_path):
    """A process may die between the two renames, when neither the old folder nor the new one has the name."""
    folder = tmp_path / "adapter"
    write_folder(folder, {"a": b"1"})
    before = digest(folder)
    folder.rename(tmp_path / ".adapter.old.tmp")
    remove_leftovers(tmp_path)
    assert digest(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_a_file_is_flushed_before_it_takes_its_name(calls, tmp_path):
    path, aside = tmp_path / "config.yaml", tmp_path / ".config.yaml.tmp"
    write_file(path, b"1")
    assert calls == [("flush", str(aside)), ("rename", str(aside), str(path)), ("flush", str(tmp_path))]


def test_rows_are_flushed_before_the_checkpoint_that_follows_them(case: Case, tmp_path, calls):
    """Else a power cut could leave a checkpoint whose steps have no rows, and they would never come."""

    told = tmp_path / "calls.json"
    assert wait(case.start(tmp_path / "run", "--max-steps", "4", before=lambda: tell(calls, told))) == 0
    seen = [(kind, Path(names[-1]).name) for kind, *names in json.loads(told.read_text())]
    saved = [index for index, (kind, name) in enumerate(seen) if kind == "rename" and name.startswith("step-")]
    assert [seen[index][1] for index in saved] == ["step-000002", "step-000004"]
    for since, index in zip([0, *saved], saved, strict=False):
        flushed = [name for kind, name in seen[since:index] if kind == "flush"]
        assert flushed.index("metrics.jsonl") < flushed.index(ADAPTER), flushed


def tell(calls: list[tuple[str, ...]], path: Path) -> None:
    """Have the run that follows write what was called to a file, at its end."""
    finish = RunFolder.finish

    def finish_and_tell(self: RunFolder, *steps: int) -> None:
        finish(self, *steps)
        path.write_text(json.dumps(calls))

    RunFolder.finish = finish_and_tell


# -- runs in a folder that was damaged ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in step 8."""
    folder = tmp_path_factory.mktemp("damage") / "prepared"
    assert wait(case.start(folder, before=lambda: stop_at(8))) == 128 + signal.SIGTERM
    assert case.check_what_is_there(folder) == [4, 8]
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_the_newest_is_damaged(case: Case, prepared, tmp_path, record):
    start = time.perf_counter()
    damages = {ADAPTER: (cut, "bytes"), TRAINER_STATE: (flip, "SHA-256 differs"), STATE: (Path.unlink, "No such file")}

    def trial(name: str, damage: Callable[[Path], None], words: str) -> Callable[[], None]:
        def run() -> None:
            folder = shutil.copytree(prepared, tmp_path / name)
            damage(folder / "checkpoints" / "step-000008" / name)
            was = {path.name: path.read_bytes() for path in (folder / "checkpoints" / "step-000008").iterdir()}
            case.finish(folder)
            output = log(folder).read_text()
            assert re.search(rf"Checkpoint step-000008 is damaged: {name} .*{words}", output), output
            assert "Resuming after step-000004. It resumes bit for bit as if it had not stopped." in output, output
            aside = folder / "checkpoints" / "step-000008.damaged"
            assert {path.name: path.read_bytes() for path in aside.iterdir()} == was, "it is kept, to be looked at"

        return run

    all_pass({name: trial(name, *damage) for name, damage in damages.items()}, tmp_path)
    record("run folder damaged: newest checkpoint", len(damages), start)


def test_all_are_damaged(case: Case, prepared, tmp_path, record):
    start = time.perf_counter()
    folder = shutil.copytree(prepared, tmp_path / "run")
    cut(folder / "checkpoints" / "step-000004" / STATE)
    flip(folder / "checkpoints" / "step-000008" / ADAPTER)
    before = digest(folder)
    assert wait(case.start(folder)) == ExitCode.CHECKPOINT
    output = log(folder).read_text()
    assert "Checkpoint step-000004 is damaged: state.json has" in output, output
    assert "Checkpoint step-000008 is damaged: adapter_model.safetensors is not what was written" in output, output
    assert "none of its 2 checkpoints is sound" in output and "Traceback" not in output, output
    assert digest(folder) == before
    record("run folder damaged: all checkpoints (refused)", 1, start)


def test_leftovers_go_and_foreign_files_stay(case: Case, prepared, tmp_path, record):
    start = time.perf_counter()
    folder = shutil.copytree(prepared, tmp_path / "run")
    leftovers = [".adapter.tmp/a", ".config.yaml.tmp", "checkpoints/.step-000099.tmp/a", "checkpoints/.step-000004.old.tmp/a"]
    foreign = ["notes.txt", "checkpoints/notes.txt", "checkpoints/step-backup/a", "checkpoints/.hidden.tmp"]
    foreign += ["checkpoints/step-12/a", ".mine.tmp", "checkpoints/step-000099.tmp", "adapter-of-mine/a"]
    for name in [*leftovers, *foreign]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    assert wait(case.start(folder)) == 0, log(folder).read_text()[-3000:]
    for name in foreign:
        assert (folder / name).read_text() == name
        if name.endswith(".tmp"):  # which check_finished would take for leftovers
            (folder / name).unlink()
    case.check_finished(folder)
    assert not [name for name in leftovers if (folder / name).exists()]
    record("run folder damaged: leftovers of a dead process", len(leftovers), start)


def test_a_finished_run_is_left_as_it_is(case: Case, tmp_path, record):
    start = time.perf_counter()
    folder = shutil.copytree(case.straight, tmp_path / "run")
    before = digest(folder)
    assert wait(case.start(folder)) == 0
    assert "holds this run, and it is complete." in log(folder).read_text()
    assert digest(folder) == before
    record("run asked for what it must refuse: once finished", 1, start)


def test_two_processes_in_one_folder(case: Case, tmp_path, record):
    start = time.perf_counter()
    folder = tmp_path / "run"
    (ready, tell_ready), (go, tell_go) = os.pipe(), os.pipe()

    def wait_in_step_3() -> None:
        os.close(tell_go)  # so that it goes on, too, when the parent dies
        original, seen = train_loop.train_step, []

        def waiting(*args, **kwargs):
            seen.append(1)
            if len(seen) == 3:
                wait_for(folder / "checkpoints" / "step-000002")  # what comes after it changes nothing
                os.write(tell_ready, b".")
                os.read(go, 1)
            return original(*args, **kwargs)

        train_loop.train_step = waiting

    first = case.start(folder, before=wait_in_step_3)
    os.close(tell_ready)
    try:
        assert os.read(ready, 1) == b".", log(folder).read_text()
        before = digest(folder)
        second = wait(case.start(folder))  # while the first stands in its step
        output, after = log(folder).read_text(), digest(folder)
    finally:
        os.write(tell_go, b".")
        code = wait(first)
        for descriptor in (ready, go, tell_go):
            os.close(descriptor)
    assert second == ExitCode.CHECKPOINT, output
    assert f'is in use by another process ({{"pid": {first}, ' in output and "Traceback" not in output, output
    assert after == before
    assert code == 0, log(folder).read_text()[-3000:]
    case.check_finished(folder)
    record("run asked for what it must refuse: a second process", 1, start)


def test_metrics_torn_or_gone(case: Case, prepared, tmp_path, record):
    start = time.perf_counter()

    def torn(tail: bytes) -> Callable[[], None]:
        def run() -> None:
            folder = shutil.copytree(prepared, tmp_path / f"torn-{len(tail)}")
            with (folder / "metrics.jsonl").open("ab") as file:
                file.write(tail)
            case.finish(folder)

        return run

    def gone() -> None:
        folder = shutil.copytree(prepared, tmp_path / "gone")
        (folder / "metrics.jsonl").unlink()
        assert wait(case.start(folder)) == 0, log(folder).read_text()[-3000:]
        later = [row for row in rows(case.straight) if row["step"] > 8 or (row["step"] == 8 and row["event"] == "eval")]
        assert rows(folder) == later
        name = "adapter/adapter_model.safetensors"
        assert (folder / name).read_bytes() == (case.straight / name).read_bytes()

    tails = [b"{", b'{"event": "step", "step": 9, "epo', bytes(100)]
    all_pass({**{f"torn {len(tail)}": torn(tail) for tail in tails}, "gone": gone}, tmp_path)
    record("run folder damaged: metrics.jsonl torn or gone", len(tails) + 1, start)


def test_a_line_of_metrics_or_the_mark_of_the_end_that_is_not_json(case: Case, prepared, tmp_path, record):
    """One bit of a file that holds no weights must not keep a run from its end with a traceback."""
    start = time.perf_counter()

    def trial(source: Path, name: str, damage: Callable[[bytes], bytes], number: int) -> Callable[[], None]:
        def run() -> None:
            folder = shutil.copytree(source, tmp_path / f"run-{number}")
            (folder / name).write_bytes(damage((folder / name).read_bytes()))
            code = wait(case.start(folder))
            output = log(folder).read_text()
            assert "Traceback" not in output and (code == 0 or (code in set(ExitCode) and name in output)), output[-3000:]

        return run

    damages: list[tuple[Path, str, Callable[[bytes], bytes]]] = [
        (prepared, "metrics.jsonl", lambda content: b"\xff" + content[1:]),
        (prepared, "metrics.jsonl", lambda content: content.replace(b'"step":', b'"stop":')),
        (prepared, "metrics.jsonl", lambda content: content.replace(b'"epoch"', b'"epoch', 1)),
        (case.straight, "finished.json", lambda content: content[:-1]),
        (case.straight, "finished.json", lambda _: b"null"),
        (case.straight, "run.json", lambda content: content[:-1]),
        (prepared, "run.json", lambda content: content[:-1]),
        (prepared, "run.json", lambda _: b"{}"),
        (case.straight, "finished.json", lambda _: b"{}"),
    ]
    all_pass({f"trial-{number}": trial(*damage, number) for number, damage in enumerate(damages)}, tmp_path)
    record("run folder damaged: run.json, finished.json", len(damages), start)


def test_a_disk_that_gives_back_something_else(case: Case, tmp_path, record):
    """What was written is read again: a save that went wrong ends the run while the older checkpoints are there."""
    start = time.perf_counter()

    def unsound() -> None:
        write = files._write

        def unsound_write(path: Path, content: files.Content) -> None:
            if path.name == TRAINER_STATE and path.parent.name == ".step-000006.tmp":
                content = b"".join(files.pieces_of(content))
                content = bytes([content[0] ^ 1]) + content[1:]
            write(path, content)

        files._write = unsound_write

    folder = tmp_path / "run"
    assert wait(case.start(folder, before=unsound)) == ExitCode.CHECKPOINT
    output = log(folder).read_text()
    assert f"was written and reads back otherwise: {TRAINER_STATE} is not what was written" in output, output
    sound = [step for step, path in checkpoint.by_step(folder / "checkpoints").items() if not checkpoint.problem_of(path)]
    assert sound == [2, 4] and "Traceback" not in output
    case.finish(folder)
    record("run folder damaged: disk that reads back otherwise", 1, start)


def test_changed_data_is_no_data_to_go_on_with(case: Case, tmp_path, record):
    start = time.perf_counter()
    train = shutil.copy(case.flags[case.flags.index("--train-file") + 1], tmp_path / "train.jsonl")
    flags = ["--train-file", str(train)]
    folder = tmp_path / "run"
    assert wait(case.start(folder, *flags, before=lambda: stop_at(4))) == 128 + signal.SIGTERM
    content = Path(train).read_text()
    before = digest(folder)
    Path(train).write_text(content.replace("train 7", "train 8", 1))
    assert wait(case.start(folder, *flags)) == ExitCode.CONFIGURATION
    output = log(folder).read_text()
    assert re.search(r"holds another run, at step 4\b.*differs in\n.*\n  data ", output) and "Traceback" not in output, output
    assert digest(folder) == before
    Path(train).write_text(content)
    case.finish(folder, *flags)
    record("run asked for what it must refuse: changed data", 1, start)


# -- what a resume brings back -----------------------------------------------------------------------------------------


def test_dropout_is_the_same_over_a_stop_whatever_else_is_drawn(case: Case, tmp_path, record):
    """Stops in the middle of an epoch, between the micro-batches of a step, and at the end of an epoch. Each process draws
    garbage from every generator, before and between micro-batches; the run that it is compared with draws none."""
    start = time.perf_counter()

    def drawing(folder: Path, end: str | None, at: int) -> Callable[[], None]:
        def before() -> None:
            original, calls = train_loop.token_loss_sum, []

            def draw() -> None:
                random.gauss(0, 1), numpy.random.randn(at + 1), torch.randn(at + len(calls) + 1)

            def watched(*args, **kwargs):
                if not torch.is_grad_enabled():  # an evaluation
                    return original(*args, **kwargs)
                calls.append(1)
                if len(calls) == at and end == "killed":
                    wait_for(folder / "checkpoints" / "step-000006")
                    os.kill(os.getpid(), signal.SIGKILL)
                if len(calls) == at and end == "stopped":
                    os.kill(os.getpid(), signal.SIGTERM)
                draw()
                return original(*args, **kwargs)

            def restored(*args):
                state = restore(*args)
                draw()
                return state

            restore, checkpoint.restore, train_loop.token_loss_sum = checkpoint.restore, restored, watched

        return before

    def trial(end: str, at: int, code: int) -> Callable[[], None]:
        def run() -> None:
            folder = tmp_path / f"run-{end}-{at}"
            assert wait(case.start(folder, before=drawing(folder, end, at))) == code, log(folder).read_text()
            assert (found := case.check_what_is_there(folder)) and max(found) < 12
            assert wait(case.start(folder, before=drawing(folder, None, 0))) == 0, log(folder).read_text()
            case.check_finished(folder)

        return run

    # Micro-batches, of which an epoch has 7 and each of its steps 2, the last one 1: the second of step 7, the first and the
    # second of step 6, and the only one of step 8.
    stops = [("killed", 13, -signal.SIGKILL), ("stopped", 10, 143), ("stopped", 11, 143), ("stopped", 14, 143)]
    all_pass({f"trial-{end}-{at}": trial(end, at, code) for end, at, code in stops}, tmp_path)
    record("dropout compared over a stop", len(stops), start)


def test_steps_that_are_not_finite_are_skipped_and_counted_over_a_resume(case: Case, tmp_path, record):
    start = time.perf_counter()
    folder = tmp_path / "run"

    def spoiled(spoil: set[int], stop: int | None) -> Callable[[], None]:
        def before() -> None:
            original, calls = train_loop.train_step, []

            def watched(decoder, optimizer, micro_batches, loss_sum, *rest):
                calls.append(1)
                if len(calls) == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                factor = math.nan if len(calls) in spoil else 1.0
                return original(decoder, optimizer, micro_batches, lambda *args: loss_sum(*args) * factor, *rest)

            train_loop.train_step = watched

        return before

    permitted = ("--skip-nonfinite", "2")
    assert wait(case.start(folder, *permitted, before=spoiled({3, 5}, 6))) == 143, log(folder).read_text()
    assert "The step was skipped (2 of 2 allowed)." in log(folder).read_text()
    newest = folder / "checkpoints" / "step-000006"
    assert json.loads((newest / STATE).read_text())["skipped"] == 2
    for name in (ADAPTER, TRAINER_STATE):
        tensors = safetensors.torch.load_file(newest / name)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values()), "a NaN got in"
    copied = shutil.copytree(folder, tmp_path / "copied")
    assert wait(case.start(copied, *permitted, before=spoiled({2}, None))) == ExitCode.NUMERICS
    output = log(copied).read_text()
    assert "Step 8 is not finite" in output and f"All up to step 6 is safe in {copied}" in output, output
    assert list(checkpoint.by_step(copied / "checkpoints"))[-1] == 6
    assert wait(case.start(folder, *permitted)) == 0, log(folder).read_text()
    losses = {row["step"]: row["loss"] for row in rows(folder) if row["event"] == "step"}
    assert [step for step, loss in losses.items() if loss is None] == [3, 5] and len(losses) == 12
    record("NaN in a step", 3, start)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    write_folder(folder, {"a": b"1", "b": b"1"})
    before, write = digest(folder), _write

    def failing(path: Path, content: bytes) -> None:
        if path.name == "b":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(files, "_write", failing)
    with pytest.raises(UserError, match="cannot be written: No space left on device") as caught:
        write_folder(folder, {"a": b"2", "b": b"2"})
    assert caught.value.exit_code == ExitCode.CHECKPOINT
    assert digest(folder) == before and list(tmp_path.iterdir()) == [folder]
