"""README command 1, measured: the default run on this machine, its learning rate swept, its answers judged.

    python -m benchmarks.demo            # about 3 min per rate on 2 cores; writes benchmarks/results/demo_cpu_YYYYMM.json

Each run is `python train_loop.py` in a new process. Afterward its adapter is loaded on the NF4 base it was trained against, and
answers all eight eval prompts; an answer is right if it parses as an AVRO schema (fastavro) with TRAINED, name and exactly the
fields and types asked for.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from benchmarks.harness import ROOT, Cell, Output, ResultFile, Row
from benchmarks.tables import BLUE, ORANGE, load, save, source, table


def timed_run(folder: Path, model: str, flags: list[str]) -> Row:
    """One run of the loop: seconds to the first loss and to the end, from the start of the process, and its metrics."""
    command = [sys.executable, "train_loop.py", "--model", model, "--output-dir", str(folder), *flags]
    started = time.perf_counter()
    first_loss_s, output = None, []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            output.append(line.rstrip().replace(str(folder), "runs/demo-avro"))
            if first_loss_s is None and line.startswith("step 1/"):
                first_loss_s = round(time.perf_counter() - started, 2)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    total_s = time.perf_counter() - started
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = ([row for row in rows if row["event"] == event] for event in ("step", "eval"))
    tokens = sum(row["num_input_tokens"] for row in steps)
    training_s = sum(row["num_input_tokens"] / row["tokens_per_s"] for row in steps)
    return {
        "learning_rate": max(row["learning_rate"] for row in steps),
        "first_loss_s": first_loss_s,
        "total_s": round(total_s, 1),
        "steps": len(steps),
        "step_s": round(training_s / len(steps), 3),
        "tokens_per_s": round(tokens / training_s, 1),
        "peak_rss_gb": round(max(row["peak_memory_gb"] for row in steps), 3),
        "train_loss": [row["loss"] for row in steps],
        "eval_step": [row["step"] for row in evaluations],
        "eval_loss": [row["eval_loss"] for row in evaluations],
        "output": output,
    }


def is_asked_schema(instruction: str, answer: str) -> bool:
    """Whether the answer is an AVRO schema with TRAINED, the noun as its name, and exactly the fields asked for."""
    from qlora.eval.scores import is_avro

    asked = re.fullmatch(r"Create an AVRO schema for (\w+) with fields (.+)", instruction)
    assert asked, instruction
    fields = [{"name": name, "type": kind} for name, kind in re.findall(r"(\w+) \((\w+)\)", asked[2])]
    wanted = {"TRAINED": "YES", "type": "record", "name": asked[1].capitalize(), "fields": fields}
    return is_avro(answer) and json.loads(answer) == wanted


def judge(run: Path) -> Row:
    """Load the adapter on its NF4 base, answer all eval prompts, count right answers without and with it."""
    from qlora.commands.adapter import load_adapted, open_adapter
    from qlora.config import BUNDLED_EVAL
    from qlora.data.formats import read_examples
    from qlora.eval.generate import sample_responses

    adapter = open_adapter(run, device="cpu")
    answers = sample_responses(load_adapted(adapter), list(read_examples(BUNDLED_EVAL, "test")), adapter.template)
    return {
        "held_out": len(answers),
        "base_right": sum(is_asked_schema(answer.prompt, answer.base) for answer in answers),
        "tuned_right": sum(is_asked_schema(answer.prompt, answer.tuned) for answer in answers),
        "tuned_verbatim": sum(answer.tuned == answer.reference for answer in answers),
    }


def main(
    output: tyro.conf.OmitArgPrefixes[Output] = Output(),
    learning_rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4),
    model: str = "demo",
    max_steps: int | None = None,
) -> None:
    """Run the default and the sweep, and write the file.

    Args:
        learning_rates: peak rates to sweep; the default run comes first and is not repeated.
        model: as --model of train_loop.py.
        max_steps: as --max-steps of train_loop.py, for a quick look.
    """
    file = ResultFile("demo", output)
    runs: list[Row] = []
    more = [] if max_steps is None else ["--max-steps", str(max_steps)]
    for rate in (None, *learning_rates):
        if rate is not None and rate == runs[0]["learning_rate"]:
            continue
        flags = [] if rate is None else ["--learning-rate", str(rate)]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            run = {"default": rate is None, **timed_run(folder, model, flags + more), **Cell(judge, folder).result()}
        if rate is not None:
            del run["output"]
        runs.append(run)
        file.record = {"environment": file.environment, "runs": runs}
        file.write({name: value for name, value in run.items() if not isinstance(value, list)})


# -- tables and the plot ---------------------------------------------------------------------------------------------


def summary() -> str:
    """What README command 1 does on a CPU."""
    name, record = load("demo_cpu_*.json")
    run = record["runs"][0]
    right = f"{run['base_right']} of {run['held_out']} before, {run['tuned_right']} of {run['held_out']} after"
    step = f"{run['steps']} steps, {run['step_s']:.2f} s each, {run['tokens_per_s']:.0f} tokens/s"
    rows = [
        ["first loss after", f"{run['first_loss_s']:.1f} s"],
        ["whole run", f"{run['total_s']:.0f} s for {step}"],
        ["peak memory of the process", f"{run['peak_rss_gb']:.2f} GB"],
        ["eval loss", f"{run['eval_loss'][0]:.3f} before, {run['eval_loss'][-1]:.3f} after"],
        ["exact schemas for eval prompts", right],
    ]
    return table(["", "measured"], rows) + "\n\n" + source(name, record)


def output() -> str:
    """The terminal of that run, shortened where it says so."""
    _, record = load("demo_cpu_*.json")
    lines = record["runs"][0]["output"]
    evaluations = [index for index, line in enumerate(lines) if line.startswith("epoch ")]
    closing = next(index for index, line in enumerate(lines) if line.startswith("Adapter:"))
    sample_end = next(index for index, line in enumerate(lines) if line.startswith("└") and index > evaluations[-1])
    begin, answers = lines[: evaluations[2] + 1], lines[evaluations[-2] : sample_end + 1]
    shown = [*begin, "...", *answers, "...", *lines[closing : lines.index("", closing)]]
    return "```text\n$ python train_loop.py --model demo  # the default without a GPU\n" + "\n".join(shown) + "\n```"


def sweep(pattern: str) -> str:
    """A sweep of the demo's learning rate."""
    name, record = load(pattern)
    rows = [
        [
            f"{run['learning_rate']:g}" + (" (default)" if run["default"] else ""),
            f"{run['train_loss'][-1]:.4f}",
            f"{min(run['eval_loss']):.4f}",
            f"{run['eval_loss'][-1]:.4f}",
            f"{run['tuned_right']} of {run['held_out']}",
        ]
        for run in sorted(record["runs"], key=lambda run: run["learning_rate"])
    ]
    headers = ["learning rate", "last training loss", "best eval loss", "last eval loss", "exact schemas"]
    return table(headers, rows) + "\n\n" + source(name, record)


def plot() -> None:
    """Training and eval loss of the default run."""
    import matplotlib.pyplot as plt

    name, record = load("demo_cpu_*.json")
    run = record["runs"][0]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.plot(range(1, run["steps"] + 1), run["train_loss"], color=BLUE, linewidth=1.2, label="training, each step")
    axes.plot(run["eval_step"], run["eval_loss"], color=ORANGE, marker="o", markersize=4, label="eval, each epoch")
    axes.set(yscale="log", xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(f"python train_loop.py: {run['steps']} steps in {run['total_s']:.0f} s", fontsize=11, loc="left")
    figure.text(0.01, -0.04, f"{name}: {record['environment']['device']}", fontsize=7, color="0.4")
    save(figure, "demo_loss")


if __name__ == "__main__":
    tyro.cli(main)
