"""What a run resumes from, and when it may not; through the command line, on the tiny model."""

import dataclasses
import datetime
import errno
import fcntl
import json
import math
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train_loop
from benchmarks.kill_resume import metrics as rows
from qlora.cli import main as any_command
from qlora.cli import train as command_line
from qlora.commands.adapter import open_adapter
from qlora.config import parse
from qlora.data.messages import Message
from qlora.data.template import encode_prompt, load_template
from qlora.errors import CheckpointError, EnvironmentProblem, ExitCode, NonFiniteError, UserError
from qlora.eval import generate
from qlora.eval.generate import Completion
from qlora.eval.loss import EvalResult
from qlora.report import html, model_card, record
from qlora.report.caveats import caveats
from qlora.report.html import _evaluations
from qlora.run import checkpoint, prepare
from qlora.run.files import verify, write_folder
from qlora.run.folder import LOCK, RunFolder, _exactness, is_going
from qlora.run.schema import FORMAT, Environment
from tests.faults.harness import fork, wait
from tests.helpers import SHORT_DATA, SHORT_EVAL, SHORT_TRAIN, tensors

FLAGS = ["--model", "tiny-random", "--lora-r", "4", "--learning-rate", "1e-2", "--max-length", "300", *SHORT_DATA]


def run(folder: Path, *flags: str) -> int:
    return command_line([*FLAGS, "--output-dir", str(folder), *flags])


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory) -> Path:
    """8 steps without a stop: an epoch of 6, and two more."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert run(folder, "--max-steps", "8", "--save-steps", "1", "--save-total-limit", "100") == 0
    return folder


@pytest.fixture
def stopped(straight, tmp_path) -> Path:
    """The same run as it was after step 4."""
    return cut(straight, tmp_path / "run", 4)


def cut(straight: Path, folder: Path, step: int) -> Path:
    """What a run that died after the checkpoint of `step` would have left, some metrics more included."""
    shutil.copytree(straight, folder, ignore=shutil.ignore_patterns("adapter", "finished.json", "samples.jsonl"))
    for later, path in checkpoint.by_step(folder / "checkpoints").items():
        if later > step:
            shutil.rmtree(path)
    return folder


SAMPLE = Completion("prompt", "base", "tuned", "reference")


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {n.replace(".default.", "."): p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_run_ends_early_for_good_and_goes_on_when_told_to(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = ["--learning-rate", "1e-12", "--num-train-epochs", "4", "--early-stopping-patience"]
    assert run(folder, *flags, "1") == 0
    assert "Ended early, after step 6: " in capsys.readouterr().out
    assert json.loads((folder / "finished.json").read_text()) == {"step": 6, "adapter_step": 6}
    assert json.loads((folder / "samples.jsonl").read_text().splitlines()[0])["step"] == 6
    assert run(folder, *flags, "1") == 0 and "it is complete" in capsys.readouterr().out
    for name in ("finished.json", "samples.jsonl"):  # as if it had been killed after the evaluation
        (folder / name).unlink()
    assert run(folder, *flags, "1") == 0 and "Ended early, after step 6" in capsys.readouterr().out
    assert run(folder, *flags, "2") == ExitCode.CONFIGURATION and "early_stopping_patience" in capsys.readouterr().err
    assert run(folder, *flags, "2", "--override", "early_stopping_patience") == 0
    assert "Ended early, after step 12" in capsys.readouterr().out
    assert max(checkpoint.by_step(folder / "checkpoints")) == 12


@pytest.fixture
def evaluated(tiny, tmp_path, monkeypatch):
    """Flags of a run with one step an epoch, whose evaluations find made-up losses."""

    def prepare(*losses: float) -> list[str]:
        found = iter(losses)
        monkeypatch.setattr(train_loop, "evaluate_loss", lambda *_: EvalResult(loss := next(found), math.exp(loss), 10))
        rows = [{"prompt": f"q{number}", "completion": "a" * number} for number in range(1, 5)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["--train-file", str(tmp_path / "rows.jsonl"), "--eval-file", str(tmp_path / "rows.jsonl")]

    return prepare


@pytest.mark.parametrize("ends_early", [True, False])
def test_early_stopping_hands_over_the_best_adapter_and_names_its_step(evaluated, tmp_path, capsys, monkeypatch, ends_early):
    folder, answered = tmp_path / "run", []
    monkeypatch.setattr(generate, "sample_responses", lambda model, *_: answered.append(adapter_of(model)) or [SAMPLE])
    flags = [*evaluated(4.0, 1.0, 2.0, 3.0), "--num-train-epochs", "4" if ends_early else "3", "--save-total-limit", "2"]
    assert run(folder, *flags, "--early-stopping-patience", "2" if ends_early else "9") == 0
    out = capsys.readouterr().out
    assert "adapter/ is that of step 1, the checkpoint with the lowest eval loss, 1.0000.\n" in out
    assert ("Ended early, after step 3: the eval loss stopped falling (--early-stopping" in out) == ends_early
    assert json.loads((folder / "finished.json").read_text()) == {"step": 3, "adapter_step": 1}
    assert json.loads((folder / "samples.jsonl").read_text())["step"] == 1
    names = [folder / place / checkpoint.ADAPTER for place in ("adapter", "checkpoints/step-000001", "checkpoints/step-000003")]
    handed_over, best, last = (path.read_bytes() for path in names)
    assert handed_over == best != last
    found = load_file(names[1])
    assert all(torch.equal(tensor, found[name]) for name, tensor in answered[0].items())
    shown = record.read(folder)
    assert shown.adapter_step == 1 and shown.of_the_adapter["eval_loss"] == 1.0
    assert ("after", "1.0000", f"{math.e:.3f}") in model_card._results(shown)
    assert "Adapter taken after step" in dict(model_card._settings(shown))
    assert not any("best adapter" in caveat.gap for caveat in caveats(shown))
    assert ("lowest loss (adapter/)", "1") in {row[:2] for row in _evaluations(shown)}


@pytest.fixture
def first_damaged(tmp_path, monkeypatch, no_answers) -> None:
    """When the run looks for its best checkpoint, that of step 1 is damaged."""
    original = RunFolder.load_best

    def damaged(self, *arguments):
        (tmp_path / "run" / "checkpoints" / "step-000001" / checkpoint.ADAPTER).write_bytes(b"x")
        return original(self, *arguments)

    monkeypatch.setattr(RunFolder, "load_best", damaged)


def test_a_damaged_best_checkpoint_is_told_and_the_last_one_taken(evaluated, tmp_path, capsys, first_damaged):
    folder = tmp_path / "run"
    assert run(folder, *evaluated(4.0, 1.0, 2.0), "--num-train-epochs", "2", "--early-stopping-patience", "9") == 0
    out = capsys.readouterr().out
    assert "Warning: checkpoint step-000001, which has the lowest loss, is damaged: " in out
    assert "adapter/ is that of step 2, whose eval loss is not the lowest, 2.0000." in out
    assert json.loads((folder / "finished.json").read_text()) == {"step": 2, "adapter_step": 2}


def test_after_a_damaged_best_checkpoint_the_next_best_is_taken(evaluated, tmp_path, capsys, first_damaged):
    folder = tmp_path / "run"
    flags = [*evaluated(4.0, 1.0, 2.0, 3.0), "--num-train-epochs", "3", "--early-stopping-patience", "9"]
    assert run(folder, *flags) == 0
    assert json.loads((folder / "finished.json").read_text()) == {"step": 3, "adapter_step": 2}
    names = [folder / place / checkpoint.ADAPTER for place in ("adapter", "checkpoints/step-000002")]
    assert names[0].read_bytes() == names[1].read_bytes()
    settings = dict(model_card._settings(record.read(folder)))
    assert settings["Adapter taken after step"] == "2"  # not the lowest loss of the run


def test_a_branch_takes_the_best_checkpoint_along(evaluated, tmp_path, capsys, no_answers):
    folder, branch = tmp_path / "run", tmp_path / "branch"
    flags = [*evaluated(4.0, 1.0, 2.0, 3.0, 3.5), "--early-stopping-patience", "9"]
    assert run(folder, *flags, "--num-train-epochs", "3") == 0
    resume = ["--resume", str(folder / "checkpoints" / "step-000003"), "--override", "num_train_epochs"]
    assert run(branch, *flags, "--num-train-epochs", "4", *resume) == 0
    assert json.loads((branch / "finished.json").read_text()) == {"step": 4, "adapter_step": 1}
    names = [place / "adapter" / checkpoint.ADAPTER for place in (branch, folder)]
    assert names[0].read_bytes() == names[1].read_bytes()


# -- the end of a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6 GB"), "memory ran out (CUDA out of memory. Tried to"),
     (AttributeError("'NoneType' object has no attribute 'shape'"), "AttributeError ('NoneType' object has no")],
)  # fmt: skip
def test_sample_answers_that_fail_are_a_warning_of_a_complete_run(tiny, tmp_path, capsys, monkeypatch, error, words):
    folder, flags = tmp_path / "run", ["--max-steps", "2"]

    def fail(model, *_):
        assert (folder / "finished.json").exists() and all(parameter.grad is None for parameter in model.parameters())
        raise error

    monkeypatch.setattr(generate, "_answer", fail)
    assert run(folder, *flags) == 0
    out = capsys.readouterr().out
    assert f"Warning: no sample answers were generated: {words}" in out and "The run is complete without them." in out
    assert verify(folder / "adapter") is None and not (folder / "samples.jsonl").exists()
    assert run(folder, *flags) == 0 and "it is complete" in capsys.readouterr().out
    assert record.read(folder).status == "finished"


@pytest.mark.parametrize("what", ["data", "disk"])
def test_a_run_is_complete_though_its_data_is_gone_or_the_disk_is_full_by_then(tiny, tmp_path, capsys, monkeypatch, what):
    folder = tmp_path / "run"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    original = RunFolder.finish

    def finish(self, *arguments):
        original(self, *arguments)
        rows.unlink()

    def full(*_):
        raise CheckpointError("samples.jsonl cannot be written: No space left on device.")

    if what == "data":
        monkeypatch.setattr(RunFolder, "finish", finish)
    else:
        monkeypatch.setattr(generate, "sample_responses", lambda *_: [SAMPLE])
        monkeypatch.setattr(train_loop.log.Tracker, "samples", lambda *_, **__: full())
    assert run(folder, "--train-file", str(rows), "--eval-file", "None", "--max-steps", "1") == 0
    words = "does not exist" if what == "data" else "No space left"
    assert re.search(f"Warning: no sample answers were generated: (Data|Checkpoint)Error .*{words}", capsys.readouterr().out)


def test_answers_of_an_earlier_end_do_not_outlive_it(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(generate, "sample_responses", lambda *_: [SAMPLE])
    assert run(folder, "--max-steps", "2") == 0 and (folder / "samples.jsonl").exists()
    monkeypatch.setattr(generate, "sample_responses", None)  # calling it fails
    assert run(folder, "--max-steps", "3", "--override", "max_steps") == 0
    assert not (folder / "samples.jsonl").exists()


def test_a_complete_run_without_its_report_gets_one(tiny, tmp_path, monkeypatch, capsys, no_answers):
    folder, drawn = tmp_path / "run", []
    assert run(folder, "--max-steps", "2") == 0  # here, reports are left out
    monkeypatch.setattr(html, "after_training", lambda path: drawn.append(path) or "drawn")
    assert run(folder, "--max-steps", "2") == 0 and drawn == [folder]
    assert "Its report was missing: drawn" in capsys.readouterr().out
    (folder / "report.html").touch()
    assert run(folder, "--max-steps", "2") == 0 and drawn == [folder]
    assert "it is complete. Nothing was done.\n" in capsys.readouterr().out
    os.utime(folder / "report.html", ns=(0, 0))  # of the run before it ended
    assert run(folder, "--max-steps", "2") == 0 and drawn == [folder, folder]
    assert "Its report was older: drawn" in capsys.readouterr().out


def test_early_stopping_needs_eval_data(tiny, tmp_path, capsys):
    flags = ["--eval-file", "None", "--early-stopping-patience", "2"]
    assert run(tmp_path / "run", *flags) == ExitCode.CONFIGURATION and "--eval-file" in capsys.readouterr().err


# -- a chat template that prints the date ------------------------------------------------------------------------------

DATED = """{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y %H:%M:%S %f') }} {% endif -%}
{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


@pytest.fixture
def no_answers(monkeypatch) -> None:
    monkeypatch.setattr(generate, "sample_responses", lambda *_: [])


@pytest.fixture
def dated(tiny, tmp_path, no_answers) -> list[str]:
    """Flags for the tiny model with a template that prints the date to the microsecond."""
    shutil.copytree(tiny, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    assert template.exists()
    template.write_text(DATED)
    return ["--model", str(tmp_path / "model"), "--prompt-format", "chat", "--max-length", "400"]


def test_a_template_with_the_date_does_not_stop_a_run_from_going_on(dated, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(folder, *dated, "--max-steps", "1", "--save-total-limit", "9") == 0
    first = json.loads((folder / "run.json").read_text())
    assert run(folder, *dated, "--max-steps", "1") == 0 and "it is complete" in capsys.readouterr().out
    (folder / "run.json").unlink()  # then the checkpoint tells it
    assert run(folder, *dated, "--max-steps", "2", "--override", "max_steps") == 0
    second = json.loads((folder / "run.json").read_text())
    assert (first["date"], first["data"], first["eval_data"]) == (second["date"], second["data"], second["eval_data"])
    branch = tmp_path / "branch"
    assert run(branch, *dated, "--max-steps", "3", "--resume", str(folder), "--override", "max_steps") == 0
    assert json.loads((branch / "run.json").read_text())["date"] == first["date"]
    while datetime.datetime.now().isoformat(timespec="seconds") <= first["date"]:  # all of it may take less than a second
        time.sleep(0.1)
    assert run(tmp_path / "another", *dated, "--max-steps", "1") == 0
    other = json.loads((tmp_path / "another" / "run.json").read_text())
    assert other["date"] > first["date"] and other["data"] != first["data"]


def test_a_run_of_a_version_that_kept_no_date_goes_on_with_that_of_its_first_event_file(dated, tmp_path):
    folder = tmp_path / "run"
    for name in ("model", "model/chat_template.jinja"):
        assert (tmp_path / name).exists()
    (tmp_path / "model" / "chat_template.jinja").write_text(DATED.replace("%H:%M:%S %f", "%H"))  # as a day, but for one hour
    assert run(folder, *dated, "--max-steps", "1", "--save-total-limit", "9") == 0
    run_info = json.loads((folder / "run.json").read_text())
    stored = run_info.pop("date")
    (folder / "run.json").write_text(json.dumps(run_info))
    found = RunFolder(folder, "auto")
    with found:
        assert found.date is not None and found.date[:13] == stored[:13]
    assert run(folder, *dated, "--max-steps", "2", "--override", "max_steps") == 0


def test_a_trained_adapter_is_prompted_with_the_date_of_its_run(dated, tmp_path):
    folder = tmp_path / "run"
    assert run(folder, *dated, "--max-steps", "1") == 0
    run_info = json.loads((folder / "run.json").read_text())
    assert datetime.datetime.fromisoformat(run_info["date"]) <= datetime.datetime.now()
    date = "2024-07-26T10:00:00"
    (folder / "run.json").write_text(json.dumps({**run_info, "date": date}))
    adapter = open_adapter(folder, device="cpu")
    ids = encode_prompt((Message("user", "Hello"),), adapter.template)
    text = f"{datetime.datetime.fromisoformat(date):%d %b %Y %H:%M:%S %f} <|user|>Hello<|end|><|assistant|>"
    assert adapter.template.tokenizer.decode(ids) == text
    assert load_template(adapter.template.tokenizer, "chat").date > date  # of no run: now


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, 9))
def test_a_run_goes_on_bit_for_bit_from_any_step(straight, tmp_path, capsys, step):
    folder = cut(straight, tmp_path / "run", step)
    assert run(folder, "--max-steps", "8", "--save-steps", "1", "--save-total-limit", "100") == 0
    assert f"Resuming after step-{step:06d}. It resumes bit for bit" in capsys.readouterr().out
    ours, theirs = checkpoint.by_step(folder / "checkpoints"), checkpoint.by_step(straight / "checkpoints")
    assert list(ours) == list(range(1, 9)) and all(tensors(ours[n]) == tensors(theirs[n]) for n in ours)
    assert rows(folder) == rows(straight)
    assert (folder / "samples.jsonl").read_bytes() == (straight / "samples.jsonl").read_bytes()
    name = "adapter_model.safetensors"
    assert (folder / "adapter" / name).read_bytes() == (straight / "adapter" / name).read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        "--gradient-checkpointing full --lora-dropout 0.3",
        "--attn-implementation eager --seed 7",
        "--packing --max-length 100",  # 3 steps per epoch: it stops and resumes within one
        "--optimizer adamw_8bit --lora-r 16",  # moments in 8 bits for some tensors, in fp32 for others
        "--optimizer lion_8bit --lora-r 16 --lora-plus-ratio 4 --use-rslora",
    ],
)
def test_other_settings_go_on_bit_for_bit_too(tiny, tmp_path, monkeypatch, flags):
    flags = [*flags.split(), "--max-steps", "7", "--save-steps", "1"]
    assert run(tmp_path / "straight", *flags) == 0
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        assert run(tmp_path / "run", *flags) == ExitCode.NUMERICS
    assert run(tmp_path / "run", *flags) == 0
    last = "checkpoints/step-000007"
    assert tensors(tmp_path / "run" / last) == tensors(tmp_path / "straight" / last)
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


def stop_in_step(patch, number: int) -> None:
    """Make a step raise, as anything might."""
    original, calls = train_loop.train_step, []

    def step(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise NonFiniteError("as asked")
        return original(*arguments)

    patch.setattr(train_loop, "train_step", step)


def test_what_is_refused_late_leaves_a_finished_run_as_it_was(straight, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(straight, tmp_path / "run")
    before = contents(folder)
    more = ("--max-steps", "9", "--override", "max_steps")
    usage = shutil.disk_usage(tmp_path)

    def fails(*_, **__):
        raise EnvironmentProblem("as asked")

    assert run(folder, "--max-steps", "7", "--override", "max_steps") == ExitCode.CONFIGURATION
    assert "is at step 8, beyond the 7 asked for" in capsys.readouterr().err
    for where, name, value, code in (
        (shutil, "disk_usage", lambda _: usage._replace(free=1000), ExitCode.CHECKPOINT),
        (train_loop, "load_nf4_model", fails, ExitCode.ENVIRONMENT),
        (train_loop, "fingerprint", lambda model: "another", ExitCode.CONFIGURATION),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert run(folder, *more) == code
    assert contents(folder) == before


def test_what_differs_in_the_environment_withdraws_the_promise(stopped, capsys):
    path = stopped / "checkpoints" / "step-000004"
    state = json.loads((path / "state.json").read_bytes())
    state["environment"]["packages"]["torch"] = "2.9.0"
    files = {n: (path / n).read_bytes() for n in json.loads((path / "MANIFEST.json").read_text())["files"]}
    write_folder(path, files | {"state.json": json.dumps(state).encode()})
    assert run(stopped, "--max-steps", "8") == 0
    assert f"later losses are only close, since torch 2.9.0 -> {torch.__version__}" in capsys.readouterr().out
    history = checkpoint.read_state(stopped / "checkpoints" / "step-000008").history
    assert [event.step for event in history] == [4] and history[0].environment.packages["torch"] == "2.9.0"


def test_on_a_gpu_only_the_deterministic_flag_promises_bits():
    environment = Environment(packages={}, python="3", device="GPU", cuda="13")
    withdrawn, given = "without --deterministic", "bit for bit as if it had not stopped"
    for flag, on_gpu, words in ((False, True, withdrawn), (True, True, given), (False, False, given)):
        assert words in _exactness(environment, environment, flag, on_gpu, overridden=False)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora-r 8", ["lora_r", "4", "8"]),
        ("--lora-alpha 8", ["lora_alpha", "64", "8"]),
        ("--seed 1", ["seed", "42", "1"]),
        ("--target-modules o_proj", ["targets", "o_proj"]),
        ("--learning-rate 2e-2", ["learning_rate", "0.01", "0.02", "--override learning_rate permits it"]),
        ("--max-steps 9", ["max_steps", "8", "9", "--override max_steps permits it"]),
        ("--per-device-train-batch-size 4", ["per_device_train_batch_size", "2", "4", "if their product stays"]),
        ("--per-device-train-batch-size 4 --override per_device_train_batch_size", ["per_device_train_batch_size", "2", "4"]),
        ("--train-file other.jsonl", ["train_file", "data", "other.jsonl"]),
        ("--max-length 45", ["data", "max_length", "300", "45"]),
        ("--loss-on all", ["data", "loss_on", "response", "all"]),
        ("--eval-file other.jsonl", ["eval_file", "--override eval_file permits it"]),
        ("--lora-r 8 --override learning_rate", ["lora_r"]),
        ("--gradient-checkpointing full", ["gradient_checkpointing", "none", "full"]),
        ("--packing", ["packing", "False", "True"]),
        ("--optimizer adamw_8bit", ["optimizer  ", "adamw  ", "adamw_8bit"]),
    ],
)
def test_another_run_is_refused_with_a_table_and_nothing_changes(stopped, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(stopped.parent)
    lines = SHORT_TRAIN.read_text().splitlines(keepends=True)
    Path("other.jsonl").write_text("".join(lines[:20]))
    before = contents(stopped)
    assert run(stopped, "--max-steps", "8", "--allow-drop", *flags.split()) == ExitCode.CONFIGURATION
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "holds another run, at step 4" in err and "Traceback" not in err
    assert all(word in err for word in words), err
    assert contents(stopped) == before


def test_other_weights_under_the_same_name_are_refused(stopped, monkeypatch, capsys):
    monkeypatch.setattr(train_loop, "fingerprint", lambda model: "another")
    assert run(stopped, "--max-steps", "8") == ExitCode.CONFIGURATION
    assert "The base model is not the one of" in capsys.readouterr().err


def test_a_step_beyond_the_end_is_refused(stopped, capsys):
    assert run(stopped, "--max-steps", "3", "--override", "max_steps") == ExitCode.CONFIGURATION
    assert "at step 4, beyond the 3 asked for" in capsys.readouterr().err


def test_with_packing_the_length_of_a_row_is_the_runs_own(tiny, tmp_path, monkeypatch, capsys):
    """Without it a length that changes no sample may change; with it rows would hold other samples."""
    folder, flags = tmp_path / "run", ("--max-steps", "4", "--save-steps", "1", "--max-length", "100", "--packing")
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        assert run(folder, *flags) == ExitCode.NUMERICS
    before = contents(folder)
    for more, changed in ((True, [*flags, "--max-length", "120"]), (False, flags[:-1])):
        assert run(folder, *changed) == ExitCode.CONFIGURATION
        err = capsys.readouterr().err
        assert "holds another run, at step 2" in err and ("max_length " in err, "packing " in err) == (more, not more), err
    assert contents(folder) == before
    assert run(folder, *flags) == 0


@pytest.mark.parametrize(
    ("option", "default", "flags"),
    [
        ("packing", False, ["--packing"]),
        ("optimizer", "adamw", ["--optimizer", "adamw_8bit"]),
        ("compile", "none", ["--compile", "layers"]),
    ],
)
@pytest.mark.parametrize("name", ["run.json", "state.json"])
def test_a_run_from_before_there_was_an_option_goes_on(stopped, straight, name, option, default, flags, capsys):
    path = stopped / "checkpoints" / "step-000004"
    if name == "run.json":
        run_info = json.loads((stopped / name).read_text())
        assert run_info["config"].pop(option) == default
        (stopped / name).write_text(json.dumps(run_info))
    else:
        (stopped / "run.json").unlink()  # as it was before there was that file, or when it was removed
        state = json.loads((path / "state.json").read_bytes())
        assert state["config"].pop(option) == default
        files = {n: (path / n).read_bytes() for n in json.loads((path / "MANIFEST.json").read_text())["files"]}
        write_folder(path, files | {"state.json": json.dumps(state).encode()})
    assert run(stopped, "--max-steps", "8", *flags) == ExitCode.CONFIGURATION
    assert option in capsys.readouterr().err
    assert run(stopped, "--max-steps", "8") == 0
    assert tensors(stopped / "checkpoints" / "step-000008") == tensors(straight / "checkpoints" / "step-000008")


def with_old_keys(values: Any) -> Any:
    """JSON values as versions until November 2026 wrote them: memory in GiB, the eval data as `held_out`."""
    if not isinstance(values, dict):
        return values
    old = {}
    for key, value in values.items():
        if key.endswith("_gb"):
            terms = isinstance(value, dict)
            value = {name: gb * 1e9 / 2**30 for name, gb in value.items()} if terms else value and value * 1e9 / 2**30
        old[key.replace("_gb", "_gib").replace("eval_data", "held_out")] = with_old_keys(value)
    return old


def test_a_run_with_the_keys_of_older_versions_is_reported_and_may_be_complete(straight, tmp_path, capsys):
    folder = shutil.copytree(straight, tmp_path / "run")
    set_format(folder, None)
    path = folder / "checkpoints" / "step-000008"
    files = {name: (path / name).read_bytes() for name in json.loads((path / "MANIFEST.json").read_text())["files"]}
    state = json.dumps(with_old_keys(json.loads(files["state.json"])))
    write_folder(path, files | {"state.json": state.encode()})
    for name in ("run.json", "env.json"):
        (folder / name).write_text(json.dumps(with_old_keys(json.loads((folder / name).read_text()))))
    before = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = "".join(json.dumps(with_old_keys(row)) + "\n" for row in before)
    (folder / "metrics.jsonl").write_text(metrics)
    assert "held_out" in metrics and "peak_memory_gib" in metrics and "held_out" in state and "predicted_terms_gib" in state
    found = record.read(folder)
    assert found.peak_memory_gb() == pytest.approx(max(row["peak_memory_gb"] for row in before if row["event"] == "step"))
    assert found.run_info.predicted_gb == pytest.approx(sum(found.run_info.predicted_terms_gb.values()))
    assert [row["step"] for row in found.evaluations] == [0, 6, 8]
    assert run(folder, "--max-steps", "8") == 0 and "it is complete" in capsys.readouterr().out
    (folder / "finished.json").unlink()
    assert run(folder, "--max-steps", "8") == ExitCode.CONFIGURATION and "has format 1" in capsys.readouterr().err


def set_format(folder: Path, format: int | None, *names: str) -> None:
    """Give run.json and the state.json of all checkpoints, or those of them that are named, this format; None removes the key,
    which versions before format 2 did not write."""
    for path in [folder / "run.json", *sorted(folder.glob("checkpoints/*/state.json"))]:
        values = json.loads(path.read_text())
        assert values.pop("format", FORMAT) == FORMAT == 2
        changed = json.dumps(values | ({} if format is None else {"format": format})).encode()
        if names and path.name not in names:
            continue
        if path.name == "run.json":
            path.write_bytes(changed)
        else:
            files = json.loads((path.parent / "MANIFEST.json").read_text())["files"]
            write_folder(path.parent, {name: (path.parent / name).read_bytes() for name in files} | {"state.json": changed})


def of_one_paragraph(error: str) -> str:
    """An error as it was before it was wrapped."""
    assert error.startswith("error: ") and "Traceback" not in error
    return " ".join(error.split())


@pytest.mark.parametrize("names", [("run.json", "state.json"), ("run.json",), ("state.json",)])
def test_a_run_of_an_earlier_format_is_refused_and_its_adapter_starts_a_new_one(stopped, capsys, names):
    set_format(stopped, None, *names)
    newest = stopped / "checkpoints" / "step-000004"
    before = contents(stopped)
    for flags in (["--max-steps", "8"], ["--max-steps", "9", "--override", "max_steps"], ["--max-steps", "8", "--seed", "1"]):
        assert run(stopped, *flags) == ExitCode.CONFIGURATION
        error = of_one_paragraph(capsys.readouterr().err)
        place = newest if "state.json" in names else stopped
        assert f"{place} has format 1, and this version resumes format 2 only. Its dropout was drawn from a gen" in error
        assert f"pass --init-adapter {newest} and a new --output-dir." in error
    assert contents(stopped) == before
    assert run(stopped.parent / "new", "--max-steps", "1", "--init-adapter", str(newest)) == 0


@pytest.mark.parametrize("named", ["checkpoint", "run folder"])
def test_no_branch_starts_from_a_checkpoint_of_an_earlier_format(stopped, capsys, named):
    set_format(stopped, None)
    before, newest = contents(stopped), stopped / "checkpoints" / "step-000004"
    branch, flags = stopped.parent / "branch", ["--max-steps", "8"]
    assert run(branch, *flags, "--resume", str(newest if named == "checkpoint" else stopped)) == ExitCode.CONFIGURATION
    error = of_one_paragraph(capsys.readouterr().err)
    assert f"{newest} has format 1" in error and f"pass --init-adapter {newest} instead of --resume" in error
    assert contents(stopped) == before and [path.name for path in branch.iterdir()] == [LOCK]
    assert run(branch, "--max-steps", "1", "--init-adapter", str(newest)) == 0


def test_a_finished_run_of_an_earlier_format_is_complete_but_not_extended(straight, tmp_path, capsys):
    folder = shutil.copytree(straight, tmp_path / "run")
    set_format(folder, None)
    before = contents(folder)
    assert run(folder, "--max-steps", "8") == 0 and "it is complete" in capsys.readouterr().out
    assert run(folder, "--max-steps", "8", "--seed", "1") == ExitCode.CONFIGURATION
    assert "holds another run, at step 8" in capsys.readouterr().err
    assert run(folder, "--max-steps", "9", "--override", "max_steps") == ExitCode.CONFIGURATION
    error = of_one_paragraph(capsys.readouterr().err)
    assert "has format 1" in error and f"pass --init-adapter {folder / 'adapter'} and a new --output-dir." in error
    assert contents(folder) == before
    assert run(tmp_path / "new", "--max-steps", "1", "--init-adapter", str(folder / "adapter")) == 0


def test_a_run_that_a_newer_version_wrote_is_refused(stopped, capsys):
    set_format(stopped, FORMAT + 1)
    assert run(stopped, "--max-steps", "8") == ExitCode.CONFIGURATION
    error = of_one_paragraph(capsys.readouterr().err)
    assert "has format 3, and this version resumes format 2 only. A newer version of this program wrote it." in error


def test_a_run_of_an_earlier_format_without_a_checkpoint_starts_again(straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "run", ignore=shutil.ignore_patterns("adapter", "finished.json", "step-*"))
    set_format(folder, None)
    assert run(folder, "--max-steps", "2") == 0
    assert json.loads((folder / "run.json").read_text())["format"] == FORMAT
    assert checkpoint.read_state(folder / "checkpoints" / "step-000002").format == FORMAT
    ours, theirs = ([row for row in rows(path) if row["event"] == "step"] for path in (folder, straight))
    assert [row["lines"] for row in ours] == [row["lines"] for row in theirs[:2]]


@pytest.mark.draws_report
def test_runs_of_an_earlier_format_are_still_read(straight, tmp_path, capsys):
    folder = shutil.copytree(straight, tmp_path / "run")
    set_format(folder, None)
    assert record.read(folder).run_info.format == checkpoint.read_state(folder / "checkpoints" / "step-000008").format == 1
    for command in (
        ["report", str(folder)],
        ["generate", str(folder), "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"],
        ["evaluate", str(folder), "--limit", "1", "--max-new-tokens", "1", "--device", "cpu"],
        ["merge", str(folder), "--into", "bf16", "--output-dir", str(tmp_path / "merged"), "--limit", "1", "--device", "cpu"],
    ):
        assert any_command(command) == 0, capsys.readouterr().err
    assert (folder / "report.html").exists() and (tmp_path / "merged" / "config.json").exists()


def test_what_is_named_may_change_and_is_recorded(stopped, capsys):
    flags = "--learning-rate 2e-2 --max-steps 9 --override learning_rate max_steps"
    assert run(stopped, *flags.split()) == 0
    assert "Resuming after step-000004; learning_rate: 0.01 -> 0.02; max_steps: 8 -> 9." in capsys.readouterr().out
    history = checkpoint.read_state(stopped / "checkpoints" / "step-000009").history
    assert history[0].overrides == {"learning_rate": [0.01, 0.02], "max_steps": [8, 9]}
    assert [row["step"] for row in rows(stopped) if row["event"] == "step"] == list(range(1, 10))
    assert max(row["learning_rate"] for row in rows(stopped) if row.get("learning_rate")) > 1e-2


def test_the_batch_may_be_cut_otherwise_if_the_step_stays_the_same(stopped):
    flags = "--max-steps 8 --per-device-train-batch-size 1 --gradient-accumulation-steps 4 "
    flags += "--override per_device_train_batch_size gradient_accumulation_steps"
    straight = rows(stopped)
    assert run(stopped, *flags.split()) == 0
    for ours, theirs in zip(rows(stopped), straight, strict=True):
        if ours["event"] == "step":
            assert ours["lines"] == theirs["lines"] and ours["num_tokens"] == theirs["num_tokens"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)  # dropout is drawn otherwise


def test_what_changes_no_number_may_change(stopped, tmp_path):
    shutil.copy(SHORT_TRAIN, tmp_path / "moved.jsonl")
    names = "qkv_proj o_proj gate_up_proj down_proj"
    more = "--logging-steps 1 --save-total-limit 5 --save-steps 3 --skip-nonfinite 1 --max-length 400"
    assert run(stopped, "--max-steps", "8", *more.split(), "--train-file", str(tmp_path / "moved.jsonl")) == 0
    again = [*FLAGS, "--max-steps", "8", "--target-modules", *sorted(names.split()), "--output-dir", str(stopped)]
    assert command_line(again) == 0  # it is finished, and the same run


def test_the_configuration_it_leaves_goes_on_with_it(stopped, capsys):
    assert run(stopped, "--max-steps", "8", "--learning-rate", "3e-2", "--override", "learning_rate") == 0
    (stopped / "finished.json").unlink()
    for step in (5, 6, 7, 8):
        shutil.rmtree(stopped / "checkpoints" / f"step-{step:06d}", ignore_errors=True)
    assert command_line(["--config", str(stopped / "config.yaml")]) == 0  # what was permitted is the run's own by now
    config = parse(["--config", str(stopped / "config.yaml")])
    assert (config.learning_rate, config.resume, config.override) == (3e-2, "auto", ())


# -- finished, extended, branched off ----------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_nothing_is_touched(straight, tmp_path, capsys):
    folder = shutil.copytree(straight, tmp_path / "run")
    before, stamps = contents(folder), {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert run(folder, "--max-steps", "8", "--save-steps", "1", "--save-total-limit", "100") == 0
    assert "holds this run, and it is complete." in capsys.readouterr().out
    assert contents(folder) == before and stamps == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    shutil.rmtree(folder / "checkpoints")  # to save room
    assert run(folder, "--max-steps", "8") == 0
    assert run(folder, "--max-steps", "9", "--override", "max_steps") == ExitCode.CHECKPOINT
    assert "finished run whose checkpoints are gone" in capsys.readouterr().err
    assert run(folder, "--max-steps", "8", "--seed", "5") == ExitCode.CONFIGURATION
    assert "holds another run, at step 8" in capsys.readouterr().err


def test_a_finished_run_can_be_extended(straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "run")
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert run(folder, "--max-steps", "11", "--override", "max_steps") == 0
    steps = [row["step"] for row in rows(folder) if row["event"] == "step"]
    assert steps == list(range(1, 12)) and rows(folder)[: len(rows(straight))] == rows(straight)
    assert json.loads((folder / "finished.json").read_text())["step"] == 11
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() != adapter
    assert verify(folder / "adapter") is None


def test_an_older_checkpoint_branches_off_into_another_folder(straight, tmp_path, monkeypatch, capsys):
    before = contents(straight)
    branch = tmp_path / "branch"
    flags = ["--max-steps", "8", "--resume", str(straight / "checkpoints" / "step-000003")]
    assert run(branch, *flags, "--learning-rate", "5e-3", "--override", "learning_rate") == 0
    assert rows(branch)[:4] == rows(straight)[:4] and rows(branch)[4:] != rows(straight)[4:]
    assert [row["step"] for row in rows(branch) if row["event"] == "step"] == list(range(1, 9))
    assert contents(straight) == before
    assert run(straight, *flags) == ExitCode.CHECKPOINT
    assert "has checkpoints up to step 8 already, which would be lost" in capsys.readouterr().err
    same = tmp_path / "same"
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        assert run(same, *flags, "--save-steps", "1") == ExitCode.NUMERICS
    assert run(same, *flags) == 0  # the same command resumes the branch
    assert tensors(same / "checkpoints" / "step-000008") == tensors(straight / "checkpoints" / "step-000008")


def test_a_run_folder_can_be_named_to_go_on_with(stopped, straight, monkeypatch):
    assert command_line([*FLAGS, "--max-steps", "8", "--resume", str(stopped)]) == 0  # and is then the output folder
    assert tensors(stopped / "checkpoints" / "step-000008") == tensors(straight / "checkpoints" / "step-000008")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nowhere", "there is no such folder"),
        (".", "neither a checkpoint"),
        ("damaged", "is damaged: state.json has"),
        ("never", "holds a run, and --resume never starts another"),
    ],
)
def test_what_cannot_be_resumed_is_told_apart(stopped, monkeypatch, capsys, what, words):
    monkeypatch.chdir(stopped.parent)
    if what == "damaged":
        path = stopped / "checkpoints" / "step-000004"
        (path / "state.json").write_text("{}")
        what = str(path)
    folder = stopped if what == "never" else stopped.parent / "other"
    assert run(folder, "--max-steps", "8", "--resume", what) == ExitCode.CHECKPOINT
    assert words in capsys.readouterr().err


def test_never_starts_in_an_empty_folder(tiny, tmp_path):
    assert run(tmp_path / "run", "--max-steps", "1", "--resume", "never") == 0


def test_other_eval_data_is_evaluated_though_the_step_is_known(straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "run")
    other = tmp_path / "other.jsonl"
    other.write_text(SHORT_EVAL.read_text().splitlines()[0])
    flags = ["--max-steps", "8", "--eval-file", str(other), "--override", "eval_file"]
    assert run(folder, *flags) == 0
    first, second = [row for row in rows(folder) if row["event"] == "eval" and row["step"] == 8]
    assert first["eval_data"] != second["eval_data"] and second["num_tokens"] < first["num_tokens"]


def test_a_run_that_began_with_an_adapter_needs_it_no_more(straight, tmp_path, monkeypatch):
    adapter = shutil.copytree(straight / "adapter", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        assert run(tmp_path / "run", "--max-steps", "4", "--save-steps", "1", "--init-adapter", "adapter") == ExitCode.NUMERICS
    assert run(tmp_path / "run", "--max-steps", "4", "--init-adapter", str(straight / "adapter")) == ExitCode.CONFIGURATION
    assert run(tmp_path / "run", "--max-steps", "3", "--init-adapter", str(adapter), "--override", "max_steps") == 0
    adapter.rename(tmp_path / "moved")
    again = ["--config", str(tmp_path / "run" / "config.yaml"), "--init-adapter", "None"]
    assert command_line(again) == 0


@pytest.mark.parametrize("name", ["finished.json", "run.json"])
def test_a_damaged_mark_is_told(straight, tmp_path, capsys, name):
    folder = shutil.copytree(straight, tmp_path / "run")
    (folder / name).write_text("")
    assert run(folder, "--max-steps", "8") == ExitCode.CHECKPOINT
    assert f"{name} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [("config", None), ("config", []), ("data", 5), ("eval_data", []), ("targets", 5), ("device", None), ("history", {}),
     ("history", [5]), ("origin", 5), ("per_device_train_batch_size", None), ("gradient_accumulation_steps", "2"),
     ("compile", "all"), ("gradient_checkpointing", 5), ("attn_implementation", ["sdpa"])],
)  # fmt: skip
@pytest.mark.parametrize("gone", [False, True])
def test_a_run_of_damaged_facts_is_not_gone_on_with(straight, tmp_path, capsys, name, value, gone):
    folder = shutil.copytree(straight, tmp_path / "run")
    run_info = json.loads((folder / "run.json").read_text())
    owner = run_info if name in run_info else run_info["config"]
    if gone and owner is not run_info:
        return  # an option that is not there is from before there was that option
    del owner[name]
    owner |= {} if gone else {name: value}
    (folder / "run.json").write_text(json.dumps(run_info))
    with pytest.raises(UserError, match=r"run\.json cannot be read") as caught, RunFolder(folder, "auto"):
        pass
    assert caught.value.exit_code == ExitCode.CHECKPOINT and "\n" not in str(caught.value)


def test_what_a_process_that_died_has_not_removed_goes_when_the_run_goes_on(tiny, tmp_path):
    """Killed after its last save and before the prune that follows: there is no other save to do it."""
    flags = ("--max-steps", "3", "--save-steps", "1", "--save-total-limit", "2")
    folder = tmp_path / "run"

    assert run(folder, "--max-steps", "3", "--save-steps", "1", "--save-total-limit", "3") == 0
    (folder / "finished.json").unlink()
    assert list(checkpoint.by_step(folder / "checkpoints")) == [1, 2, 3]
    assert run(folder, *flags) == 0
    assert list(checkpoint.by_step(folder / "checkpoints")) == [2, 3]


def test_the_same_checkpoints_stay_if_the_process_died_before_removing_the_others(tiny, tmp_path, monkeypatch):
    """The last evaluation has the lowest loss, and was on disk before the process died."""
    flags = ("--num-train-epochs", "3", "--save-steps", "2", "--save-total-limit", "2")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run(straight, *flags) == 0
    kept = list(checkpoint.by_step(straight / "checkpoints"))
    with monkeypatch.context() as patch:
        prune = checkpoint.prune
        last = f"step-{kept[-1]:06d}"
        patch.setattr(checkpoint, "prune", lambda at, *rest: None if (at / last).exists() else prune(at, *rest))
        assert run(killed, *flags) == 0
    (killed / "finished.json").unlink()
    losses = {row["step"]: row["eval_loss"] for row in rows(killed) if "eval_loss" in row}
    assert min(losses, key=losses.get) == kept[-1] and len(checkpoint.by_step(killed / "checkpoints")) == 3
    assert run(killed, *flags) == 0
    assert list(checkpoint.by_step(killed / "checkpoints")) == kept


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    for folder, words in (
        (tmp_path / "used", "holds no run of this program"),
        (tmp_path / "file" / "run", "cannot be written"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            RunFolder(folder, "auto")
        assert caught.value.exit_code == ExitCode.CHECKPOINT
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["notes.txt"]
    with RunFolder(tmp_path / "a" / "b", "auto") as run:
        assert run.checkpoint is None and run.step == 0
    with RunFolder(tmp_path / "a" / "b", "never"):  # a run that left nothing is none
        assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["run.lock"]


def test_a_folder_is_one_processs_at_a_time(stopped, tmp_path):
    with RunFolder(stopped, "auto") as run:
        assert run.step == 4
        (stopped / LOCK).write_text('{"pid": 1234, "host": "there"}')
        with pytest.raises(UserError, match=r'is in use by another process.*"pid": 1234') as caught:
            RunFolder(stopped, "auto")
        assert caught.value.exit_code == ExitCode.CHECKPOINT and is_going(stopped)
    lock = (stopped / LOCK).stat()
    with RunFolder(stopped, "auto"):  # as soon as it is released
        assert (stopped / LOCK).stat().st_mtime_ns == lock.st_mtime_ns and (stopped / LOCK).stat().st_ino == lock.st_ino
    assert not is_going(stopped)


def test_a_look_at_the_lock_does_not_stop_a_run_that_starts(tmp_path):
    folder = tmp_path / "run"
    assert not is_going(tmp_path) and not list(tmp_path.iterdir())  # it makes no run folder of others'
    with RunFolder(folder, "auto"):
        pass
    with (folder / LOCK).open() as look:
        fcntl.flock(look, fcntl.LOCK_EX)
        threading.Timer(0.05, lambda: fcntl.flock(look, fcntl.LOCK_UN)).start()
        with RunFolder(folder, "auto"):
            assert is_going(folder)


def test_a_child_process_does_not_keep_the_lock(tmp_path):
    """Workers are forked while a run holds its folder, and may outlive it."""
    (ready, tell_ready), (end, tell_end) = os.pipe(), os.pipe()

    def worker() -> int:
        os.close(tell_end)
        os.write(tell_ready, b".")
        return len(os.read(end, 1))

    with RunFolder(tmp_path / "run", "auto"):
        child = fork(worker, tmp_path / "log")
        assert os.read(ready, 1) == b"."
    with RunFolder(tmp_path / "run", "auto") as run:
        assert run.step == 0
    for descriptor in (ready, tell_ready, end, tell_end):
        os.close(descriptor)
    assert wait(child) == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, number):
    def without_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with pytest.raises(UserError, match=f"cannot be written: {os.strerror(number)}") as caught:
        RunFolder(tmp_path / "run", "auto")
    assert caught.value.exit_code == ExitCode.CHECKPOINT


def test_no_room_is_told_before_training(tiny, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    assert run(tmp_path / "run", "--max-steps", "1") == ExitCode.CHECKPOINT
    needed = 16_896 * (12 * 4 + 4)  # parameters, in three checkpoints and one being written, and the adapter
    assert f"has 100,000 bytes free, and {needed:,} are needed" in capsys.readouterr().err


def test_what_auto_was_resolved_to_stays_the_runs_own(stopped, straight, monkeypatch, capsys):
    """The machine has changed: auto would be something else by now, and the run resumes as it started, bit for bit."""
    known = json.loads((stopped / "run.json").read_text())["config"]
    assert (known["gradient_checkpointing"], known["compile"], known["attn_implementation"]) == ("none", "none", "sdpa")
    original = prepare.choose_layers

    def elsewhere(config, *arguments):
        other = {"gradient_checkpointing": "full"} if config.gradient_checkpointing == "auto" else {}
        return original(dataclasses.replace(config, **other), *arguments)

    monkeypatch.setattr(prepare, "choose_layers", elsewhere)
    assert run(stopped, "--max-steps", "8") == 0
    assert "gradient checkpointing: none" in capsys.readouterr().out
    assert tensors(stopped / "checkpoints" / "step-000008") == tensors(straight / "checkpoints" / "step-000008")
    fresh = stopped.parent / "fresh"
    assert (
        run(fresh, "--max-steps", "1") == 0
        and json.loads((fresh / "run.json").read_text())["config"]["gradient_checkpointing"] == "full"
    )
