"""Tables and the plot of TRL, unsloth and this loop."""

import math

from benchmarks.harness import Row
from benchmarks.peers.contenders import family
from benchmarks.tables import BLUE, ORANGE, counts, load, save, select, source, table, table_of

COLORS = {"trl": BLUE, "unsloth": ORANGE, "naive": "#000000", "ours": "#009E73"}
COLUMNS = {
    "contender": "`{contender}`",
    "version": "{version}",
    "adapters": "{adapter_dtype}",
    "tokens/s": "{rate}",  # or why there is none
    "ms per step": "{step_ms:,.0f} ({step_ms_p10:,.0f}-{step_ms_p90:,.0f})",
    "x TRL": "{ratio_to_trl:.2f}",
    "peak GB": "{peak_gb:.2f}",
    "MFU": "{mfu:.1%}",
    "first loss": "{first_loss:.3f}",
}


def newest(record: Row, shape: str, dropout: float) -> list[Row]:
    """One cell for each contender, the fastest first: the file keeps each `trl` that another cell was compared with."""
    cells = {cell["contender"]: cell for cell in select(record, shape=shape, dropout=dropout)}
    fastest = sorted(cells.values(), key=lambda cell: -cell.get("tokens_per_s", 0.0))
    return [{"rate": cell.get("failed", "").replace("|", "/") or f"{cell['tokens_per_s']:,.0f}", **cell} for cell in fastest]


def other_versions(record: Row, cells: list[Row]) -> str:
    """The versions of contenders whose versions differ."""
    usual, found = record["environment"]["packages"], {}
    for cell in cells:
        versions = cell.get("versions", {})
        if any(usual.get(package, version) != version for package, version in versions.items()):
            named = (f"{package} {versions[package]}" for package in ("transformers", "peft", "trl") if package in versions)
            found[family(cell["contender"])] = ", ".join(named)
    return "".join(f" {contender}'s had {versions}." for contender, versions in found.items())


def by_shape(pattern: str, card: str | None = None) -> str:
    """A table for each shape, the fastest contender first, and the plot of a card if there is one."""
    name, record = load(pattern)
    parts = []
    usual = record["cells"][0]["dropout"]
    for shape, dropout in dict.fromkeys((cell["shape"], cell["dropout"]) for cell in record["cells"]):
        named = f"`{shape}`" if dropout == usual else f"`{shape}`, dropout {dropout:g}"
        parts.append(f"{named}:\n\n{table_of(COLUMNS, newest(record, shape, dropout))}")
    if card is not None:
        parts.append(f"![Tokens per second over peak memory, one point per contender](results/peers_{card}.png)")
    runs = [record["runs"][number] for number in sorted({cell["run"] for cell in record["cells"]})]
    steps, warm_up = (counts([run[name] for run in runs]) for name in ("steps", "warm_up"))
    counted = "allocated on the GPU" if record["cells"][0].get("reserved_gb") else "of the process"
    dropouts = " and ".join(sorted({f"{cell['dropout']:g}" for cell in record["cells"]}))
    parts.append(
        f"{runs[-1]['shape_of_model']}, LoRA dropout {dropouts}; tokens without padding, the median of {steps} steps "
        f"(10th to 90th percentile) after {warm_up}; x TRL: against `trl` in the same run; peak {counted}, GB of 1e9 "
        f"bytes. {source(name, record)}{other_versions(record, record['cells'])}"
    )
    return "\n\n".join(parts)


def short(pattern: str, shape: str) -> str:
    """The contenders of one shape, the fastest first, in the columns that a reader asks for."""
    name, record = load(pattern)
    cells = [cell for cell in newest(record, shape, 0.0) if "tokens_per_s" in cell]
    steps = counts([record["runs"][cell["run"]]["steps"] for cell in cells])
    words = (
        f"Phi-3-mini's shape, random weights, `{shape}` (rows x tokens x micro-batches), no dropout, "
        f"the median of {steps} steps."
    )
    titles = {"": "contender", "version": "version", "adapters": "adapters", "tokens/s": "tokens/s", "x `trl`": "x TRL"}
    columns = {title: COLUMNS[name] for title, name in {**titles, "peak GB": "peak GB"}.items()}
    versions = other_versions(record, select(record, shape=shape, dropout=0.0))
    return f"{table_of(columns, cells)}\n\n{words} {source(name, record)}{versions}"


def targets(pattern: str) -> str:
    """What was to be reached, against what was."""
    name, record = load(pattern)
    cells = {(cell["contender"], cell["shape"]): cell for cell in record["cells"] if cell["dropout"] == 0 and "mfu" in cell}
    full = "2x2048x2"
    unsloth = {mode: cells[f"unsloth_{mode}", full]["tokens_per_s"] for mode in ("none", "checkpointing")}

    def row(what: str, contender: str, shape: str, wanted: str, rate=0.0, times=0.0, most=math.inf) -> list[str]:
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


def plot(card: str) -> None:
    """Tokens per second over peak memory, a panel for each shape; what no other beats in both is joined by a line."""
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    name, record = load(f"peers_{card}_*.json")
    ours = (cell["shape"] for cell in record["cells"] if "tokens_per_s" in cell and family(cell["contender"]) == "ours")
    shapes = list(dict.fromkeys(ours))
    columns = min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.8 * rows), layout="constrained", squeeze=False)
    for panel in panels.flat[len(shapes) :]:
        panel.set_axis_off()
    usual = record["cells"][0]["dropout"]
    for panel, shape in zip(panels.flat, shapes, strict=False):
        cells = [cell for cell in newest(record, shape, usual) if "tokens_per_s" in cell]
        points = sorted((cell["peak_gb"], cell["tokens_per_s"], cell["contender"]) for cell in cells)
        best = [point for i, point in enumerate(points) if all(point[1] > other[1] for other in points[:i])]
        panel.plot(*zip(*[point[:2] for point in best], strict=True), color="0.7", linewidth=1, zorder=1)
        top = 1.15 * max(speed for _, speed, _ in points)
        for peak, speed, contender in points:
            panel.scatter(peak, speed, color=COLORS[family(contender)], s=30, zorder=2)
            # To the right of its point, except where it has a neighbor there, or too little room.
            near = any(1 < x / peak < 1.5 and abs(y - speed) < 0.05 * top for x, y, _ in points)
            left = near or peak > 0.8 * points[-1][0]
            side = {"xytext": (-6, 4), "ha": "right"} if left else {"xytext": (6, -9), "ha": "left"}
            style = {"textcoords": "offset points", "fontsize": 8, "color": COLORS[family(contender)], **side}
            panel.annotate(contender, (peak, speed), **style)
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
