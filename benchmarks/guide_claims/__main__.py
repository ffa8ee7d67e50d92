"""Measure the claims on one core of a CPU, in about 40 minutes, and write benchmarks/results/guide_claims_cpu_YYYYMM.json."""

import dataclasses
import json
import time
from typing import Any

import torch
import tyro

from benchmarks import harness
from benchmarks.guide_claims.finding import Source
from benchmarks.guide_claims.tables import CLAIMS, FILES, GROUPS
from benchmarks.tables import load
from qlora.run.environment import environment

TEXT = "Python's own reference, pydoc_data.topics of Python {} (PSF license), its first 4,096 tokens"


@dataclasses.dataclass(frozen=True)
class Options(harness.Part, harness.Output):
    """Which claims."""

    only: tuple[str, ...] = ()
    """Ids of the claims to measure. Empty: all."""
    model: str = "demo"
    """As --model of train_loop.py, for claims that need weights; tiny-random for a quick look."""
    epochs: int = 4
    """Of the short runs."""


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what follows from its figures, in today's words. One whose claim has gone stays as it is."""
    if (claim := CLAIMS.get(row["id"])) is None:
        return row
    finding = claim(Source("", 0, []), row["figures"])
    how = f"from {load(finding.how)[0]}" if finding.how.endswith(".json") else finding.how
    group = next(name for name, claims in GROUPS.items() if claim in claims)
    said = {"group": group, "short": finding.short, "claim": str(claim.__doc__).removesuffix(".")}
    return row | said | {"verdict": finding.verdict, "fact": " ".join(finding.fact.split()), "how": how}


def main(options: Options) -> None:
    """Measure the claims that are wanted, and write the file after each."""
    if unknown := sorted(set(options.only) - CLAIMS.keys()):
        raise SystemExit(f"There is no claim {', '.join(unknown)}. There are {', '.join(CLAIMS)}.")
    torch.set_num_threads(1)
    began, here = time.perf_counter(), environment(torch.device("cpu"))
    newest = max(harness.RESULTS.glob(FILES), default=harness.result_path("guide_claims", here["device"]))
    path = options.out or newest
    record: Any = {"environment": here, "model": options.model, "trainings": [], "rows": []}
    record |= harness.reopened(path, here, {}) if path.exists() else {}
    if record["model"] != options.model:
        raise SystemExit(f"{path} has another model: {record['model']}. Give another --out.")
    source = Source(options.model, options.epochs, record["trainings"])
    rows = {row["id"]: judged(row) for row in record["rows"]}
    for name in options.only or CLAIMS:
        if options.minutes is not None and time.perf_counter() - began > 60 * options.minutes:
            break
        if options.missing and name in rows:
            continue
        since = time.perf_counter()
        torch.manual_seed(0)
        figures = json.loads(json.dumps(CLAIMS[name](source, {}).figures))
        about = {"seconds": round(time.perf_counter() - since, 1), "commit": options.commit or here["commit"]}
        rows[name] = judged({"id": name, "figures": figures, **about})
        record |= {"text": TEXT.format(here["python"]), "rows": list(rows.values())}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {rows[name]['verdict']}. {rows[name]['fact']}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
