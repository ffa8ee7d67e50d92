"""Which contenders train which shapes, in which order, and what becomes of their rows."""

import contextlib
import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.harness import Cell, Output, Part, ResultFile, Row
from benchmarks.peers.contenders import CONTENDERS, IMPORTS, UNSLOTH, family, measure
from benchmarks.peers.work import Work, prepare
from benchmarks.shapes import SHAPES

BASELINE = "trl"
WORKS = ("2x2048x2", "8x2048x1", "1x4096x2", "1x512x4", "mixed", "mixed_packed")
ON_A_CPU = ("trl", "trl_no_checkpointing", "ours_none")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare. What is unset depends on the machine."""

    output: tyro.conf.OmitArgPrefixes[Output] = Output()
    part: tyro.conf.OmitArgPrefixes[Part] = Part()
    contenders: tuple[str, ...] | None = None
    """Unset: all on a GPU (unsloth's with --unsloth-site); trl, trl_no_checkpointing and ours_none on a CPU."""
    shapes: tuple[str, ...] | None = None
    """Unset: 2x2048x2 8x2048x1 1x4096x2 1x512x4 mixed mixed_packed on a GPU, avro on a CPU."""
    shape_of_model: Literal["phi3-mini", "demo", "tiny", "llama-3.1-8b", "qwen3-8b", "gemma-3-12b"] | None = None
    """All but demo have random weights. Unset: phi3-mini on a GPU, demo on a CPU."""
    dropout: float | None = None
    """Of LoRA. Unset: 0 on a GPU, which is what unsloth is made for; the demo's 0.1 on a CPU."""
    warm_up: int = 3
    """Steps that are not timed."""
    steps: int = 8
    """Steps that are timed."""
    unsloth_site: Path | None = None
    """Folder with unsloth and what it pins."""
    seed: int = 0
    """Of the samples."""
    timeout_s: float = 400.0
    """For one cell."""


def resolved(options: Options, on_gpu: bool) -> Options:
    """Fill in what depends on the machine.

    Raises:
        SystemExit: for a contender or shape that does not exist.
    """
    every = tuple(name for name in CONTENDERS if options.unsloth_site or name not in UNSLOTH)
    contenders = options.contenders or (every if on_gpu else ON_A_CPU)
    if unknown := set(contenders) - set(CONTENDERS):
        raise SystemExit(f"There is no contender {', '.join(sorted(unknown))}. There are {', '.join(CONTENDERS)}.")
    shapes = options.shapes or (WORKS if on_gpu else ("avro",))
    if unknown := {shape for shape in shapes if not re.fullmatch(r"\d+x\d+x\d+|mixed|mixed_packed|avro", shape)}:
        shown = ", ".join(sorted(unknown))
        raise SystemExit(f"There is no shape {shown}. It is ROWSxLENGTHxACCUMULATION, mixed, mixed_packed or avro.")
    return dataclasses.replace(
        options,
        contenders=contenders,
        shapes=shapes,
        shape_of_model=options.shape_of_model or ("phi3-mini" if on_gpu else "demo"),
        dropout=(0.0 if on_gpu else 0.1) if options.dropout is None else options.dropout,
    )


# -- rows ------------------------------------------------------------------------------------------------------------


def key(row: Row) -> tuple[str, str, float]:
    """What makes two cells the same."""
    return row["contender"], row["shape"], row["dropout"]


def group(row: Row) -> tuple[int, str, float]:
    """What a row has in common with the baseline that it is compared with."""
    return row["run"], row["shape"], row["dropout"]


def merged(before: list[Row], row: Row) -> list[Row]:
    """The rows with a new one instead of the old one. Of baselines the newest stay, and those that others are compared with."""
    kept = [old for old in before if key(old) != key(row) or (row["contender"] == BASELINE and old["run"] != row["run"])]
    rows = [*kept, row]
    newest = {key(old): old for old in rows}  # the last of each wins
    compared = {group(old) for old in rows if old["contender"] != BASELINE}
    return [old for old in rows if old is newest[key(old)] or group(old) in compared]


def with_ratios(rows: list[Row]) -> list[Row]:
    """Each measured row with its speed over that of the baseline of its own run, shape and dropout; None without one."""
    rates = {group(row): row.get("tokens_per_s") for row in rows if row["contender"] == BASELINE}

    def ratio(row: Row) -> float | None:
        rate = rates.get(group(row))
        return rate and round(row["tokens_per_s"] / rate, 3)

    return [{**row, "ratio_to_trl": ratio(row)} if "tokens_per_s" in row else row for row in rows]


def planned(contenders: tuple[str, ...], shapes: tuple[str, ...], dropout: float, known: list[Row]) -> dict[str, list[str]]:
    """For each shape the contenders in the order of their cells, rotated by one more for each; with the baseline.

    A row of `known` counts if it has its ratio, or says that its cell does not fit.
    """
    done = {key(row) for row in known if row.get("ratio_to_trl") is not None or row.get("failed") == "out of memory"}
    plan = {}
    for number, shape in enumerate(shapes):
        turn = number % len(contenders)
        wanted = [name for name in contenders[turn:] + contenders[:turn] if (name, shape, dropout) not in done]
        if wanted:
            plan[shape] = wanted if BASELINE in wanted else [BASELINE, *wanted]
    return plan


# -- main ------------------------------------------------------------------------------------------------------------


def measured(
    cells: list[tuple[str, str]], works: dict[str, Work], scratch: Path, options: Options, ahead: int
) -> Iterator[Row]:
    """The rows of contenders and shapes, one after the other.

    While one is measured, the processes of the next `ahead` import what they need: half of a cell's time.
    """
    waiting: list[tuple[Row, Cell]] = []
    try:
        for number, _ in enumerate(cells):
            for contender, shape in cells[number + len(waiting) : number + 1 + ahead]:
                row: Row = {"contender": contender, "shape": shape, "dropout": options.dropout}
                job = (measure, contender, works[shape], scratch, options.dropout)
                site = options.unsloth_site if contender in UNSLOTH else None
                waiting.append((row, Cell(*job, imports=IMPORTS[family(contender)], site=site, folder=scratch)))
            row, cell = waiting.pop(0)
            began = time.perf_counter()
            row |= cell.row("failed", options.timeout_s)
            yield {**row, "seconds": round(time.perf_counter() - began, 1)}
    finally:
        for _, cell in waiting:
            cell.stop()


def version(contender: str, row: Row, commit: str) -> str:
    """What was measured, in a few words."""
    library = {"trl": "trl", "unsloth": "unsloth", "naive": "peft", "ours": None}[family(contender)]
    return f"{library} {row['versions'][library]}" if library else f"commit {commit[:9]}"


def main(options: Options) -> None:
    """Measure every cell and write the file after each."""
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    file = ResultFile(f"peers_{options.shape_of_model}" if options.shape_of_model in SHAPES else "peers", options.output)
    options = resolved(options, file.on_gpu)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "part", "unsloth_site")}
    fixed = {name: settings.pop(name) for name in ("shape_of_model", "seed")}
    file.begin_run(fixed, **settings, **vars(options.part))
    number, commit = len(file.record["runs"]) - 1, file.environment["commit"]
    file.record["runs"][-1]["run"] = number
    known = file.record["cells"] if options.part.missing else []
    plan = planned(options.contenders, options.shapes, options.dropout, known)
    cells = [(contender, shape) for shape, wanted in plan.items() for contender in wanted]
    split = any(contender in UNSLOTH for contender, _ in cells)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        job = (options.shape_of_model, scratch, split, list(plan), options.seed, options.warm_up, options.steps)
        works = Cell(prepare, *job).result()
        with contextlib.closing(measured(cells, works, scratch, options, ahead=int(file.on_gpu))) as rows:
            for row in rows:
                row |= {"run": number, "commit": commit}
                if "tokens_per_s" in row:
                    row["version"] = version(row["contender"], row, commit)
                file.record["cells"] = with_ratios(merged(file.record["cells"], row))
                file.write(file.record["cells"][-1])
                if file.is_late(options.part.minutes):
                    return


if __name__ == "__main__":
    main(tyro.cli(Options))
