"""metrics.jsonl, TensorBoard, and what a person sees."""

import dataclasses
import io
import json
import math
import re
import shutil
import time

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlora.cli import train
from qlora.config import TrainConfig
from qlora.errors import ExitCode, UserError
from qlora.eval.generate import Completion
from qlora.eval.loss import EvalResult
from qlora.model.targets import Target
from qlora.run import environment, log, timing
from qlora.run.timing import PhaseClock
from tests.helpers import SHORT_DATA

SAMPLE = Completion("Create [bold]x[/bold]", "\n".join(f"line {i}" for i in range(40)), '{"a": [1]}', '{"a": [2]}')


def row(step: int) -> dict:
    return {"step": step, "epoch": 1, "learning_rate": 1e-4, "loss": 2.0 / step, "grad_norm": 0.5,
            "num_tokens": 7, "num_input_tokens": 9, "tokens_per_s": 1234.5, "peak_memory_gb": 1.5}  # fmt: skip


def track(folder, terminal: bool, width: int = 150) -> str:
    out = io.StringIO()
    with log.Tracker(folder, Console(file=out, force_terminal=terminal, width=width), PhaseClock()) as tracker:
        tracker.begin(step=0, total_steps=7, logging_steps=3)
        tracker.evaluation(0, 0, EvalResult(1.0, 2.718, 10))
        tracker.steps([row(1)])
        tracker.steps([row(step) for step in range(2, 8)])
        tracker.evaluation(7, 1, EvalResult(0.5, 1.649, 10))
        tracker.hyperparameters(TrainConfig(), EvalResult(0.5, 1.649, 10))
        tracker.samples([SAMPLE], of="eval", step=7)
    return out.getvalue()


def test_every_step_has_a_row_and_every_third_a_line_when_piped(tmp_path):
    text = track(tmp_path, terminal=False)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["event"] == "step"] == list(range(1, 8))
    assert rows[1] == {"event": "step", **row(1)}
    assert rows[0] == {
        "event": "eval",
        "step": 0,
        "epoch": 0,
        "eval_loss": 1.0,
        "perplexity": 2.718,
        "num_tokens": 10,
        "eval_data": None,
    }
    assert [line.split()[1] for line in text.splitlines() if line.startswith("step")] == ["1/7", "3/7", "6/7", "7/7"]
    assert "step 3/7  epoch 1  loss 0.6667  lr 1.00e-04  grad_norm 0.500  1,234 tokens/s  peak 1.50 GB" in text
    assert "\x1b" not in text


def test_a_terminal_gets_a_bar_with_the_same_numbers(tmp_path):
    text = track(tmp_path, terminal=True, width=80)
    for words in (
        "7/7",
        "epoch 1",
        "loss 0.2857",
        "lr 1.0e-04",
        "norm 0.50",
        "1234 tok/s",
        "1.5 GB",
        "eval loss 0.5000",
    ):
        assert words in text, words
    assert "step 3/7" not in text


def test_answers_are_shown_side_by_side_as_they_are(tmp_path):
    text = track(tmp_path, terminal=False)
    assert "Create [bold]x[/bold]" in text and '{"a": [1]}' in text
    assert "line 23" in text and "line 24" not in text and "... 16 more lines" in text
    (stored,) = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert stored == {"step": 7, **SAMPLE._asdict()}


def test_tensorboard_has_curves_texts_and_hyperparameters(tmp_path):
    track(tmp_path, terminal=False)
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    board.Reload()
    tags = board.Tags()
    assert set(log.TRAIN_CURVES.values()) | {"eval/loss", "eval/perplexity"} <= set(tags["scalars"])
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(s, pytest.approx(2.0 / s)) for s in range(1, 8)]
    assert [(e.step, e.value) for e in board.Scalars("eval/loss")] == [(0, 1.0), (7, 0.5)]
    assert "samples/0/text_summary" in tags["tensors"]
    assert any(b"lora_dropout" in p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())


def scalars(folder, tag: str) -> list[tuple[int, float]]:
    """As TensorBoard shows them: what a later process has purged is gone."""
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_a_resumed_run_has_each_row_and_each_point_once(tmp_path):
    """Stopped after step 5 with the checkpoint of step 3 to go back to, its evaluation known; then once more from step 6."""
    console = Console(file=io.StringIO())
    for start, end in ((0, 5), (3, 6), (6, 7)):
        with log.Tracker(tmp_path, console, PhaseClock(), start) as tracker:
            tracker.begin(start, total_steps=7, logging_steps=3)
            known = sorted(tracker.known_evaluations)
            if start == 0:
                tracker.evaluation(0, 0, EvalResult(1.0, 2.718, 10))
            for step in range(start + 1, end + 1):
                tracker.steps([row(step)])
                if step % 3 == 0:
                    tracker.evaluation(step, 1, EvalResult(1.0 / step, 2.0, 10))
        assert known == [step for step in (0, 3, 6) if 0 < start >= step]
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"event": "step", "st')  # and cut short
        time.sleep(1.01)  # TensorBoard reads files in the order of their names, which have seconds in them
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert [r["step"] for r in rows if r["event"] == "step"] == list(range(1, 8))
    assert [r["step"] for r in rows if r["event"] == "eval"] == [0, 3, 6]
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == list(range(1, 8))
    assert [step for step, _ in scalars(tmp_path, "eval/loss")] == [0, 3, 6]


def test_a_run_that_starts_again_before_its_first_checkpoint_starts_its_records_again(tmp_path):
    for loss in (5.0, 4.0):
        with log.Tracker(tmp_path, Console(file=io.StringIO()), PhaseClock(), step=0) as tracker:
            tracker.begin(0, total_steps=7, logging_steps=3)
            assert tracker.known_evaluations == {}
            tracker.evaluation(0, 0, EvalResult(loss, 2.718, 10))
            tracker.steps([row(1)])
        time.sleep(1.01)  # TensorBoard reads files in the order of their names, which have seconds in them
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    assert scalars(tmp_path, "eval/loss") == [(0, 4.0)]


def test_a_branch_shows_the_curves_of_before_it(tmp_path):
    for name in ("run", "branch"):
        (tmp_path / name).mkdir()
    track(tmp_path / "run", terminal=False)
    shutil.copy(tmp_path / "run" / "metrics.jsonl", tmp_path / "branch")
    with log.Tracker(tmp_path / "branch", Console(file=io.StringIO()), PhaseClock(), step=4) as tracker:
        tracker.begin(4, total_steps=7, logging_steps=3)
        tracker.steps([row(5)])
    assert [step for step, _ in scalars(tmp_path / "branch", "train/loss")] == [1, 2, 3, 4, 5]
    assert [step for step, _ in scalars(tmp_path / "branch", "eval/loss")] == [0]


def test_what_is_not_finite_is_null_in_the_metrics_and_left_out_of_the_curves(tmp_path):
    with log.Tracker(tmp_path, Console(file=io.StringIO()), PhaseClock()) as tracker:
        tracker.begin(0, total_steps=7, logging_steps=3)
        tracker.steps([row(1), {**row(2), "loss": math.nan, "grad_norm": math.inf}])
        tracker.evaluation(2, 1, EvalResult(math.nan, math.nan, 10))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (rows[1]["loss"], rows[1]["grad_norm"], rows[2]["eval_loss"]) == (None, None, None)
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1]
    with log.Tracker(tmp_path, Console(file=io.StringIO()), PhaseClock(), step=2) as tracker:
        assert math.isnan(tracker.known_evaluations[2].loss)  # known, and never the best


def test_a_full_disk_ends_the_run_with_exit_4_not_with_a_traceback(tmp_path):
    with pytest.raises(UserError, match="No space left on device") as caught, log.Tracker(
        tmp_path, Console(file=io.StringIO()), PhaseClock()
    ) as tracker:  # fmt: skip
        tracker.begin(0, total_steps=7, logging_steps=3)
        tracker.metrics_file.close()
        tracker.metrics_file = open("/dev/full", "ab")  # noqa: SIM115  which is always full
        tracker.steps([row(1)])
    assert caught.value.exit_code == ExitCode.CHECKPOINT


def test_secrets_are_masked_wherever_something_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-very-secret-value")
    token = "hf_" + "AbCdEf123456" * 3
    out = io.StringIO()
    log.say(Console(file=out), f"https://user:{token}@hub and a-very-secret-value")
    config = TrainConfig(train_file=(f"https://user:{token}@hub/data.jsonl",), output_dir=tmp_path / token)
    with log.Tracker(tmp_path, Console(file=out), PhaseClock()) as tracker:
        tracker.begin(0, total_steps=7, logging_steps=3)
        tracker.hyperparameters(config, None)
    told = [out.getvalue(), config.to_yaml(), json.dumps(config.plain())]
    told += [path.read_bytes().decode("latin-1") for path in (tmp_path / "tensorboard").iterdir()]
    assert not [text for text in told if token in text or "a-very-secret-value" in text]
    assert "hf_***" in told[0] and "hf_***" in told[1]


def test_the_audit_is_a_table_with_the_share_of_true_parameters():
    out = io.StringIO()
    targets = [
        Target("qkv_proj", ("a",) * 32, ((9216, 3072),), 12_582_912),
        Target("o_proj", ("b",) * 2, ((4, 8), (8, 8)), 100),
    ]
    Console(file=out, width=100).print(log.targets_table(targets, 3_821_079_552))
    for words in ("qkv_proj", "32", "9216 x 3072", "12,582,912", "4 x 8, 8 x 8", "12,583,012 trained, 0.33 % of 3,833,662,564"):
        assert words in out.getvalue(), words


def test_the_environment_has_versions_and_hardware():
    found = environment.environment(torch.device("cpu"))
    assert found["packages"]["torch"] == torch.__version__ and found["packages"]["bitsandbytes"]
    assert "CPU" in found["device"] and found["python"]
    assert json.loads(json.dumps(found)) == found


def test_the_closing_words_have_the_measured_peak_beside_the_prediction(tmp_path, monkeypatch):
    config = TrainConfig()
    words = log.closing_words(tmp_path, "report.html", 1.25, 1.5, PhaseClock(), config)
    assert "GPU memory" not in words and "on the base in NF4 with double quantization, as it was trained" in words
    fp4 = dataclasses.replace(config, quantization="fp4", precision="fp16")
    words = log.closing_words(tmp_path, "report.html", 1.25, 1.5, PhaseClock(), fp4)
    assert 'bnb_4bit_quant_type="fp4"' in words and "compute_dtype=torch.float16" in words and 'dtype="float16"' in words
    plain = dataclasses.replace(config, quantization="none")
    assert "as it was trained" not in log.closing_words(tmp_path, "report.html", 1.25, 1.5, PhaseClock(), plain)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = log.closing_words(tmp_path, "report.html", 1.25, 1.5, PhaseClock(), config)
    assert words.startswith(f"\nGPU memory:   1.25 GB at its peak, 1.50 predicted\nAdapter:      {tmp_path}/adapter\n")
    assert "Report:       report.html" in words


@pytest.mark.parametrize(
    ("losses", "words"),
    [({0: 1.0, 3: 2.0}, "lowest eval loss, 2.0000. It was 1.0000 before training: no step made it lower.\n"),
     ({0: math.nan, 3: 1.0, 6: 2.0}, "adapter/ is that of step 3, the checkpoint with the lowest eval loss, 1.0000.\n"),
     ({0: 4.0, 3: 1.0, 6: 2.0}, "with the lowest eval loss, 1.0000.\n")],
)  # fmt: skip
def test_a_run_that_ends_early_says_which_adapter_it_took(tmp_path, losses, words):
    told = io.StringIO()
    with log.Tracker(tmp_path, Console(file=told, width=200), PhaseClock(), step=0) as tracker:
        tracker.begin(0, total_steps=9, logging_steps=3)
        tracker.ended_early(max(losses), 1)
        tracker.adapter_chosen(3, {at: EvalResult(loss, 2.0, 10) for at, loss in losses.items()})
    told = told.getvalue()
    assert f"Ended early, after step {max(losses)}: the eval loss stopped falling" in told and words in told


def test_each_moment_belongs_to_one_phase_and_short_ones_are_left_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    clock = timing.PhaseClock()
    start_s = clock.seconds["start"]
    assert start_s > 0  # of this process
    for phase, seconds in (("model", 2.0), ("steps", 3.0), ("evaluation", 0.01), ("steps", 4.5)):
        now[0] += seconds
        clock.end(phase)
    assert clock.seconds == pytest.approx({"start": start_s, "model": 2.0, "steps": 7.5, "evaluation": 0.01})
    assert clock.summary() == f"{start_s + 9.51:.1f} s (start {start_s:.1f}, model 2.0, steps 7.5)"


def test_a_run_accounts_for_its_time(tiny, tmp_path, capsys):
    began = time.perf_counter()
    command = [
        "--model",
        "tiny-random",
        "--lora-r",
        "4",
        "--max-steps",
        "2",
        *SHORT_DATA,
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert train(command) == 0
    took_s = time.perf_counter() - began
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Time:"))
    phases = dict(part.rsplit(" ", 1) for part in re.search(r"\((.*)\)", line)[1].split(", "))
    total_s = float(line.split()[1])
    assert (
        {"start", "steps"}
        <= phases.keys()
        <= {"start", "data and checks", "model", "steps", "evaluation", "checkpoints", "answers"}
    )
    assert sum(map(float, phases.values())) == pytest.approx(total_s, abs=0.5)
    assert total_s - float(phases["start"]) <= took_s + 0.2
