"""Kill and resume train_loop.py at full size, and compare bit for bit with a run that was left alone.

    python benchmarks/kill_resume.py                            # a CUDA GPU; writes benchmarks/results/
    python benchmarks/kill_resume.py --shape tiny --kills 2     # anywhere, a smoke test

Each process is killed with SIGKILL at a random moment after it has written a checkpoint; the next one resumes.
The model has the exact shape and random weights. Always with --deterministic.
"""

import dataclasses
import datetime
import hashlib
import io
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).parents[1]
TIMES = ("tokens_per_s", "peak_memory_gb")  # of a metrics row: what may differ


@dataclasses.dataclass(frozen=True)
class Options:
    """What to kill, and how often."""

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
    out: Path | None = None
    """Where the JSON goes. Unset: benchmarks/results/kill_resume_CARD_YYYYMM.json."""
    commit: str | None = None
    """Commit of the code, where it runs without its repository."""


def write_rows(path: Path, count: int, length: int) -> None:
    """Training data of random letters; the first three rows, which are generated from at the end, are short."""
    draw = random.Random(0)
    lengths = [10] * 3 + [draw.randint(length // 2, length * 9 // 10) for _ in range(count - 3)]
    rows = [{"prompt": f"row {i}", "completion": "".join(draw.choices("abcdefgh", k=n))} for i, n in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def newest_step(folder: Path) -> int:
    """The last checkpoint in sight, 0 if there is none."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def fork(function: Callable[[], int], output: Path) -> int:
    """Process id of a child that runs `function`, ends with the code it returns, and writes to the file `output`."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70  # of a traceback
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(descriptor, number)
            setattr(sys, name, io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), line_buffering=True))
        code = function()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start(arguments: list[str], log: Path) -> int:
    """Process id of train_loop.py in a fork of this process, which has imported what is slow and has not touched the GPU."""

    def run() -> int:
        from qlora.cli import train

        return train(arguments)

    return fork(run, log)


def wait(child: int) -> int:
    """How it ended: its exit code, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after_progress(arguments: list[str], folder: Path, log: Path, pause_s: float) -> dict:
    """Start, wait for a checkpoint that was not there, a little longer, and kill."""
    began, before = time.perf_counter(), newest_step(folder)
    child = start(arguments, log)
    while newest_step(folder) == before:
        time.sleep(0.005)
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit(f"the run ended by itself:\n{log.read_text()[-3000:]}")
    time.sleep(pause_s)
    os.kill(child, signal.SIGKILL)
    assert wait(child) == -signal.SIGKILL
    kill = {"resumed_after_step": before, "newest_checkpoint": newest_step(folder)}
    return {**kill, "pause_s": round(pause_s, 3), "seconds": round(time.perf_counter() - began, 1)}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what a checkpoint or adapter folder holds in tensors: adapter, and moments with generators."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def metrics(folder: Path) -> list[dict]:
    """metrics.jsonl without the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def compared(step: int, straight: Path, pieces: Path) -> bool:
    """Whether both runs have the same checkpoint of a step; waits until the straight one has got there."""
    ours, theirs = (folder / "checkpoints" / f"step-{step:06d}" for folder in (pieces, straight))
    while not theirs.exists():
        time.sleep(0.1)
    return len(digests(ours)) == 2 and digests(ours) == digests(theirs)


def write(record: dict, options: Options) -> None:
    """Write what is known so far, so that a time limit does not take it."""
    card = re.search(r"[HAB]\d{2,3}|CPU", record["environment"]["device"])
    name = f"kill_resume_{card[0].lower() if card else 'gpu'}_{datetime.date.today():%Y%m}.json"
    (options.out or ROOT / "benchmarks" / "results" / name).write_text(json.dumps(record, indent=1) + "\n")


def main(options: Options) -> None:
    """Run once straight and once in pieces, compare, and write the file."""
    import torch
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401  for the children, as the line above

    steps, draw = options.kills + 3, random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        model, rows, straight, pieces = (Path(scratch) / name for name in ("model", "rows.jsonl", "straight", "pieces"))
        described = Path(scratch) / "environment.json"
        child = os.fork()
        if not child:  # in a process of its own: it touches the GPU
            from benchmarks.train_step import write_random_model
            from qlora.run.environment import environment

            write_random_model(options.shape, model)
            device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
            described.write_text(json.dumps(environment(device)))
            os._exit(0)
        write_rows(rows, 4 * steps, options.length)
        assert wait(child) == 0, "the model could not be written"
        flags = ["--max-steps", str(steps), "--save-steps", "1", "--save-total-limit", str(steps), "--logging-steps", "1"]
        flags += ["--deterministic", "--attn-implementation", options.attn_implementation]
        arguments = ["--model", str(model), "--train-file", str(rows), *flags, "--output-dir"]
        record = {"environment": json.loads(described.read_text()), "steps": steps, "kills": [], "finished": None}
        record["environment"]["commit"] = options.commit or record["environment"]["commit"]
        record["flags"] = {**dataclasses.asdict(options), "out": None, "train_loop": " ".join(flags)}
        began = time.perf_counter()
        log, pause_s = Path(scratch) / "pieces.log", 2.5 if options.shape == "phi3-mini" else 0.05  # about a step and its save
        alone = start([*arguments, str(straight)], Path(scratch) / "straight.log")  # beside the others: it disturbs no bit
        for _ in range(options.kills):
            kill = kill_after_progress([*arguments, str(pieces)], pieces, log, draw.uniform(0, pause_s))
            kill["equal"] = compared(kill["newest_checkpoint"], straight, pieces)
            record["kills"].append(kill)
            record["seconds"] = round(time.perf_counter() - began, 1)
            write(record, options)
            print(kill, flush=True)
        assert wait(start([*arguments, str(pieces)], log)) == 0, log.read_text()[-3000:]
        assert wait(alone) == 0, "the straight run failed"
        assert log.read_text().count("It resumes bit for bit") == options.kills
        record["finished"] = {
            "last checkpoint": compared(steps, straight, pieces),
            "adapter": digests(pieces / "adapter") == digests(straight / "adapter"),
            "metrics": metrics(pieces) == metrics(straight),
        }
        last = straight / "checkpoints" / f"step-{steps:06d}"
        record["checkpoint_bytes"] = sum(path.stat().st_size for path in last.iterdir())
        record["seconds"] = round(time.perf_counter() - began, 1)
    write(record, options)
    print(json.dumps({"finished": record["finished"], "kills": len(record["kills"]), "seconds": record["seconds"]}))
    if not all([*record["finished"].values(), *(kill["equal"] for kill in record["kills"])]):
        raise SystemExit("the run in pieces differs from the straight one")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(tyro.cli(Options))
