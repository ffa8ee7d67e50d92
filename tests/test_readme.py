"""The README keeps its word: commands, tables, quoted code, links, and edits that apply and run."""

import ast
import enum
import importlib.util
import io
import itertools
import json
import os
import re
import signal
import sys
import tokenize
from pathlib import Path
from typing import Any

import cogapp
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import report, tables
from benchmarks.methods import edited
from qlora.cli import train as command_line
from qlora.config import DEMO_LEARNING_RATE, TrainConfig
from qlora.data.batch import Batch, collate
from qlora.data.template import IGNORED
from qlora.model.loss import read_head
from qlora.run.signals import Signals
from tests.helpers import SHORT_DATA, SHORT_EVAL, SHORT_TRAIN

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
    assert cogapp.Cog().main(["cog", *report.COG_FLAGS, "--check", str(document)]) == 0


def test_results_name_their_machine_versions_and_commit():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        record = json.loads(path.read_text())
        environment = record["environment"]
        assert environment["commit"] and environment["device"] and environment["packages"]["torch"], path.name
        assert "/root" not in path.read_text() and "/tmp/" not in path.read_text(), path.name


def test_the_measured_default_run_keeps_what_is_promised_of_it():
    _, record = tables.load("demo_cpu_*.json")
    run = record["runs"][0]
    assert run["default"] and run["steps"] == 120
    assert run["first_loss_s"] < 30 and run["total_s"] < 240 and run["peak_rss_gb"] < 3
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


def changed_loop(text: str, folder: Path, monkeypatch, name: str) -> Any:
    """A changed train_loop.py as a module."""
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"changed_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def short_run(folder: Path, save_steps: int | None = None) -> TrainConfig:
    """Of the tiny model, eight steps."""
    files = {"train_file": str(SHORT_TRAIN), "eval_file": str(SHORT_EVAL)}
    options = {"max_steps": 8, "learning_rate": 1e-2, "lora_r": 4, "save_steps": save_steps}
    return TrainConfig(model="tiny-random", output_dir=folder, **files, **options)


def run_copy(text: str, folder: Path, monkeypatch, name: str, save_steps: int | None = None) -> list[dict]:
    """Metrics of a short run of a changed train_loop.py, through its own main."""
    changed_loop(text, folder, monkeypatch, name).main(short_run(folder / name, save_steps), Signals())
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def padding(row: dict, lengths: dict[int, int], batch_size: int) -> int:
    """Positions of a step's micro-batches that hold no token, from its lines."""
    batches = [row["lines"][start : start + batch_size] for start in range(0, len(row["lines"]), batch_size)]
    return sum(len(lines) * max(lengths[line] for line in lines) - sum(lengths[line] for line in lines) for lines in batches)


def predictions(model: Any, batch: Batch, hidden: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Logits [V] and the token that they are to predict, one after the other, by the model's own head."""
    logits = model.get_output_embeddings()(hidden).float()  # [B, T, V]
    return [
        (logits[row, position], int(batch.labels[row, position + 1]))
        for row in range(len(batch.labels))
        for position in range(batch.labels.shape[1] - 1)
        if batch.labels[row, position + 1] != IGNORED
    ]


@pytest.fixture
def fixed(model, samples) -> tuple[Any, Batch, torch.Tensor]:
    """A model, a batch of two, and hidden states [B, T, D] for it."""
    batch = collate(samples[:2])
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*batch.input_ids.shape, model.config.hidden_size, generator=generator)  # [B, T, D]
    return model, batch, hidden.to(torch.bfloat16)


@pytest.fixture(scope="module")
def unchanged(tiny, tmp_path_factory) -> list[dict]:
    """Metrics of a short run of train_loop.py as it is."""
    text = (ROOT / "train_loop.py").read_text()
    with pytest.MonkeyPatch.context() as patch:
        return run_copy(text, tmp_path_factory.mktemp("unchanged"), patch, "original")


@pytest.mark.parametrize(("name", "diff"), DIFFS, ids=[name for name, _ in DIFFS])
def test_each_edit_applies_runs_and_changes_what_it_says(tmp_path, monkeypatch, name, diff, samples, unchanged):
    text = edited(diff, (ROOT / "train_loop.py").read_text())
    after = [row for row in run_copy(text, tmp_path, monkeypatch, name) if row["event"] == "step"]
    before = [row for row in unchanged if row["event"] == "step"]
    assert len(after) == len(before) == 8
    if name == "metric":
        lengths = {sample.line: len(sample.input_ids) for sample in samples}
        expected = [padding(row, lengths, TrainConfig().per_device_train_batch_size) for row in after]
        assert [row["num_padding_tokens"] for row in after] == expected and max(expected) > 0
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


def test_the_smoothed_loss_is_torchs_of_each_next_token(fixed, tmp_path, monkeypatch):
    model, batch, hidden = fixed
    loop = changed_loop(edited(dict(DIFFS)["loss"], (ROOT / "train_loop.py").read_text()), tmp_path, monkeypatch, "loss")
    found = loop.smoothed_loss_sum(hidden, batch, read_head(model))
    smoothed = [
        torch.nn.functional.cross_entropy(logits, torch.tensor(token), label_smoothing=0.1)
        for logits, token in predictions(model, batch, hidden)
    ]
    assert len(smoothed) == batch.num_tokens
    torch.testing.assert_close(found, torch.stack(smoothed).sum(), rtol=1e-5, atol=0)


# -- what the Trainer did ----------------------------------------------------------------------------------------------


SFT, TRAINER = "trl.trainer.sft_trainer", "transformers.trainer"
PREPARE, COLLATE = f"{SFT}:SFTTrainer._prepare_dataset", f"{SFT}:DataCollatorForLanguageModeling.torch_call"
EPOCH, SAVE = f"{TRAINER}:Trainer._run_epoch", f"{TRAINER}:Trainer._save_checkpoint"
# For each row of the map: what stands in backticks on their side, with the function and the code of it that it means, or None
# for a default of SFTConfig; and ours.
PAIRS: list[tuple[dict[str, tuple[str, str] | None], str, str]] = [
    (
        {
            "completion_mask": (PREPARE, 'mask_columns.append("completion_mask")'),
            "formatting_func": (PREPARE, 'return {"text": formatting_func(example)}'),
        },
        "qlora/data/template.py:_encode_turns",
        "[IGNORED] * len(context_ids)",
    ),
    (
        {"add_eos": (PREPARE, "def add_eos(example, eos_token, dataset_text_field)")},
        "qlora/data/template.py:_encode_turns",
        "turn.stop_id",
    ),
    (
        {
            "pad_token": (
                f"{SFT}:SFTTrainer.__init__",
                "args.pad_token or self._tokenizer.pad_token or self._tokenizer.eos_token",
            )
        },
        "qlora/data/batch.py:collate",
        "torch.zeros((max(len(samples), least), longest), dtype=torch.int64)",
    ),
    ({"max_length=1024": None}, "qlora/data/dataset.py:_fitting", "tally.drop(example.line)"),
    (
        {"fully masked": (PREPARE, "Dropping fully masked examples")},
        "qlora/data/dataset.py:truncate_or_drop",
        "any(label != IGNORED for label in cut.labels[1:])",
    ),
    (
        {"RandomSampler": (f"{TRAINER}:Trainer._get_train_sampler", "return RandomSampler(")},
        "qlora/data/batch.py:epoch_order",
        "torch.randperm",
    ),
    (
        {"attention_mask": (COLLATE, 'output["attention_mask"] = pad(')},
        "qlora/model/attention.py:decoder_inputs",
        '{"input_ids": batch.input_ids}',
    ),
    (
        {"_prepare_inputs": (f"{TRAINER}:Trainer.training_step", "inputs = self._prepare_inputs(inputs)")},
        "qlora/data/batch.py:Batch.to",
        "non_blocking=True",
    ),
    (
        {"set_seed": (f"{TRAINER}:Trainer.__init__", "set_seed(self.args.seed)")},
        "qlora/model/random_state.py:seed_generators",
        "torch.manual_seed(seed)",
    ),
    (
        {"torch.bfloat16": (f"{SFT}:SFTTrainer.__init__", "param.data = param.data.to(torch.bfloat16)")},
        "qlora/model/lora.py:add_lora",
        "peft.get_peft_model(model, lora)",
    ),
    ({"gradient_checkpointing=True": None}, "qlora/speed/layers.py:_policies", '("none", "selective", "full")'),
    (
        {"enable_input_require_grads": (f"{SFT}:SFTTrainer.__init__", "model.enable_input_require_grads()")},
        "qlora/speed/layers.py:_policy",
        '"use_reentrant": False',
    ),
    (
        {"use_cache": (f"{SFT}:SFTTrainer.compute_loss", 'inputs["use_cache"] = False')},
        "train_loop.py:train_step",
        "use_cache=False",
    ),
    ({"bf16=True": None}, "train_loop.py:train_step", "torch.autocast(device.type, decoder.dtype)"),
    (
        {"add_fused_lm_head": (f"{SFT}:SFTTrainer.__init__", "add_fused_lm_head(")},
        "qlora/model/loss.py:token_loss_sum",
        "_ChunkedCrossEntropy.apply",
    ),
    (
        {"num_items_in_batch": (f"{TRAINER}:Trainer.training_step", "inputs, num_items_in_batch=num_items_in_batch)")},
        "train_loop.py:train_step",
        "num_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)",
    ),
    (
        {"remainder": (EPOCH, "remainder = steps_in_epoch % self.args.gradient_accumulation_steps")},
        "qlora/data/batch.py:batched",
        "itertools.islice(items, size)",
    ),
    ({"max_grad_norm=1.0": None}, "train_loop.py:train_step", "torch.nn.utils.clip_grad_norm_"),
    ({'optim="adamw_torch_fused"': None, "weight_decay=0.0": None}, "qlora/model/optimizer.py:build_optimizer", "fused=True"),
    (
        {'lr_scheduler_type="linear"': None, "warmup_steps=0": None},
        "train_loop.py:lr_multiplier",
        "(step + 1) / warmup_steps",
    ),
    ({"zero_grad": (EPOCH, "model.zero_grad()")}, "train_loop.py:train_step", "optimizer.zero_grad(set_to_none=True)"),
    ({"logging_steps=10": None}, "qlora/run/log.py:StepLog.add", "self.pending.append(row)"),
    (
        {"mean_token_accuracy": (f"{SFT}:SFTTrainer.compute_loss", '["mean_token_accuracy"].append(')},
        "qlora/run/log.py:StepLog.flush",
        "torch.stack",
    ),
    ({"logging_nan_inf_filter=True": None}, "train_loop.py:train_step", "torch.isfinite(loss) & torch.isfinite(grad_norm)"),
    (
        {"model.eval()": (f"{TRAINER}:Trainer.evaluation_loop", "model.eval()")},
        "qlora/eval/loss.py:evaluate_loss",
        "model.eval()",
    ),
    ({'eval_strategy="no"': None}, "train_loop.py:train", "evaluate(step, epoch)"),
    (
        {"save_steps=500": None, "save_total_limit=None": None},
        "qlora/run/checkpoint.py:lowest",
        "min(known, key=lambda step: losses[step])",
    ),
    ({"_save_rng_state": (SAVE, "self._save_rng_state(")}, "train_loop.py:train_step", "torch.manual_seed(micro_batch.seed)"),
    (
        {"_save_optimizer_and_scheduler": (SAVE, "self._save_optimizer_and_scheduler(")},
        "qlora/run/checkpoint.py:trainer_state",
        "optimizer.state",
    ),
    (
        {"resume_from_checkpoint=None": None},
        "qlora/run/folder.py:RunFolder._find",
        "self._newest(self.checkpoints, of=self.folder)",
    ),
    (
        {"skip_first_batches": (EPOCH, "skip_first_batches(train_dataloader,")},
        "train_loop.py:train",
        "epoch_rows(prep.train_set, config, epoch)[seen:]",
    ),
]


def uncommented(source: str) -> str:
    """Source without its comments and docstrings."""
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip() + "\n"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = ["\n"] * ((first.end_lineno or 0) - first.lineno + 1)
    return "".join(lines)


def definition(path: Path, name: str) -> str:
    """Source of a function or, by its dotted name, of a method, without comments."""
    text = uncommented(path.read_text())
    nodes = ast.parse(text).body
    for part in name.split("."):
        (node,) = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
        nodes = node.body
    return ast.get_source_segment(text, node) or ""


def test_what_is_commented_out_does_not_count():
    source = 'def f(x):\n    """return x * 2"""\n    # x += 1\n    return "#" + x  # x * 3\n'
    left = uncommented(source)
    assert 'return "#" + x\n' in left and not any(gone in left for gone in ("x * 2", "x += 1", "x * 3"))


def test_the_map_of_what_the_trainer_did_has_these_rows():
    section = README.partition("## What the Trainer did for you")[2].partition("\n## ")[0]
    assert len(TRAINER_MAP) == section.count("\n| ") - 2 == len(PAIRS)  # each row is found, but for the two of the header
    for (told, _, where), (theirs, place, code) in zip(TRAINER_MAP, PAIRS, strict=True):
        assert re.findall(r"`([^`]+)`", told) == list(theirs) and where == f"`{place}` `{code}`"


@pytest.mark.parametrize(("place", "code"), [pair[1:] for pair in PAIRS])
def test_what_the_trainer_did_is_done_where_the_map_says(place, code):
    path, _, name = place.partition(":")
    assert code in definition(ROOT / path, name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # an old name, still in TRL's
def test_the_trainer_does_what_the_map_says(tmp_path):
    """Each `name=value` is a default of SFTConfig, anything else stands in the function that trains."""
    pytest.importorskip("trl.trainer.sft_trainer")
    from trl import SFTConfig

    defaults = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    for theirs, _, _ in PAIRS:
        for word, where in theirs.items():
            name, given, value = word.partition("=")
            if where is None:
                seen = getattr(defaults, name)
                assert given and (seen.value if isinstance(seen, enum.Enum) else seen) == ast.literal_eval(value), word
            else:
                module, _, function = where[0].partition(":")
                origin = importlib.util.find_spec(module).origin
                assert word in where[1] and where[1] in definition(Path(origin), function), word


# -- exercises ---------------------------------------------------------------------------------------------------------


def run_commands(number: int, folder: Path, monkeypatch, capsys) -> str:
    """Run the commands of an exercise on the tiny model in a folder of its own; what they print."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("qlora.eval.generate.sample_responses", lambda *_: [])
    block = EXERCISES.partition(f"**{number}. ")[2].partition(f"**{number + 1}. ")[0]
    (commands,) = re.findall(r"```bash\n(.*?)```", block, re.DOTALL)
    capsys.readouterr()
    for command in commands.replace("\\\n", " ").splitlines():
        python, script, *flags = command.split()
        assert (python, script) == ("python", "train_loop.py")
        short = [] if "--num-train-epochs" in flags else ["--max-steps", "5"]
        assert command_line([*SHORT_DATA, *flags, "--model", "tiny-random", *short]) == 0
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


def test_exercise_2_eval_data_is_evaluated_each_epoch(tiny, tmp_path, monkeypatch, capsys):
    for name, count in (("my.jsonl", 8), ("eval.jsonl", 3)):
        rows = [json.dumps({"prompt": f"{name} {index}", "completion": "ab" * index}) for index in range(1, count + 1)]
        (tmp_path / name).write_text("\n".join(rows))
    run_commands(2, tmp_path, monkeypatch, capsys)
    assert [row["step"] for row in events(tmp_path / "runs" / "eval", "eval")] == [0, 2, 4, 5]


def steps_of(rows: list[dict], event: str = "eval") -> list[int]:
    return [row["step"] for row in rows if row["event"] == event]


def test_exercises_2_and_3_as_edits(tiny, tmp_path, monkeypatch):
    assert [name for name, _ in EXERCISE_EDITS] == ["evaluation", "accuracy"]
    original = (ROOT / "train_loop.py").read_text()
    texts = {"original": original} | {name: edited(diff, original) for name, diff in EXERCISE_EDITS}
    rows = {name: run_copy(text, tmp_path, monkeypatch, name, save_steps=3) for name, text in texts.items()}
    losses = {name: [row["loss"] for row in found if row["event"] == "step"] for name, found in rows.items()}
    assert losses["evaluation"] == losses["accuracy"] == losses["original"]  # looking changes nothing
    assert steps_of(rows["evaluation"]) == [0, 3, 6, 8] and steps_of(rows["accuracy"]) == steps_of(rows["original"]) == [
        0,
        6,
        8,
    ]
    board = EventAccumulator(str(tmp_path / "accuracy" / "tensorboard")).Reload()
    values = {scalar.step: scalar.value for scalar in board.Scalars("eval/token_accuracy")}
    assert list(values) == [0, 6, 8] and 0 <= values[0] < 0.02 < values[8] < 1  # a random model, and one that has begun


@pytest.fixture
def ctrl_c():
    """SIGINT is heard, also by a test that runs in the background, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_loses_nothing_where_checkpoints_are_evaluated(tiny, tmp_path, monkeypatch, ctrl_c):
    """In step 4, which is neither logged nor to be saved, and in the evaluation of step 3."""
    text = edited(dict(EXERCISE_EDITS)["evaluation"], (ROOT / "train_loop.py").read_text())
    straight = run_copy(text, tmp_path, monkeypatch, "straight", save_steps=3)
    for name, call, saved in (("train_step", 4, "step-000004"), ("evaluate_loss", 2, "step-000003")):
        loop = changed_loop(text, tmp_path, monkeypatch, name)
        interrupted = interrupting(getattr(loop, name), call)
        with monkeypatch.context() as patch, Signals() as stop:
            patch.setattr(loop, name, interrupted)
            loop.main(short_run(tmp_path / name, 3), stop)
        assert stop.received == signal.SIGINT
        assert max(path.name for path in (tmp_path / name / "checkpoints").iterdir()) == saved
        rows = run_copy(text, tmp_path, monkeypatch, name, save_steps=3)
        losses = [[row["loss"] for row in found if row["event"] == "step"] for found in (rows, straight)]
        assert losses[0] == losses[1] and len(losses[0]) == 8


def interrupting(function: Any, when: int) -> Any:
    """The function, with Ctrl-C at the start of one of its calls."""
    calls = itertools.count(1)

    def called(*arguments, **settings):
        if next(calls) == when:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments, **settings)

    return called


def test_hits_are_counted_by_the_next_token(fixed, tmp_path, monkeypatch):
    model, batch, hidden = fixed
    text = edited(dict(EXERCISE_EDITS)["accuracy"], (ROOT / "train_loop.py").read_text())
    loop, pairs = changed_loop(text, tmp_path, monkeypatch, "accuracy"), predictions(model, batch, hidden)
    guesses = [int(logits.argmax()) for logits, _ in pairs]
    rows, columns = batch.positions // batch.input_ids.shape[1], batch.positions % batch.input_ids.shape[1]  # [N], [N]
    for right in (0, 1, 7, len(pairs)):  # as many labels are made to be what the head says
        labels = batch.labels.clone()  # [B, T]
        for number, guess in enumerate(guesses):
            labels[rows[number], columns[number] + 1] = guess if number < right else (guess + 1) % model.config.vocab_size
        assert int(loop.hits(hidden, batch._replace(labels=labels), read_head(model))) == right


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
