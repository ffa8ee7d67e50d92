"""Tables and plots of README.md and benchmarks/README.md, from benchmarks/results/*.json alone.

python benchmarks/report.py          # rewrites what stands between the markers, and draws the plots (needs matplotlib)
"""

import ast
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]  # run as a script, Python has only this file's folder there

import cogapp  # noqa: E402
import tabulate  # noqa: E402

from benchmarks.guide_claims.tables import claims, claims_short  # noqa: E402, F401
from qlora.run.schema import in_gb  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "benchmarks" / "GUIDE_CLAIMS.md")
# What is between `[[[cog` and `[[[end]]]` in them is the output of functions of this file; CI runs `cog --check`.
COG_FLAGS = ("-I", str(ROOT), "-p", "from benchmarks.report import *")
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's palette, told apart by the color-blind
COLORS = {"eager": "#000000", "sdpa": BLUE, "sdpa_cudnn": "#332288", "sdpa_flash": "#56B4E9", "sdpa_efficient": "#CC79A7",
           "sdpa_math": "#999999", "flash_attention_2": ORANGE, "varlen": "#009E73", "flex_attention": "#E69F00",
           "flash_attention_4": "#882255"}  # fmt: skip
FAMILIES = {"trl": BLUE, "unsloth": ORANGE, "naive": "#000000", "ours": "#009E73"}  # contenders of peers.py


def load(pattern: str) -> tuple[str, dict[str, Any]]:
    """Name and contents of the newest result file that matches."""
    path = max(RESULTS.glob(pattern), key=lambda path: re.findall(r"\d{6}", path.name))
    return path.name, json.loads(path.read_text(), object_hook=in_gb)


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    plain = {"stralign": None, "numalign": None, "disable_numparse": True}
    return tabulate.tabulate(rows, headers, tablefmt="github", **plain)


def source(name: str, record: dict[str, Any]) -> str:
    """Where numbers come from: file, machine, versions, commit."""
    environment = record["environment"]
    packages = ", ".join(
        f"{package} {environment['packages'][package]}" for package in ("torch", "transformers", "peft", "bitsandbytes")
    )
    commits = {cell["commit"][:9]: None for cell in record.get("cells", []) if "commit" in cell}
    return f"`{name}`: {environment['device']}; {packages}; commit {', '.join(commits) or environment['commit'][:9]}."


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
        ["peak memory of the process", f"{run['peak_rss_gb']:.2f} GB"],
        ["eval loss", f"{run['eval_loss'][0]:.3f} before, {run['eval_loss'][-1]:.3f} after"],
        [
            "exact schemas for eval prompts",
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
        *lines[closing : lines.index("", closing)],
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
    headers = ["learning rate", "last training loss", "best eval loss", "last eval loss", "exact schemas"]
    return table(headers, rows) + "\n\n" + source(name, record)


def train_step(pattern: str) -> str:
    """One step on a GPU, by backend, checkpointing and how layers run; where it went, if it was profiled."""
    name, record = load(pattern)
    flags, rows, profiles = record["flags"], [], []
    [batch] = flags["batch"] if isinstance(flags["batch"], list) else [flags["batch"]]
    for cell in record["cells"]:
        if "unavailable" in cell:
            measured = [cell["unavailable"].split(". ")[0], "", ""]
        else:
            measured = [f"{cell['step_ms']:.0f}", f"{cell['tokens_per_s']:,.0f}", f"{cell['peak_gb']:.2f}"]
        which = [f"`{cell['attn_implementation']}`", cell["gradient_checkpointing"], HOW[cell.get("compile", "none")]]
        rows.append([*which, *measured])
        if profile := cell.get("profile_ms"):
            profiles.append([*which, *(f"{milliseconds:.0f}" for milliseconds in profile.values())])
            kinds = list(profile)
    what = (
        f"{flags['shape']}, random weights, {flags['accumulation']} micro-batches of {batch} x {flags['length']} "
        f"tokens, LoRA dropout {flags['dropout']}, median of {flags['steps']} steps. "
    )
    headers = ["attention", "gradient checkpointing", "layers"]
    text = table([*headers, "ms per step", "tokens/s", "peak GB allocated"], rows) + "\n\n" + what + source(name, record)
    return text + ("\n\nWhere the step went, in ms:\n\n" + table([*headers, *kinds], profiles) if profiles else "")


def tokens(pattern: str) -> str:
    """Time and memory of a micro-batch from few tokens to many, in rows of one length."""
    if not any(RESULTS.glob(pattern)):
        return "Not measured yet."
    name, record = load(pattern)
    flags = record["flags"]
    cells = [cell for cell in record["cells"] if "step_ms" in cell]
    rows, profiles, before = [], [], None
    for cell in cells:
        count = cell["batch"] * flags["length"]
        grown = "" if before is None else f"{(cell['peak_gb'] - before[1]) * 1e6 / (count - before[0]):.0f}"
        rows.append([f"{count:,}", f"{cell['step_ms']:,.0f}", f"{1000 * cell['step_ms'] / count:.1f}",
                     f"{cell['tokens_per_s']:,.0f}", f"{cell['peak_gb']:.2f}", grown])  # fmt: skip
        before = (count, cell["peak_gb"])
        if profile := cell.get("profile_ms"):
            shares = (f"{taken:.0f} ({taken / sum(profile.values()):.0%})" for taken in profile.values())
            profiles.append([f"{count:,}", *shares])
            kinds = list(profile)
    headers = ["tokens", "ms", "us per token", "tokens/s", "peak GB", "KB per additional token"]
    chosen = f"`--gradient-checkpointing {cells[0]['gradient_checkpointing']} --compile {cells[0]['compile']}`"
    what = f"A step of one micro-batch of rows of {flags['length']:,} tokens, {chosen}, no dropout, sdpa. "
    if missing := [f"{size * flags['length']:,}" for size in flags["batch"] if size not in [cell["batch"] for cell in cells]]:
        what += f"Not measured yet: {', '.join(missing)} tokens. "
    where = f"Where that time goes, in ms:\n\n{table(['tokens', *kinds], profiles)}\n\n" if profiles else ""
    return f"{table(headers, rows)}\n\n{where}{what}{source(name, record)}"


def loading(pattern: str) -> str:
    """How long a model takes to load, in bf16 and as it was saved in NF4, and the most memory on the way."""
    if not any(RESULTS.glob(pattern)):
        return "Not measured yet."
    name, record = load(pattern)
    rows = [[cell["stored"], f"{cell['disk_gb']:.2f}", f"{cell['load_s'][0]:.1f}", f"{statistics.median(cell['load_s']):.1f}",
             f"{cell['model_gb']:.2f}", f"{cell['peak_gb']:.2f}" if cell["peak_gb"] else "not measured"]
            for cell in record["cells"]]  # fmt: skip
    headers = ["stored as", "on disk, GB", "first load, s", "median, s", "loaded, GB", "peak on the way, GB"]
    what = f"The largest linear layer is {record['largest_layer_gb']:.2f} GB in bf16. Loaded {record['loads']} times in a "
    what += f"process of its own, files in the page cache. {record.get('note', '')}".strip()
    return f"{table(headers, rows)}\n\n{what} {source(name, record)}"


HOW = {"none": "as written", "layers": "compiled", "graphs": "compiled, CUDA graphs"}


def ladder(pattern: str) -> str:
    """The means of speed, tried one by one."""
    name, record = load(pattern)
    rows = []
    for cell in record["cells"]:
        micro_batches = f"{cell['gradient_accumulation_steps']} x {cell['per_device_train_batch_size']} x {cell['length']:,}"
        how = HOW[cell["compile"]]
        how += f", T dynamic ({cell['step_ms_min_max'][0]:.0f} ms at best)" if cell.get("dynamic") else ""
        how += f", kept {cell['kept']}" if "kept" in cell else ""
        how += f", weights {cell['weights']}" if "weights" in cell else ""
        rows.append(
            [
                f"{cell['linear']}, {how}",
                cell["gradient_checkpointing"],
                f"{cell['lora_dropout']:g}",
                micro_batches,
                f"{cell['step_ms']:.0f}",
                f"{cell['tokens_per_s']:,.0f}",
                f"{cell['peak_gb']:.2f}",
                f"{cell['first_step_s']:.0f}",
            ]
        )
    headers = ["layers", "gradient checkpointing", "dropout", "tokens in a step", "ms per step", "tokens/s", "peak GB",
               "first step, s"]  # fmt: skip
    return table(headers, rows) + f"\n\n{record['what'][0].upper()}{record['what'][1:]}. {source(name, record)}"


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


Cell = dict[str, Any]
LAYERS = {"phi3-mini": 32}


def peers(pattern: str, card: str) -> str:
    """TRL, unsloth and this loop: a table for each shape, the fastest first, and the plot."""
    if not any(RESULTS.glob(pattern)):
        return "Not measured yet."
    name, record = load(pattern)
    headers = ["contender", "version", "adapters", "tokens/s", "ms per step", "x TRL", "peak GB", "MFU", "first loss"]
    parts = []
    usual = record["cells"][0]["dropout"]
    for shape, dropout in dict.fromkeys((cell["shape"], cell["dropout"]) for cell in record["cells"]):
        cells = newest_peers(record, shape, dropout)
        rows = [peer_row(cell) for cell in sorted(cells, key=lambda cell: -cell.get("tokens_per_s", 0.0))]
        named = f"`{shape}`" if dropout == usual else f"`{shape}`, dropout {dropout:g}"
        parts.append(f"{named}:\n\n{table(headers, rows)}")
    runs = [record["runs"][number] for number in sorted({cell["run"] for cell in record["cells"]})]
    steps, warm_up = (counts([run[name] for run in runs]) for name in ("steps", "warm_up"))
    if (RESULTS / f"peers_{card}.png").exists():
        parts.append(f"![Tokens per second over peak memory, one point per contender](results/peers_{card}.png)")
    counted = "allocated on the GPU" if record["cells"][0].get("reserved_gb") else "of the process"
    dropout = " and ".join(sorted({f"{cell['dropout']:g}" for cell in record["cells"]}))
    parts.append(
        f"{runs[-1]['shape_of_model']}, LoRA dropout {dropout}; tokens without padding, the median of {steps} steps "
        f"(10th to 90th percentile) after {warm_up}; x TRL: against `trl` in the same run; peak {counted}, GB of 1e9 "
        f"bytes. {source(name, record)}{other_versions(record, record['cells'])}"
    )
    return "\n\n".join(parts)


def other_versions(record: dict[str, Any], cells: list[Cell]) -> str:
    """Versions that contenders had of their own, where there are any."""
    usual, found = record["environment"]["packages"], {}
    for cell in cells:
        versions = cell.get("versions", {})
        if any(usual.get(package, version) != version for package, version in versions.items()):
            named = (f"{package} {versions[package]}" for package in ("transformers", "peft", "trl") if package in versions)
            found[cell["contender"].partition("_")[0]] = ", ".join(named)
    return "".join(f" {contender}'s had {versions}." for contender, versions in found.items())


def targets(pattern: str) -> str:
    """What was to be reached, against what was."""
    name, record = load(pattern)
    cells = {(cell["contender"], cell["shape"]): cell for cell in record["cells"] if cell["dropout"] == 0 and "mfu" in cell}
    full = "2x2048x2"
    unsloth = {mode: cells[f"unsloth_{mode}", full]["tokens_per_s"] for mode in ("none", "checkpointing")}

    def row(
        what: str, contender: str, shape: str, wanted: str, rate: float = 0, times: float = 0, most: float = math.inf
    ) -> list[str]:
        cell = cells[contender, shape]
        met = cell["tokens_per_s"] >= rate and cell["ratio_to_trl"] >= times and cell["peak_gb"] <= most
        got = f"{cell['tokens_per_s']:,.0f}, {cell['ratio_to_trl']:.2f} x `trl`, {cell['peak_gb']:.2f} GB"
        return [what, wanted, f"`{contender}`", got, "yes" if met else "no"]

    peak = cells["trl", "mixed_packed"]["peak_gb"]
    rows = [
        row("fast", "ours_none", full, "3.3 x `trl`, 1.5 x unsloth's fastest", 1.5 * unsloth["none"], 3.3),
        row("fast", "ours_none", full, "28,000 tokens/s", 28e3),
        row("fast, `8x2048x1`", "ours_none", "8x2048x1", "30,000 tokens/s", 30e3),
        row("balanced", "ours_selective_layers", full, "2.6 x `trl`, 22,000 tokens/s, 8 GB at most", 22e3, 2.6, 8.0),
        row("small", "ours_full_layers", full, "2.3 x `trl`, 1.4 x unsloth's smallest, its 4.76 GB at most",
            1.4 * unsloth["checkpointing"], 2.3, 4.76),
        row("smallest", "ours_smallest", full, "as fast as `trl`", times=1.0),
        row("smallest", "ours_smallest", full, "3.3 GB at most", most=3.3),
        row("short, `1x512x4`", "ours_none", "1x512x4", "3 x `trl`", times=3.0),
        row("packed, `mixed_packed`", "ours_full", "mixed_packed", "1.5 x `trl` at its peak", times=1.5, most=peak),
    ]  # fmt: skip
    return f"{table(['', 'wanted', 'contender', 'got', 'reached'], rows)}\n\n{source(name, record)}"


def counts(values: list[int]) -> str:
    """One number, or from the least to the most."""
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def peers_short(pattern: str, shape: str) -> str:
    """The contenders of one shape, the fastest first, in the columns that a reader asks for."""
    name, record = load(pattern)
    cells = [cell for cell in newest_peers(record, shape, 0.0) if "tokens_per_s" in cell]
    rows = []
    for cell in sorted(cells, key=lambda cell: -cell["tokens_per_s"]):
        contender, version, adapters, rate, _, ratio, peak_gb, *_ = peer_row(cell)
        rows.append([contender, version, adapters, rate, ratio, peak_gb])
    steps = counts([record["runs"][cell["run"]]["steps"] for cell in cells])
    words = (
        f"Phi-3-mini's shape, random weights, `{shape}` (rows x tokens x micro-batches), no dropout, "
        f"the median of {steps} steps."
    )
    headers = ["", "version", "adapters", "tokens/s", "x `trl`", "peak GB"]
    return f"{table(headers, rows)}\n\n{words} {source(name, record)}{other_versions(record, cells)}"


def plan_fits() -> str:
    """The fastest settings that are predicted to fit cards of several sizes."""
    from qlora.commands import plan
    from qlora.commands.options import PlanOptions

    shape = plan.shape_meta_model(PlanOptions(), plan.configuration(PlanOptions()))

    def fastest(free_gb: float, batch: int) -> str:
        for policy in plan.POLICIES:
            for how in ("graphs", "layers"):
                options = PlanOptions(compile=how, gradient_checkpointing=policy, per_device_train_batch_size=batch)
                found = plan.planned(shape, plan.configuration(options))
                if found.fits(free_gb):
                    return f"`{plan.flags(found.config)}`, {found.total_gb:.2f} GB"
        return "-"

    rows = [[f"{card} GB", *(fastest(plan.card_free_gb(card), batch) for batch in (2, 1))] for card in (6, 8, 12, 16, 24)]
    name, record = load("plan_h100_*.json")
    held = [cell["predicted_gb"] / cell["peak_gb"] - 1 for cell in record["cells"] if "peak_gb" in cell]
    words = (
        "Predicted for Phi-3-mini at rank 32; a tenth of the card and 0.5 GB for CUDA stay free. No such card was there to "
        f"try; {len(held)} settings on an 80 GB H100 peaked within {max(map(abs, held)):.1%} of what is predicted for them "
        f"([table and plot](benchmarks/README.md#memory-predicted-and-measured)). {source(name, record)}"
    )
    return f"{table(['card', '2 x 2,048 tokens', '1 x 2,048 tokens'], rows)}\n\n{words}"


def plan_measured(pattern: str) -> str:
    """Predicted and measured peak of each setting that ran, and by how much they differ."""
    if not any(RESULTS.glob(pattern)):
        return "Not measured yet."
    name, record = load(pattern)
    headers = ["checkpointing", "compile", "attention", "rows", "tokens", "rank", "predicted GB", "measured GB", ""]
    rows = []
    for cell in record["cells"]:
        shown = [str(cell[key]) for key in ("checkpointing", "compile", "backend", "batch", "length", "lora_r")]
        result = [cell.get("unavailable", "").replace("|", "/"), ""]
        if "peak_gb" in cell:
            result = [f"{cell['peak_gb']:.2f}", f"{cell['predicted_gb'] / cell['peak_gb'] - 1:+.1%}"]
        rows.append([*shown, f"{cell['predicted_gb']:.2f}", *result])
    card = pattern.split("_")[1]
    plot = f"![Measured over predicted peak, one point per setting](results/plan_{card}.png)\n\n"
    return f"{table(headers, rows)}\n\n{plot if (RESULTS / f'plan_{card}.png').exists() else ''}{source(name, record)}"


def newest_peers(record: dict[str, Any], shape: str, dropout: float) -> list[Cell]:
    """One cell for each contender: the file keeps each `trl` that another cell was compared with."""
    cells = [cell for cell in record["cells"] if (cell["shape"], cell["dropout"]) == (shape, dropout)]
    return list({cell["contender"]: cell for cell in cells}.values())


def peer_row(cell: Cell) -> list[str]:
    """A contender's row of the table, or why it has none."""
    if "failed" in cell:
        return [f"`{cell['contender']}`", "", "", cell["failed"].replace("|", "/"), *[""] * 5]
    ratio = "" if cell["ratio_to_trl"] is None else f"{cell['ratio_to_trl']:.2f}"
    return [
        f"`{cell['contender']}`",
        cell["version"],
        cell["adapter_dtype"],
        f"{cell['tokens_per_s']:,.0f}",
        f"{cell['step_ms']:,.0f} ({cell['step_ms_p10']:,.0f}-{cell['step_ms_p90']:,.0f})",
        ratio,
        f"{cell['peak_gb']:.2f}",
        "" if cell["mfu"] is None else f"{cell['mfu']:.1%}",
        "" if cell["first_loss"] is None else f"{cell['first_loss']:.3f}",
    ]


def attention(pattern: str, level: str, **wanted: Any) -> tuple[str, dict[str, Any], list[Cell]]:
    """Name and contents of a file of attention.py, and its cells of a level with the given values."""
    name, record = load(pattern)
    fits = [cell for cell in record["cells"] if all(cell.get(key) == value for key, value in wanted.items())]
    return name, record, [cell for cell in fits if cell["level"] == level]


def pivot(cells: list[Cell], labels: list[str], row: Callable[[Cell], tuple[Any, ...]], show: Callable[[Cell], str]) -> str:
    """A table with a column for each backend that was tried; what cannot run says why below it."""
    if not cells:
        return "Not measured yet."
    backends = [name for name in COLORS if any(cell["backend"] == name for cell in cells)]
    rows, reasons = [], []
    for key in sorted(
        {row(cell) for cell in cells}, key=lambda key: ([part for part in key if isinstance(part, int)], str(key))
    ):
        texts = []
        for backend in backends:
            found = [cell for cell in cells if row(cell) == key and cell["backend"] == backend]
            reason = found[0].get("unavailable", found[0].get("failed")) if found else None
            if reason and reason != "out of memory" and (backend, first := reason.split(". ")[0]) not in reasons:
                reasons.append((backend, first))
            texts.append(
                "not measured" if not found else (reason if reason == "out of memory" else "-") if reason else show(found[0])
            )
        rows.append([*(f"{part:,}" if isinstance(part, int) else str(part) for part in key), *texts])
    notes = "".join(f"\n\n`{backend}`: {reason}" for backend, reason in reasons)
    return table([*labels, *(f"`{backend}`" for backend in backends)], rows) + notes


def attention_kernels(pattern: str, show: Callable[[Cell, float], str], what: str) -> str:
    """Attention alone: one row for each length and window."""
    name, record, cells = attention(pattern, "kernel")
    peak = record["matmul_tflops"]
    body = pivot(
        cells, ["tokens", "window"], lambda cell: (cell["length"], cell["window"] or "none"), lambda cell: show(cell, peak)
    )
    shape = record["runs"][-1]
    text = f"{what} {shape['shape']}'s heads, bf16, causal, {shape['kernel_tokens']:,} tokens in all rows together. "
    return f"{body}\n\n{text}{source(name, record)}"


def peak(cell: Cell, _: Any) -> str:
    """Peak memory of a cell."""
    return f"{cell['peak_gb']:.2f}"


def attention_steps(pattern: str) -> str:
    """The loop's own step over full rows."""
    name, record, cells = attention(pattern, "step", layout="full", window="as trained")
    body = pivot(
        cells,
        ["tokens", "rows", "gradient checkpointing"],
        lambda cell: (cell["length"], cell["rows"], cell["checkpointing"]),
        lambda cell: (
            f"{cell['step_ms']:,.0f} ms ({cell['step_ms_p10']:,.0f}-{cell['step_ms_p90']:,.0f}), "
            f"{cell['tokens_per_s']:,.0f} tokens/s, {cell['peak_gb']:.1f} GB"
        ),
    )
    window = record["runs"][-1]["window"]
    text = (
        "Median (10th to 90th percentile) of 3 to 8 steps of one micro-batch; "
        f"beyond {window + 1:,} tokens the window of {window:,} acts. "
    )
    return f"{body}\n\n{text}{source(name, record)}"


def attention_findings(pattern: str) -> str:
    """What the steps say about the choice of a backend."""
    _, _, cells = attention(pattern, "step", window="as trained", checkpointing="full")

    def of(backend: str, layout: str, length: int = 2048, key: str = "step_ms") -> float:
        found = [cell for cell in cells if (cell["backend"], cell["layout"], cell["length"]) == (backend, layout, length)]
        return max(found, key=lambda cell: cell["rows"])[key]

    longest = max(cell["length"] for cell in cells if cell["backend"] == "sdpa" and "step_ms" in cell)
    packing = [
        f"{of(backend, 'packed', key='tokens_per_s') / of(backend, 'padded', key='tokens_per_s'):.2f} times with `{backend}`"
        for backend in ("flash_attention_2", "varlen", "sdpa", "eager")
    ]
    lost = min(cell["length"] for cell in cells if cell["backend"] == "eager" and "unavailable" in cell)
    return "\n".join(
        (
            f"- One micro-batch of 2 x 2,048 tokens takes {of('eager', 'full') / of('sdpa', 'full'):.2f} times as long with "
            "`eager` as with `sdpa`.",
            f"- Where the window acts, at {longest:,} tokens, it takes "
            f"{of('sdpa', 'full', longest) / of('flash_attention_2', 'full', longest):.2f} times as long with `sdpa` as with "
            f"`flash_attention_2`, and {of('varlen', 'full', longest) / of('flash_attention_2', 'full', longest):.2f} times "
            "with `varlen`.",
            f"- `eager` runs out of memory at {lost:,} tokens.",
            f"- Packed rows are worth, in tokens per second: {', '.join(packing)}.",
            f"- Attention passes half of the step: {passes_half(attention_shares(pattern))}.",
        )
    )


def attention_shares(pattern: str) -> list[tuple[Cell, float]]:
    """The steps over full rows, each with the share of it that attention takes, from the kernel's time at that length."""
    _, record, steps = attention(pattern, "step", layout="full", window="as trained")
    shape, window = record["runs"][-1]["shape"], record["runs"][-1]["window"]
    kernels = {
        (cell["backend"], cell["length"], cell["window"]): (cell["forward_ms"], cell["backward_ms"])
        for cell in record["cells"]
        if cell["level"] == "kernel" and "forward_ms" in cell
    }

    def share(cell: Cell) -> float | None:
        active = window if cell["length"] > window + 1 else None
        found = kernels.get((cell["backend"], cell["length"], active))
        if found is None or "step_ms" not in cell:
            return None
        forwards = 2 if cell["checkpointing"] == "full" else 1
        rows_of_kernel = record["runs"][-1]["kernel_tokens"] / (cell["rows"] * cell["length"])
        return LAYERS[shape] * (forwards * found[0] + found[1]) / rows_of_kernel / cell["step_ms"]

    return [(cell, part) for cell in steps if (part := share(cell)) is not None]


def passes_half(shares: list[tuple[Cell, float]]) -> str:
    """For each backend the first length at which attention takes more than half of a step with full checkpointing."""
    passes = []
    for backend in COLORS:
        measured = sorted((cell["length"], part) for cell, part in shares
                          if cell["backend"] == backend and cell["checkpointing"] == "full")  # fmt: skip
        over = [length for length, part in measured if part > 0.5]
        if over:
            passes.append(f"`{backend}` at {over[0]:,} tokens")
        elif measured:
            passes.append(f"`{backend}` not up to {measured[-1][0]:,} ({measured[-1][1]:.0%} there)")
    return ", ".join(passes)


def attention_share(pattern: str) -> str:
    """Attention's share of a step."""
    name, record, _ = attention(pattern, "step")
    shares = attention_shares(pattern)
    body = pivot(
        [cell for cell, _ in shares],
        ["tokens", "rows", "gradient checkpointing"],
        lambda cell: (cell["length"], cell["rows"], cell["checkpointing"]),
        lambda cell: next(f"{part:.0%}" for known, part in shares if known is cell),
    )
    text = (
        f"{LAYERS[record['runs'][-1]['shape']]} layers of the kernel measured alone, its forward twice where it is recomputed, "
        "over the step. "
        f"With full checkpointing attention passes half of the step: {passes_half(shares)}. "
    )
    return f"{body}\n\n{text}{source(name, record)}"


def attention_packing(pattern: str) -> str:
    """Samples of lognormal lengths, one to a row or as many as fit."""
    name, record, cells = attention(pattern, "step")
    cells = [cell for cell in cells if cell["layout"] != "full"]
    body = pivot(
        cells,
        ["rows", "in a micro-batch"],
        lambda cell: (cell["layout"], cell["rows"]),
        lambda cell: (
            f"{cell['tokens_per_s']:,.0f} tokens/s, {cell['positions']:,} positions in {cell['micro_batches']} micro-batches, "
            f"{cell['peak_gb']:.1f} GB"
        ),
    )
    return f"{body}\n\nTokens without padding, of the same samples. {source(name, record)}"


def attention_masks(pattern: str) -> str:
    """What the window costs where transformers makes the masks, beside the loop's own functions."""
    name, record, cells = attention(pattern, "step", layout="full")
    lengths = {cell["length"] for cell in cells if cell["window"] == "left to transformers"}
    rows = [
        [
            f"`{cell['backend']}`",
            f"{cell['length']:,}",
            cell["window"],
            cell["checkpointing"],
            f"{cell['step_ms']:,.0f}",
            ", ".join(cell["ran"]),
        ]
        for cell in cells
        if cell["length"] in lengths and "step_ms" in cell
    ]
    headers = ["attention", "tokens", "window", "gradient checkpointing", "ms per step", "kernel that ran"]
    return table(headers, sorted(rows)) + f"\n\n{source(name, record)}"


def attention_parity(pattern: str) -> str:
    """The worst of all lengths, for each backend and layout."""
    name, record, cells = attention(pattern, "parity")
    reasons = [cell for cell in cells if "layout" not in cell]
    cells = [cell for cell in cells if "layout" in cell]
    if not cells:
        return "Not measured yet."
    rows = []
    for backend in COLORS:
        for layout in ("unpadded", "right-padded", "packed"):
            found = [cell for cell in cells if cell["backend"] == backend and cell.get("layout") == layout]
            if not found:
                continue
            worst = [
                max(abs(cell[key]) for cell in found)
                for key in (
                    "loss_difference",
                    "logits_max_difference",
                    "logits_relative",
                    "gradient_relative",
                    "gradient_max_relative",
                )
            ]
            leak = max((cell["leak"] for cell in found if "leak" in cell), default=None)
            again = all(cell.get("same_bits_again", True) for cell in found)
            rows.append([f"`{backend}`", layout, *(f"{value:.2g}" for value in worst), "" if leak is None else f"{leak:g}",
                         "the same bits" if again else "other bits"])  # fmt: skip
    lengths = sorted({cell["length"] for cell in cells if "length" in cell})
    headers = ["attention", "rows", "loss", "logits, largest", "logits, relative", "gradient, relative", "gradient, largest",
               "leak", "backward again"]  # fmt: skip
    text = (
        f"bf16 against fp32 on the same NF4 weights, the worst of {', '.join(map(str, lengths))} tokens, "
        f"window {cells[0]['window']:,}. "
        "Relative: norm of the difference over norm. Backward again: twice in one process, at one length. "
        "Leak: largest change in other samples of a packed row when one changes. "
    )
    notes = "".join(f"\n\n`{cell['backend']}`: {cell.get('unavailable', cell.get('failed'))}" for cell in reasons)
    return f"{table(headers, rows)}{notes}\n\n{text}{source(name, record)}"


def milliseconds(cell: Cell, peak: float) -> str:
    """Forward and backward."""
    return f"{cell['forward_ms']:.3g} + {cell['backward_ms']:.3g}"


def rate(cell: Cell, peak: float) -> str:
    """TFLOP/s of both together, and the share of what a large matrix product reaches."""
    operations = cell["forward_tflops"] * cell["forward_ms"] + cell["backward_tflops"] * cell["backward_ms"]
    tflops = operations / (cell["forward_ms"] + cell["backward_ms"])
    return f"{tflops:.3g} ({tflops / peak:.0%})"


def inference() -> str:
    """How fast the demo model answers, and how long `evaluate` takes."""
    name, record = load("inference_cpu_*.json")
    rows = []
    for row in record["generate"]:
        ours, theirs = (f"{row['tokens_per_s'][side]:.1f}" for side in ("ours", "transformers"))
        rows.append([row["precision"], str(row["batch_size"]), ours, theirs, f"{row['ratio']:.2f}", f"{row['cpu_ratio']:.2f}"])
    headers = ["base", "prompts at a time", "`generate`, tokens/s", "transformers' own", "ratio", "by processor seconds"]
    lines = [table(headers, rows), ""]
    for row in record["evaluate"]:
        losses = {side: row["metrics"]["loss"][side]["value"] for side in ("base", "adapter")}
        lines.append(
            f"`evaluate` with {row['precision']}: {row['num_examples']} prompts in {row['total_s']:.0f} s, start and loading "
            f"included ({row['cpu_s']:.0f} processor seconds); eval loss {losses['base']:.4f} without the adapter, "
            f"{losses['adapter']:.4f} with it."
        )
    busy = f"Load average of the machine at the end: {record['load_average'][1]:.1f}."
    return "\n".join([*lines, "", f"{record['new_tokens']} new tokens, greedy, fastest round. {busy} {source(name, record)}"])


H100, CPU = "attention_h100_*.json", "attention_cpu_*.json"
TIME, RATE = "Forward + backward, ms.", "TFLOP/s, and share of a large product's rate."


def code_map() -> str:
    """The folders of qlora/ and their modules, in the words of their docstrings."""
    package = ROOT / "qlora"
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    rows = []
    for folder in re.findall(r"^(\w+)/ ", text, re.MULTILINE):
        purpose = ast.get_docstring(ast.parse((package / folder / "__init__.py").read_text())) or ""
        modules = sorted(path.stem for path in (package / folder).glob("*.py") if path.stem != "__init__")
        links = ", ".join(f"[{name}](qlora/{folder}/{name}.py)" for name in modules)
        rows.append([f"`{folder}/`", " ".join(purpose.split()), links])
    return table(["folder", "what for", "modules"], rows)


def plot_attention(card: str) -> None:
    """Time and memory of a kernel and of a step over the length, with the spread from the 10th to the 90th percentile."""
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    name, record = load(f"attention_{card}_*.json")
    kernels = [cell for cell in record["cells"] if cell["level"] == "kernel" and cell["window"] is None]
    trained = [cell for cell in record["cells"] if cell.get("layout") == "full" and cell["window"] == "as trained"]
    checkpointing = "full" if any(cell["checkpointing"] == "full" for cell in trained) else "none"
    steps = [cell for cell in trained if cell["checkpointing"] == checkpointing]
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex="col")
    for column, (cells, keys, title) in enumerate(
        (
            (kernels, ("forward_ms", "backward_ms"), "attention alone"),
            (steps, ("step_ms",), f"a step, checkpointing {checkpointing}"),
        )
    ):
        for backend, color in COLORS.items():
            found = sorted((c for c in cells if c["backend"] == backend and "peak_gb" in c), key=lambda c: c["length"])
            if not found:
                continue
            lengths = [cell["length"] for cell in found]
            times = [sum(cell[key] for key in keys) for cell in found]
            low, high = ([sum(cell[f"{key}_{end}"] for key in keys) for cell in found] for end in ("p10", "p90"))
            spread = [[t - a for t, a in zip(times, low, strict=True)], [b - t for t, b in zip(times, high, strict=True)]]
            style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.3, "label": backend}
            style |= {"linestyle": "--"} if backend == "sdpa_cudnn" else {}
            panels[0][column].errorbar(
                lengths, times, yerr=[[max(0.0, x) for x in side] for side in spread], capsize=2, **style
            )
            panels[1][column].plot(lengths, [cell["peak_gb"] for cell in found], **style)
        panels[0][column].set(title=title, ylabel="ms")
        panels[1][column].set(xlabel="tokens in a row", ylabel="peak GB")
        panels[1 - column][column].legend(frameon=False, fontsize=8, loc=("center right", "upper left")[column])
        for panel in panels[:, column]:
            panel.set(xscale="log", yscale="log")
            panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            ticks = sorted({cell["length"] for cell in cells})
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    packages = record["environment"]["packages"]
    versions = ", ".join(
        f"{package} {packages[package]}" for package in ("torch", "transformers", "flash-attn") if packages[package]
    )
    figure.text(
        0.01,
        -0.03,
        f"{name}: {record['environment']['device']}; {versions}. Bars: 10th to 90th percentile.",
        fontsize=7,
    )
    save(figure, f"attention_{card}")
    plt.close(figure)


def plot_peers(card: str) -> None:
    """Tokens per second over peak memory, a panel for each shape; what no other beats in both is joined by a line."""
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    if not any(RESULTS.glob(f"peers_{card}_*.json")):
        return
    name, record = load(f"peers_{card}_*.json")
    ours = (cell["shape"] for cell in record["cells"] if "tokens_per_s" in cell and cell["contender"].startswith("ours"))
    shapes = list(dict.fromkeys(ours))
    columns = min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.8 * rows), layout="constrained", squeeze=False)
    for panel in panels.flat[len(shapes) :]:
        panel.set_axis_off()
    usual = record["cells"][0]["dropout"]
    for panel, shape in zip(panels.flat, shapes, strict=False):
        cells = [cell for cell in newest_peers(record, shape, usual) if "tokens_per_s" in cell]
        points = sorted((cell["peak_gb"], cell["tokens_per_s"], cell["contender"]) for cell in cells)
        best = [point for i, point in enumerate(points) if all(point[1] > other[1] for other in points[:i])]
        panel.plot(*zip(*[point[:2] for point in best], strict=True), color="0.7", linewidth=1, zorder=1)
        top = 1.15 * max(speed for _, speed, _ in points)
        for peak, speed, contender in points:
            color = FAMILIES[contender.partition("_")[0]]
            panel.scatter(peak, speed, color=color, s=30, zorder=2)
            # To the right of its point, but for what has a neighbor there, or too little room.
            crowded = (
                any(1 < x / peak < 1.5 and abs(y - speed) < 0.05 * top for x, y, _ in points) or peak > 0.8 * points[-1][0]
            )
            side = {"xytext": (-6, 4), "ha": "right"} if crowded else {"xytext": (6, -9), "ha": "left"}
            panel.annotate(contender, (peak, speed), textcoords="offset points", fontsize=8, color=color, **side)
        panel.set(title=shape, xlabel="peak GB", ylabel="tokens/s", xscale="log", ylim=(0, top))
        panel.set_xlim(points[0][0] / 1.8, points[-1][0] * 1.3)
        panel.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    told = f"{name}: {record['environment']['device']}. Line: what no other beats in both."
    figure.suptitle(told, x=0.01, ha="left", fontsize=8, color="0.4")
    save(figure, f"peers_{card}")
    plt.close(figure)


def plot_plan(card: str) -> None:
    """Measured over predicted peak, a point a setting, with the tenth on either side that the prediction promises."""
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    if not any(RESULTS.glob(f"plan_{card}_*.json")):
        return
    name, record = load(f"plan_{card}_*.json")
    cells = [cell for cell in record["cells"] if "peak_gb" in cell]
    figure, panel = plt.subplots(figsize=(4.8, 4.4), layout="constrained")
    ends = [0.9 * min(cell["predicted_gb"] for cell in cells), 1.1 * max(cell["predicted_gb"] for cell in cells)]
    panel.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="0.92", zorder=0)
    panel.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
    for color, how in zip((BLUE, ORANGE, "#000000"), ("graphs", "layers", "none"), strict=True):
        points = [(cell["predicted_gb"], cell["peak_gb"]) for cell in cells if cell["compile"] == how]
        if points:
            panel.scatter(*zip(*points, strict=True), color=color, s=24, label=f"--compile {how}", zorder=2)
    panel.set(xscale="log", yscale="log", xlabel="predicted GB", ylabel="measured GB", xlim=ends, ylim=ends)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
        axis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{name}: {record['environment']['device']}. Gray: 10 %", x=0.01, ha="left", fontsize=8, color="0.4")
    save(figure, f"plan_{card}")
    plt.close(figure)


def save(figure: Any, name: str) -> None:
    """As PNG and SVG, the same bytes each time."""
    for suffix in ("png", "svg"):
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(RESULTS / f"{name}.{suffix}", dpi=150, bbox_inches="tight", metadata=metadata)


def plot_demo() -> None:
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


def main() -> None:
    """Rewrite the documents and draw the plots."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "qlora"  # the same ids each time it is drawn
    plot_demo()
    plot_attention("h100")
    plot_peers("h100")
    plot_plan("h100")
    if status := cogapp.Cog().main(["cog", *COG_FLAGS, "-r", *map(str, DOCUMENTS)]):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
