"""Tables and plots of README.md and benchmarks/README.md, from benchmarks/results/*.json alone.

python benchmarks/report.py          # rewrites what stands between the markers, and draws the plots (needs matplotlib)
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's palette, told apart by the colour-blind


def load(pattern: str) -> tuple[str, dict[str, Any]]:
    """Name and contents of the newest result file that matches."""
    path = max(RESULTS.glob(pattern), key=lambda path: re.findall(r"\d{6}", path.name))
    return path.name, json.loads(path.read_text())


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def source(name: str, record: dict[str, Any]) -> str:
    """Where numbers come from: file, machine, versions, commit."""
    environment = record["environment"]
    packages = ", ".join(
        f"{package} {environment['packages'][package]}" for package in ("torch", "transformers", "peft", "bitsandbytes")
    )
    return f"`{name}`: {environment['device']}; {packages}; commit {environment['commit'][:9]}."


def demo_summary() -> str:
    """What README command 1 does on a CPU."""
    name, record = load("demo_cpu_*.json")
    run = record["runs"][0]
    rows = [
        ["first loss after", f"{run['first_loss_s']:.1f} s"],
        [
            "whole run",
            f"{run['total_s']:.0f} s for {run['steps']} steps, {run['step_s']:.2f} s each, {run['tokens_per_s']:.0f} tokens/s",
        ],
        ["peak memory of the process", f"{run['peak_rss_gib']:.2f} GiB"],
        ["held-out loss", f"{run['eval_loss'][0]:.3f} before, {run['eval_loss'][-1]:.3f} after"],
        [
            "exact schemas for held-out prompts",
            f"{run['base_right']} of {run['held_out']} before, {run['tuned_right']} of {run['held_out']} after",
        ],
    ]
    return table(["", "measured"], rows) + "\n\n" + source(name, record)


def demo_output() -> str:
    """The terminal of that run, shortened where it says so."""
    _, record = load("demo_cpu_*.json")
    lines = record["runs"][0]["output"]
    evaluations = [index for index, line in enumerate(lines) if line.startswith("epoch ")]
    closing = next(index for index, line in enumerate(lines) if line.startswith("Adapter:"))
    sample_end = next(index for index, line in enumerate(lines) if line.startswith("└") and index > evaluations[-1])
    shown = [
        *lines[: evaluations[2] + 1],
        "...",
        *lines[evaluations[-2] : sample_end + 1],
        "...",
        *lines[closing : closing + 3],
    ]
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
    headers = ["learning rate", "last training loss", "best held-out loss", "last held-out loss", "exact schemas"]
    return table(headers, rows) + "\n\n" + source(name, record)


def train_step(pattern: str) -> str:
    """One step on a GPU, by backend and checkpointing."""
    name, record = load(pattern)
    flags = record["flags"]
    rows = []
    for cell in record["cells"]:
        if "unavailable" in cell:
            measured = [cell["unavailable"].split(". ")[0], "", ""]
        else:
            measured = [f"{cell['step_ms']:.0f}", f"{cell['tokens_per_s']:,.0f}", f"{cell['peak_gib']:.2f}"]
        rows.append([f"`{cell['attn_implementation']}`", cell["gradient_checkpointing"], *measured])
    what = (
        f"{flags['shape']}, random weights, {flags['accumulation']} micro-batches of {flags['batch']} x {flags['length']} "
        f"tokens, LoRA dropout {flags['dropout']}, median of {flags['steps']} steps. "
    )
    headers = ["attention", "gradient checkpointing", "ms a step", "tokens/s", "peak GiB allocated"]
    return table(headers, rows) + "\n\n" + what + source(name, record)


def survival() -> str:
    """What was done to runs and checkpoints, how often, and how much of it was survived."""
    name, record = load("survival_cpu_*.json")
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial in record["trials"]:  # "kind: detail", or a kind alone
        groups.setdefault(trial["what"].partition(": ")[0], []).append(trial)
    rows = []
    for kind, trials in groups.items():
        details = [trial["what"].partition(": ")[2] for trial in trials if ": " in trial["what"]]
        counts = [str(sum(trial[count] for trial in trials)) for count in ("tried", "survived")]
        seconds = f"{sum(trial['seconds'] for trial in trials):.0f}"
        files = details and all(re.fullmatch(r"\S+\.\w+", detail) for detail in details)
        told = f"each of {len(details)} files" if files else ", ".join(details)
        rows.append([f"{kind} ({told})" if told else kind, *counts, seconds])
    sources = source(name, record)
    if any(RESULTS.glob("kill_resume_*.json")):
        gpu_name, gpu = load("kill_resume_*.json")
        equal = sum(kill["equal"] for kill in gpu["kills"])
        flags = gpu["flags"]
        what = f"SIGKILL of {flags['shape']} in full size on a GPU, `--deterministic`, {flags['attn_implementation']}"
        rows.append([what, str(len(gpu["kills"])), str(equal), f"{gpu['seconds']:.0f}"])
        sources += f" Last row: {source(gpu_name, gpu)}"
    return table(["what was done", "times", "survived", "seconds"], rows) + "\n\n" + sources


BLOCKS = {
    "survival": survival,
    "demo-summary": demo_summary,
    "demo-output": demo_output,
    "demo-sweep": lambda: sweep("demo_cpu_*.json"),
    "demo-repeated-names": lambda: sweep("demo_repeated_names_*.json"),
    "train-step": lambda: train_step("train_step_*.json"),
    "train-step-first": lambda: train_step("first_train_step_*.json"),
}


def rendered(text: str) -> str:
    """The document with each `<!-- NAME -->` ... `<!-- /NAME -->` filled anew."""
    for name, block in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text):
            filled = block()
            text = pattern.sub(lambda match, filled=filled: f"{match[1]}{filled}\n{match[2]}", text)
    return text


def plot_demo() -> None:
    """Training and held-out loss of the default run."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "qlora"  # the same ids each time it is drawn
    import matplotlib.pyplot as plt

    name, record = load("demo_cpu_*.json")
    run = record["runs"][0]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.plot(range(1, run["steps"] + 1), run["train_loss"], color=BLUE, linewidth=1.2, label="training, each step")
    axes.plot(run["eval_step"], run["eval_loss"], color=ORANGE, marker="o", markersize=4, label="held out, each epoch")
    axes.set(yscale="log", xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(f"python train_loop.py: {run['steps']} steps in {run['total_s']:.0f} s", fontsize=11, loc="left")
    figure.text(0.01, -0.04, f"{name}: {record['environment']['device']}", fontsize=7, color="0.4")
    for suffix in ("png", "svg"):
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(RESULTS / f"demo_loss.{suffix}", dpi=150, bbox_inches="tight", metadata=metadata)


def main() -> None:
    """Rewrite the documents and draw the plots."""
    plot_demo()
    for document in DOCUMENTS:
        document.write_text(rendered(document.read_text()))


if __name__ == "__main__":
    main()
