"""All examples of a run, tokenized: what is cut or dropped, and a dataset that may be larger than memory."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import mmap
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, overload

from rich.console import Console
from rich.progress import Progress

from qlora import terminal
from qlora.config import TrainConfig
from qlora.data import token_cache
from qlora.data.formats import ColumnOptions, Example, SourceSummary, check_source, read_examples
from qlora.data.messages import TEXT
from qlora.data.parallel import map_in_order, num_cores
from qlora.data.read import LISTED
from qlora.data.sources import Source, lines_of, place_of
from qlora.data.template import IGNORED, CannotRender, PromptTemplate, TokenizedExample, encode
from qlora.errors import CheckpointError, DataError
from qlora.validation import UNREADABLE

CHUNK = 200  # examples that a process tokenizes at once
MANY = 2000  # examples from which on it pays to use all cores, a progress bar and a cache: half a second on one core

# -- the samples of a run --------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Samples as they are kept: int32 ids, then as many labels, of one after the other."""

    numbers: bytes | memoryview
    lengths: list[int]  # how many ids each has
    lines: list[int]


class TokenizedDataset(Sequence[TokenizedExample]):
    """Encoded examples, in a file that is mapped into memory: there may be more of them than memory holds.

    The file is temporary, has no name and goes with the process, or it is one of the cache. It holds `Rows.numbers`.

    Raises:
        CheckpointError: if the temporary folder has no room for them.
    """

    def __init__(self, encoded: Iterable[TokenizedExample]):
        self._fill(rows_of([sample]) for sample in encoded)

    @classmethod
    def of_rows(cls, parts: Iterable[Rows]) -> "TokenizedDataset":
        """The samples of all parts, in order."""
        samples = cls.__new__(cls)
        samples._fill(parts)
        return samples

    def _fill(self, parts: Iterable[Rows]) -> None:
        self._begin()
        # What goes wrong with the examples themselves is no OSError.
        with _room_needed(), tempfile.TemporaryFile() as file:
            for part in parts:
                file.write(part.numbers)
                self._add(part)
            file.flush()
            self._map(file, self._ends)

    def _begin(self) -> None:
        self._ends = array("q")  # of each sample, counted in ids from the first sample on
        self._lines = array("q")
        self._numbers = memoryview(b"")
        self._digest = hashlib.sha256()
        self.counts: dict[str, int] = {}  # what encode_all and encode_files have counted, for run.json
        self.source: Source | None = None  # names the lines of several files; set by encode_files

    def _add(self, part: Rows) -> None:
        numbers, start = memoryview(part.numbers), 0
        end = self._ends[-1] if self._ends else 0
        for length in part.lengths:
            size = 2 * 4 * length  # bytes of int32 ids and labels
            self._digest.update(size.to_bytes(8, "little"))
            self._digest.update(numbers[start : start + size])
            start += size
            end += length
            self._ends.append(end)
        self._lines.extend(part.lines)

    def _map(self, file: BinaryIO, samples: Sequence[int]) -> None:
        if samples:  # an empty file cannot be mapped
            self._numbers = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast("i")

    @property
    def sha256(self) -> str:
        """Of all ids and labels, in order."""
        return self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        at = range(len(self))[index]  # as a list has it: from the end when negative, an IndexError behind it
        if isinstance(at, range):
            return [self[one] for one in at]
        length = self.length(at)
        start = 2 * (self._ends[at] - length)
        ids, labels = self._numbers[start : start + length], self._numbers[start + length : start + 2 * length]
        return TokenizedExample(ids.tolist(), labels.tolist(), self._lines[at])

    @property
    def longest(self) -> int:
        """The most ids that a sample has."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """How many ids each has."""
        return [self.length(index) for index in range(len(self))]

    def length(self, index: int) -> int:
        """How many ids a sample has, without reading them."""
        at = range(len(self))[index]
        return self._ends[at] - (self._ends[at - 1] if at else 0)

    def ids_sha256(self, index: int) -> bytes:
        """Digest of the ids of a sample."""
        start = 2 * (self._ends[index] - self.length(index))
        return hashlib.sha256(self._numbers[start : start + self.length(index)]).digest()

    # -- the cache --

    def save(self, entry: Path, tally: "Tally") -> None:
        """Keep the samples as an entry of the cache.

        Raises:
            OSError: if the cache cannot be written.
        """
        index = {"lengths": self.lengths, "lines": self._lines.tolist(), "sha256": self.sha256}
        token_cache.write(entry, self._numbers, {**index, "tally": dataclasses.asdict(tally)})

    @classmethod
    def load(cls, entry: Path) -> "tuple[TokenizedDataset, Tally] | None":
        """The samples of an entry of the cache, and what was counted; None if it is not there, or damaged."""
        with contextlib.suppress(*UNREADABLE, LookupError):
            index = token_cache.read_index(entry)
            samples = cls.__new__(cls)
            samples._begin()
            with token_cache.numbers_of(entry).open("rb") as file:
                samples._map(file, index["lengths"])
            samples._add(Rows(samples._numbers.cast("B"), index["lengths"], index["lines"]))
            tally = Tally(**index["tally"])
            if samples.sha256 == index["sha256"] and len(samples._numbers) == 2 * samples._ends[-1]:
                return samples, tally
        return None


@contextlib.contextmanager
def _room_needed() -> Iterator[None]:
    """A block that writes to the temporary folder."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"The temporary folder ({tempfile.tempdir}) is full or cannot be written, so that encoded samples have no "
            f"place: {error.strerror}.",
            hint="Free space there, or set TMPDIR to a folder on a larger disk.",
        ) from None


def rows_of(encoded: Iterable[TokenizedExample]) -> Rows:
    """Samples as they are kept."""
    numbers, lengths, lines = array("i"), list[int](), list[int]()
    for sample in encoded:
        numbers.extend(sample.input_ids)
        numbers.extend(sample.labels)
        lengths.append(len(sample.input_ids))
        lines.append(sample.line)
    return Rows(numbers.tobytes(), lengths, lines)


# -- encoding --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tally:
    """What encode_all tells about the examples it has seen."""

    seen: int = 0
    tokens: int = 0
    longest: int = 0
    truncated: int = 0
    special: int = 0
    special_text: str = ""
    masked: int = 0
    dropped: int = 0
    dropped_lines: list[int] = dataclasses.field(default_factory=list)  # the first few

    def drop(self, line: int) -> None:
        """Count one that is left out."""
        self.dropped += 1
        if len(self.dropped_lines) <= LISTED:
            self.dropped_lines.append(line)

    def keep(self, encoded: TokenizedExample, special_text: str) -> None:
        """Count one that is trained on; `special_text` is that of a special token in its messages, if there is one."""
        self.tokens += sum(label != IGNORED for label in encoded.labels[1:])
        self.longest = max(self.longest, len(encoded.input_ids))
        self.special += bool(special_text)
        self.special_text = self.special_text or special_text

    def add(self, other: "Tally") -> None:
        """Add the counts of `other`, which come after these."""
        for name in ("seen", "tokens", "truncated", "special", "masked", "dropped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.special_text = self.special_text or other.special_text
        self.dropped_lines = [*self.dropped_lines, *other.dropped_lines][: LISTED + 1]


class _Part(NamedTuple):
    """What a process makes of a chunk of examples."""

    rows: Rows
    tally: Tally
    refused: tuple[int, str, str] | None  # number of a row that cannot be used, what is wrong with it, and a hint


def encode_all(
    examples: Iterable[Example],
    source: str | Path | Source,
    template: PromptTemplate,
    config: TrainConfig,
    entry: Path | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[TokenizedDataset, str]:
    """Encode examples, many on all cores, and deal with those longer than `config.max_length`.

    Args:
        examples: read as they are needed.
        source: of the examples, for messages.
        template: prompt format and tokenizer.
        config: max_length, on_long, allow_drop and loss_on are read.
        entry: of the cache: read if it is there, else written.
        advance: called with the number of examples that were encoded since.

    Returns:
        The samples, each with at least one token to train on; and a line that counts them and names what was left out.

    Raises:
        DataError: if none is left, if more than a fifth is dropped without `--allow-drop`, if one is too long under
            `--on-long error`, or the chat template fails on one. Exit 4 if the temporary folder is full.
    """
    samples, tally, from_where = _encoded(examples, functools.partial(_encode_part, template, config), source, entry, advance)
    limit = f"--max-length {config.max_length}"
    cut = "" if config.on_long == "truncate" else "use --on-long truncate, "
    if not samples:
        advice = "Raise it, or use --on-long truncate." if cut else "Raise it: their prompts alone are longer."
        raise DataError(f"{source}: none of {tally.seen} examples fits {limit}. {advice}")
    lines = f"({lines_of(source, tally.dropped_lines)})"
    if tally.dropped * 5 > tally.seen and not config.allow_drop:
        raise DataError(
            f"{source}: {tally.dropped} of {tally.seen} examples, more than a fifth, do not fit {limit} {lines}.",
            hint=f"Give a larger --max-length, {cut}or drop them with --allow-drop.",
        )
    lengths = sorted(map(samples.length, range(len(samples))))
    samples.counts = {"read": tally.seen, "examples": len(samples), "tokens": tally.tokens, "input_tokens": sum(lengths)}
    samples.counts |= {"shortest": lengths[0], "median": lengths[len(lengths) // 2], "longest": lengths[-1]}
    samples.counts |= {"cut": tally.truncated, "dropped": tally.dropped}
    notes = f"{len(samples)} examples, {tally.tokens:,} tokens to train on, the longest of {tally.longest}"
    if tally.truncated:
        notes += f"; {tally.truncated} cut to {config.max_length}"
    if tally.dropped:
        notes += f"; {tally.dropped} dropped as longer than {config.max_length} {lines}"
    if tally.masked:
        notes += f"; {tally.masked} answers not trained, by weight, train or as part of a prompt"
    if tally.special:
        notes += f"; {tally.special} hold special tokens such as {tally.special_text} in their text, encoded as plain text"
    return samples, notes + from_where


def _encoded(
    examples: Iterable[Example],
    encode_part: Callable[[list[Example]], _Part],
    source: str | Path | Source,
    entry: Path | None,
    advance: Callable[[int], object],
) -> tuple[TokenizedDataset, Tally, str]:
    """The samples, what was counted, and a note if the cache has a part in it."""
    if entry is not None and (found := TokenizedDataset.load(entry)):
        with contextlib.suppress(OSError):  # a cache of another user, or an entry that was just removed
            token_cache.touch(entry)
        return *found, f"; tokenized before, from {entry}"
    tally = Tally()
    reading = iter(examples)
    first = list(itertools.islice(reading, MANY))
    reading = itertools.chain(first, reading)
    chunks = iter(lambda: list(itertools.islice(reading, CHUNK)), [])

    def parts() -> Iterator[Rows]:
        for part in map_in_order(encode_part, chunks, num_cores() if len(first) == MANY else 1):
            if part.refused:
                line, text, hint = part.refused
                raise DataError(f"{place_of(source, line)}: {text}", hint=hint)
            tally.add(part.tally)
            advance(part.tally.seen)
            yield part.rows

    samples = TokenizedDataset.of_rows(parts())
    note = ""
    if entry is not None and samples:
        try:
            samples.save(entry, tally)
        except OSError as error:
            note = f"; not kept in {entry.parent}: {error.strerror or error}"
    return samples, tally, note


class _Refused(Exception):
    """A row that cannot be used. Only the parent knows which file it is of."""

    def __init__(self, number: int, text: str, hint: str = ""):
        """Keep the three apart; see _Part.refused."""
        super().__init__(number, text, hint)


def _encode_part(template: PromptTemplate, config: TrainConfig, examples: list[Example]) -> _Part:
    tally = Tally()
    kept: list[TokenizedExample] = []
    refused = None
    try:
        kept.extend(_fitting(examples, template, config, tally))
    except _Refused as error:
        refused = error.args
    return _Part(rows_of(kept), tally, refused)


def _fitting(
    examples: Iterable[Example], template: PromptTemplate, config: TrainConfig, tally: Tally
) -> Iterator[TokenizedExample]:
    for example in examples:
        tally.seen += 1
        try:
            encoded = encode(example, template, config.loss_on)
        except CannotRender as error:
            raise _Refused(example.line, f"{error}.", error.hint) from None
        if not any(label != IGNORED for label in encoded.labels[1:]):  # the first id is never predicted
            raise _Refused(example.line, "Its text is a single token, of which nothing can be predicted.", "Remove the row.")
        length = len(encoded.input_ids)
        if length > config.max_length and config.on_long == "error":
            raise _Refused(example.line, f"{length} tokens, more than --max-length {config.max_length}.")
        kept = truncate_or_drop(encoded, config)
        if kept is None:
            tally.drop(example.line)
            continue
        tally.truncated += kept is not encoded
        tally.masked += sum(not message.trained for message in example.messages)
        tally.keep(kept, _special_text(example, template))
        yield kept


def _special_text(example: Example, template: PromptTemplate) -> str:
    """The first special token that the example has in its text; those of a rendered text are real, and none of this kind."""
    if example.messages[0].role == TEXT:
        return ""
    texts = (f"{message.content}{message.keys or ''}" for message in example.messages)
    found = next(filter(None, map(template.special.search, texts)), None)
    return found[0] if found else ""


def truncate_or_drop(encoded: TokenizedExample, config: TrainConfig) -> TokenizedExample | None:
    """The sample; cut to `config.max_length` if it is longer and is to be cut; None if it cannot be used."""
    if len(encoded.input_ids) <= config.max_length:
        return encoded
    cut = TokenizedExample(encoded.input_ids[: config.max_length], encoded.labels[: config.max_length], encoded.line)
    return cut if config.on_long == "truncate" and any(label != IGNORED for label in cut.labels[1:]) else None


def count_shared(samples: TokenizedDataset, eval_set: TokenizedDataset) -> int:
    """How many eval samples have the very ids of a training sample; memory for the eval side alone."""
    wanted = [eval_set.ids_sha256(index) for index in range(len(eval_set))]
    distinct = set(wanted)
    shared = {digest for index in range(len(samples)) if (digest := samples.ids_sha256(index)) in distinct}
    return sum(digest in shared for digest in wanted)


def column_options(config: TrainConfig) -> ColumnOptions:
    """--columns and --ignore-columns.

    Raises:
        ConfigError: if one of them cannot be used.
    """
    return ColumnOptions.parse(config.columns, config.ignore_columns)


def check_files(config: TrainConfig) -> list[SourceSummary]:
    """Read all data once and keep nothing but the columns found: a mistake in a last line should not cost a download.

    Raises:
        UserError: as check_source does; exit 2 if --columns cannot be used.
    """
    options = column_options(config)
    return [check_source(source, split, options) for source, split, _ in sources_of(config)]


def encode_files(
    config: TrainConfig, columns: list[SourceSummary], template: PromptTemplate, console: Console
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """The training data and, if there is any, the eval data, with a line about each, and a progress bar where they are many.

    Raises:
        DataError: as encode_all does.
    """
    sets = []
    for (source, split, name), found in zip(sources_of(config), columns, strict=True):
        examples = _unchanged(read_examples(source, split, column_options(config)), source, found.sha256)
        is_small = found.rows < MANY
        entry = None if is_small else token_cache.entry(found.sha256, template, config)
        with Progress(console=console, transient=True, disable=is_small or not console.is_terminal) as progress:
            advance = functools.partial(progress.advance, progress.add_task("Tokenizing", total=found.rows))
            encoded, notes = encode_all(examples, source, template, config, entry, advance)
        encoded.source = source
        terminal.say(console, f"{name}: {notes}; form {found}{source.count}")
        sets.append(encoded)
    samples, eval_set = sets[0], sets[1] if len(sets) > 1 else None
    if eval_set and (shared := count_shared(samples, eval_set)):
        eval_set.counts["shared"] = shared
        terminal.say(console, f"Warning: {shared} of {len(eval_set)} eval examples also occur in the training data.")
    return samples, eval_set


def _unchanged(examples: Iterable[Example], source: Source, sha256: str) -> Iterator[Example]:
    """The examples, which must be those that were checked: the cache knows them by that digest."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode())
        yield example
    if digest.hexdigest() != sha256:
        raise DataError(f"{source} changed while it was read.", hint="Run it again.")


def sources_of(config: TrainConfig) -> list[tuple[Source, str, str]]:
    """(source, its default split, name in the log) of the training data and, if there is any, the eval data.

    Raises:
        DataError: as Source does.
    """
    assert config.train_file is not None  # as resolved
    eval_set = [(Source(config.eval_file, "test"), "test", "Eval")] if config.eval_file else []
    return [(Source(config.train_file, "train"), "train", "Data"), *eval_set]


def first_examples(
    config: TrainConfig, samples: TokenizedDataset, eval_set: TokenizedDataset | None, count: int
) -> list[Example]:
    """The first `count` examples of the eval data, or of the training data if there is none; none of rows that are one text."""
    source, split, _ = sources_of(config)[-1]
    found = kept_examples(read_examples(source, split, column_options(config)), eval_set or samples, count)
    return [example for example in found if example.prompt]


def kept_examples(examples: Iterable[Example], samples: Sequence[TokenizedExample], count: int) -> list[Example]:
    """The first `count` examples that encode_all kept; the rest is not read."""
    lines = {sample.line for sample in samples[:count]}
    return list(itertools.islice((example for example in examples if example.line in lines), len(lines)))
