"""The teaching guide's claims, measured: one row for each, its figures, and the verdict that follows from them.

    python benchmarks/guide_claims.py                     # all, about 40 minutes on one core of a CPU
    python benchmarks/guide_claims.py --only bits-4.5 merge
    python benchmarks/guide_claims.py --missing           # what the file does not have yet
    python benchmarks/report.py                           # GUIDE_CLAIMS.md, and the short table of the README

Rows that need weights are measured on the demo model, each in a process of its own where it takes long; rows of a GPU are read
from the files that other benchmarks left, and name them. Runs that several claims read are made once and kept in the file. A
row that cannot be measured here says so. Verdicts and texts follow from figures: each start renews those of all rows.
"""

import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python has only this file's folder there

from benchmarks import report  # noqa: E402
from benchmarks.guide_claims_list import CLAIMS, COMMANDS, GROUPS, Claim  # noqa: E402
from qlora.run.schema import in_gb  # noqa: E402

TEXT = "Python's own reference, pydoc_data.topics of Python {python} (PSF license), its first {tokens:,} tokens"


def newest() -> Path:
    """The newest file, so that a later month extends it; this month's if there is none."""
    try:
        return report.RESULTS / report.load(report.CLAIMS_FILE)[0]
    except ValueError:
        return report.RESULTS / f"guide_claims_cpu_{datetime.date.today():%Y%m}.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """Which claims."""

    only: tuple[str, ...] = ()
    """Ids of the claims to measure. Empty: all."""
    missing: bool = False
    """Only those that the file does not have yet."""
    model: str = "demo"
    """As --model of train_loop.py, for rows that need weights; tiny-random for a quick look."""
    epochs: int | None = None
    """Of the short runs. Unset: 4."""
    minutes: float | None = None
    """Start no further row after this many minutes; a later call with --missing continues."""
    out: Path = dataclasses.field(default_factory=newest)
    """Where the JSON is, or goes. Unset: the newest of benchmarks/results."""


def alone(function: Any, *arguments: Any) -> Any:
    """The function's result, from a process of its own: its peak memory and its threads are nobody else's."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def row_of(claim: Claim, figures: dict[str, Any], **about: Any) -> dict[str, Any]:
    """The row of a claim, its verdict and text as they follow from the figures."""
    is_file = claim.how.endswith(".json")
    return {
        "id": claim.id,
        "group": next(name for name, group in GROUPS.items() if claim in group),
        "short": claim.short,
        "claim": claim.claim,
        "verdict": claim.judge(figures),
        "fact": claim.fact(figures),
        "figures": figures,
        "how": f"from {report.load(claim.how)[0]}" if is_file else claim.how,
        "command": COMMANDS[claim.how] if is_file else f"python benchmarks/guide_claims.py --only {claim.id}",
        **about,
    }


def renewed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of the list, in today's words for the figures they have; one whose claim is gone is dropped."""
    known = {row["id"]: row for row in rows}
    about = ("seconds", "commit")
    return [
        row_of(claim, known[name]["figures"], **{key: known[name][key] for key in about})
        for name, claim in CLAIMS.items()
        if name in known
    ]


def measure(name: str, model: str, trainings: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a claim's function, as JSON gives them back; seeded, on one thread."""
    import torch

    from benchmarks import guide_claims_cells, guide_claims_demo

    torch.set_num_threads(1)
    torch.manual_seed(0)
    function = getattr(guide_claims_cells, name, None) or getattr(guide_claims_demo, name)
    return json.loads(json.dumps(function(guide_claims_cells.Source(model, trainings))))


def flags_of(runs: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The flags of the runs that a claim reads, as JSON gives them back."""
    from benchmarks import guide_claims_training as training

    singles = {name: getattr(training, name) for name in ("BASE", "ANOTHER_SEED", "NO_DECAY")}
    groups = {name: getattr(training, name) for name in ("TARGETS", "RANKS", "DROPOUTS", "RATES")}
    for name in runs:
        yield from [singles[name]] if name in singles else groups[name].values()


def opened(path: Path, model: str, environment: dict[str, Any]) -> dict[str, Any]:
    """What the file holds already; one of another machine, other versions or another model is refused."""
    if not path.exists():
        return {"environment": environment, "model": model, "trainings": [], "rows": []}
    record = json.loads(path.read_text(), object_hook=in_gb)
    for name in ("device", "packages"):
        if record["environment"][name] != environment[name]:
            raise SystemExit(f"{path} has another {name}: {record['environment'][name]}. Give another --out.")
    if record["model"] != model:
        raise SystemExit(f"{path} has another model: {record['model']}. Give another --out.")
    return record


def main(options: Options) -> None:
    """Measure the claims that are wanted and write the file after each."""
    if unknown := sorted(set(options.only) - CLAIMS.keys()):
        raise SystemExit(f"There is no claim {', '.join(unknown)}. There are {', '.join(CLAIMS)}.")
    import torch

    from benchmarks import guide_claims_demo
    from benchmarks import guide_claims_training as training
    from qlora.model.demo import model_source
    from qlora.run.environment import environment

    torch.set_num_threads(1)
    model_source(options.model)  # made here, once
    began = time.perf_counter()
    here = environment(torch.device("cpu"))
    record = opened(options.out, options.model, here)
    text = TEXT.format(python=here["python"], tokens=training.TEXT_ROWS * training.TEXT_LENGTH)
    done = {row["id"] for row in record["rows"]} if options.missing else set()
    wanted = [claim for name, claim in CLAIMS.items() if name in (options.only or CLAIMS) and name not in done]
    again = {claim.id for claim in wanted}  # whose figures may lack what today's text says
    record |= {"text": text, "rows": renewed([row for row in record["rows"] if row["id"] not in again])}
    figures: dict[tuple[str, str], Any] = {}  # of functions that several claims share
    for claim in wanted:
        if options.minutes is not None and time.perf_counter() - began > 60 * options.minutes:
            break
        since = time.perf_counter()
        for flags in flags_of(claim.runs):
            if not any(row["flags"] == flags for row in record["trainings"]):
                row = alone(training.training_row, options.model, flags, options.epochs or training.EPOCHS)
                record["trainings"].append({**row, "commit": here["commit"]})
                options.out.write_text(json.dumps(record, indent=1) + "\n")
        key = (claim.measure, claim.how)
        if key not in figures:
            arguments = (claim.measure, options.model, record["trainings"])
            figures[key] = alone(measure, *arguments) if hasattr(guide_claims_demo, claim.measure) else measure(*arguments)
        about = {"seconds": round(time.perf_counter() - since, 1), "commit": here["commit"]}
        rows = [row for row in record["rows"] if row["id"] != claim.id]
        record["rows"] = renewed([*rows, {"id": claim.id, "figures": figures[key], **about}])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        told = next(row for row in record["rows"] if row["id"] == claim.id)
        print(f"{told['id']}: {told['verdict']}. {re.sub(' +', ' ', told['fact'])}", flush=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
