"""The curves of a run: as SVG, whose colors and font the page may replace, and as PNG."""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora.report.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colors of both files; the page replaces them by name in dark mode. Blue and orange differ for color-blind readers too (after
# Okabe and Ito), and each is dark enough on white for text.
COLORS = {"ink": "#1f2328", "muted": "#59636e", "rule": "#e1e4e8", "blue": "#0068a8", "orange": "#b34a00"}
INK, MUTED, RULE, BLUE, ORANGE = COLORS.values()
MOST_POINTS = 1200  # of a line; more are not visible at its width
SMALL, WIDE = (400, 230), (920, 320)  # units of the SVG, which a phone and a desktop show at 0.9 and 1.1 pixels
NARROW = (400, 280)
LEFT = 52  # units that the numbers of the vertical axis take
FONT_UNITS = 11.5
LOG_FROM = 20.0  # ratio of the largest to the smallest value


class Curve(NamedTuple):
    """A figure: its name, what a screen reader says of it, the <svg> element as matplotlib writes it, and the PNG file."""

    name: str
    description: str
    svg: str
    png: bytes


class Line(NamedTuple):
    """A line of a figure; `label` stands at its end in its color, and nothing where it is empty."""

    steps: Sequence[float]
    values: Sequence[float]
    label: str
    color: str
    width: float = 1.8
    opacity: float = 1.0
    marker: str = ""
    dashed: bool = False


def draw(record: Record) -> list[Curve]:
    """The curves of a run: loss (wide, and narrow as `loss-narrow`), learning rate, gradient norm, speed, memory.

    Returns:
        None of them for a run without a step.
    """
    steps = [row["step"] for row in record.steps]
    if not steps:
        return []
    loss_lines, said = _loss(record, steps)
    curves = [
        _curve("loss", "Loss, nats per token", said, loss_lines, WIDE, _room(loss_lines)),
        _curve("loss-narrow", "Loss, nats per token", said, loss_lines, NARROW, _room(loss_lines)),
    ]
    small = _small(record, steps)
    room = max(_room(lines) for _, _, lines in small.values())  # one for all, so that their axes are of one length
    return curves + [_curve(name, title, said, lines, SMALL, room) for name, (title, said, lines) in small.items()]


def _small(record: Record, steps: list[int]) -> dict[str, tuple[str, str, list[Line]]]:
    """Name -> title, description and lines of the figures beside the loss."""
    found = {}
    for name, title in (
        ("learning_rate", "Learning rate"),
        ("grad_norm", "Gradient norm, before clipping"),
        ("tokens_per_s", "Speed, input tokens per second"),
        ("peak_memory_gb", "Peak memory so far, GB"),
    ):
        values = record.curve(name)
        label = "" if name == "learning_rate" else short(_last(values))
        lines = [Line(steps, values, label, BLUE, width=1.4)]
        predicted = record.predicted_gb
        if name == "peak_memory_gb" and predicted and record.on_gpu():
            lines.append(Line([steps[0], steps[-1]], [predicted] * 2, f"predicted {predicted:.2f}", MUTED, 1.0, dashed=True))
        if name == "grad_norm" and (limit := record.config["max_grad_norm"]) and limit <= 2 * _most(values):
            lines.append(Line([steps[0], steps[-1]], [limit] * 2, f"clipped at {short(limit)}", MUTED, 1.0, dashed=True))
        found[name] = title, _range(title, values), lines
    return found


def reach(num_steps: int) -> int:
    """Steps before and after one that its smoothed loss is the mean of."""
    return max(1, round(num_steps / 40))


def smoothed(values: Sequence[float], steps: int) -> list[float]:
    """The mean of each value and of the `steps` before and after it, where there are any; what is not finite is left out."""
    import numpy

    numbers = numpy.asarray(values, dtype=float)
    finite = numpy.isfinite(numbers)
    sums = numpy.concatenate([[0.0], numpy.cumsum(numpy.where(finite, numbers, 0.0))])
    counts = numpy.concatenate([[0], numpy.cumsum(finite)])
    at = numpy.arange(len(numbers))
    start, end = numpy.maximum(at - steps, 0), numpy.minimum(at + steps + 1, len(numbers))
    with numpy.errstate(invalid="ignore"):
        means: list[float] = ((sums[end] - sums[start]) / (counts[end] - counts[start])).tolist()
        return means


def short(value: float) -> str:
    """A number for an axis or a label: three digits, thousands apart, no zeros to pad an exponent."""
    if not math.isfinite(value):
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return re.sub(r"e([+-])0*(\d)", lambda match: f"e{match[1].strip('+')}{match[2]}", f"{value:.3g}")


def _loss(record: Record, steps: list[int]) -> tuple[list[Line], str]:
    raw = record.curve("loss")
    lines = [Line(steps, raw, "", BLUE, width=0.9, opacity=0.45)]
    mean = smoothed(raw, reach(len(raw)))
    lines.append(Line(steps, mean, f"training {short(_last(mean))}", BLUE))
    said = _range("Training loss", raw)
    if evaluations := record.evaluations:
        losses = [row["eval_loss"] for row in evaluations]
        marker = "o" if len(evaluations) <= 40 else ""
        lines.append(Line([row["step"] for row in evaluations], losses, f"eval {short(losses[-1])}", ORANGE, marker=marker))
        said += " " + _range("Eval loss", losses)
    return lines, said


def _range(title: str, values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return f"{title}: no finite value."
    first, last, least, most = map(short, (finite[0], finite[-1], min(finite), max(finite)))
    return f"{title}: {first} at first, {last} at last, between {least} and {most}."


def _last(values: Sequence[float]) -> float:
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def _most(values: Sequence[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=0.0)


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points that look the same: of each stretch the lowest and the highest, in their order."""
    stretch = 2 * math.ceil(len(values) / MOST_POINTS)
    if stretch <= 2:
        return list(steps), list(values)
    kept: list[int] = []
    for start in range(0, len(values), stretch):
        part = [at for at in range(start, min(start + stretch, len(values))) if math.isfinite(values[at])]
        key = values.__getitem__
        kept += sorted({min(part, key=key), max(part, key=key)}) if part else [start]  # a gap stays one
    return [steps[at] for at in kept], [values[at] for at in kept]


def _room(lines: list[Line]) -> float:
    """Units that the labels behind the ends of lines take."""
    return 18 + 6.2 * max(len(line.label) for line in lines)


def _curve(name: str, title: str, said: str, lines: list[Line], units: tuple[int, int], room: float) -> Curve:
    import matplotlib

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "DejaVu Sans", "font.size": FONT_UNITS}
    with matplotlib.rc_context(style):
        figure = _figure(title, lines, units, room)
        for index, artist in enumerate(figure.findobj()):
            artist.set_gid(f"{name}-{index}")  # ids that no other figure of the page has
        svg, png = io.StringIO(), io.BytesIO()
        nothing: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nothing, transparent=True)
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    element = svg.getvalue()
    return Curve(name, said, element[element.index("<svg") :], png.getvalue())


def _figure(title: str, lines: list[Line], units: tuple[int, int], room: float) -> "Figure":
    from matplotlib.figure import Figure  # without pyplot, which would choose a backend for windows
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    width, height = units
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # a unit is a point is a pixel
    inner = width - LEFT - room
    axes = figure.add_axes((LEFT / width, 40 / height, inner / width, (height - 74) / height))
    for line in lines:
        style = "--" if line.dashed else "-"
        axes.plot(*thinned(line.steps, line.values), style, color=line.color, linewidth=line.width, alpha=line.opacity,
                  solid_joinstyle="round", clip_on=False, zorder=3, marker=line.marker, markersize=3.5)  # fmt: skip
    finite = [value for line in lines for value in line.values if math.isfinite(value)]
    number = FuncFormatter(lambda value, _: short(value))
    spread = title != "Learning rate" and finite and min(finite) > 0
    if spread and max(finite) / min(finite) > LOG_FROM:
        axes.set_yscale("log")
        title += ", log scale"
        decades = math.log10(max(finite) / min(finite))
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2.5 else (1, 3), numticks=12))
    else:
        least, most = (min(finite), max(finite)) if finite else (0.0, 1.0)
        if not title.startswith("Loss"):  # of which a change shows that is small beside it
            least, most = min(least, 0.0), 1.05 * most or 1.0
        axes.set_ylim(least, max(most, least + 1e-9))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(number)
    axes.set_xlim(0, max(max(line.steps) for line in lines))
    axes.xaxis.set_major_locator(MaxNLocator(6 if width > 500 else 4, integer=True))
    axes.xaxis.set_major_formatter(number)
    axes.set_title(title, loc="left", color=INK, fontsize=FONT_UNITS + 1, x=-LEFT / inner, pad=14)
    axes.set_xlabel("optimizer step", color=MUTED, labelpad=4)
    axes.grid(axis="y", color=RULE, linewidth=0.8, zorder=0)
    axes.tick_params(length=0, colors=MUTED, pad=6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    _label_ends(axes, lines)
    return figure


def _label_ends(axes: Any, lines: list[Line]) -> None:
    """Write each line's label behind its end, pushed apart where two would touch."""
    to_units: Callable[[Any], Any] = axes.transData.transform
    ends = [line for line in lines if line.label and math.isfinite(_last(line.values))]
    x = axes.get_xlim()[1]
    places = sorted((float(to_units((x, _last(line.values)))[1]), line) for line in ends)
    ys = [y for y, _ in places]
    gap = FONT_UNITS + 2.5
    for at in range(1, len(ys)):
        ys[at] = max(ys[at], ys[at - 1] + gap)
    for y, (_, line) in zip(ys, places, strict=True):
        axes.annotate(line.label, (to_units((x, 1.0))[0] + 8, y), xycoords="figure points", color=line.color, va="center")
