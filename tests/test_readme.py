"""The README keeps its word: commands, tables, quoted code, links, and edits that apply and run."""

import ast
import enum
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import report
from qlora.__main__ import train as command_line
from qlora.config import DEMO_LEARNING_RATE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DIFFS = re.findall(r"Another \*\*(\w+)\*\*[^\n]*:\n\n```diff\n(.*?)```", README, re.DOTALL)

TRAINER_MAP = re.findall(r"^\| (.*?) \| (.*?) \| (`\S+\.py:.*) \|$", README, re.MULTILINE)
EXERCISES = README.partition("## Five exercises")[2].partition("\n## ")[0]
EXERCISE_EDITS = re.findall(r"As an edit, \*\*(\w+)\*\*[^\n]*:\n\n```diff\n(.*?)```", EXERCISES, re.DOTALL)


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
        assert after[0]["loss"] == pytest.approx(before[0]["loss"], rel=0.02)  # still a mean over tokens
    else:
        assert after[0]["loss"] == before[0]["loss"] and after[-1]["loss"] != before[-1]["loss"]
        state = json.loads((tmp_path / name / "checkpoints" / "step-000008" / "state.json").read_text())
        assert state["optimizer_class"] == "SGD"


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


# -- what the Trainer did ----------------------------------------------------------------------------------------------


def definition(path: Path, name: str) -> str:
    """Source of a function or, by its dotted name, of a method."""
    nodes, text = ast.parse(path.read_text()).body, path.read_text()
    for part in name.split("."):
        (node,) = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
        nodes = node.body
    return ast.get_source_segment(text, node) or ""


def test_there_is_a_map_of_what_the_trainer_did():
    section = README.partition("## What the Trainer did for you")[2].partition("\n## ")[0]
    assert len(TRAINER_MAP) == section.count("\n| ") - 2 == 30  # each row is found, but for the two of the header


@pytest.mark.parametrize("where", [where for _, _, where in TRAINER_MAP])
def test_what_the_trainer_did_is_done_where_the_map_says(where):
    match = re.fullmatch(r"`(\S+\.py):([\w.]+)` `(.+)`", where)
    assert match and match[3] in definition(ROOT / match[1], match[2])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # an old name, still in TRL's
def test_the_trainer_does_what_the_map_says(tmp_path):
    """Each `name=value` is a default of SFTConfig, any other word in backticks stands in the code that trains."""
    sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")
    import accelerate.data_loader
    import transformers
    from trl import SFTConfig

    sources = [inspect.getsource(module) for module in (sft_trainer, transformers.trainer, accelerate.data_loader)]
    defaults, words = SFTConfig(output_dir=str(tmp_path), use_cpu=True), 0
    for theirs, _, _ in TRAINER_MAP:
        for word in re.findall(r"`([^`]+)`", theirs):
            name, given, value = word.partition("=")
            if given:
                seen = getattr(defaults, name)
                assert (seen.value if isinstance(seen, enum.Enum) else seen) == ast.literal_eval(value), word
            elif not word.startswith("Trainer"):
                assert any(word in source for source in sources), word
            words += 1
    assert words > 30


# -- exercises ---------------------------------------------------------------------------------------------------------


def run_commands(number: int, folder: Path, monkeypatch, capsys) -> str:
    """Run the commands of an exercise on the tiny model in a folder of its own; what they print."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("train_loop.evaluate.sample_responses", lambda *_: [])
    block = EXERCISES.partition(f"**{number}. ")[2].partition(f"**{number + 1}. ")[0]
    (commands,) = re.findall(r"```bash\n(.*?)```", block, re.DOTALL)
    capsys.readouterr()
    for command in commands.replace("\\\n", " ").splitlines():
        python, script, *flags = command.split()
        assert (python, script) == ("python", "train_loop.py")
        short = [] if "--num-train-epochs" in flags else ["--max-steps", "5"]
        assert command_line([*flags, "--model", "tiny-random", *short]) == 0
    return capsys.readouterr().out


def events(run: Path, event: str) -> list[dict]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["event"] == event]


def test_exercise_1_what_grows_with_the_rank(tiny, tmp_path, monkeypatch, capsys):
    out = run_commands(1, tmp_path, monkeypatch, capsys)
    ledgers = [re.findall(r"│ ([\w ]+?) +│ (\w+) +│ +[\d,]+ │ +([\d,]+) │", text) for text in out.split("Memory from step")[1:]]
    small, large = ({row[:2]: int(row[2].replace(",", "")) for row in ledger} for ledger in ledgers)
    growing = {("adapters", "float32"), ("gradients", "float32"), ("moments", "float32")}
    assert {key for key in small if large[key] != small[key]} == growing
    assert all(large[key] == 4 * small[key] for key in growing)
    trained = small["adapters", "float32"] // 4
    assert sum(small[key] for key in growing) == 16 * trained and f"of which {trained:,} are trained" in out


def test_exercise_2_held_out_data_is_evaluated_each_epoch(tiny, tmp_path, monkeypatch, capsys):
    for name, count in (("my.jsonl", 8), ("held_out.jsonl", 3)):
        rows = [json.dumps({"prompt": f"{name} {index}", "completion": "ab" * index}) for index in range(1, count + 1)]
        (tmp_path / name).write_text("\n".join(rows))
    run_commands(2, tmp_path, monkeypatch, capsys)
    assert [row["step"] for row in events(tmp_path / "runs" / "held-out", "eval")] == [0, 2, 4, 5]


def test_exercises_2_and_3_as_edits(tiny, tmp_path, monkeypatch):
    assert [name for name, _ in EXERCISE_EDITS] == ["evaluation", "accuracy"]
    original = (ROOT / "train_loop.py").read_text()
    texts = {"original": original} | {name: applied(diff, original) for name, diff in EXERCISE_EDITS}
    rows = {name: run_copy(text, tmp_path, monkeypatch, name) for name, text in texts.items()}
    losses = {name: [row["loss"] for row in found if row["event"] == "step"] for name, found in rows.items()}
    assert losses["evaluation"] == losses["accuracy"] == losses["original"]  # looking changes nothing
    steps = {name: [row["step"] for row in found if row["event"] == "eval"] for name, found in rows.items()}
    assert steps["evaluation"] == [0, 1, 5, 6, 8] and steps["accuracy"] == steps["original"] == [0, 6, 8]
    board = EventAccumulator(str(tmp_path / "accuracy" / "tensorboard")).Reload()
    values = {scalar.step: scalar.value for scalar in board.Scalars("eval/token_accuracy")}
    assert list(values) == [0, 6, 8] and 0 <= values[0] < 0.02 < values[8] < 1  # a random model, and one that has begun


def test_exercise_4_only_the_named_modules_are_trained(tiny, tmp_path, monkeypatch, capsys):
    run_commands(4, tmp_path, monkeypatch, capsys)
    wanted = {"attention": ["o_proj", "qkv_proj"], "mlp": ["down_proj", "gate_up_proj"], "pair": ["down_proj", "o_proj"]}
    losses = set()
    for name, modules in wanted.items():
        folder = tmp_path / "runs" / name
        assert sorted(json.loads((folder / "adapter" / "adapter_config.json").read_text())["target_modules"]) == modules
        losses.add(events(folder, "eval")[-1]["eval_loss"])
    assert len(losses) == 3


def test_exercise_5_a_run_is_extended_and_branches_off(tiny, tmp_path, monkeypatch, capsys):
    out = run_commands(5, tmp_path, monkeypatch, capsys)
    assert out.count("Resuming after step-000012; ") == 2 and "num_train_epochs: 2 -> 3" in out
    longer, branch = (events(tmp_path / "runs" / name, "step") for name in ("resumed", "branch"))
    assert [row["step"] for row in longer] == [row["step"] for row in branch] == list(range(1, 19))
    assert longer[:12] == branch[:12] and longer[12]["lines"] == branch[12]["lines"]
    assert branch[12]["learning_rate"] == pytest.approx(longer[12]["learning_rate"] / 5)


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
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "out.json")],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
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
