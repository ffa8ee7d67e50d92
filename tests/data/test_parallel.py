"""Tokenizing on several cores and from the cache gives what one core gives, in order and in flat memory."""

import dataclasses
import errno
import functools
import io
import json
import multiprocessing
import os
import re
import signal
import time

import pytest
from rich.console import Console

from qlora.config import TrainConfig
from qlora.data import dataset, parallel, token_cache
from qlora.data.dataset import TokenizedDataset, check_files, encode_all, encode_files
from qlora.data.formats import Example
from qlora.data.messages import Message
from qlora.data.parallel import map_in_order
from qlora.errors import DataError, EnvironmentProblem, ExitCode

pytestmark = pytest.mark.skipif(parallel.sys.platform != "linux", reason="processes are forked on Linux alone")


def slow_square(number: int) -> int:
    time.sleep(0.02 if number % 3 == 0 else 0.0)  # those that follow overtake it
    return number * number


def children() -> list:
    return multiprocessing.active_children()


@pytest.mark.parametrize("num_processes", [1, 3])
def test_results_come_in_order(num_processes):
    assert list(map_in_order(slow_square, iter(range(40)), num_processes)) == [n * n for n in range(40)]
    assert list(map_in_order(slow_square, iter([]), num_processes)) == [] == children()


def test_chunks_are_processed_elsewhere_by_what_cannot_be_pickled():
    found = set(map_in_order(lambda _: os.getpid(), iter(range(40)), 3))
    assert os.getpid() not in found and 1 <= len(found) <= 3


def test_no_more_is_read_ahead_than_memory_should_hold():
    taken = []
    chunks = (taken.append(number) or number for number in range(1000))
    results = map_in_order(slow_square, chunks, 2)
    for _ in range(3):
        next(results)
    time.sleep(0.1)
    assert len(taken) <= 3 + 2 * parallel.AHEAD
    results.close()
    assert children() == []


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed. The machine may have run out of memory"),
        (lambda: os._exit(9), "exited early, with code 9. Its error is printed above"),
        (lambda: 1 / 0, "exited early, with code 1. Its error is printed above"),
    ],
)
def test_a_process_that_ends_is_an_error_and_the_others_end(end, words):
    with pytest.raises(EnvironmentProblem, match=words):
        list(map_in_order(lambda number: end() if number == 5 else number, iter(range(100)), 2))
    assert children() == []


def test_a_process_that_is_killed_while_it_waits_is_an_error_too(monkeypatch):
    pool = parallel._Pool(slow_square, 1)
    pool.send(0, 1)
    assert pool.take(0) == 1
    (process,) = pool._workers.values()
    process.kill()
    process.join()
    with pytest.raises(EnvironmentProblem, match="was killed"):
        pool.send(1, 1)
    pool.close()


def test_a_process_that_cannot_start_is_told_apart_from_a_full_disk(monkeypatch, template, several):
    def refuse(function):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(parallel, "_start", refuse)
    with pytest.raises(EnvironmentProblem, match=r"No process could be started.*Resource temporarily unavailable"):
        encode_all([example(line) for line in range(1, 50)], "f", template, TrainConfig())


# -- examples --------------------------------------------------------------------------------------------------------


def example(line: int, answer: str = "answer") -> Example:
    return Example(
        (Message("user", f"question {line}"), Message("assistant", f"{answer} {line}" + " and so on" * (line % 5))), line
    )


@pytest.fixture
def several(monkeypatch):
    """What is done with many examples on several cores is done here with 20, on three."""
    monkeypatch.setattr(dataset, "MANY", 20)
    monkeypatch.setattr(dataset, "CHUNK", 7)
    monkeypatch.setattr(dataset, "num_cores", lambda: 3)


def test_examples_are_encoded_as_one_process_does(template, monkeypatch, several):
    config = TrainConfig(max_length=120, allow_drop=True)
    rows = [example(line, "a" * 200 if line % 9 == 4 else "answer <|end|>") for line in range(1, 101)]
    counted = []
    ours, notes = encode_all(iter(rows), "f", template, config, None, counted.append)
    monkeypatch.setattr(dataset, "num_cores", lambda: 1)
    theirs, same_notes = encode_all(rows, "f", template, config)
    assert list(ours) == list(theirs) and ours.sha256 == theirs.sha256 and ours.counts == theirs.counts
    assert notes == same_notes and "dropped as longer than 120 (lines 4, 13, 22" in notes and "<|end|>" in notes
    assert sum(counted) == 100 and len(counted) == 15


def test_the_first_row_that_is_wrong_is_named(template, several):
    rows = [example(line, "a" * (100 if line in (31, 64) else 1)) for line in range(1, 101)]
    with pytest.raises(DataError, match=r"f:31: \d+ tokens, more than") as caught:
        encode_all(rows, "f", template, TrainConfig(max_length=80, on_long="error"))
    assert caught.value.exit_code == ExitCode.DATA and children() == []


def test_a_row_is_named_with_its_file_though_a_process_found_it(template, tmp_path, monkeypatch, several):
    for name, lengths in (("a", [1] * 90), ("b", [1] * 40 + [150] + [1] * 40)):
        rows = [json.dumps({"prompt": "q", "completion": "x" * length}) + "\n" for length in lengths]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    files = tuple(str(tmp_path / f"{name}.jsonl") for name in "ab")
    config = TrainConfig(train_file=files, max_length=120, on_long="error")
    with pytest.raises(DataError, match=r"/b\.jsonl:41: \d+ tokens, more than --max-length 120"):
        encode_files(config, check_files(config), template, Console(file=io.StringIO()))


# -- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path, monkeypatch, several):
    """A file of 50 rows, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q {n}", "completion": "a" * (n % 7 + 1)}) + "\n" for n in range(50)))
    return path


def tokenize(path, template, **changes) -> tuple[TokenizedDataset, str]:
    config = TrainConfig(train_file=str(path), **changes)
    console = Console(file=io.StringIO(), width=10_000)
    samples, _ = encode_files(config, check_files(config), template, console)
    return samples, console.file.getvalue()


def entries(path) -> list:
    return sorted((path.parent / "cache" / "qlora-train" / "tokenized").iterdir())


def test_the_same_data_are_tokenized_once(source, template, monkeypatch):
    first, notes = tokenize(source, template)
    (entry,) = entries(source)
    assert "tokenized before" not in notes
    copy = source.with_name("copy.jsonl")
    copy.write_text(source.read_text().replace('"prompt": ', '"prompt":   '))  # other bytes, the same examples
    monkeypatch.setattr(dataset, "encode", None)
    again, said = tokenize(copy, template)
    assert list(again) == list(first) and again.sha256 == first.sha256 and again.counts == first.counts
    assert said.strip() == notes.strip().replace("; form", f"; tokenized before, from {entry}; form")
    assert entries(source) == [entry]


def test_what_changes_ids_or_labels_changes_the_entry(source, template, monkeypatch):
    tokenize(source, template)
    for count, changes in enumerate(({"max_length": 300}, {"on_long": "truncate"}, {"loss_on": "all"}), start=2):
        tokenize(source, template, **changes)
        assert len(entries(source)) == count
    settings = TrainConfig()
    same = functools.partial(token_cache.entry, "content", template, settings)
    assert same() == same() != token_cache.entry("other", template, settings)
    dated = template._replace(date="2020-01-01T00:00:00")
    assert token_cache.entry("content", dated, settings) == same()  # plain text prints no date
    for changes in ({"stop_id": 7}, {"begin_ids": (9,)}, {"special": re.compile("x")}, {"name": "chat"}):
        assert token_cache.entry("content", template._replace(**changes), settings) != same()
    before = same()
    template, dated = template._replace(name="chat"), dated._replace(name="chat")
    same = functools.partial(token_cache.entry, "content", template, settings)
    template.tokenizer.chat_template, kept = "{{ strftime_now('%d') }}", template.tokenizer.chat_template
    try:
        assert len({before, same(), token_cache.entry("content", dated, settings)}) == 3
    finally:
        template.tokenizer.chat_template = kept
    before = same()
    with monkeypatch.context() as patch:
        patch.setattr(template.tokenizer, "split_special_tokens", True)
        assert same() != before
    assert same() == before
    read_text = token_cache.Path.read_text
    monkeypatch.setattr(token_cache.Path, "read_text", lambda path, **more: read_text(path, **more) + "# edited")
    assert same() != before


@pytest.mark.parametrize("damage", ["numbers.bin", "index.json", "shorter", "gone"])
def test_a_damaged_entry_is_made_again(source, template, damage):
    first, _ = tokenize(source, template)
    (entry,) = entries(source)
    if damage == "gone":
        (entry / "numbers.bin").unlink()
    elif damage == "shorter":
        (entry / "numbers.bin").write_bytes((entry / "numbers.bin").read_bytes()[:-8])
    else:
        data = bytearray((entry / damage).read_bytes())
        data[len(data) // 2] ^= 1
        (entry / damage).write_bytes(data)
    again, notes = tokenize(source, template)
    assert list(again) == list(first) and "tokenized before" not in notes
    assert "tokenized before" in tokenize(source, template)[1]


@pytest.mark.parametrize("key", ["lines", "tally", "lengths"])
def test_a_damaged_index_is_made_again(source, template, key):
    first, _ = tokenize(source, template)
    (entry,) = entries(source)
    text = (entry / "index.json").read_text()
    sha256, _, index = text.partition("\n")
    changed = json.loads(index) | {key: []}
    (entry / "index.json").write_text(f"{sha256}\n{json.dumps(changed)}")
    again, notes = tokenize(source, template)
    assert list(again) == list(first) and "tokenized before" not in notes


def test_data_that_change_between_check_and_tokenizing_are_refused_and_not_kept(source, template):
    config = TrainConfig(train_file=str(source))
    checked = check_files(config)
    source.write_text(source.read_text().replace("q 7", "other"))
    with pytest.raises(DataError, match=r"train\.jsonl changed while it was read"):
        encode_files(config, checked, template, Console(file=io.StringIO()))
    assert not (source.parent / "cache").exists()


def test_data_of_which_nothing_fits_are_refused_each_time(source, template):
    for _ in range(2):
        with pytest.raises(DataError, match="none of 50 examples fits --max-length 3"):
            tokenize(source, template, max_length=3)


def test_a_cache_of_another_user_is_read(source, template, monkeypatch):
    first, _ = tokenize(source, template)

    def refuse(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(token_cache, "touch", refuse)
    again, notes = tokenize(source, template)
    assert list(again) == list(first) and "tokenized before" in notes


def test_what_a_process_that_died_was_writing_goes_after_a_day(source, template):
    tokenize(source, template)
    folder = entries(source)[0].parent
    for name, age in ((".old", 90_000), (".new", 0)):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age,) * 2)
    tokenize(source, template, max_length=300)
    assert not (folder / ".old").exists() and (folder / ".new").exists()


def test_a_cache_that_cannot_be_written_is_a_note(source, template):
    (source.parent / "cache").write_text("a file")
    samples, notes = tokenize(source, template)
    assert len(samples) == 50 and f"; not kept in {source.parent}/cache/qlora-train/tokenized: Not a directory; form" in notes


def test_the_oldest_entries_go_and_few_rows_make_none(source, template, monkeypatch):
    monkeypatch.setattr(token_cache, "MAX_ENTRIES", 2)
    for age, length in enumerate((300, 301)):
        tokenize(source, template, max_length=length)
        for entry in entries(source):
            os.utime(entry, (1000 * age, 1000 * age))
    assert len(entries(source)) == 2
    tokenize(source, template, max_length=300)  # used: it is the newest now
    tokenize(source, template, max_length=302)
    assert len(entries(source)) == 2
    assert "tokenized before" in tokenize(source, template, max_length=300)[1]
    source.write_text("".join(source.read_text().splitlines(keepends=True)[:19]))
    monkeypatch.setattr(token_cache, "entry", None)
    assert len(tokenize(source, template)[0]) == 19


def test_samples_of_the_cache_live_as_long_as_they_are_used(source, template):
    tokenize(source, template)
    samples, _ = tokenize(source, template)
    wanted = list(samples)
    for path in entries(source)[0].iterdir():
        path.unlink()
    assert list(samples) == wanted and dataclasses.is_dataclass(dataset.Tally)
