"""What a claim is measured on, and what it returns. MB and GB are 1e6 and 1e9 bytes."""

from typing import Any, Literal, NamedTuple

from benchmarks.tables import load, select

Figures = dict[str, Any]
Verdict = Literal["right", "wrong", "depends"]
RANK, ROWS, LENGTH = 32, 2, 2048  # the guide's
LIBRARY = "read from the library"


class Source(NamedTuple):
    """What claims are measured on."""

    model: str  # as --model names it
    epochs: int  # of a short run
    trainings: list[dict[str, Any]]  # the short runs so far


class Finding(NamedTuple):
    """What came of a claim. Verdict and fact follow from the figures."""

    verdict: Verdict
    fact: str  # line breaks and indentation do not count
    figures: Figures
    how: str = "measured"  # or LIBRARY, or the pattern of another benchmark's files
    short: bool = False  # whether it is in the README too


def right_if(holds: bool, otherwise: Verdict = "wrong") -> Verdict:
    """The verdict of a claim that holds or does not."""
    return "right" if holds else otherwise


def listed(values: dict[str, float], spec: str, unit: str = "") -> str:
    """`name: value unit`, separated by semicolons."""
    return "; ".join(f"{name}: {value:{spec}}{unit}" for name, value in values.items())


def measured_cell(pattern: str, **wanted: Any) -> dict[str, Any]:
    """The first cell of the newest matching result file that has these values."""
    return select(load(pattern)[1], **wanted)[0]
