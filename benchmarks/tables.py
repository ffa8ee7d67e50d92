"""Result files read, and written as Markdown tables and figures: what the tables and plots of all benchmarks share."""

import json
import re
from typing import Any

import tabulate

from benchmarks.harness import RESULTS, Row
from qlora.run.schema import in_gb

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's palette, told apart by the color-blind
COMPILE_LABELS = {"none": "as written", "layers": "compiled", "graphs": "compiled, CUDA graphs"}


def load(pattern: str) -> tuple[str, Row]:
    """Name and contents of the newest result file that matches.

    Raises:
        SystemExit: if there is none.
    """
    paths = sorted(RESULTS.glob(pattern), key=lambda path: re.findall(r"\d{6}", path.name))
    if not paths:
        raise SystemExit(f"There is no {pattern} in {RESULTS}. `python -m benchmarks.NAME` measures it.")
    return paths[-1].name, json.loads(paths[-1].read_text(), object_hook=in_gb)


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return tabulate.tabulate(rows, headers, tablefmt="github", stralign=None, numalign=None, disable_numparse=True)


def table_of(columns: dict[str, str], rows: list[Row]) -> str:
    """A Markdown table of dictionaries: each header with the format of its column, such as `{step_ms:.0f}`.

    A cell is empty where its row lacks a value or has None.
    """
    return table(list(columns), [[_filled(text, row) for text in columns.values()] for row in rows])


def _filled(text: str, row: Row) -> str:
    try:
        return text.format(**row)
    except (KeyError, TypeError):  # None has no formats
        return ""


def select(record: Row, **wanted: Any) -> list[Row]:
    """The cells with the given values."""
    return [cell for cell in record["cells"] if all(cell.get(key) == value for key, value in wanted.items())]


def source(name: str, record: Row) -> str:
    """Where numbers come from: file, machine, versions, commit."""
    environment = record["environment"]
    names = ("torch", "transformers", "peft", "bitsandbytes")
    packages = ", ".join(f"{package} {environment['packages'][package]}" for package in names)
    commits = {cell["commit"][:9]: None for cell in record.get("cells", []) if "commit" in cell}
    return f"`{name}`: {environment['device']}; {packages}; commit {', '.join(commits) or environment['commit'][:9]}."


def counts(values: list[int]) -> str:
    """One number, or from the least to the most."""
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def save(figure: Any, name: str) -> None:
    """Write a figure to results/ as PNG and SVG, the same bytes each time, and close it."""
    import matplotlib.pyplot as plt

    for suffix in ("png", "svg"):
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(RESULTS / f"{name}.{suffix}", dpi=150, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
