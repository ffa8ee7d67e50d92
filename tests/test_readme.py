"""The README keeps its word: commands, tables, quoted code, links, and edits that apply and run."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from qlora.config import DEMO_LEARNING_RATE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DIFFS = re.findall(r"Another \*\*(\w+)\*\*[^\n]*:\n\n```diff\n(.*?)```", README, re.DOTALL)


def test_the_two_commands_stand_there():
    assert "pip install -e . && python train_loop.py" in README
    assert 'pip install -e ".[test]" && pytest' in README
    assert re.search(r"^pytest$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


@pytest.mark.parametrize("document", report.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_what_the_results_give(document):
    text = document.read_text()
    assert report.rendered(text) == text
    assert all(f"<!-- {name} -->" in "".join(path.read_text() for path in report.DOCUMENTS) for name in report.BLOCKS)


def test_results_name_their_machine_versions_and_commit():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        record = json.loads(path.read_text())
        environment = record["environment"]
        assert environment["commit"] and environment["device"] and environment["packages"]["torch"], path.name
        assert "/root" not in path.read_text() and "/tmp/" not in path.read_text(), path.name


def test_the_measured_default_run_keeps_what_is_promised_of_it():
    _, record = report.load("demo_cpu_*.json")
    run = record["runs"][0]
    assert run["default"] and run["steps"] == 120
    assert run["first_loss_s"] < 30 and run["total_s"] < 240 and run["peak_rss_gib"] * 2**30 < 3e9
    assert run["eval_loss"][-1] < 0.1 * run["eval_loss"][0]
    assert run["base_right"] == 0 and run["tuned_right"] >= 7 and run["held_out"] == 8
    assert run["learning_rate"] == DEMO_LEARNING_RATE
    assert run["tuned_right"] == max(other["tuned_right"] for other in record["runs"])


def test_quoted_code_stands_in_the_loop():
    (quoted,) = re.findall(r"```python\n(.*?)```", README.split("## The loop, explained")[1], re.DOTALL)
    loop = [line.strip() for line in (ROOT / "train_loop.py").read_text().splitlines()]
    positions = [loop.index(line.strip()) for line in quoted.splitlines()]
    assert positions == sorted(positions)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def applied(diff: str, text: str) -> str:
    """Replace each hunk's old lines, which must stand in `text` exactly once, by its new ones."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines()
        old = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
        new = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def run_copy(text: str, folder: Path, monkeypatch, name: str) -> list[dict]:
    """Metrics of a short run of a changed train_loop.py, through its own main."""
    from qlora.config import TrainConfig
    from qlora.signals import Signals

    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"changed_{name}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    config = TrainConfig(model="tiny-random", output_dir=folder / name, max_steps=8, learning_rate=1e-2, lora_r=4)
    module.main(config, Signals())
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "diff"), DIFFS, ids=[name for name, _ in DIFFS])
def test_each_edit_applies_runs_and_changes_what_it_says(tiny, tmp_path, monkeypatch, name, diff):
    original = (ROOT / "train_loop.py").read_text()
    before, after = (
        [row for row in run_copy(text, tmp_path, monkeypatch, label) if row["event"] == "step"]
        for text, label in ((original, "original"), (applied(diff, original), name))
    )
    assert len(after) == len(before) == 8
    if name == "metric":
        assert [row.pop("num_padding_tokens") >= 0 for row in after] == [True] * 8
        assert [row["loss"] for row in after] == [row["loss"] for row in before]
    elif name == "schedule":
        rates = [row["learning_rate"] for row in after]
        assert rates == pytest.approx([1e-2] + [1e-2 * (1 - k / 7) for k in range(7)])  # warmup of one step
    elif name == "loss":
        assert after[0]["loss"] != before[0]["loss"] and after[0]["grad_norm"] != before[0]["grad_norm"]
    else:
        assert after[0]["loss"] == before[0]["loss"] and after[-1]["loss"] != before[-1]["loss"]


def test_a_killed_run_is_compared_with_a_straight_one(tmp_path):
    """A smoke test of benchmarks/kill_resume.py, on the tiny model."""
    command = [sys.executable, "benchmarks/kill_resume.py", "--shape", "tiny", "--kills", "1", "--length", "150"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out.json")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert [kill["equal"] for kill in record["kills"]] == [True] and set(record["finished"].values()) == {True}


def test_there_are_four_edits():
    assert [name for name, _ in DIFFS] == ["loss", "schedule", "metric", "optimizer"]


def test_benchmarks_run_on_a_cpu(tiny, tmp_path):
    """A smoke test of each script, on the tiny model; numbers go to a temporary file."""
    step = [
        sys.executable,
        "benchmarks/train_step.py",
        "--shape",
        "tiny",
        "--length",
        "32",
        "--steps",
        "2",
        "--checkpointing",
        "full",
    ]
    demo = [sys.executable, "benchmarks/demo.py", "--model", "tiny-random", "--max-steps", "2", "--learning-rates", "1e-3"]
    for command in (step, demo):
        done = subprocess.run([*command, "--out", str(tmp_path / "out.json")], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "out.json").read_text())
        rows = record.get("cells") or record["runs"]
        assert len(rows) >= 2 and record["environment"]["packages"]["torch"]
        if command is step:
            assert [row["attn_implementation"] for row in rows] == ["sdpa", "flash_attention_2", "eager"]
            assert rows[0]["finite"] and rows[0]["step_ms"] > 0 and "needs a CUDA GPU" in rows[1]["unavailable"]
        else:
            assert (
                rows[0]["default"]
                and rows[0]["first_loss_s"] < rows[0]["total_s"]
                and rows[0]["output"]
                and rows[0]["held_out"] == 8
            )
