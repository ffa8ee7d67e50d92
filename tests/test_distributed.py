"""Several processes train as one does: real ones, which talk by gloo."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from qlora import distributed
from qlora.config import TrainConfig
from qlora.data.batch import _elsewhere, collate, collate_packed, training_batches, training_steps
from qlora.distributed import Ranks, shares
from qlora.errors import ExitCode, UserError
from qlora.run.prepare import set_up_torch

ROOT = Path(__file__).parents[1]
FLAGS = ["--model", "tiny-random", "--lora-r", "4", "--learning-rate", "1e-2", "--gradient-accumulation-steps", "3"]


# -- processes -------------------------------------------------------------------------------------------------------


def _rank(rank, size, port, argv, cache, log, breaks, slow, full):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port), "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1"}  # fmt: skip
    tempfile.tempdir = str(Path(log).with_name("scratch"))
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    torch.set_num_threads(1)
    import train_loop
    from qlora.cli import train
    from qlora.eval import generate
    from qlora.report import html
    from qlora.run import checkpoint

    if breaks == rank:
        train_loop.train_step = broken
    original = checkpoint.write
    if full and rank == 0:  # from the first checkpoint on no file may grow beyond this, as on a full disk
        limit = (resource.RLIMIT_FSIZE, (full, full))
        checkpoint.write = lambda *arguments: resource.setrlimit(*limit) or original(*arguments)
    if slow:
        checkpoint.write = lambda *arguments: time.sleep(slow) or original(*arguments)
    generate.sample_responses, html.after_training = (lambda *_: []), (lambda folder: "left out")
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os._exit(train(argv))


def broken(*_, **__):
    raise ValueError("broken")


class Started:
    """Ranks of a run, each a process."""

    def __init__(self, size: int, output: Path, *more: str, files=None, breaks=None, slow=None, full=None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train_loop", "qlora.cli"])
        self.output, self.logs = output, [output.with_name(f"{output.name}.{rank}.log") for rank in range(size)]
        argv = [*FLAGS, *more, "--output-dir", str(output)]
        for rank, lines in (files or {}).items():
            output.with_name(f"{rank}.jsonl").write_text("\n".join(lines) + "\n")
        self.processes = [
            context.Process(
                target=_rank,
                args=(
                    rank,
                    size,
                    port,
                    [word.replace("RANK", str(rank)) for word in argv],
                    os.environ["XDG_CACHE_HOME"],
                    log,
                    breaks,
                    slow,
                    full,
                ),
                daemon=True,
            )
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int]:
        """Their exit codes."""
        for process in self.processes:
            process.join(180)
        return [process.exitcode for process in self.processes]

    def wait_for(self, checkpoint: str) -> None:
        """Until there is a checkpoint."""
        while not (self.output / "checkpoints" / checkpoint).exists():
            assert all(process.is_alive() for process in self.processes), [log.read_text() for log in self.logs]
            time.sleep(0.01)

    def output_of(self, rank: int) -> str:
        """What a rank has printed."""
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""


def trained(size, output, *more):
    run = Started(size, output, *more)
    assert run.wait() == [0] * size, [run.output_of(rank) for rank in range(size)]
    return rows_of(output), load_file(output / "adapter" / "adapter_model.safetensors")


def rows_of(output):
    """Metrics, without what is measured."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in ("tokens_per_s", "peak_memory_gb")} for row in rows]


def same(one, other, within=1e-6):
    """Whether runs have the same rows and adapter, losses and weights up to rounding."""
    for ours, theirs in zip(one[0], other[0], strict=True):
        for name, value in theirs.items():
            assert ours[name] == (pytest.approx(value, rel=within) if isinstance(value, float) else value), (name, ours, theirs)
    assert all(torch.allclose(one[1][name], tensor, rtol=0, atol=within) for name, tensor in other[1].items())
    return True


# -- the same run on any number of ranks -----------------------------------------------------------------------------


@pytest.mark.parametrize("more", [("--lora-dropout", "0.1"), ("--packing", "--max-length", "500")], ids=["padded", "packed"])
def test_one_two_and_four_ranks_train_the_same(tiny, tmp_path, more):
    """Rows of different lengths, a short last step in each epoch and, with four, a rank that often has nothing to do."""
    steps = ("--max-steps", "6", *more)
    alone = trained(1, tmp_path / "1", *steps)
    for size in (2, 4):
        assert same(trained(size, tmp_path / str(size), *steps), alone)
    assert not list((tmp_path / "4").rglob("*.tmp"))


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Phi-3 with five layers, so that each of the two buffers serves several; and Bloom, whose layers return tuples."""
    folder = tmp_path_factory.mktemp("models")
    bloom = {"vocab_size": 384, "hidden_size": 64, "n_layer": 3, "n_head": 4}
    deep = transformers.AutoConfig.from_pretrained(tiny, num_hidden_layers=5)
    for name, config in (("deep", deep), ("bloom", transformers.BloomConfig(**bloom))):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
        transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("model", "size", "policy"), [("deep", 2, "full"), ("deep", 3, "none"), ("deep", 2, "selective"), ("bloom", 2, "full")]
)
def test_a_sharded_base_trains_the_same(models, tmp_path, model, size, policy):
    """Each rank keeps a part of every layer, and some have nothing to compute in the last step."""
    steps = ("--model", str(models / model), "--max-steps", "5", "--max-length", "512", "--gradient-checkpointing", policy)
    steps += ("--lora-dropout", "0.1") if model == "deep" else ("--lora-dropout", "0")
    alone = trained(1, tmp_path / "1", *steps)
    run = tmp_path / "shared"
    assert same(trained(size, run, *steps, "--shard-base"), alone)
    assert "No sample answers: no GPU holds the whole base" in run.with_name("shared.0.log").read_text()
    # The base is the same to a checkpoint, so one GPU that holds all of it may resume the run, within an epoch.
    more = ("--max-steps", "7", "--override", "max_steps", "shard_base")
    resumed, straight = (trained(1, folder, *steps, *more)[0] for folder in (run, tmp_path / "7"))
    rows = [[row["lines"] for row in found if row["event"] == "step"] for found in (resumed, straight)]
    assert rows[0] == rows[1] and len(rows[0]) == 7


def test_a_run_resumes_on_another_number_of_ranks(tiny, tmp_path):
    straight = trained(2, tmp_path / "straight", "--max-steps", "6")
    for name, sizes in (("same", (2, 2)), ("fewer", (2, 1)), ("more", (1, 3))):
        trained(sizes[0], tmp_path / name, "--max-steps", "3")
        found = trained(sizes[1], tmp_path / name, "--max-steps", "6", "--override", "max_steps")
        rows = [row for row in straight[0] if row["event"] == "step"][3:]
        ours = [row for row in found[0] if row["event"] == "step"][3:]
        # The schedule is that of the longer run from step 4 on.
        assert [row["lines"] for row in ours] == [row["lines"] for row in rows] and len(ours) == 3, name


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_killed_ends_the_run_and_it_resumes_bit_for_bit(tiny, tmp_path, victim):
    steps = ("--max-steps", "8", "--save-steps", "1")
    straight = trained(2, tmp_path / "straight", *steps)
    run = Started(2, tmp_path / "killed", *steps)
    run.wait_for("step-000003")
    run.processes[victim].kill()
    began = time.monotonic()
    codes = run.wait()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == ExitCode.ENVIRONMENT and time.monotonic() - began < 30
    assert "Another process of this run has ended" in run.output_of(1 - victim)
    found = trained(2, tmp_path / "killed", *steps)
    assert found[0] == straight[0] and all(torch.equal(found[1][name], tensor) for name, tensor in straight[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--shard-base",)], ids=["whole", "sharded"])
def test_ten_kills_at_random_moments_change_no_bit(models, tmp_path, more):
    steps = ("--model", str(models / "deep"), "--max-steps", "30", "--save-steps", "1", *more)
    draw = random.Random(len(more))
    straight = trained(2, tmp_path / "straight", *steps)
    done = 0
    for _ in range(10):
        run = Started(2, tmp_path / "killed", *steps)
        before = len(run.output_of(0))
        while len(run.output_of(0)) == before:  # they have not found each other yet; that, torchrun watches
            time.sleep(0.01)
        # Most get some steps further.
        wanted = min(done + draw.randint(0, 4), 29)
        while newest(tmp_path / "killed") < wanted and all(process.is_alive() for process in run.processes):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        victim = draw.randint(0, 1)
        run.processes[victim].kill()
        began = time.monotonic()
        codes = run.wait()
        assert time.monotonic() - began < 30
        assert codes in ([0, 0], [0, -signal.SIGKILL], [-signal.SIGKILL, 0]) or codes[1 - victim] in (1, ExitCode.ENVIRONMENT)
        done = newest(tmp_path / "killed")
    found = trained(2, tmp_path / "killed", *steps)
    assert found[0] == straight[0] and all(torch.equal(found[1][name], tensor) for name, tensor in straight[1].items())


def newest(output):
    return max((int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*")), default=0)


@pytest.mark.slow
def test_a_full_disk_on_the_first_rank_ends_all(tiny, tmp_path):
    run = Started(2, tmp_path / "run", "--max-steps", "40", "--save-steps", "1", full=20_000)
    began = time.monotonic()
    codes = run.wait()
    assert codes[0] == ExitCode.CHECKPOINT and codes[1] in (ExitCode.CHECKPOINT, ExitCode.ENVIRONMENT), codes
    assert time.monotonic() - began < 90 and "cannot be written: File too large" in run.output_of(0)
    # With room it starts again.
    assert trained(2, tmp_path / "run", "--max-steps", "3", "--override", "max_steps")[0][-1]["step"] == 3


@pytest.mark.parametrize("receivers", [[0], [1], [0, 1]])
def test_a_signal_to_any_rank_stops_all_at_the_same_step(tiny, tmp_path, receivers):
    steps = ("--max-steps", "60", "--save-steps", "1")
    run = Started(2, tmp_path / "run", *steps)
    run.wait_for("step-000003")
    for rank in receivers:
        os.kill(run.processes[rank].pid, signal.SIGTERM)
    assert run.wait() == [143, 143], [run.output_of(rank) for rank in (0, 1)]
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert rows_of(tmp_path / "run")[-1]["step"] == int(saved[-1].removeprefix("step-")) < 60
    assert "Stopped by SIGTERM. All up to step" in run.output_of(0) and not run.output_of(1).strip()


def test_bad_input_ends_every_rank_with_its_code_and_one_message(tiny, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    run = Started(3, tmp_path / "run", "--train-file", str(tmp_path / "bad.jsonl"))
    assert run.wait() == [ExitCode.DATA] * 3
    assert "bad.jsonl:2" in run.output_of(0) and not run.output_of(1) and not run.output_of(2)


def test_ranks_that_see_other_data_are_refused(tiny, tmp_path):
    rows = [json.dumps({"prompt": f"q{number}", "completion": "a" * (1 + number)}) for number in range(8)]
    run = Started(2, tmp_path / "run", *(f"--train-file={tmp_path / 'RANK.jsonl'}",), files={"0": rows, "1": rows[::-1]})
    assert run.wait() == [ExitCode.CONFIGURATION] * 2
    assert "training data than the first" in run.output_of(1)
    assert "Another process differs" in run.output_of(0) and not (tmp_path / "run" / "checkpoints").is_dir()


def test_a_run_branches_off_on_two_ranks(tiny, tmp_path):
    """At the end of an epoch, whose evaluation the new folder does not have yet."""
    trained(1, tmp_path / "source", "--max-steps", "4")
    resume = ("--resume", str(tmp_path / "source" / "checkpoints" / "step-000004"))
    rows, _ = trained(2, tmp_path / "branch", "--max-steps", "6", *resume, "--override", "max_steps")
    assert rows[-1]["step"] == 6


def test_a_crash_shows_on_the_rank_where_it_happens(tiny, tmp_path):
    run = Started(2, tmp_path / "run", "--max-steps", "3", breaks=1)
    codes = run.wait()
    assert codes[1] == 1 and codes[0] in (1, ExitCode.ENVIRONMENT)
    assert "ValueError: broken" in run.output_of(1)


def test_a_slow_checkpoint_is_written_before_any_rank_leaves(tiny, tmp_path):
    run = Started(2, tmp_path / "run", "--max-steps", "60", slow=2.0)
    deadline = time.monotonic() + 60
    while "step 1/60" not in run.output_of(0):
        assert time.monotonic() < deadline, run.output_of(0)
        time.sleep(0.01)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    run.processes[1].join(60)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))  # rank 1 left later
    assert run.wait() == [143, 143] and "All up to step" in run.output_of(0)


def test_only_the_first_rank_prints_and_writes(tiny, tmp_path):
    run = Started(2, tmp_path / "run", "--max-steps", "2")
    assert run.wait() == [0, 0]
    assert "Learning rate" in run.output_of(0) and not run.output_of(1).strip()
    assert not list((tmp_path / "scratch").iterdir())


# -- parts -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5000), max_size=40), st.integers(1, 9))
def test_shares_are_balanced_by_tokens(sizes, ranks):
    owner = shares(sizes, ranks)
    assert owner == shares(list(sizes), ranks) and len(owner) == len(sizes) and set(owner) <= set(range(ranks))
    load = [sum(size for size, rank in zip(sizes, owner, strict=True) if rank == each) for each in range(ranks)]
    assert max(load) - min(load) <= max(sizes, default=0)


@pytest.mark.parametrize("compile", ["none", "layers"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_ranks_of_a_step_have_each_micro_batch_once(config, samples, packing, size, compile):
    config = dataclasses.replace(config, gradient_accumulation_steps=3, compile=compile)
    rows = [[0, 1], [2], [3, 4, 5], [6], [7, 8]] if packing else list(range(13))
    whole = list(training_batches(samples, rows, config))
    found = [list(training_steps(samples, rows, config, Ranks(rank, size), (1, 0))) for rank in range(size)]
    assert len({len(steps) for steps in found}) == 1 and sum(map(len, found[0])) == len(whole)
    each = [list(itertools.chain.from_iterable(steps)) for steps in found]
    for number, batch in enumerate(whole):
        owned = [batches[number] for batches in each if batches[number].input_ids.numel()]
        assert len(owned) == 1 and torch.equal(owned[0].input_ids, batch.input_ids)
        for other in (batches[number] for batches in each):
            for name in ("num_tokens", "num_input_tokens", "lines"):
                assert getattr(other, name) == getattr(batch, name)
            assert len(other.input_ids) == len(batch.input_ids)


def test_what_is_elsewhere_has_no_ids_but_all_counts(config, samples):
    for group, collated in (([0, 3], collate([samples[0], samples[3]])),
                            ([[0, 3], [1]], collate_packed([[samples[0], samples[3]], [samples[1]]]))):  # fmt: skip
        stub = _elsewhere(samples, group, dataclasses.replace(config, compile="none"))
        assert stub.input_ids.shape == (2, 0) and stub.num_tokens == collated.num_tokens > 0
        assert (stub.lines, stub.num_input_tokens) == (collated.lines, collated.num_input_tokens)


def test_more_processes_than_gpus_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"process 3 on a machine with 2 GPUs\. Pass torchrun --nproc-per-node 2") as refused:
        set_up_torch(TrainConfig())
    assert refused.value.exit_code == ExitCode.ENVIRONMENT


def test_a_world_size_without_the_others_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"2 ranks of WORLD_SIZE cannot be joined: .*RANK.* Start all of them with torchrun"):
        distributed.start()


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["SIGTERM", "SIGKILL"])
def test_torchrun_passes_signals_on_and_restarts_what_has_died(tiny, tmp_path, ends):
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--max-restarts", "2", "train_loop.py"]
    steps = "40" if ends == "SIGKILL" else "400"
    command += [*FLAGS, "--max-steps", steps, "--save-steps", "1", "--output-dir", str(tmp_path / "run")]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while not (tmp_path / "run" / "checkpoints" / "step-000003").exists():
            assert run.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        if ends == "SIGTERM":
            run.send_signal(signal.SIGTERM)
            assert run.wait(60) != 0
            assert "Stopped by SIGTERM. All up to step" in (tmp_path / "log").read_text()
            return
        ranks = [child for child in psutil.Process(run.pid).children() if "train_loop.py" in " ".join(child.cmdline())]
        ranks[-1].kill()
        assert run.wait(180) == 0, (tmp_path / "log").read_text()
    assert "Resuming after step" in (tmp_path / "log").read_text()
    assert (tmp_path / "run" / "finished.json").exists()


def test_one_process_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.start() == Ranks(0, 1) == distributed.ranks()
    parameter, loss = torch.nn.Parameter(torch.zeros(2)), torch.ones(())
    distributed.sum_gradients([parameter], loss)
    distributed.require_same([parameter], "it")
    assert parameter.grad is None and loss == 1 and distributed.largest(3) == 3 and distributed.smallest(0.5) == 0.5
    assert (
        distributed.sum_numbers(1.5, 2) == [1.5, 2] and distributed.by_first(lambda: 7) == distributed.in_turn(lambda: 7) == 7
    )
    distributed.leave()


def _compare(rank, size, port, different, queue):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    distributed.start()
    tensors = [torch.arange(5.0), torch.full((3,), float(rank) if different else 1.0)]
    with contextlib.suppress(UserError):
        try:
            distributed.require_same(tensors, "adapters")
            queue.put((rank, None))
        except UserError as error:
            queue.put((rank, f"{int(error.exit_code)} {error}"))
    distributed.leave()


@pytest.mark.parametrize("different", [False, True])
def test_ranks_that_differ_end_the_run(different):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_loop", "qlora.cli"])
    queue = context.Queue()
    processes = [context.Process(target=_compare, args=(rank, 2, port, different, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    if different:
        assert all(text.startswith("4 Ranks hold different adapters: 1 of 2 tensors") for text in found.values()), found
    else:
        assert found == {0: None, 1: None}
