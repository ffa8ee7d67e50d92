"""What the data holds before it is trained on: lengths, what is cut or dropped, duplicates, leaks, padding, tokens.

All of it is what training would see: the same reading, encoding, order and packing.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora.commands.options import InspectDataOptions, refuse_below
from qlora.config import TrainConfig
from qlora.data import mistakes
from qlora.data.batch import batched, epoch_rows, rounded, row_length
from qlora.data.dataset import TokenizedDataset, check_files, column_options, encode_files, truncate_or_drop
from qlora.data.formats import BECOMES, Example, SourceSummary, read_examples
from qlora.data.messages import Message
from qlora.data.sources import Source, names_of
from qlora.data.template import IGNORED, PromptTemplate, TokenizedExample, load_template
from qlora.model.demo import model_source
from qlora.model.load import load_meta_model, load_tokenizer
from qlora.run import explain
from qlora.run.files import require_writable, write_file
from qlora.terminal import say

BINS = 12  # of a histogram
BAR = 40  # characters of its longest bar
SHOWN = 5  # pairs of lines, or lines, in the terminal
UNLIMITED = 2**31 - 1  # tokens: all samples are looked at, those that training drops too
GRAPH_MULTIPLE = TrainConfig(compile="graphs").length_multiple


@dataclasses.dataclass(frozen=True)
class Contents:
    """What one source holds; lengths are in tokens, as they are before --max-length acts."""

    source: str
    examples: int
    truncated: int
    dropped: int
    dropped_lines: list[int]
    input_tokens: int  # of what is left
    trained_tokens: int
    shortest: int
    median: float
    mean: float
    percentile_95: int
    longest: int
    histogram: list[tuple[int, int, int]]  # from, to, examples


@dataclasses.dataclass(frozen=True)
class Repeats:
    """Examples that stand elsewhere already: (line, line of the earlier one, or of the training data) of each."""

    exact: list[tuple[int, int]]
    normalized: list[tuple[int, int]]  # equal if case and whitespace are ignored; includes the exact ones


@dataclasses.dataclass(frozen=True)
class Padding:
    """An epoch's rows as they lie in micro-batches, and the share of positions that hold no token."""

    rows: int
    micro_batches: int
    positions: int
    wasted: float
    wasted_with_graphs: float  # where lengths are rounded up to a multiple of 128


# -- contents --------------------------------------------------------------------------------------------------------


def describe(source: str, everything: TokenizedDataset, config: TrainConfig) -> tuple[Contents, TokenizedDataset]:
    """Count a source.

    Args:
        source: its name.
        everything: its samples, whatever their length.
        config: max_length and on_long are read.

    Returns:
        What it holds, and the samples that training keeps, which may be none.
    """
    lengths = everything.lengths
    dropped: list[int] = []
    kept = TokenizedDataset(_kept(everything, config, dropped))
    ordered = sorted(lengths)
    contents = Contents(
        source=source,
        examples=len(lengths),
        truncated=sum(length > config.max_length for length in lengths) - len(dropped),
        dropped=len(dropped),
        dropped_lines=dropped,
        input_tokens=sum(kept.lengths),
        trained_tokens=sum(label != IGNORED for sample in kept for label in sample.labels[1:]),
        shortest=ordered[0],
        median=statistics.median(ordered),
        mean=statistics.fmean(ordered),
        percentile_95=ordered[-(-95 * len(ordered) // 100) - 1],
        longest=ordered[-1],
        histogram=histogram(ordered),
    )
    return contents, kept


def _kept(everything: TokenizedDataset, config: TrainConfig, dropped: list[int]) -> Iterator[TokenizedExample]:
    for sample in everything:
        kept = truncate_or_drop(sample, config)
        if kept is None:
            dropped.append(sample.line)
        else:
            yield kept


def histogram(ordered: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, to, count) of ranges of one width, both ends included, that hold all of the ascending lengths."""
    width = max(-(-(ordered[-1] - ordered[0] + 1) // BINS), 1)
    starts = range(ordered[0], ordered[-1] + 1, width)
    counts = [0] * len(starts)
    for length in ordered:
        counts[(length - ordered[0]) // width] += 1
    return [(start, start + width - 1, count) for start, count in zip(starts, counts, strict=True)]


def refusal(contents: Contents, config: TrainConfig) -> str | None:
    """Why training would not begin with this, or None; as data.encode_all decides."""
    if contents.dropped and config.on_long == "error":
        return "--on-long error, and some are too long"
    if contents.dropped == contents.examples:
        return "none is left"
    more = contents.dropped * 5 > contents.examples and not config.allow_drop
    return "more than a fifth is dropped, and --allow-drop is not given" if more else None


def _normalized(text: str) -> str:
    return " ".join(text.split()).casefold()


def _digest(turns: Iterable[Message], normalize: bool) -> bytes:
    turns = list(turns)  # their number tells whose they are
    texts = [_normalized(turn.content or "") if normalize else turn.content for turn in turns]
    texts += [json.dumps(dict(turn.keys)) for turn in turns if turn.keys]
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()


def duplicates(examples: Iterable[Example]) -> Repeats:
    """Examples of a source that an earlier one equals, prompt and response. It takes 300 bytes of memory an example."""
    first: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})
    found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for example in examples:
        for seen, pairs, normalize in zip(first, found, (False, True), strict=True):
            line = seen.setdefault(_digest(example.messages, normalize), example.line)
            if line != example.line:
                pairs.append((example.line, line))
    return Repeats(*found)


def leaks(train: Iterable[Example], eval_examples: Sequence[Example], prompts_only: bool) -> Repeats:
    """Eval examples that also occur in the training data.

    Args:
        train: read once; nothing of it is kept.
        eval_examples: all of it.
        prompts_only: compare prompts alone, whatever the response.
    """
    digests = [
        [_digest(_compared(example, prompts_only), normalize) for example in eval_examples] for normalize in (False, True)
    ]
    wanted, found = [set(column) for column in digests], [dict[bytes, int](), dict[bytes, int]()]
    for example in train:
        for normalize, (column, lines) in enumerate(zip(wanted, found, strict=True)):
            digest = _digest(_compared(example, prompts_only), bool(normalize))
            if digest in column:
                lines.setdefault(digest, example.line)
    pairs = [
        [(example.line, lines[digest]) for example, digest in zip(eval_examples, column, strict=True) if digest in lines]
        for column, lines in zip(digests, found, strict=True)
    ]
    return Repeats(*pairs)


def _compared(example: Example, prompts_only: bool) -> tuple[Message, ...]:
    return example.prompt if prompts_only else example.messages


def padding(samples: TokenizedDataset, config: TrainConfig) -> Padding:
    """What padding costs in the first epoch, from lengths alone.

    Args:
        samples: at least one.
        config: packing, per_device_train_batch_size, max_length and seed are read.
    """
    rows = [row_length(samples, row) for row in epoch_rows(samples, config, epoch=1)]
    size = config.per_device_train_batch_size
    groups = list(batched(rows, size))
    positions = sum(len(group) * max(group) for group in groups)
    in_graphs = sum(size * rounded(max(group), GRAPH_MULTIPLE) for group in groups)
    return Padding(len(rows), len(groups), positions, 1 - sum(rows) / positions, 1 - sum(rows) / in_graphs)


def spread(samples: TokenizedDataset, count: int) -> list[TokenizedExample]:
    """`count` samples, from the shortest to the longest, evenly by rank."""
    order = sorted(range(len(samples)), key=samples.length)
    count = min(count, len(order))
    return [samples[order[index * (len(order) - 1) // max(count - 1, 1)]] for index in range(count)]


# -- shown -----------------------------------------------------------------------------------------------------------


def columns_table(found: dict[str, SourceSummary]) -> Table:
    """What became of each column of each source."""
    table = Table("", "form", "column", "becomes", title="Columns")
    for name, columns in found.items():
        rows = [
            (
                theirs,
                BECOMES[ours] + (f" (empty in {columns.empty[ours]:,} of {columns.rows:,})" if ours in columns.empty else ""),
            )
            for ours, theirs in columns.used.items()
        ]
        rows += [(f"messages.{key}", f"given to the chat template ({count:,} rows)") for key, count in columns.keys.items()]
        for column, becomes in [*rows, *((column, "ignored") for column in columns.ignored)]:
            table.add_row(name, columns.form, Text(repr(column).strip("'")), becomes)
    return table


def contents_table(contents: dict[str, Contents]) -> Table:
    """Counts and lengths, a column for each source."""
    table = Table(title="Data")
    table.add_column("")
    for name in contents:
        table.add_column(name, justify="right")

    def share(part: int, whole: int) -> str:
        return f"{part:,} ({100 * part / whole:.1f} %)" if whole else "0"

    rows: dict[str, Callable[[Any], str]] = {
        "examples": lambda c: f"{c.examples:,}",
        "truncated": lambda c: share(c.truncated, c.examples),
        "dropped": lambda c: share(c.dropped, c.examples),
        "tokens left": lambda c: f"{c.input_tokens:,}",
        "of them trained": lambda c: share(c.trained_tokens, c.input_tokens),
        "shortest": lambda c: f"{c.shortest:,}",
        "median": lambda c: f"{c.median:,.0f}",
        "mean": lambda c: f"{c.mean:,.1f}",
        "95 % are within": lambda c: f"{c.percentile_95:,}",
        "longest": lambda c: f"{c.longest:,}",
    }
    for label, shown in rows.items():
        table.add_row(label, *(shown(column) for column in contents.values()))
    table.caption = "lengths in tokens, before --max-length acts"
    return table


def histogram_text(contents: Contents, max_length: int) -> Text:
    """Lengths as bars; those that lie beyond --max-length are red."""
    most = max(count for _, _, count in contents.histogram)
    width = len(f"{contents.longest:,}")
    text = Text()
    for start, end, count in contents.histogram:
        bar = "\u2588" * (-(-count * BAR // most))
        text.append(f"{start:>{width},} to {end:>{width},}  ").append(bar, "red" if start > max_length else "cyan")
        text.append(f" {count:,}{'  --max-length is in here' if start <= max_length < end else ''}\n")
    return text


def repeats_line(what: str, found: list[tuple[int, int]], total: int, own: Source, others: Source) -> str:
    """How many repeat, and the first few lines; `others` is the source of the second line of each pair."""
    pairs = ", ".join(f"{own.line(line)} = {others.line(other)}" for line, other in found[:SHOWN]) + (
        ", ..." if len(found) > SHOWN else ""
    )
    return f"{what}: {len(found):,} of {total:,}" + (f" (lines {pairs})" if found else "")


def padding_table(found: dict[str, Padding], packing: bool) -> Table:
    """Padding with and without packing; `packing` is what was asked for."""
    table = Table("rows", title="Padding in an epoch")
    for header in ("count", "micro-batches", "positions", "padding", "in graphs"):
        table.add_column(header, justify="right")
    for name, row in found.items():
        counts = (f"{value:,}" for value in (row.rows, row.micro_batches, row.positions))
        asked = " *" if name == ("packed" if packing else "single samples") else ""
        table.add_row(name + asked, *counts, f"{100 * row.wasted:.1f} %", f"{100 * row.wasted_with_graphs:.1f} %")
    table.caption = f"* as asked. CUDA graphs pad rows to a multiple of {GRAPH_MULTIPLE} tokens, and the last batch."
    return table


# -- the command -----------------------------------------------------------------------------------------------------


def run(options: InspectDataOptions) -> int:
    """Inspect the data and show what was found; see InspectDataOptions.

    Returns:
        0, whatever is found.

    Raises:
        UserError: as training, but that any share of examples may be longer than --max-length.
    """
    refuse_below(0, options, "examples")
    if options.json is not None:
        require_writable(options.json, *names_of(options.train_file), *names_of(options.eval_file))
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    chosen: dict[str, Any] = {name: value for name, value in vars(options).items() if name in names}
    config = TrainConfig(**chosen)
    config.check()
    config, line = config.resolved(on_gpu=torch.cuda.is_available())
    console = Console()
    say(console, line)
    columns = check_files(config)
    source = model_source(str(config.model))
    meta_model = load_meta_model(source, config)
    template = load_template(load_tokenizer(source, meta_model, config), config.prompt_format)
    unlimited = dataclasses.replace(config, max_length=UNLIMITED)
    encoded = encode_files(unlimited, columns, template, console)
    contents, kept = {}, {}
    sources: dict[str, Source] = {}
    for name, everything in zip(("train", "eval"), encoded, strict=True):
        if everything is not None and everything.source is not None:  # which encode_files has set
            sources[name] = everything.source
            contents[name], kept[name] = describe(str(everything.source), everything, config)
    inspection = {"config": config.plain(), "data": contents, "padding": {}}
    eval_examples = [*read_examples(config.eval_file, "test", column_options(config))] if config.eval_file else None
    by_name = dict(zip(("train", "eval"), encoded, strict=True))
    inspection["repeats"] = _repeats(config, eval_examples)
    inspection["mistakes"] = _mistakes(config, template, by_name, kept, eval_examples)
    found_columns = dict(zip(contents, columns, strict=True))
    inspection["columns"] = {name: found._asdict() for name, found in found_columns.items()}
    for name, packing in (("single samples", False), ("packed", True)):
        if kept["train"]:
            inspection["padding"][name] = padding(kept["train"], dataclasses.replace(config, packing=packing))
    console.print(columns_table(found_columns))
    _show(inspection, config, console, sources)
    for sample in spread(kept["train"], options.examples):
        rows = explain.tokens(sample, template.tokenizer)
        trained = sum(token.trained for token in rows)
        line = sources["train"].line(sample.line)
        say(console, f"\nLine {line}, {len(rows)} tokens, {trained} trained (green, in double brackets):")
        console.print(explain.token_text(rows, bars=options.tokens))
    if options.json is not None:
        write_file(options.json, json.dumps(inspection, indent=1, default=dataclasses.asdict).encode())
        say(console, f"Written to {options.json}")
    return 0


def _repeats(config: TrainConfig, eval_examples: list[Example] | None) -> dict[str, Repeats]:
    """Duplicates in each source and, if there is eval data, its leaks."""
    train = config.train_file
    assert train is not None  # as resolved
    options = column_options(config)
    found = {"duplicates in train": duplicates(read_examples(train, "train", options))}
    if eval_examples is not None:
        found["duplicates in eval"] = duplicates(eval_examples)
        for what, prompts_only in (("prompt and response", False), ("prompt", True)):
            found[f"eval {what} in train"] = leaks(read_examples(train, "train", options), eval_examples, prompts_only)
    return found


def _mistakes(
    config: TrainConfig,
    template: PromptTemplate,
    encoded: dict[str, TokenizedDataset | None],
    kept: dict[str, TokenizedDataset],
    eval_examples: list[Example] | None,
) -> dict[str, list[mistakes.Finding]]:
    """What is probably not meant, in each source."""
    train = config.train_file
    assert train is not None  # as resolved
    read = functools.partial(read_examples, options=column_options(config))
    found = {"train": mistakes.in_examples(read(train, "train"), template)}
    if eval_examples is not None:
        found["eval"] = mistakes.in_examples(eval_examples, template) + mistakes.shared_text(
            read(train, "train"), eval_examples
        )
    for name, findings in found.items():
        findings += mistakes.without_stop(encoded[name] or [], kept[name])
    return found


def mistake_lines(
    found: dict[str, list[mistakes.Finding]], totals: dict[str, int], sources: dict[str, Source]
) -> Iterator[str]:
    """What is probably not meant, where, and what to do about it; `totals` are the examples of each source."""
    for name, findings in found.items():
        for finding in findings:
            lines = ", ".join(map(sources[name].line, finding.lines[:SHOWN])) + (", ..." if finding.examples > SHOWN else "")
            yield f"{name}: {finding.what}: {finding.examples:,} of {totals[name]:,} (lines {lines})"
            yield f"  {finding.advice}"


def _show(inspection: dict[str, Any], config: TrainConfig, console: Console, sources: dict[str, Source]) -> None:
    contents: dict[str, Contents] = inspection["data"]
    console.print(contents_table(contents))
    for name, found in contents.items():
        console.print(f"Lengths, {name}:", histogram_text(found, config.max_length), sep="\n", end="")
        if found.dropped:
            lines = ", ".join(map(sources[name].line, itertools.islice(found.dropped_lines, SHOWN)))
            say(console, f"Dropped of {name}: lines {lines}{', ...' if found.dropped > SHOWN else ''}")
        if why := refusal(found, config):
            say(console, f"Training would refuse {name}: {why}. Raise --max-length.")
    for what, repeats in inspection["repeats"].items():
        own = "train" if what.endswith("s in train") else "eval"
        places = sources[own], sources["train" if what.endswith("in train") else "eval"]
        total = contents[own].examples
        say(console, repeats_line(what, repeats.exact, total, *places))
        if len(repeats.normalized) > len(repeats.exact):
            say(console, repeats_line("  ignoring case and whitespace", repeats.normalized, total, *places))
    totals = {name: found.examples for name, found in contents.items()}
    found_mistakes = list(mistake_lines(inspection["mistakes"], totals, sources))
    for mistake in ["Probably not meant:", *found_mistakes] if found_mistakes else ["No common mistake was found."]:
        say(console, mistake)
    if inspection["padding"]:
        console.print(padding_table(inspection["padding"], config.packing))
