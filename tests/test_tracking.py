"""metrics.jsonl, TensorBoard, and what a person sees."""

import io
import json

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlora import tracking
from qlora.config import TrainConfig
from qlora.evaluate import HeldOut, Sample
from qlora.model import Target

SAMPLE = Sample("Create [bold]x[/bold]", "\n".join(f"line {i}" for i in range(40)), '{"a": [1]}', '{"a": [2]}')


def row(step: int) -> dict:
    return {"step": step, "epoch": 1, "learning_rate": 1e-4, "loss": 2.0 / step, "grad_norm": 0.5,
            "num_tokens": 7, "num_input_tokens": 9, "tokens_per_s": 1234.5, "peak_memory_gib": 1.5}  # fmt: skip


def track(folder, terminal: bool, width: int = 150) -> str:
    out = io.StringIO()
    with tracking.Tracker(folder, Console(file=out, force_terminal=terminal, width=width)) as tracker:
        tracker.begin(total_steps=7, logging_steps=3)
        tracker.held_out(0, 0, HeldOut(1.0, 2.718, 10))
        tracker.steps([row(1)])
        tracker.steps([row(step) for step in range(2, 8)])
        tracker.held_out(7, 1, HeldOut(0.5, 1.649, 10))
        tracker.hyperparameters(TrainConfig(), HeldOut(0.5, 1.649, 10))
        tracker.samples([SAMPLE], of="held-out")
    return out.getvalue()


def test_every_step_has_a_row_and_every_third_a_line_when_piped(tmp_path):
    text = track(tmp_path, terminal=False)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["event"] == "step"] == list(range(1, 8))
    assert rows[1] == {"event": "step", **row(1)}
    assert rows[0] == {"event": "eval", "step": 0, "epoch": 0, "eval_loss": 1.0, "perplexity": 2.718, "num_tokens": 10}
    assert [line.split()[1] for line in text.splitlines() if line.startswith("step")] == ["1/7", "3/7", "6/7", "7/7"]
    assert "step 3/7  epoch 1  loss 0.6667  lr 1.00e-04  grad_norm 0.500  1,234 tokens/s  peak 1.50 GiB" in text
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
        "1.5 GiB",
        "held-out loss 0.5000",
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
    assert {f"train/{name}" for name in tracking.METRICS} | {"eval/loss", "eval/perplexity"} <= set(tags["scalars"])
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(s, pytest.approx(2.0 / s)) for s in range(1, 8)]
    assert [(e.step, e.value) for e in board.Scalars("eval/loss")][:2] == [(0, 1.0), (7, 0.5)]
    assert "samples/0/text_summary" in tags["tensors"]
    assert any(b"lora_dropout" in p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())


def test_the_audit_is_a_table_with_the_share_of_true_parameters():
    out = io.StringIO()
    targets = [
        Target("qkv_proj", ("a",) * 32, ((9216, 3072),), 12_582_912),
        Target("o_proj", ("b",) * 2, ((4, 8), (8, 8)), 100),
    ]
    Console(file=out, width=100).print(tracking.targets_table(targets, 3_821_079_552))
    for words in ("qkv_proj", "32", "9216 x 3072", "12,582,912", "4 x 8, 8 x 8", "12,583,012 trained, 0.33 % of 3,833,662,564"):
        assert words in out.getvalue(), words


def test_the_environment_has_versions_and_hardware():
    environment = tracking.environment(torch.device("cpu"))
    assert environment["packages"]["torch"] == torch.__version__ and environment["packages"]["bitsandbytes"]
    assert "CPU" in environment["device"] and environment["python"]
    assert json.loads(json.dumps(environment)) == environment
