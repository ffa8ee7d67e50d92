"""Tables and the plot of the attention benchmark, from its result files alone."""

from typing import Any

from benchmarks.harness import Row
from benchmarks.tables import BLUE, ORANGE, load, save, select, source, table

H100, CPU = "attention_h100_*.json", "attention_cpu_*.json"
LAYERS = {"phi3-mini": 32}
COLORS = {"eager": "#000000", "sdpa": BLUE, "sdpa_cudnn": "#332288", "sdpa_flash": "#56B4E9", "sdpa_efficient": "#CC79A7",
          "sdpa_math": "#999999", "flash_attention_2": ORANGE, "varlen": "#009E73", "flex_attention": "#E69F00",
          "flash_attention_4": "#882255"}  # fmt: skip
KERNEL = {  # what a table of kernels may show, and what that is
    "time": ("{forward_ms:.3g} + {backward_ms:.3g}", "Forward + backward, ms."),
    "rate": ("{tflops:.3g} ({share:.0%})", "TFLOP/s, and share of a large product's rate."),
    "peak": ("{peak_gb:.2f}", "Peak GB."),
}
STEP = {"tokens": "length", "rows": "rows", "gradient checkpointing": "checkpointing"}  # what tells steps apart


def pivot(cells: list[Row], columns: dict[str, str], show: str) -> str:
    """A table with a column for each backend that was tried. What cannot run says why below it.

    `columns` come before those: header -> key of a cell. `show` is the format of a cell that was measured.
    """
    backends = [name for name in COLORS if any(cell["backend"] == name for cell in cells)]

    def order(cell: Row) -> tuple[Any, ...]:
        row = [cell[key] for key in columns.values()]
        return [part for part in row if isinstance(part, int)], str(row), backends.index(cell["backend"])

    rows: dict[tuple[str, ...], dict[str, str]] = {}
    reasons = {}
    for cell in sorted(cells, key=order):
        row = (f"{cell[key]:,}" if isinstance(cell[key], int) else cell[key] or "none" for key in columns.values())
        why = cell.get("unavailable") or cell.get("failed")
        text = why if why == "out of memory" else "-" if why else show.format(**cell)
        rows.setdefault(tuple(row), {})[cell["backend"]] = text
        if text == "-":
            reasons[f"\n\n`{cell['backend']}`: {why.split('. ')[0]}"] = None
    lines = [[*row, *(texts.get(backend, "not measured") for backend in backends)] for row, texts in rows.items()]
    return table([*columns, *(f"`{backend}`" for backend in backends)], lines) + "".join(reasons)


def kernels(pattern: str, what: str) -> str:
    """Attention alone: one row for each length and window. `what` is a key of KERNEL."""
    name, record = load(pattern)
    cells = select(record, level="kernel")
    for cell in cells:
        if "forward_ms" in cell:
            operations = cell["forward_tflops"] * cell["forward_ms"] + cell["backward_tflops"] * cell["backward_ms"]
            tflops = operations / (cell["forward_ms"] + cell["backward_ms"])
            cell |= {"tflops": tflops, "share": tflops / record["matmul_tflops"]}
    show, text = KERNEL[what]
    run = record["runs"][-1]
    text += f" {run['shape']}'s heads, bf16, causal, {run['kernel_tokens']:,} tokens in all rows together. "
    return f"{pivot(cells, {'tokens': 'length', 'window': 'window'}, show)}\n\n{text}{source(name, record)}"


def steps(pattern: str) -> str:
    """The loop's own step over full rows."""
    name, record = load(pattern)
    show = "{step_ms:,.0f} ms ({step_ms_p10:,.0f}-{step_ms_p90:,.0f}), {tokens_per_s:,.0f} tokens/s, {peak_gb:.1f} GB"
    body = pivot(select(record, level="step", layout="full", window="as trained"), STEP, show)
    window = record["runs"][-1]["window"]
    text = "Median (10th to 90th percentile) of 3 to 8 steps of one micro-batch; "
    text += f"beyond {window + 1:,} tokens the window of {window:,} acts. "
    return f"{body}\n\n{text}{source(name, record)}"


def findings(pattern: str) -> str:
    """What the steps say about the choice of a backend."""
    _, record = load(pattern)
    cells = select(record, level="step", window="as trained", checkpointing="full")

    def of(backend: str, key: str, layout: str = "full", length: int = 2048) -> float:
        found = [cell for cell in cells if (cell["backend"], cell["layout"], cell["length"]) == (backend, layout, length)]
        return max(found, key=lambda cell: cell["rows"])[key]

    flash, backends = "flash_attention_2", ("flash_attention_2", "varlen", "sdpa", "eager")
    eager = of("eager", "step_ms") / of("sdpa", "step_ms")
    longest = max(cell["length"] for cell in cells if cell["backend"] == "sdpa" and "step_ms" in cell)
    sdpa, varlen = (of(name, "step_ms", length=longest) / of(flash, "step_ms", length=longest) for name in ("sdpa", "varlen"))
    lost = min(cell["length"] for cell in cells if cell["backend"] == "eager" and "unavailable" in cell)
    gains = {name: of(name, "tokens_per_s", "packed") / of(name, "tokens_per_s", "padded") for name in backends}
    packing = ", ".join(f"{gain:.2f} times with `{name}`" for name, gain in gains.items())
    return (
        f"- One micro-batch of 2 x 2,048 tokens takes {eager:.2f} times as long with `eager` as with `sdpa`.\n"
        f"- Where the window acts, at {longest:,} tokens, it takes {sdpa:.2f} times as long with `sdpa` as with `{flash}`, "
        f"and {varlen:.2f} times with `varlen`.\n"
        f"- `eager` runs out of memory at {lost:,} tokens.\n"
        f"- Packed rows are worth, in tokens per second: {packing}.\n"
        f"- Attention passes half of the step: {passes_half(shares(record))}."
    )


def shares(record: Row) -> list[Row]:
    """The steps over full rows, each with the `share` of it that attention takes, from the kernel's time at that length."""
    run, found = record["runs"][-1], []
    for cell in select(record, level="step", layout="full", window="as trained"):
        window = run["window"] if cell["length"] > run["window"] + 1 else None
        kernels = select(record, level="kernel", backend=cell["backend"], length=cell["length"], window=window)
        if "step_ms" in cell and kernels and "forward_ms" in kernels[0]:
            forwards = 2 if cell["checkpointing"] == "full" else 1
            attention_ms = forwards * kernels[0]["forward_ms"] + kernels[0]["backward_ms"]
            rows_of_kernel = run["kernel_tokens"] / (cell["rows"] * cell["length"])
            found.append({**cell, "share": LAYERS[run["shape"]] * attention_ms / rows_of_kernel / cell["step_ms"]})
    return found


def passes_half(cells: list[Row]) -> str:
    """For each backend the first length at which attention takes more than half of a step with full checkpointing."""
    passes = []
    for backend in COLORS:
        chosen = [cell for cell in cells if cell["backend"] == backend and cell["checkpointing"] == "full"]
        measured = sorted((cell["length"], cell["share"]) for cell in chosen)
        over = [length for length, share in measured if share > 0.5]
        if over:
            passes.append(f"`{backend}` at {over[0]:,} tokens")
        elif measured:
            passes.append(f"`{backend}` not up to {measured[-1][0]:,} ({measured[-1][1]:.0%} there)")
    return ", ".join(passes)


def share(pattern: str) -> str:
    """Attention's share of a step."""
    name, record = load(pattern)
    cells = shares(record)
    body = pivot(cells, STEP, "{share:.0%}")
    text = f"{LAYERS[record['runs'][-1]['shape']]} layers of the kernel measured alone, its forward twice where it is "
    text += f"recomputed, over the step. With full checkpointing attention passes half of the step: {passes_half(cells)}. "
    return f"{body}\n\n{text}{source(name, record)}"


def packing(pattern: str) -> str:
    """Samples of lognormal lengths, one to a row or as many as fit."""
    name, record = load(pattern)
    cells = [cell for cell in select(record, level="step") if cell["layout"] != "full"]
    show = "{tokens_per_s:,.0f} tokens/s, {positions:,} positions in {micro_batches} micro-batches, {peak_gb:.1f} GB"
    body = pivot(cells, {"rows": "layout", "in a micro-batch": "rows"}, show)
    return f"{body}\n\nTokens without padding, of the same samples. {source(name, record)}"


def masks(pattern: str) -> str:
    """What the window costs where transformers makes the masks, beside the loop's own functions."""
    name, record = load(pattern)
    cells = select(record, level="step", layout="full")
    lengths = {cell["length"] for cell in cells if cell["window"] == "left to transformers"}
    rows = []
    for cell in cells:
        if cell["length"] in lengths and "step_ms" in cell:
            firsts = [f"`{cell['backend']}`", f"{cell['length']:,}", cell["window"], cell["checkpointing"]]
            rows.append([*firsts, f"{cell['step_ms']:,.0f}", ", ".join(cell["ran"])])
    headers = ["attention", "tokens", "window", "gradient checkpointing", "ms per step", "kernel that ran"]
    return f"{table(headers, sorted(rows))}\n\n{source(name, record)}"


DIFFERENCES = {
    "loss": "loss_difference",
    "logits, largest": "logits_max_difference",
    "logits, relative": "logits_relative",
    "gradient, relative": "gradient_relative",
    "gradient, largest": "gradient_max_relative",
}


def parity(pattern: str) -> str:
    """The worst of all lengths, for each backend and layout."""
    name, record = load(pattern)
    every = select(record, level="parity")
    cells = [cell for cell in every if "layout" in cell]
    rows = []
    for backend in COLORS:
        for layout in ("unpadded", "right-padded", "packed"):
            found = [cell for cell in cells if (cell["backend"], cell["layout"]) == (backend, layout)]
            if found:
                worst = [f"{max(abs(cell[key]) for cell in found):.2g}" for key in DIFFERENCES.values()]
                leaks = f"{max(cell['leak'] for cell in found):g}" if layout == "packed" else ""
                again = "the same bits" if all(cell.get("same_bits_again", True) for cell in found) else "other bits"
                rows.append([f"`{backend}`", layout, *worst, leaks, again])
    whys = {cell["backend"]: cell.get("unavailable") or cell["failed"] for cell in every if "layout" not in cell}
    notes = "".join(f"\n\n`{backend}`: {why}" for backend, why in whys.items())
    lengths = sorted({cell["length"] for cell in cells})
    text = (
        f"bf16 against fp32 on the same NF4 weights, the worst of {', '.join(map(str, lengths))} tokens, window "
        f"{cells[0]['window']:,}. Relative: norm of the difference over norm. Backward again: twice in one process, at one "
        "length. Leak: largest change in other samples of a packed row when one changes. "
    )
    headers = ["attention", "rows", *DIFFERENCES, "leak", "backward again"]
    return f"{table(headers, rows)}{notes}\n\n{text}{source(name, record)}"


def plot(card: str) -> None:
    """Time and memory of a kernel and of a step over the length, with the spread from the 10th to the 90th percentile."""
    import matplotlib.pyplot as plt

    name, record = load(f"attention_{card}_*.json")
    steps = select(record, level="step", layout="full", window="as trained")
    checkpointing = "full" if any(cell["checkpointing"] == "full" for cell in steps) else "none"
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex="col")
    draw_column(panels[:, 0], select(record, level="kernel", window=None), ["forward_ms", "backward_ms"])
    panels[0, 0].set(title="attention alone")
    panels[1, 0].legend(frameon=False, fontsize=8, loc="center right")
    draw_column(panels[:, 1], [cell for cell in steps if cell["checkpointing"] == checkpointing], ["step_ms"])
    panels[0, 1].set(title=f"a step, checkpointing {checkpointing}")
    panels[0, 1].legend(frameon=False, fontsize=8, loc="upper left")
    packages = record["environment"]["packages"]
    versions = ", ".join(f"{each} {packages[each]}" for each in ("torch", "transformers", "flash-attn") if packages[each])
    told = f"{name}: {record['environment']['device']}; {versions}. Bars: 10th to 90th percentile."
    figure.text(0.01, -0.03, told, fontsize=7)
    save(figure, f"attention_{card}")


def draw_column(panels: Any, cells: list[Row], keys: list[str]) -> None:
    """Times, which are sums over `keys`, in the upper panel, and peaks in the lower one."""
    import matplotlib.ticker

    for backend, color in COLORS.items():
        found = sorted((c for c in cells if c["backend"] == backend and "peak_gb" in c), key=lambda c: c["length"])
        if found:
            lengths = [cell["length"] for cell in found]
            low, times, high = ([sum(cell[key + end] for key in keys) for cell in found] for end in ("_p10", "", "_p90"))
            below = [max(0.0, time - end) for time, end in zip(times, low, strict=True)]
            above = [max(0.0, end - time) for time, end in zip(times, high, strict=True)]
            style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.3, "label": backend}
            style |= {"linestyle": "--"} if backend == "sdpa_cudnn" else {}
            panels[0].errorbar(lengths, times, yerr=[below, above], capsize=2, **style)
            panels[1].plot(lengths, [cell["peak_gb"] for cell in found], **style)
    panels[0].set(ylabel="ms")
    panels[1].set(xlabel="tokens in a row", ylabel="peak GB")
    for panel in panels:
        panel.set(xscale="log", yscale="log")
        panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        ticks = sorted({cell["length"] for cell in cells})
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
