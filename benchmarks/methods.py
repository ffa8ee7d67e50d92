"""PEFT methods, bases and optimizers on the demo task: what each trains, what it costs, and how much it learns.

    python -m benchmarks.methods                                 # on a GPU a few minutes with --at-once 8; on 2 cores hours
    python -m benchmarks.methods --methods LoRA DoRA --seeds 0 --missing
    python -m benchmarks.methods --model tiny-random --max-steps 4 --seeds 0    # anywhere, a smoke test

Each run is `python train_loop.py` in a new process on the bundled data. A method is tried at three learning rates. The table
has the one with the lowest mean eval loss, so the eval data has chosen it; all runs are in the file. Bottleneck adapters and
full fine-tuning are the edits of docs/models.md. An answer is right if it is exactly the schema that was asked for.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import tyro

from benchmarks.demo import is_asked_schema
from benchmarks.harness import ROOT, Cell, Failed, Output, Part, ResultFile, Row
from benchmarks.tables import load, source, table

LORA = (2e-4, 4e-4, 8e-4)  # the default is 4e-4


class Method(NamedTuple):
    """How the demo is trained."""

    rates: tuple[float, ...]  # to try
    peft: Row | None = None  # what --peft-config gets
    flags: tuple[str, ...] = ()
    edit: str | None = None  # of docs/models.md


METHODS: dict[str, Method] = {
    "LoRA": Method(LORA),
    "rsLoRA": Method(LORA, flags=("--use-rslora",)),
    "LoRA+": Method(LORA, flags=("--lora-plus-ratio", "16")),
    "DoRA": Method(LORA, {"use_dora": True, "r": 32, "lora_alpha": 64, "lora_dropout": 0.1}),
    "IA3": Method((3e-3, 1e-2, 3e-2), {"peft_type": "IA3", "target_modules": ["qkv_proj", "down_proj"],
                                       "feedforward_modules": ["down_proj"]}),
    "VeRA": Method((1e-3, 4e-3, 1.6e-2), {"peft_type": "VERA", "r": 64}),
    "OFT": Method(LORA, {"peft_type": "OFT", "oft_block_size": 32}),
    "prompt tuning": Method((3e-2, 1e-1, 3e-1), {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20}),
    "P-tuning": Method((1e-3, 3e-3, 1e-2), {"peft_type": "P_TUNING", "num_virtual_tokens": 20, "encoder_hidden_size": 128}),
    "prefix tuning": Method((1e-2, 3e-2, 1e-1), {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 20}),
    "bottleneck adapters": Method(LORA, edit="Bottleneck adapters"),
    "LoRA on FP4": Method(LORA, flags=("--quantization", "fp4")),
    "LoRA on INT8": Method(LORA, flags=("--quantization", "int8")),
    "LoRA on bf16": Method(LORA, flags=("--quantization", "none")),
    "LoHa on bf16": Method(LORA, {"peft_type": "LOHA", "r": 16, "alpha": 16}, ("--quantization", "none")),
    "LoKr on bf16": Method(LORA, {"peft_type": "LOKR", "r": 16, "alpha": 16}, ("--quantization", "none")),
    "LoRA, adamw_8bit": Method(LORA, flags=("--optimizer", "adamw_8bit")),
    "LoRA, paged_adamw_8bit": Method(LORA, flags=("--optimizer", "paged_adamw_8bit")),
    "LoRA, lion_8bit": Method((2e-5, 4e-5, 8e-5), flags=("--optimizer", "lion_8bit")),
    "full fine-tuning, bf16": Method((1e-5, 3e-5, 1e-4), flags=("--quantization", "none"), edit="Full fine-tuning"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """Which methods."""

    output: tyro.conf.OmitArgPrefixes[Output] = Output()
    part: tyro.conf.OmitArgPrefixes[Part] = Part()
    methods: tuple[str, ...] = tuple(METHODS)
    """By their names in the table."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of adapters and order."""
    model: str = "demo"
    """As --model of train_loop.py."""
    max_steps: int | None = None
    """As --max-steps of train_loop.py, for a quick look."""
    at_once: int = 1
    """Runs side by side; more of them slow each other down, which shows in seconds."""


def edited(diff: str, text: str) -> str:
    """A text with each hunk's old lines, which must occur in it exactly once, replaced by its new ones."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines()
        old = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
        new = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
        if text.count(old) != 1:
            raise ValueError(f"these lines occur {text.count(old)} times in the text:\n{old}")
        text = text.replace(old, new)
    return text


def edits() -> dict[str, str]:
    """The diffs of docs/models.md by name."""
    text = (ROOT / "docs" / "models.md").read_text()
    return dict(re.findall(r"^\*\*([\w -]+)\*\* .*?```diff\n(.*?)```", text, re.MULTILINE | re.DOTALL))


def run(name: str, rate: float, seed: int, options: Options) -> Row:
    """Train once, in a process; then answer the eval prompts, in another."""
    method = METHODS[name]
    row: Row = {"method": name, "learning_rate": rate, "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        folder, script = Path(scratch) / "run", ROOT / "train_loop.py"
        if method.edit:
            script = Path(scratch) / "train_loop.py"
            script.write_text(edited(edits()[method.edit], (ROOT / "train_loop.py").read_text()))
        command = [sys.executable, str(script)]
        command += ["--model", options.model, "--output-dir", str(folder), "--seed", str(seed), "--learning-rate", str(rate)]
        command += [*method.flags, *(("--max-steps", str(options.max_steps)) if options.max_steps else ())]
        if method.peft is not None:
            (Path(scratch) / "peft.json").write_text(json.dumps(method.peft))
            command += ["--peft-config", str(Path(scratch) / "peft.json")]
        clock = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {**row, "failed": done.stderr.strip()[-300:].replace(scratch, "")}
        row["total_s"] = round(time.perf_counter() - clock, 1)
        try:
            return {**row, **Cell(measured, folder, method.edit == "Full fine-tuning").result()}
        except Failed as failed:
            return {**row, "failed": str(failed).replace(scratch, "")}


def measured(folder: Path, is_whole_model: bool) -> Row:
    """What a run trained, what it took, and how many answers are right."""
    from safetensors.torch import load_file

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = ([row for row in rows if row["event"] == event] for event in ("step", "eval"))
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    moments = load_file(newest / "trainer_state.safetensors")
    trained = sum(tensor.numel() for name, tensor in moments.items() if name.startswith(("exp_avg.", "state1.")))
    tokens = sum(row["num_input_tokens"] for row in steps)
    training_s = sum(row["num_input_tokens"] / row["tokens_per_s"] for row in steps)
    return {
        "trained_parameters": trained,
        "eval_loss": evaluations[-1]["eval_loss"],
        "step_s": round(training_s / len(steps), 3),
        "tokens_per_s": round(tokens / training_s, 1),
        "peak_gb": round(max(row["peak_memory_gb"] for row in steps), 3),
        **right_answers(folder, is_whole_model),
    }


def right_answers(folder: Path, is_whole_model: bool) -> Row:
    """How many of the eval prompts get exactly the schema that was asked for."""
    import torch
    import transformers

    from qlora.commands.adapter import load_adapted, open_adapter
    from qlora.config import BUNDLED_EVAL
    from qlora.data.formats import read_examples
    from qlora.data.template import encode_prompt
    from qlora.eval.generate import answer_limit, generate_all
    from qlora.model.precision import autocast_dtype

    if (folder / "bottlenecks").exists():  # which no command loads
        return {"right": None, "prompts": None}
    adapter = open_adapter(folder)
    if is_whole_model:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).to(adapter.device)
    else:
        model = load_adapted(adapter)
    examples = list(read_examples(BUNDLED_EVAL, "test"))
    prompts = [encode_prompt(example.prompt, adapter.template) for example in examples]
    with torch.autocast(model.device.type, autocast_dtype(model)):
        answers = generate_all(model, prompts, adapter.template, answer_limit(examples, adapter.template), len(prompts))
    asked = [example.prompt[-1].content or "" for example in examples]
    return {"right": sum(map(is_asked_schema, asked, answers)), "prompts": len(prompts)}


def main(options: Options) -> None:
    """Train each method at each rate with each seed, and write the file after each run."""
    file = ResultFile("methods", options.output)
    file.begin_run({"model": options.model, "max_steps": options.max_steps}, at_once=options.at_once)
    done = {key(row) for row in file.record["cells"] if "failed" not in row} if options.part.missing else set()
    wanted = [(name, rate, seed) for seed in options.seeds for name in options.methods for rate in METHODS[name].rates]
    wanted = [each for each in wanted if each not in done]

    def trained(each: tuple[str, float, int]) -> Row | None:
        return None if file.is_late(options.part.minutes) else run(*each, options)

    with concurrent.futures.ThreadPoolExecutor(options.at_once) as pool:
        for row in pool.map(trained, wanted):
            if row is not None:
                others = [other for other in file.record["cells"] if key(other) != key(row)]
                file.record["cells"] = [*others, {**row, "commit": file.environment["commit"]}]
                file.write(row)


def key(row: Row) -> tuple[str, float, int]:
    """What makes two runs the same."""
    return row["method"], row["learning_rate"], row["seed"]


# -- the table -------------------------------------------------------------------------------------------------------


def best(record: Row) -> dict[str, list[Row]]:
    """Method -> its runs at the rate whose mean eval loss is the lowest."""
    found: dict[str, list[Row]] = {}
    for name in METHODS:
        runs = [row for row in record["cells"] if row["method"] == name and "failed" not in row]
        rates = {rate: [row for row in runs if row["learning_rate"] == rate] for rate in {row["learning_rate"] for row in runs}}
        if rates:
            found[name] = min(rates.values(), key=lambda rows: mean(rows, "eval_loss"))
    return found


def mean(rows: list[Row], name: str) -> float:
    """Of a number over runs; infinity if one is not a number."""
    values = [row[name] for row in rows]
    return statistics.mean(values) if all(map(math.isfinite, values)) else math.inf


def methods(pattern: str) -> str:
    """A row per method: mean and range over seeds."""
    name, record = load(pattern)
    rows = []
    for method, runs in best(record).items():

        def spread(key: str, form: str, runs: list[Row] = runs) -> str:
            values = [row[key] for row in runs]
            if None in values:
                return "-"
            average, low, high = (format(value, form) for value in (statistics.mean(values), min(values), max(values)))
            return average if low == high else f"{average} ({low} to {high})"

        cells = [f"{runs[0]['trained_parameters']:,}", f"{runs[0]['learning_rate']:g}", spread("eval_loss", ".4f")]
        cells += [spread("right", ".3g"), spread("step_s", ".3f"), spread("total_s", ".0f"), spread("peak_gb", ".2f")]
        rows.append([method, *cells, str(len(runs))])
    headers = ["method", "trained", "rate", "eval loss", "exact schemas of 8", "s per step", "s in all", "peak, GB", "seeds"]
    return f"{table(headers, rows)}\n\n{source(name, record)}"


if __name__ == "__main__":
    main(tyro.cli(Options))
