"""Kill and resume train_loop.py at full size, and compare bit for bit with a run that was left alone.

    python -m benchmarks.kill_resume                            # a CUDA GPU; writes benchmarks/results/
    python -m benchmarks.kill_resume --shape tiny --kills 2     # anywhere, a smoke test

Each process is killed with SIGKILL at a random moment after it has written a checkpoint; the next one resumes.
The model has the exact shape and random weights. Always with --deterministic.
"""

import dataclasses
import hashlib
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.harness import Cell, Output, ResultFile, Row, write_random_model
from benchmarks.tables import load, source, table
from qlora.cli import train

TIMES = ("tokens_per_s", "peak_memory_gb")  # of a metrics row: what may differ


@dataclasses.dataclass(frozen=True)
class Options:
    """What to kill, and how often."""

    output: tyro.conf.OmitArgPrefixes[Output] = Output()
    shape: Literal["phi3-mini", "tiny"] = "phi3-mini"
    """phi3-mini: 3.8 billion parameters, 7.6 GB on disk while it runs. tiny: the two-layer model of the tests."""
    attn_implementation: str = "sdpa"
    """As of train_loop.py."""
    kills: int = 10
    """Processes killed before the last one may end."""
    length: int = 2048
    """About the tokens of a row; 2 x 2 rows make a step."""
    seed: int = 0
    """Of the moments."""


def write_rows(path: Path, count: int, length: int) -> None:
    """Training data of random letters; the first three rows, which are generated from at the end, are short."""
    draw = random.Random(0)
    lengths = [10] * 3 + [draw.randint(length // 2, length * 9 // 10) for _ in range(count - 3)]
    rows = [{"prompt": f"row {i}", "completion": "".join(draw.choices("abcdefgh", k=n))} for i, n in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def newest_step(folder: Path) -> int:
    """The last checkpoint in sight, 0 if there is none."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def kill_after_progress(arguments: list[str], folder: Path, log: Path, pause_s: float) -> Row:
    """Start, wait for a checkpoint that was not there, a little longer, and kill."""
    began, before = time.perf_counter(), newest_step(folder)
    cell = Cell(train, arguments, log=log).start()
    while newest_step(folder) == before:
        time.sleep(0.005)
        if not cell.process.is_alive():
            raise SystemExit(f"the run ended before it was killed:\n{log.read_text()[-3000:]}")
    time.sleep(pause_s)
    cell.stop()
    kill = {"resumed_after_step": before, "newest_checkpoint": newest_step(folder)}
    return {**kill, "pause_s": round(pause_s, 3), "seconds": round(time.perf_counter() - began, 1)}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what a checkpoint or adapter folder holds in tensors: adapter and moments."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def metrics(folder: Path) -> list[Row]:
    """metrics.jsonl without the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def is_equal(step: int, straight: Path, pieces: Path) -> bool:
    """Whether both runs have the same checkpoint of a step; waits until the straight one has got there."""
    ours, theirs = (folder / "checkpoints" / f"step-{step:06d}" for folder in (pieces, straight))
    while not theirs.exists():
        time.sleep(0.1)
    return len(digests(ours)) == 2 and digests(ours) == digests(theirs)


def main(options: Options) -> None:
    """Run once straight and once in pieces, compare, and write the file."""
    file = ResultFile("kill_resume", options.output)
    steps, draw = options.kills + 3, random.Random(options.seed)
    flags = ["--max-steps", str(steps), "--save-steps", "1", "--save-total-limit", str(steps), "--logging-steps", "1"]
    flags += ["--deterministic", "--attn-implementation", options.attn_implementation]
    about = {name: value for name, value in vars(options).items() if name != "output"}
    kills: list[Row] = []
    record: Row = {"environment": file.environment, "steps": steps, "kills": kills, "finished": None}
    file.record = record | {"flags": {**about, "train_loop": " ".join(flags)}}
    with tempfile.TemporaryDirectory() as scratch:
        model, rows, straight, pieces, log = (Path(scratch) / name for name in ("m", "rows.jsonl", "straight", "pieces", "log"))
        Cell(write_random_model, options.shape, model).result()
        write_rows(rows, 4 * steps, options.length)
        arguments = ["--model", str(model), "--train-file", str(rows), *flags, "--output-dir"]
        began, longest_s = time.perf_counter(), 2.5 if options.shape == "phi3-mini" else 0.05  # about a step and its save
        # Beside the others: it disturbs no bit.
        alone = Cell(train, [*arguments, str(straight)], log=Path(scratch) / "straight.log").start()
        for _ in range(options.kills):
            kill = kill_after_progress([*arguments, str(pieces)], pieces, log, draw.uniform(0, longest_s))
            kill["equal"] = is_equal(kill["newest_checkpoint"], straight, pieces)
            kills.append(kill)
            file.record["seconds"] = round(time.perf_counter() - began, 1)
            file.write(kill)
        codes = Cell(train, [*arguments, str(pieces)], log=log).result(), alone.result()
        assert codes == (0, 0), log.read_text()[-3000:]
        assert log.read_text().count("It resumes bit for bit") == options.kills
        finished = {
            "last checkpoint": is_equal(steps, straight, pieces),
            "adapter": digests(pieces / "adapter") == digests(straight / "adapter"),
            "metrics": metrics(pieces) == metrics(straight),
        }
        last = straight / "checkpoints" / f"step-{steps:06d}"
        size = sum(path.stat().st_size for path in last.iterdir())
    file.record |= {"finished": finished, "checkpoint_bytes": size, "seconds": round(time.perf_counter() - began, 1)}
    file.write({"finished": finished, "kills": len(kills)})
    if not all([*finished.values(), *(kill["equal"] for kill in kills)]):
        raise SystemExit("the run in pieces differs from the straight one")


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
        files = details and all(re.fullmatch(r"\S+\.\w+", detail) for detail in details)
        told = f"each of {len(details)} files" if files else ", ".join(details)
        rows.append([f"{kind} ({told})" if told else kind, *counts, f"{sum(trial['seconds'] for trial in trials):.0f}"])
    gpu_name, gpu = load("kill_resume_*.json")
    flags, equal = gpu["flags"], sum(kill["equal"] for kill in gpu["kills"])
    what = f"SIGKILL of {flags['shape']} in full size on a GPU, `--deterministic`, {flags['attn_implementation']}"
    rows.append([what, str(len(gpu["kills"])), str(equal), f"{gpu['seconds']:.0f}"])
    sources = f"{source(name, record)} Last row: {source(gpu_name, gpu)}"
    return table(["what was done", "times", "survived", "seconds"], rows) + "\n\n" + sources


if __name__ == "__main__":
    main(tyro.cli(Options))
