"""report.html of a run: one file that needs nothing else, with plots/*.png and the model card beside it."""

import statistics
from pathlib import Path
from typing import Any

import jinja2

from qlora.config import TrainConfig
from qlora.errors import UserError
from qlora.eval import scores
from qlora.report import plots
from qlora.report.caveats import caveats
from qlora.report.model_card import base_of, data_name, model_card
from qlora.report.record import Record, read
from qlora.run.files import cannot_write, write_file
from qlora.run.folder import FINISHED
from qlora.run.schema import Environment, Evaluation
from qlora.terminal import redact

TEMPLATE = Path(__file__).parent / "templates" / "report.html.jinja"
STATUS = {
    "finished": "",
    "going": "This run is still going: what follows is its state at the moment this report was made.",
    "stopped": "This run has not ended: it stopped, and the same command resumes it. The page shows the progress so far.",
}
LONGEST_HEADING = 160  # characters of a prompt that stands as a heading
PLACES = ("output_dir", "train_file", "eval_file")  # options that each run sets, so that they are never worth a mark


def when_complete(folder: Path) -> str:
    """What the command of a run that is complete tells; it draws the report if an interruption left none."""
    line = f"{folder} holds this run, and it is complete."
    path = folder / "report.html"
    if not path.exists():
        return f"{line} Its report was missing: {after_training(folder)}"
    if path.stat().st_mtime_ns < (folder / FINISHED).stat().st_mtime_ns:  # of a run that had not ended, or was extended since
        return f"{line} Its report was older: {after_training(folder)}"
    return f"{line} Nothing was done."


def after_training(folder: Path) -> str:
    """Write model card, report and plots of a run that has just been marked as finished.

    The run is whole without them. So what the machine may lack (matplotlib, room on the disk) does not make a failure of it:
    a line says so, with the command that writes the report. A bug in this program is not hidden.

    Returns:
        Where the report is, or why there is none.
    """
    try:
        record = read(folder)
        if not (folder / "adapter" / "README.md").exists():  # a user may have edited it
            write_card(record)
        return str(write(record))
    except (ImportError, OSError, ValueError, UserError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        return f"none, as it could not be written: {why}. The run is complete; python -m qlora report {folder} tries again."


def write(record: Record) -> Path:
    """Write report.html and plots/*.png into the folder of a run, each whole or not at all; nothing else in it changes.

    Raises:
        CheckpointError: if they cannot be written.
    """
    curves = plots.draw(record)
    if curves:
        plotted = record.folder / "plots"
        try:
            plotted.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(plotted, 0, error) from error
        for curve in (curve for curve in curves if curve.name != "loss-narrow"):
            write_file(plotted / f"{curve.name}.png", curve.png)
    path = record.folder / "report.html"
    write_file(path, html(record, curves).encode(errors="replace"))  # a command line may hold what is no UTF-8
    return path


def write_card(record: Record) -> None:
    """Write adapter/README.md, the model card of a finished run."""
    write_file(record.folder / "adapter" / "README.md", model_card(record).encode(errors="replace"))


def html(record: Record, curves: list[plots.Curve]) -> str:
    """The report as one HTML document: no script, no outside address, colors for light and dark.

    Args:
        record: of a run in any state.
        curves: as plots.draw gives them.
    """
    config = record.config
    train, eval_counts = record.counts
    defaults = TrainConfig().plain()
    rows = [(name, _plain(value), value != defaults.get(name) and name not in PLACES) for name, value in config.items()]
    raw = 2 * plots.reach(len(record.steps)) + 1
    values = {
        "title": f"{base_of(record).name} fine-tuned on {data_name(config['train_file'])}",
        "folder": record.folder.name,
        "note": STATUS[record.status],
        "status": record.status,
        "headline": _headline(record),
        "curves": {curve.name: curve for curve in curves},
        "smoothing": raw,
        "samples": record.samples,
        "longest_heading": LONGEST_HEADING,
        "of": "eval" if record.eval_data else "training",
        "evaluations": _evaluations(record),
        "eval_tokens": f"{record.evaluations[-1]['num_tokens']:,}" if record.evaluations else "",
        "compared": _compared(record.evaluation),
        "compared_on": _compared_on(record),
        "compared_few": record.evaluation is not None and record.evaluation.num_examples < scores.FEWEST,
        "compared_another": record.evaluation_of_another,
        "fewest": scores.FEWEST,
        "caveats": caveats(record),
        "data": _data(record, train, eval_counts),
        "memory": _memory(record),
        "memory_terms": _memory_terms(record),
        "on_gpu": record.on_gpu(),
        "environment": _environment(record.environment),
        "changed": [(name, value) for name, value, marked in rows if marked],
        "config": [(name, value) for name, value, _ in rows],
        "history": record.run_info.history if record.run_info else [],
        "colors": plots.COLORS,
    }
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a value that is missing is an error, never an empty place
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return redact(environment.from_string(TEMPLATE.read_text()).render(values))


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _headline(record: Record) -> list[tuple[str, str, str]]:
    """Label, value and remark of the few numbers that a reader needs first."""
    steps, evaluations = record.steps, record.evaluations
    found = []
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        remark = f"perplexity {first['perplexity']:.3f} \N{RIGHTWARDS ARROW} {last['perplexity']:.3f}"
        found.append(("Eval loss", f"{first['eval_loss']:.3f} \N{RIGHTWARDS ARROW} {last['eval_loss']:.3f}", remark))
    if not steps:
        return found
    loss = [value for value in record.curve("loss") if value == value]
    if loss:
        found.append(("Training loss", f"{loss[0]:.3f} \N{RIGHTWARDS ARROW} {loss[-1]:.4f}", "first and last step"))
    total = f" of {record.total_steps:,}" if record.total_steps else ""
    found.append(("Steps", f"{record.last_step:,}{total}", f"up to epoch {steps[-1]['epoch']}"))
    tokens = sum(row.get("num_tokens", 0) for row in steps)
    found.append(("Tokens trained on", f"{tokens:,}", "those that carry the loss"))
    if speed := [value for value in record.curve("tokens_per_s") if value == value]:
        found.append(("Speed", f"{statistics.median(speed):,.0f} tokens/s", "input tokens, median"))
    if (peak := record.peak_memory_gb()) is not None:
        found.append(("Peak memory", f"{peak:.2f} GB", "of the GPU" if record.on_gpu() else "of the process"))
    if trained := record.trained_parameters:
        total_parameters = record.run_info.parameters if record.run_info else None
        share = f"{100 * trained / (total_parameters + trained):.2f} % of the model" if total_parameters else "the adapter"
        found.append(("Trained parameters", f"{trained:,}", share))
    return found


def _evaluations(record: Record) -> list[tuple[str, ...]]:
    """When, step, loss and perplexity of the first, the best and the last evaluation."""
    evaluations = record.evaluations
    if not evaluations:
        return []
    best, last = min(evaluations, key=lambda row: row["eval_loss"]), evaluations[-1]
    start = "before training" + (", from the adapter given" if record.config["init_adapter"] else "")
    rows = [(start if evaluations[0]["step"] == 0 else "first", evaluations[0])]
    if len(evaluations) > 1:
        chosen = " (adapter/)" if record.adapter_step == best["step"] != last["step"] else ""
        rows += [(f"lowest loss{chosen}", best), ("at the end" if record.status == "finished" else "last so far", last)]
    return [(name, f"{row['step']:,}", f"{row['eval_loss']:.4f}", f"{row['perplexity']:.3f}") for name, row in rows]


def _compared(evaluation: Evaluation | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """Metric, and value and interval of base, adapter and their difference, as python -m qlora evaluate has them."""
    rows = []
    for name, (label, _, _) in scores.SHOWN.items():
        if evaluation is not None and (found := evaluation.metrics.get(name)):
            sides = (found.base, found.adapter, found.difference)
            estimates = [scores.Estimate(side.value, side.low, side.high) for side in sides]
            rows.append((label, [scores.shown(estimate, name) for estimate in estimates]))
    return rows


def _compared_on(record: Record) -> str:
    """What that comparison was made on."""
    if record.evaluation is None:
        return ""
    same = record.evaluation.eval_data_sha256 == record.eval_data
    which = "eval examples" if same else "examples that are not this run's eval data, or not all of it"
    return f"{record.evaluation.num_examples:,} {which}"


def _data(record: Record, train: dict[str, int], eval_counts: dict[str, int]) -> list[tuple[str, str, str]]:
    """Name, and value for the training and the eval data."""
    seen = record.times_seen
    rows = [("source", data_name(record.config["train_file"]), data_name(record.config["eval_file"]))]
    for name, key in (
        ("examples read", "read"),
        ("left out as too long", "dropped"),
        ("cut", "cut"),
        ("examples used", "examples"),
        ("tokens that carry the loss", "tokens"),
        ("input tokens", "input_tokens"),
        ("tokens in the shortest example", "shortest"),
        ("in the median one", "median"),
        ("in the longest", "longest"),
    ):
        if key in train:
            rows.append((name, f"{train[key]:,}", f"{eval_counts[key]:,}" if key in eval_counts else ""))
    if eval_counts.get("shared"):
        rows.append(("of them in the training data too", "", f"{eval_counts['shared']:,}"))
    if seen:
        least, most = min(seen.values()), max(seen.values())
        rows.append(("examples trained on", f"{len(seen):,}", ""))
        rows.append(("times each was seen", f"{least:,}" if least == most else f"{least:,} to {most:,}", ""))
    digests = [str(digest or "")[:8] for digest in (record.run_info and record.run_info.data, record.eval_data)]
    return [*rows, ("SHA-256 of the encoded data", *digests)] if any(digests) else rows  # type: ignore[list-item]


def _memory(record: Record) -> list[tuple[str, str]]:
    """Name and value of peaks, predicted and measured."""
    predicted, measured = record.predicted_gb, record.peak_memory_gb()
    rows = [("predicted for a GPU", f"{predicted:.2f} GB")] if predicted else []
    rows += [("measured", f"{measured:.2f} GB")] if measured is not None else []
    if record.environment and record.environment.device_memory_gb is not None:
        if predicted and measured:
            rows.append(("predicted over measured", f"{100 * (predicted / measured - 1):+.1f} %"))
        rows.append(("the GPU has", f"{record.environment.device_memory_gb:.2f} GB"))
    return rows


def _memory_terms(record: Record) -> list[tuple[str, str]]:
    """Name and size of each nonzero term of the predicted memory; older runs did not keep them."""
    terms_gb = (record.run_info and record.run_info.predicted_terms_gb) or {}
    return [(name, f"{size:.3f} GB") for name, size in terms_gb.items() if size]


def _environment(environment: Environment | None) -> list[tuple[str, str]]:
    """Name and value; packages each in a row, as they are what one compares."""
    if environment is None:
        return []
    names = {"device": "hardware", "cuda": "CUDA", "python": "Python", "platform": "platform", "commit": "commit of the code"}
    rows = [(name, str(value)) for key, name in names.items() if (value := getattr(environment, key))]
    rows += [(name, version or "not installed") for name, version in environment.packages.items()]
    return [*rows, ("command", " ".join(environment.command))] if environment.command else rows
