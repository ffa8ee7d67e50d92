"""Claims about attention, from the file that benchmarks.attention left."""

from typing import Any

from benchmarks.guide_claims.finding import LENGTH, ROWS, Figures, Finding, Source, listed, measured_cell, right_if

KERNELS, BACKENDS = "attention_h100_*.json", ("eager", "sdpa", "flash_attention_2")


def flash_kernel(source: Source, f: Figures) -> Finding:
    """Flash attention is 2 to 3 times as fast as standard attention."""
    if not f:
        f = {"length": LENGTH, "kernel_ms": {}}
        for name in (*BACKENDS, "sdpa_flash"):
            cell = measured_cell(KERNELS, level="kernel", backend=name, length=LENGTH, window=None)
            f["kernel_ms"][name] = cell["forward_ms"] + cell["backward_ms"]
            f |= {"sdpa_ran": cell["ran"]} if name == "sdpa" else {}
    eager, sdpa, sdpa_flash = (f["kernel_ms"][name] / f["kernel_ms"][BACKENDS[-1]] for name in ("eager", "sdpa", "sdpa_flash"))
    fact = f"""the kernel at {f["length"]:,} tokens: {eager:.1f} times as fast as eager, {sdpa:.2f} times as sdpa, which is the
        default and runs {", ".join(f["sdpa_ran"])} there, {sdpa_flash:.2f} times as sdpa told to take its flash kernel"""
    return Finding(right_if(2 <= eager <= 3 and 2 <= sdpa <= 3, "depends"), fact, f, KERNELS, short=True)


def step(backend: str, length: int, policy: str = "full") -> dict[str, Any]:
    """A cell of a step, by backend, tokens in a row and checkpointing."""
    wanted = {"level": "step", "layout": "full", "window": "as trained", "checkpointing": policy}
    return measured_cell(KERNELS, backend=backend, length=length, **wanted)


def flash_training(source: Source, f: Figures) -> Finding:
    """Training gets 2 to 3 times as fast by it."""
    if not f:
        f = {"steps": {}}
        for rows, length, policy in ((ROWS, LENGTH, "full"), (ROWS, LENGTH, "none"), (1, 8192, "full"), (1, 8192, "none")):
            times = f["steps"][f"{rows} x {length:,}, {policy}"] = {}  # ms: median, 10th and 90th percentile
            for backend in BACKENDS:
                cell = step(backend, length, policy)  # which has no times where memory ran out
                keys = ("step_ms", "step_ms_p10", "step_ms_p90")
                times[backend] = [cell[key] for key in keys] if cell.get("step_ms") else None
    told = []
    for name, row in f["steps"].items():
        ms = (f"{times[0]:,.0f} ({times[1]:,.0f}-{times[2]:,.0f})" if times else "out of memory" for times in row.values())
        told.append(f"{name}: {', '.join(map(' '.join, zip(row, ms, strict=True)))}")
    ran = [row for row in f["steps"].values() if row["flash_attention_2"]]
    ratios = {name: [row[name][0] / row["flash_attention_2"][0] for row in ran if row[name]] for name in ("eager", "sdpa")}
    fact = f"""ms of a step of this loop, not compiled, by tokens and checkpointing, median (10th to 90th percentile):
        {"; ".join(told).replace("flash_attention_2", "flash")}. So {min(ratios["eager"]):.1f} to {max(ratios["eager"]):.1f}
        times as fast as eager, {min(ratios["sdpa"]):.2f} to {max(ratios["sdpa"]):.2f} as sdpa, the default"""
    both = ratios["eager"] + ratios["sdpa"]
    verdict = right_if(all(2 <= ratio <= 3 for ratio in both), "depends" if max(both) >= 2 else "wrong")
    return Finding(verdict, fact, f, KERNELS, short=True)


def flash_memory(source: Source, f: Figures) -> Finding:
    """Memory falls from O(N²) to O(N)."""
    if not f:
        short, middle, long = ({name: step(name, length)["peak_gb"] for name in BACKENDS} for length in (2048, 4096, 8192))
        f = {"growth_gb": {name: long[name] - middle[name] for name in BACKENDS}, "at_2048_gb": short}
    growth, short = listed(f["growth_gb"], "+.1f", " GB"), f["at_2048_gb"]
    fact = f"""peak of a step of this loop with checkpointing, from 4,096 to 8,192 tokens: {growth}. At 2 x 2,048 eager costs
        {short["eager"] - short["sdpa"]:.1f} GB more than either"""
    return Finding(right_if(f["growth_gb"]["flash_attention_2"] < 0.25 * f["growth_gb"]["eager"]), fact, f, KERNELS)
