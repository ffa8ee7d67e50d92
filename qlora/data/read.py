"""From a file or a hub dataset to rows: JSONL, Parquet, plain text, with file and line in every error."""

import functools
import itertools
import json
import reprlib
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from qlora.errors import DataError

LINE_LIMIT = 10_000_000  # bytes; a file without a newline must not be read whole to be refused
LISTED = 10  # names or lines that a message lists at most
FOREIGN = {
    b"\x1f\x8b": "is packed with gzip. Unpack it first",
    b"\xff\xfe": "is UTF-16. Save it as UTF-8",
    b"\xfe\xff": "is UTF-16. Save it as UTF-8",
    b"PAR1": "is Parquet. Let its name end in .parquet",
}


def listed(items: Iterable[object]) -> str:
    """The first few, each shortened and as repr writes it, so that nothing in a file can drive the terminal."""
    first = list(itertools.islice(items, LISTED + 1))
    names = [reprlib.repr(item).strip("'\"") for item in first[:LISTED]]
    return ", ".join([*names, "..."] if len(first) > LISTED else names)


def file_rows(path: Path, is_text: bool = False) -> Iterator[tuple[int, object]]:
    """Line number and value of each row of a JSONL or Parquet file, or the lines of a text.

    Raises:
        DataError: naming file and line.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"{path} is a folder.", hint="Give one JSONL or Parquet file.")
        if not stat.S_ISREG(mode):
            raise DataError(
                f"{path} is a pipe or a device, and data is read more than once.",
                hint="Save it to a file first.",
            )
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
        else:
            yield from ((line, text if is_text else _parse(text, f"{path}:{line}")) for line, text in _lines(path))
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist.",
            hint="Give the path of a JSONL or Parquet file, or a hub data set without a dot in front.",
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            twice = [name for name, count in Counter(file.schema_arrow.names).items() if count > 1]
            if twice:
                raise DataError(f"{path}: there are two columns {reprlib.repr(twice[0])}.", hint="Keep one of them.")
            batches = file.iter_batches(batch_size=1000)
            yield from enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), start=1)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a Parquet file, or a broken one: {error}.") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not empty."""
    # Lines end at \n alone (U+2028 may stand inside a string), so they are split as bytes and decoded one by one.
    with path.open("rb") as file:
        for line in itertools.count(1):
            raw = file.readline(LINE_LIMIT + 1)
            if not raw:
                return
            text = _decode(raw, f"{path}:{line}", is_first=line == 1)
            if text:
                yield line, text


def _decode(raw: bytes, where: str, is_first: bool) -> str:
    for start, what in FOREIGN.items():
        if is_first and raw.startswith(start):
            raise DataError(f"{where}: the file {what}.")
    if len(raw) > LINE_LIMIT:
        raise DataError(
            f"{where}: the line is longer than {LINE_LIMIT:,} bytes. JSONL has one object per line; shorten this one.",
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} of the line is not UTF-8.", hint="Save the file as UTF-8.") from None
    return (text.removeprefix("\ufeff") if is_first else text).rstrip()


def _parse(text: str, where: str) -> object:
    """json.loads, but strict: it would let later keys win over earlier ones, and take NaN for a number."""
    pairs, constant = functools.partial(_unique_keys, where), functools.partial(_refuse_constant, where)
    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        seen = text[max(0, error.pos - 20) : error.pos + 20]
        spread = text == "{" or text.startswith("[")
        hint = " The file looks like one JSON value spread over lines; JSONL has one object per line." if spread else ""
        raise DataError(f"{where}:{error.colno}: not JSON: {error.msg}, near {seen!r}.{hint}") from None
    except RecursionError:
        raise DataError(f"{where}: the JSON is nested too deeply to be read.", hint="Remove the row.") from None
    except ValueError:  # the one that is left is int()'s, against thousands of digits
        raise DataError(f"{where}: an integer has too many digits to be read.", hint="Write it as text.") from None


def _unique_keys(where: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DataError(f"{where}: duplicate key {reprlib.repr(twice)}.", hint="Keep one of the two.")
    return row


def _refuse_constant(where: str, name: str) -> None:
    raise DataError(f"{where}: {name} is no JSON.", hint="Write a number, null or text.")


def hub_rows(source: str, default_split: str) -> Iterator[tuple[int, object]]:
    """Number and value of each row of a hub dataset, NAME or NAME:SPLIT.

    Raises:
        DataError: if it cannot be loaded.
    """
    import datasets

    name, _, split = source.partition(":")
    split = split or default_split
    try:
        yield from enumerate(datasets.load_dataset(name, split=split), start=1)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{source} is not a local file, and loading it as hub data set {name!r}, split {split!r} failed: {reason}",
        ) from None
