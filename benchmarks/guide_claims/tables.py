"""All claims by group, and the tables of GUIDE_CLAIMS.md and README.md, from the newest result file."""

import re
from collections.abc import Callable

from benchmarks.guide_claims import attention, libraries, training, weights
from benchmarks.guide_claims.finding import LIBRARY
from benchmarks.harness import Row
from benchmarks.tables import load, source, table

FILES = "guide_claims_*.json"
GROUPS = {
    "Adapters": [weights.targets, weights.adapter_3mb],
    "NF4": [weights.nf4_levels, weights.bits_4_5, weights.double_quantization, weights._97_5_percent, weights.model_3_8gb,
            weights.quality_nf4],
    "Memory": [weights.total_2gb, weights._96_7_percent, weights.peft_checkpointing, weights.checkpointing_stores,
               weights._6gb],
    "Attention": [attention.flash_kernel, attention.flash_training, attention.flash_memory],
    "Precision": [libraries.fp16_with_bf16],
    "Schedule, steps and batches": [libraries.default_scheduler, libraries.configuration_runs, libraries._110_steps,
                                    libraries.accumulation],
    "Tokens and data": [libraries.pad_eos],
    "Loading, merging, generating": [training.merge],
    "Training": [training.target_modules, training.dropout, training.learning_rate, training.knowledge],
}  # fmt: skip


def id_of(claim: Callable) -> str:
    """Its function's name with dashes: `_97_5_percent` is 97.5-percent, as a name has no point and begins with no digit."""
    return re.sub(r"(\d)_(\d)", r"\1.\2", claim.__name__).strip("_").replace("_", "-")


CLAIMS = {id_of(claim): claim for group in GROUPS.values() for claim in group}  # in the order of the tables


def claims_record() -> tuple[str, Row, str]:
    """The newest file's name, its contents with the rows of today's claims, and how many there are."""
    name, record = load(FILES)
    rows = {row["id"]: row for row in record["rows"]}
    if lacking := sorted(CLAIMS.keys() - rows.keys()):
        missing = f"{name} lacks {len(lacking)} of {len(CLAIMS)} claims ({', '.join(lacking[:5])})"
        raise SystemExit(f"{missing}; measure them: python -m benchmarks.guide_claims --missing")
    shown = [rows[claim] for claim in CLAIMS]
    gone = [row for claim, row in rows.items() if claim not in CLAIMS and row["figures"]]
    read = sum(row["how"] == LIBRARY for row in shown)
    counts = f"{len(shown)} claims: {verdicts(shown)}. {len(shown) - read} are measured, {read} {LIBRARY}."
    counts += f" The file has rows of {len(gone)} others, which are no longer measured: {verdicts(gone)}." if gone else ""
    return name, {**record, "rows": shown, "cells": shown}, counts


def verdicts(rows: list[Row]) -> str:
    """How rows came out."""
    words = {"right": "right", "wrong": "wrong", "depends": "depend"}
    return ", ".join(f"{sum(row['verdict'] == verdict for row in rows)} {word}" for verdict, word in words.items())


def how_known(row: Row) -> str:
    """How a row's figures came about; of a file, also the command that made it."""
    how = str(row["how"])
    return f"{how}, `python -m benchmarks.{how[5:].rsplit('_', 2)[0]}`" if how.startswith("from ") else how


def short() -> str:
    """The claims that matter most."""
    name, record, counts = claims_record()
    rows = [[row["claim"], row["verdict"], row["fact"]] for row in record["rows"] if row["short"]]
    return f"{table(['a guide says', 'verdict', 'what is so'], rows)}\n\n{counts} {source(name, record)}"


def claims() -> str:
    """All claims, a table for each group, the terms of a step's memory, and the short runs."""
    name, record, counts = claims_record()
    parts = [counts]
    for group in dict.fromkeys(row["group"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["group"] == group]
        cells = [[f"`{row['id']}`", row["claim"], row["verdict"], row["fact"], how_known(row)] for row in rows]
        parts += [f"## {group}", table(["id", "the guide says", "verdict", "what is so", "how it is known"], cells)]
        if group == "Memory":
            f = next(row["figures"] for row in rows if row["id"] == "total-2gb")
            terms = f["terms_gb"] | {"all, predicted": f["predicted_gb"], "all, measured on an H100": f["measured_gb"]}
            headers = ["term, full checkpointing", "Phi-3-mini, 2 x 2,048 tokens, GB"]
            parts.append(table(headers, [[term, f"{gb:.2f}"] for term, gb in terms.items()]))
    parts += ["## The short runs", short_runs(record)] if record["trainings"] else []
    return "\n\n".join([*parts, f"Perplexity: {record['text']}. {source(name, record)}"])


def short_runs(record: Row) -> str:
    """The runs of the demo that claims about training read."""
    rows = []
    for run in record["trainings"]:
        flags = (
            f"--{name.replace('_', '-')} {' '.join(value) if isinstance(value, list) else f'{value:g}'}"
            for name, value in run["flags"].items()
        )
        command = f"`{' '.join(flags)}`" if run["flags"] else "(the demo's defaults)"
        losses = (f"{loss:.4f}" for loss in (run["train_loss_without_dropout"], run["eval_loss"][-1]))
        rows.append([command, f"{run['trained_parameters']:,}", *losses, f"{run['text_perplexity']:.2f}"])
    headers = ["python train_loop.py", "trained parameters", "training loss, dropout off", "eval loss", "text perplexity"]
    epochs = " or ".join(map(str, sorted({run["epochs"] for run in record["trainings"]})))
    what = f"`{record['model']}`, `--num-train-epochs {epochs}`, one run each; losses in nats per token."
    return f"{table(headers, rows)}\n\n{what}"
