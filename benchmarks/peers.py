"""TRL, unsloth and this loop side by side: QLoRA steps on one model, the same samples, the same card.

    python benchmarks/peers.py                                                   # a CUDA GPU: Phi-3-mini's shape
    python benchmarks/peers.py --unsloth-site FOLDER --minutes 8 --missing       # only what the file lacks
    python benchmarks/peers.py --shape-of-model demo                             # a CPU: TRL and the loop on the demo
    python benchmarks/report.py                                                  # the tables and the plot

pip install -e ".[benchmark,peers]" brings TRL. unsloth pins other versions of everything, so it is installed into a folder of
its own (pip install --target FOLDER unsloth==2026.10.9), which goes first on the path of its cells.

Contenders: `trl` is SFTTrainer with its defaults (fp32 where nothing is quantized, sdpa, checkpointing); `trl_best` loads bf16
and flash_attention_2 where it is installed, `trl_selective` also keeps attention's outputs, `trl_no_checkpointing` keeps all,
`trl_liger...` adds liger's kernels. `unsloth_offload` is its default, which keeps checkpoints in the host's memory;
`unsloth_checkpointing` and `unsloth_none` are its other two. `ours_...` is this loop with that --gradient-checkpointing, and
`naive` is PEFT's and transformers' examples put together. Adapters r=32, alpha=64 on all linear layers.

Shapes: ROWSxLENGTHxACCUMULATION with full rows; `mixed`, 64 samples of lognormal lengths a step, padded in fours (unsloth, by
default, pads nothing); `mixed_packed`, the same packed by each contender itself, two rows of 2,048 at a time; `avro`, the
bundled examples as the demo trains them.

Each cell (contender and shape) runs in a process of its own, so that its peak memory, and running out of it, are its own; one
that fails is a row with the reason. Shape by shape, `trl` runs among the others, and a ratio is only formed with the `trl` of
the same run. The order of contenders turns from shape to shape. Runs on one card merge into one file.
"""

import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python has only this file's folder there

from benchmarks.attention import reopened, result_file  # noqa: E402
from benchmarks.peers_cells import CONTENDERS, UNSLOTH  # noqa: E402

BASELINE = "trl"
SHAPES = ("2x2048x2", "8x2048x1", "1x4096x2", "1x512x4", "mixed", "mixed_packed")
ON_A_CPU = ("trl", "trl_no_checkpointing", "ours_none")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare. What is unset depends on the machine."""

    contenders: tuple[str, ...] | None = None
    """Unset: all on a GPU (unsloth's with --unsloth-site); trl, trl_no_checkpointing and ours_none on a CPU."""
    shapes: tuple[str, ...] | None = None
    """Unset: 2x2048x2 8x2048x1 1x4096x2 1x512x4 mixed mixed_packed on a GPU, avro on a CPU."""
    shape_of_model: Literal["phi3-mini", "demo", "tiny"] | None = None
    """phi3-mini and tiny have random weights. Unset: phi3-mini on a GPU, demo on a CPU."""
    dropout: float | None = None
    """Of LoRA. Unset: 0 on a GPU, which is what unsloth is made for; the demo's 0.1 on a CPU."""
    warm_up: int = 3
    """Steps that are not timed."""
    steps: int = 8
    """Steps that are."""
    unsloth_site: Path | None = None
    """Folder with unsloth and what it pins."""
    seed: int = 0
    """Of the samples."""
    timeout_s: float = 400.0
    """For one cell."""
    missing: bool = False
    """Only cells that the file does not have yet, and the trl of their shape."""
    minutes: float | None = None
    """Start no further cell after this many minutes; a later run with --missing continues."""
    out: Path | None = None
    """Where the JSON is, or goes. Unset: benchmarks/results/peers_CARD_YYYYMM.json."""
    commit: str | None = None
    """Commit of the code, where it runs without its repository."""


# -- processes -------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """Why a process came to nothing."""


def start(scratch: Path, site: Path | None = None, **job: Any) -> tuple[Path, subprocess.Popen[str]]:
    """A process of its own for a job of peers_cells.py, which imports what it needs and waits; and where it will answer."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    asked, result = folder / "job.json", folder / "result.json"
    asked.write_text(json.dumps({**job, "folder": str(scratch), "result": str(result)}))
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if site is not None:
        variables["PYTHONPATH"] = str(site.resolve())
    command = [sys.executable, str(ROOT / "benchmarks" / "peers_cells.py"), str(asked)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # In the scratch folder, where unsloth and Trainers may leave files.
    return result, subprocess.Popen(command, cwd=scratch, env=variables, text=True, **pipes)


def wait(job: tuple[Path, subprocess.Popen[str]], timeout_s: float) -> dict[str, Any]:
    """What such a process answers, once it is told to go.

    Raises:
        Failed: with the last lines that it wrote.
    """
    result, process = job
    try:
        _, stderr = process.communicate("go\n", timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise Failed(f"not done in {timeout_s:g} s") from None
    if process.returncode == 0:
        return json.loads(result.read_text())
    raise Failed(reason(stderr) or f"ended with status {process.returncode}")


def reason(stderr: str) -> str:
    """The last lines of what a process wrote, without this machine's folders."""
    if "OutOfMemoryError" in stderr:
        return "out of memory"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()][-2:]
    return re.sub(r"(?<![\w.:/])/(?:[^\s'\"/:]+/)+", "", " / ".join(lines))[-400:]


# -- rows ------------------------------------------------------------------------------------------------------------


def key(row: Row) -> tuple[Any, ...]:
    """What makes two cells the same."""
    return row["contender"], row["shape"], row["dropout"]


def merged(before: list[Row], row: Row) -> list[Row]:
    """The rows with a new one in the place of the old one; a baseline stays while a row of its run and shape does."""
    kept = [old for old in before if key(old) != key(row) or (row["contender"] == BASELINE and old["run"] != row["run"])]
    rows = [*kept, row]
    compared = {(old["run"], *key(old)[1:]) for old in rows if old["contender"] != BASELINE}
    newest = {key(old): old["run"] for old in rows if old["contender"] == BASELINE}  # the last of each wins
    return [old for old in rows if old["contender"] != BASELINE or old["run"] == newest[key(old)]
            or (old["run"], *key(old)[1:]) in compared]  # fmt: skip


def with_ratios(rows: list[Row]) -> list[Row]:
    """Each measured row with its speed over that of the baseline of its own run, shape and dropout; None without one."""
    baselines = {(row["run"], *key(row)[1:]): row for row in rows if row["contender"] == BASELINE}

    def ratio(row: Row) -> float | None:
        other = baselines.get((row["run"], *key(row)[1:]), {}).get("tokens_per_s")
        return None if other is None else round(row["tokens_per_s"] / other, 3)

    return [{**row, "ratio_to_trl": ratio(row)} if "tokens_per_s" in row else row for row in rows]


def is_known(contender: str, shape: str, dropout: float, rows: list[Row]) -> bool:
    """Whether there is a row with its ratio, or one that says that it does not fit."""
    found = [row for row in rows if key(row) == (contender, shape, dropout)]
    return any(row.get("ratio_to_trl") is not None or row.get("failed") == "out of memory" for row in found)


def planned(contenders: tuple[str, ...], shapes: tuple[str, ...], dropout: float, known: list[Row]) -> dict[str, list[str]]:
    """For each shape the contenders in the order of their cells, turned by one more for each; the baseline where any is."""
    plan = {}
    for number, shape in enumerate(shapes):
        turn = number % len(contenders)
        wanted = [name for name in contenders[turn:] + contenders[:turn] if not is_known(name, shape, dropout, known)]
        if wanted:
            plan[shape] = wanted if BASELINE in wanted else [BASELINE, *wanted]
    return plan


# -- main ------------------------------------------------------------------------------------------------------------


def resolved(options: Options, on_gpu: bool) -> Options:
    """Fill in what depends on the machine."""
    every = tuple(name for name in CONTENDERS if options.unsloth_site or name not in UNSLOTH)
    contenders = options.contenders or (every if on_gpu else ON_A_CPU)
    if unknown := set(contenders) - set(CONTENDERS):
        raise SystemExit(f"There is no contender {', '.join(sorted(unknown))}. There are {', '.join(CONTENDERS)}.")
    shapes = options.shapes or (SHAPES if on_gpu else ("avro",))
    if unknown := [shape for shape in shapes if not re.fullmatch(r"\d+x\d+x\d+|mixed|mixed_packed|avro", shape)]:
        raise SystemExit(
            f"There is no shape {', '.join(unknown)}. It is ROWSxLENGTHxACCUMULATION, mixed, mixed_packed or avro."
        )
    return dataclasses.replace(
        options,
        contenders=contenders,
        shapes=shapes,
        shape_of_model=options.shape_of_model or ("phi3-mini" if on_gpu else "demo"),
        dropout=(0.0 if on_gpu else 0.1) if options.dropout is None else options.dropout,
    )


def version(contender: str, row: Row, commit: str) -> str:
    """What was measured, in a few words."""
    if contender.startswith("ours"):
        return f"commit {commit[:9]}"
    library = {"trl": "trl", "unsloth": "unsloth"}.get(contender.partition("_")[0], "peft")
    return f"{library} {row['versions'][library]}"


def main(options: Options) -> None:
    """Measure every cell and write the file after each."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        described = wait(start(scratch, task="environment"), 300.0)
        environment = described["environment"]
        commit = environment["commit"] = options.commit or environment["commit"] or "unknown"
        options = resolved(options, described["on_gpu"])
        assert options.contenders and options.shapes and options.dropout is not None  # as resolved
        path = options.out or result_file("peers", environment)
        fixed = {name: getattr(options, name) for name in ("shape_of_model", "seed")}
        record = reopened(path, environment, fixed)
        plan = planned(options.contenders, options.shapes, options.dropout, record["cells"] if options.missing else [])
        run = len(record["runs"])
        flags = {name: value for name, value in dataclasses.asdict(options).items() if name not in ("out", "unsloth_site")}
        record["runs"].append({"run": run, "date": f"{datetime.date.today()}", **flags, "commit": commit})
        names = {name for wanted in plan.values() for name in wanted}
        split = bool(names & set(UNSLOTH))
        work = {"shapes": list(plan), "seed": options.seed, "warm_up": options.warm_up, "steps": options.steps}
        wait(start(scratch, task="models", shape_of_model=options.shape_of_model, split=split, **work), 600.0)
        cells = [(contender, shape) for shape, wanted in plan.items() for contender in wanted]
        for row in measured(cells, scratch, options, ahead=int(described["on_gpu"])):
            row |= {"run": run, "commit": commit}
            if "tokens_per_s" in row:
                row["version"] = version(row["contender"], row, commit)
            record["cells"] = with_ratios(merged(record["cells"], row))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(json.dumps(record["cells"][-1]), flush=True)
            if options.minutes is not None and time.perf_counter() - began > 60 * options.minutes:
                return


def measured(cells: list[tuple[str, str]], scratch: Path, options: Options, ahead: int) -> Iterator[Row]:
    """The rows of contenders and shapes, one after the other.

    The processes of the next `ahead` are begun, and import what they need, while one loads its model: half of a cell's time.
    """
    waiting: list[tuple[Row, tuple[Path, subprocess.Popen[str]]]] = []
    try:
        for number, _ in enumerate(cells):
            for contender, shape in cells[number + len(waiting) : number + 1 + ahead]:
                row: Row = {"contender": contender, "shape": shape, "dropout": options.dropout}
                site = options.unsloth_site if contender in UNSLOTH else None
                waiting.append((row, start(scratch, site, task="cell", **row)))
            row, job = waiting.pop(0)
            began = time.perf_counter()
            try:
                row |= wait(job, options.timeout_s)
            except Failed as failed:
                row["failed"] = str(failed)
            yield {**row, "seconds": round(time.perf_counter() - began, 1)}
    finally:
        for _, (_, process) in waiting:
            process.kill()
            process.communicate()


if __name__ == "__main__":
    main(tyro.cli(Options))
