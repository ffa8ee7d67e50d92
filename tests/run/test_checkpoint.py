"""What a run leaves on disk, and whether others can load it."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import bitsandbytes
import peft
import pytest
import safetensors.torch
import torch
import transformers
from safetensors.torch import load_file

from qlora.data.batch import collate
from qlora.errors import CheckpointError, ExitCode, UserError
from qlora.model.loss import read_head, token_loss_sum
from qlora.run import checkpoint, files
from qlora.run.files import MANIFEST, _write, remove_leftovers, verify, write_file, write_folder
from qlora.run.folder import RunFolder
from qlora.run.schema import State
from qlora.run.signals import Stopped
from tests.helpers import RUN_INFO, adapted_model, save_checkpoint, wake_adapters
from train_loop import train_step


@pytest.fixture
def trained(config, samples):
    """A model and its optimizer after one step."""
    model = adapted_model(config)
    head = read_head(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    train_step(model.get_decoder(), optimizer, [collate(samples[:2])], lambda h, b: token_loss_sum(h, b, head), 1e-3, 1.0)
    return model, optimizer


REQUIRED = [name for name, field in State.model_fields.items() if field.is_required()]


def save(checkpoints: Path, trained, step: int) -> Path:
    return save_checkpoint(checkpoints, *trained, checkpoint.TrainState(step=step), RUN_INFO)


def test_a_checkpoint_holds_adapter_moments_and_place(trained, tmp_path):
    model, optimizer = trained
    progress = checkpoint.TrainState(step=12, epoch=2, samples=7, skipped=1)
    folder = save_checkpoint(tmp_path, model, optimizer, progress, RUN_INFO)
    assert folder == tmp_path / "step-000012" and checkpoint.problem_of(folder) is None
    files = ["adapter_config.json", "adapter_model.safetensors", "state.json", "trainer_state.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == ["MANIFEST.json", *files]
    assert sorted(json.loads((folder / "MANIFEST.json").read_text())["files"]) == files
    state = json.loads((folder / "state.json").read_text())
    assert state == {
        **progress._asdict(),
        "optimizer_class": "AdamW",
        "optimizer": {},
        "loss_scaling": {},
        **RUN_INFO.model_dump(),
    }
    stored = load_file(folder / "trainer_state.safetensors")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    moments = {f"{kind}.{name}" for name in named for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert stored.keys() == moments  # and no generator
    for name, parameter in named.items():
        for kind, value in optimizer.state[parameter].items():
            assert (
                torch.equal(stored[f"{kind}.{name}"], value) and stored[f"{kind}.{name}"].dtype == value.dtype == torch.float32
            )


def test_a_snapshot_stays_as_it_was_taken_while_training_continues(trained, tmp_path):
    _, optimizer = trained
    state = checkpoint.TrainState(step=3)
    at_once = save_checkpoint(tmp_path, *trained, state, RUN_INFO)
    taken = checkpoint.snapshot(*trained, state, RUN_INFO)
    files = {path.name: path.read_bytes() for path in at_once.iterdir()}
    with torch.no_grad():
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.add_(1)
            for value in optimizer.state[parameter].values():
                value.add_(1)
    shutil.rmtree(at_once)
    assert {path.name: path.read_bytes() for path in checkpoint.write(tmp_path, taken).iterdir()} == files


class Slow:
    """checkpoint.write of a disk that takes as long as the test wants, or fails."""

    def __init__(self, monkeypatch):
        self.may_end, self.written = threading.Event(), []
        self.error = None
        monkeypatch.setattr(checkpoint, "write", self.write)

    def write(self, checkpoints, taken):
        assert self.may_end.wait(60)
        if self.error:
            raise self.error
        self.written.append(taken.step)
        return checkpoints / f"step-{taken.step:06d}"


@pytest.fixture
def opened(trained, tmp_path):
    """A run folder, and its save of a step."""
    with RunFolder(tmp_path / "run", "auto") as folder:
        folder.info = RUN_INFO
        yield folder, lambda step: folder.save(*trained, checkpoint.TrainState(step=step), 2, {})


@pytest.mark.parametrize("changed", [b"", b"x", b"1234567", b"123456789", b"12345670"])
def test_what_reads_back_otherwise_is_seen(tmp_path, changed):
    path = tmp_path / "file"
    path.write_bytes(changed)
    for content in (b"12345678", [b"1234", memoryview(b"56"), b"78"]):
        assert not files._reads_back(path, content) and not files._reads_back(tmp_path / "none", content)
    path.write_bytes(b"12345678")
    assert files._reads_back(path, b"12345678") and files._reads_back(path, [b"1234", memoryview(b"56"), b"78"])


def test_tensors_are_serialized_as_safetensors_does():
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(()),
        "none": torch.empty(0, 4),
        **{str(dtype): torch.tensor([0, 1, 1]).to(dtype) for dtype in checkpoint.DTYPES},
    }
    data = b"".join(checkpoint.serialized(tensors, {"format": "pt"}))
    found = safetensors.torch.load(data)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    floats = {"b": torch.randn(3, 5), "a": torch.randn(2)}
    assert b"".join(checkpoint.serialized(floats, {"format": "pt"})) == safetensors.torch.save(floats, {"format": "pt"})
    assert b"".join(checkpoint.serialized(floats)) == safetensors.torch.save(floats)


def test_a_save_does_not_wait_but_for_the_one_before(opened, monkeypatch):
    folder, save = opened
    disk = Slow(monkeypatch)
    save(1)
    folder.raise_if_not_saved()
    assert disk.written == [] and folder.step == 0  # training continues
    second = threading.Thread(target=save, args=(2,))
    second.start()
    second.join(0.2)
    assert second.is_alive() and disk.written == []  # one at a time
    disk.may_end.set()
    second.join(60)
    folder.wait_until_saved()
    assert disk.written == [1, 2] and folder.step == 2


@pytest.mark.parametrize("noticed", ["step", "save", "end"])
def test_a_save_that_fails_is_raised_once_in_the_loop(opened, monkeypatch, noticed):
    folder, save = opened
    disk = Slow(monkeypatch)
    disk.error = CheckpointError("the disk is full")
    disk.may_end.set()
    save(1)
    notice = {"step": folder.raise_if_not_saved, "save": lambda: save(2), "end": folder.wait_until_saved}[noticed]
    concurrent.futures.wait([folder._saving])
    with pytest.raises(CheckpointError, match="the disk is full"):
        notice()
    folder.raise_if_not_saved()
    folder.wait_until_saved()
    assert folder.step == 0


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_whatever_ends_a_run_waits_for_the_checkpoint(trained, tmp_path, monkeypatch, error):
    disk = Slow(monkeypatch)
    threading.Timer(0.2, disk.may_end.set).start()
    with contextlib.suppress(KeyboardInterrupt, ValueError), RunFolder(tmp_path / "run", "auto") as folder:
        folder.info = RUN_INFO
        folder.save(*trained, checkpoint.TrainState(step=1), 2, {})
        if error:
            raise error
    assert disk.written == [1] and folder.step == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_advice_waits_for_the_checkpoint(opened, monkeypatch):
    folder, save = opened
    disk = Slow(monkeypatch)
    threading.Timer(0.2, disk.may_end.set).start()
    save(1)
    assert "All up to step 1 is safe" in folder.advice()


def test_an_error_of_the_run_is_not_hidden_by_one_of_its_checkpoint(trained, tmp_path, monkeypatch):
    disk = Slow(monkeypatch)
    disk.error = CheckpointError("the disk is full")
    disk.may_end.set()
    for raised, seen in ((ValueError, ValueError), (None, CheckpointError), (Stopped, CheckpointError)):
        with pytest.raises(seen), RunFolder(tmp_path / "run", "auto") as folder:
            folder.info = RUN_INFO
            folder.save(*trained, checkpoint.TrainState(step=1), 2, {})
            if raised:
                raise raised


def test_a_checkpoint_of_damaged_state_is_not_gone_on_from(trained, tmp_path):
    older, folder = save(tmp_path, trained, 1), save(tmp_path, trained, 2)
    files = {n: (folder / n).read_bytes() for n in json.loads((folder / "MANIFEST.json").read_text())["files"]}
    state = json.loads((folder / "state.json").read_bytes())
    damaged: list = [
        None,
        [],
        5,
        "state",
        *({k: v for k, v in state.items() if k != name} for name in REQUIRED),
    ]
    wrong = {
        "step": "2",
        "epoch": None,
        "samples": 1.5,
        "skipped": True,
        "optimizer": [],
        "optimizer_class": 5,
        "weights": None,
    }
    damaged += [{**state, name: value} for name, value in wrong.items()]
    odd = [{"packages": []}, {"python": 3}, {"device": None}, {"cuda": 12}, {"commit": []}]
    damaged += [{**state, "environment": {**state["environment"], **each}} for each in odd] + [{**state, "environment": {}}]
    assert len(damaged) > 20
    for content in damaged:
        write_folder(folder, files | {"state.json": json.dumps(content).encode()})
        found, skipped = checkpoint.newest(tmp_path)
        assert found == older and skipped[folder].startswith("state.json is damaged ("), content


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3),  # of tensors of 3,072 to 8,192 elements: the smallest keep fp32
], ids=["AdamW", "SGD", "AdamW8bit"])  # fmt: skip
def test_what_is_restored_goes_on_bit_for_bit(config, samples, tmp_path, make):
    """Adapter and moments into a model and optimizer that have other values, dropout on; no generator is touched."""
    config = dataclasses.replace(config, lora_dropout=0.1, lora_r=16)

    def start():
        model = adapted_model(config)
        wake_adapters(model)
        return model, make([p for p in model.parameters() if p.requires_grad])

    def steps(model, optimizer, rows):
        loss_sum = functools.partial(token_loss_sum, head=read_head(model))
        batches = [collate([row])._replace(seed=row.line) for row in rows]
        return [train_step(model.get_decoder(), optimizer, [batch], loss_sum, 1e-3, 1.0)[0].item() for batch in batches]

    model, optimizer = start()
    steps(model, optimizer, samples[:2])
    folder = save_checkpoint(tmp_path, model, optimizer, checkpoint.TrainState(step=2, samples=2), RUN_INFO)
    straight = steps(model, optimizer, samples[2:4])
    again, other = start()
    steps(again, other, samples[5:8])
    before = torch.get_rng_state()  # [bytes]
    assert checkpoint.restore(folder, again, other) == checkpoint.TrainState(step=2, samples=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert steps(again, other, samples[2:4]) == straight
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        ours_state, theirs_state = optimizer.state.get(ours, {}), other.state.get(theirs, {})
        assert ours_state.keys() == theirs_state.keys()
        for kind, value in ours_state.items():  # a step is a number in bitsandbytes' state
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs_state[kind]))
            assert checkpoint._shape_and_dtype(value) == checkpoint._shape_and_dtype(theirs_state[kind])


def test_a_checkpoint_that_does_not_fit_is_refused(config, trained, tmp_path):
    model, _ = trained
    folder = save(tmp_path, trained, 1)
    larger = adapted_model(dataclasses.replace(config, lora_r=8))
    for other, kind, code, words in (
        (larger, torch.optim.AdamW, ExitCode.CHECKPOINT, r"lora_A.weight is \(\(4, \d+\), torch.float32\) there"),
        (model, torch.optim.SGD, ExitCode.CONFIGURATION, "was saved with AdamW, this loop has SGD"),
        (model, bitsandbytes.optim.AdamW8bit, ExitCode.CONFIGURATION, "was saved with AdamW, this loop has AdamW8bit"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            checkpoint.restore(folder, other, kind([p for p in other.parameters() if p.requires_grad], lr=1.0))
        assert caught.value.exit_code == code
    half = adapted_model(config)
    for parameter in half.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()  # what a resume of TRL's does the other way round
    with pytest.raises(UserError, match=r"torch.float32\) there, .*torch.bfloat16\) here"):
        checkpoint.restore(folder, half, torch.optim.AdamW([p for p in half.parameters() if p.requires_grad]))


def test_the_newest_and_the_best_are_kept_and_foreign_files_stay(trained, tmp_path):
    (tmp_path / "notes.txt").touch()
    losses = {6: math.nan, 12: 1.0, 18: 2.0, 999_999: 2.5, 3: 0.1, 24: math.nan}
    for step, kept in (
        (6, {6}),
        (12, {6, 12}),
        (18, {12, 18}),
        (24, {12, 24}),  # 12 is the best; one whose loss is NaN is not
        (999_999, {12, 999_999}),
        (1_000_000, {12, 1_000_000}),  # not sorted as text
    ):
        save(tmp_path, trained, step)
        checkpoint.prune(tmp_path, 2, {s: loss for s, loss in losses.items() if s <= step})
        assert {p.name for p in tmp_path.iterdir()} == {"notes.txt", *(f"step-{number:06d}" for number in kept)}
    save(tmp_path, trained, 1_000_001)
    checkpoint.prune(tmp_path, 2, {})
    assert list(checkpoint.by_step(tmp_path)) == [1_000_000, 1_000_001]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(trained, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, trained, step)
    (tmp_path / "step-000002" / "trainer_state.safetensors").write_bytes(b"cut short")
    checkpoint.prune(tmp_path, 2, {2: 0.0})
    assert list(checkpoint.by_step(tmp_path)) == [1, 2, 3]  # 1 and 3 are the two; 2 is left to be looked at
    save(tmp_path, trained, 4)
    checkpoint.prune(tmp_path, 2, {})
    assert list(checkpoint.by_step(tmp_path)) == [2, 3, 4]


def test_a_save_that_reads_back_otherwise_is_an_error(trained, tmp_path, monkeypatch):
    write = _write

    def lying(path: Path, data: files.Content) -> None:
        if path.name == checkpoint.TRAINER_STATE:
            data = b"".join(files.pieces_of(data))
            data = data[:-1] + bytes([data[-1] ^ 1])
        write(path, data)

    monkeypatch.setattr(files, "_write", lying)
    with pytest.raises(UserError, match=r"reads back otherwise: trainer_state\.safetensors is not what was written") as caught:
        save(tmp_path, trained, 1)
    assert caught.value.exit_code == ExitCode.CHECKPOINT


def test_no_room_is_told_before_anything_is_written(trained, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"has 1,000 bytes free, and \d+,\d+ are needed") as caught:
        save(tmp_path, trained, 1)
    assert caught.value.exit_code == ExitCode.CHECKPOINT and not list(tmp_path.iterdir())


def test_a_folder_that_was_being_replaced_comes_back(tmp_path):
    """The process died between the two renames: the old adapter has lost its name, and the new one has not got it."""
    write_folder(tmp_path / "adapter", {"a": b"old"})
    (tmp_path / "adapter").rename(tmp_path / ".adapter.old.tmp")
    (tmp_path / ".adapter.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"] and (tmp_path / "adapter" / "a").read_bytes() == b"old"
    write_folder(tmp_path / "adapter", {"a": b"new"})
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"] and (tmp_path / "adapter" / "a").read_bytes() == b"new"


def test_a_file_too_large_for_memory_is_moved_and_verified(tmp_path):
    (tmp_path / "weights").write_bytes(b"large")
    write_folder(tmp_path / "model", {"deep/weights": tmp_path / "weights", "config": b"small"})
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and verify(tmp_path / "model") is None
    entries = json.loads((tmp_path / "model" / MANIFEST).read_bytes())["files"]
    assert entries["deep/weights"] == {"size": 5, "sha256": hashlib.sha256(b"large").hexdigest()}
    (tmp_path / "model" / "deep" / "weights").write_bytes(b"large!"[1:])
    assert "deep/weights is not what was written" in verify(tmp_path / "model")
    with pytest.raises(UserError, match="No such file") as caught:
        write_folder(tmp_path / "other", {"a": tmp_path / "gone"})
    assert caught.value.exit_code == ExitCode.CHECKPOINT and not (tmp_path / "other").exists()


def test_optimizer_state_for_some_tensors_only_is_refused(trained, tmp_path):
    model, optimizer = trained
    first = next(p for p in model.parameters() if p.requires_grad)
    del optimizer.state[first]["exp_avg"]
    folder = save(tmp_path, trained, 1)
    with pytest.raises(UserError, match="optimizer state for some of the trained tensors only") as caught:
        checkpoint.restore(folder, model, optimizer)
    assert caught.value.exit_code == ExitCode.CHECKPOINT


@pytest.fixture
def trained_8bit(config, samples):
    """As `trained`, with 8-bit moments for all but the smallest tensors."""
    model = adapted_model(dataclasses.replace(config, lora_r=16))
    head = read_head(model)
    optimizer = bitsandbytes.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad])
    train_step(model.get_decoder(), optimizer, [collate(samples[:2])], lambda h, b: token_loss_sum(h, b, head), 1e-3, 1.0)
    return model, optimizer


def test_8_bit_moments_their_scales_maps_and_steps_are_kept_bit_for_bit(trained_8bit, tmp_path):
    model, optimizer = trained_8bit
    folder = save(tmp_path, trained_8bit, 1)
    stored, steps = load_file(folder / "trainer_state.safetensors"), checkpoint.read_state(folder).optimizer
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: dict(optimizer.state[parameter]) for name, parameter in named.items()}
    assert {tuple(state) for state in before.values()} == {
        ("step", "state1", "state2"),
        ("step", "state1", "qmap1", "state2", "qmap2", "absmax1", "absmax2"),
    }
    assert steps == {f"step.{name}": 1 for name in named}
    again = bitsandbytes.optim.AdamW8bit(list(named.values()))
    checkpoint.restore(folder, model, again)
    for name, parameter in named.items():
        assert list(again.state[parameter]) == list(before[name]) and again.state[parameter]["step"] == 1
        for kind in before[name].keys() - {"step"}:
            ours, kept, restored = before[name][kind], stored[f"{kind}.{name}"], again.state[parameter][kind]
            assert torch.equal(ours, kept) and torch.equal(ours, restored) and ours.dtype == kept.dtype == restored.dtype
    eight_bit = [state for state in again.state.values() if "qmap1" in state]
    assert len({id(state["qmap1"]) for state in eight_bit}) == 1 and eight_bit[0]["qmap1"] is again.name2qmap["dynamic"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda state: state.pop("absmax1"), "trained tensors only: .*1.mlp.gate_up_proj.lora_B.default.weight lacks it"),
        (lambda state: state.clear(), "for some of the trained tensors only"),
        (lambda state: state.update(more=torch.zeros(1)), "for some of the trained tensors only"),
        (
            lambda state: state.update(absmax1=torch.zeros(2)),
            r"absmax1 of .* is \(\(2,\), torch.float32\) there, \(\(32,\), torch.f",
        ),
        (
            lambda state: state.update(state1=state["state1"].float()),
            r"\(512, 16\), torch.float32\) there, .*, torch.uint8\) here",
        ),
    ],
)
def test_8_bit_state_that_is_not_what_the_optimizer_makes_is_refused(trained_8bit, tmp_path, damage, words):
    """Each parameter must have its own set: it is not the same for all."""
    model, optimizer = trained_8bit
    (one,) = (p for name, p in model.named_parameters() if "1.mlp.gate_up_proj.lora_B" in name)
    damage(optimizer.state[one])
    folder = save(tmp_path, trained_8bit, 1)
    with pytest.raises(UserError, match=words) as caught:
        checkpoint.restore(folder, model, optimizer)
    assert caught.value.exit_code == ExitCode.CHECKPOINT


def test_leftovers_of_a_save_that_died_do_not_hinder_the_next(trained, tmp_path):
    (tmp_path / ".step-000006.tmp").mkdir()
    (tmp_path / ".step-000006.tmp" / "adapter_model.safetensors").write_bytes(b"half")
    folder = save(tmp_path, trained, 6)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_a_file_is_replaced_whole_or_kept(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(UserError, match=r"No space left on device\. It needs 5 bytes, "):
        write_file(path, b"newer")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_the_adapter_loads_in_another_process_offline_with_equal_logits(tiny, tokenizer, config, tmp_path):
    """As the closing words say: AutoPeftModelForCausalLM.from_pretrained(RUN/adapter), in bf16 and on the NF4 base."""
    model = adapted_model(config)
    wake_adapters(model)
    tmp_path = tmp_path / "adapter"
    write_folder(tmp_path, dict(checkpoint.adapter_files(model, tokenizer)))
    bf16 = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16), str(tmp_path)
    )
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = {"bf16": bf16(input_ids=ids).logits, "nf4": model.eval()(input_ids=ids).logits}
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import torch; torch.set_num_threads(1)
from bitsandbytes.functional import has_avx512bf16
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)
expected = torch.load({str(tmp_path / "expected.pt")!r})
for name, how in (("bf16", {{}}), ("nf4", {{"quantization_config": nf4}})):
    model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype="bfloat16", **how).eval()
    ids = torch.arange(5, 45)[None]
    for module in model.modules():  # bitsandbytes' inference kernel rounds otherwise than the one we train with
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected[name]), name
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = has_avx512bf16()  # elsewhere it would read repacked bytes
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected[name], rtol=0.05, atol=0.05)
assert AutoTokenizer.from_pretrained({str(tmp_path)!r}).eos_token == "<|endoftext|>"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not torch.equal(expected["bf16"], expected["nf4"])  # the two bases differ: NF4 rounds


def test_the_adapter_names_its_base_and_commit_and_carries_no_blank_card(model, config, tmp_path):
    tmp_path = tmp_path / "adapter"
    write_folder(tmp_path, dict(checkpoint.adapter_files(model)))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == config.model and Path(config.model).is_absolute()
    assert saved["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]  # sorted: the same file each time
    assert saved["inference_mode"] is True and model.peft_config["default"].inference_mode is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["MANIFEST.json", "adapter_config.json", "adapter_model.safetensors"]
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "adapter_model.safetensors").values())


def test_a_hub_model_is_named_by_id_and_commit(config, tmp_path):
    from qlora.model.load import load_nf4_model
    from qlora.model.lora import add_lora
    from qlora.model.targets import audit_targets
    from tests.helpers import CPU

    base = load_nf4_model(config.model, config, "sdpa", CPU)
    base.config._commit_hash = "0123abc"
    adapted = add_lora(base, config, audit_targets(base, config), "org/model")
    tmp_path = tmp_path / "adapter"
    write_folder(tmp_path, dict(checkpoint.adapter_files(adapted)))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/model", "0123abc")


def test_nothing_that_is_written_is_a_pickle(trained, tmp_path):
    folder = save(tmp_path, trained, 1)
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".json", ".safetensors"}
