"""From CSV, Parquet and Arrow to rows, with file and line or row in every error."""

import contextlib
import csv
import itertools
import reprlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from qlora.data.kinds import raw_lines, unpack
from qlora.data.read import LINE_LIMIT, decoded, listed
from qlora.errors import DataError

BATCH_ROWS = 1000  # that are Python objects at a time


# -- CSV -------------------------------------------------------------------------------------------------------------


def csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Number of the first line and columns of each row of CSV; the first row names the columns, and all values are text.

    Raises:
        DataError: naming file and line.
    """
    csv.field_size_limit(LINE_LIMIT)
    texts = (decoded(raw, f"{path}:{line}", line == 1) for line, raw in raw_lines(path, LINE_LIMIT))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            begin, line = line, reader.line_num + 1
            if not "".join(cells).strip() and len(cells) < 2:  # a blank line
                continue
            if not header:
                header = cells
                _check_header(header, delimiter, f"{path}:{begin}")
            elif len(cells) != len(header):
                raise DataError(
                    f"{path}:{begin}: the row has {len(cells)} cells, and the header names {len(header)} columns.",
                    hint="Quote cells that hold a delimiter or a line feed.",
                )
            else:
                yield begin, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        hint = "A quote is not closed." if "end of data" in str(error) or "limit" in str(error) else ""
        hint = hint or "Inside a quoted cell, a quote is written twice."
        raise DataError(f"{path}:{line}: not CSV: {error}.", hint=hint) from None


def _check_header(names: list[str], delimiter: str, where: str) -> None:
    if names[0].startswith(("{", "[")):
        raise DataError(f"{where}: the file looks like JSON.", hint="Let its name end in .jsonl.")
    others = [other for other in ",;\t|" if other != delimiter and other in names[0]]
    if len(names) == 1 and others:
        hint = {",": "Let its name end in .csv.", "\t": "Let its name end in .tsv."}.get(others[0], "Save it with commas.")
        raise DataError(
            f"{where}: the only column is {reprlib.repr(names[0])}; columns are separated by {others[0]!r}.", hint=hint
        )
    if "" in names:
        raise DataError(
            f"{where}: column {names.index('') + 1} has no name; the header is {listed(names)}.",
            hint="Name it; pandas leaves out its index with to_csv(path, index=False).",
        )
    _refuse_twice(names, where)


def _refuse_twice(names: list[str], where: str | Path) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{where}: there are two columns {reprlib.repr(twice[0])}.", hint="Keep one of them.")


# -- Parquet and Arrow -----------------------------------------------------------------------------------------------


def arrow_rows(path: Path, head: bytes, is_parquet: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and columns of each row of Parquet, or of an Arrow file or stream, a batch at a time.

    Args:
        path: of the file.
        head: its first bytes, unpacked.
        is_parquet: else it is Arrow.

    Raises:
        DataError: naming the file, and the row where reading stopped.
    """
    import pyarrow

    number = 0
    try:
        with _seekable(path) as file:
            batches = _parquet_batches(file, path) if is_parquet else _arrow_batches(file, head, path)
            for number, row in enumerate(itertools.chain.from_iterable(map(_python_rows, batches)), start=1):
                yield number, without_nulls(row)
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system, and not of what the file holds
        what = "a Parquet file" if is_parquet else "an Arrow file"
        reason = " ".join(str(error).split()).rstrip(".")
        where = f"{path}:{number + 1}: the file" if number else str(path)
        raise DataError(f"{where} is not {what}, or a broken one: {reason}.") from None


def _python_rows(batch: Any) -> Iterator[dict[str, Any]]:
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield from batch.slice(start, BATCH_ROWS).to_pylist()


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[BinaryIO]:
    """The file; if it is packed, what it holds in a temporary file."""
    with tempfile.TemporaryFile() as whole:
        if unpack(path, cast(BinaryIO, whole)):
            whole.seek(0)
            yield cast(BinaryIO, whole)
            return
    with path.open("rb") as file:
        yield file


def _parquet_batches(file: BinaryIO, path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        _refuse_twice(parquet.schema_arrow.names, path)
        yield from parquet.iter_batches(batch_size=BATCH_ROWS)


def _arrow_batches(file: BinaryIO, head: bytes, path: Path) -> Iterator[Any]:
    import pyarrow.ipc

    if head.startswith(b"ARROW1"):
        with pyarrow.ipc.open_file(file) as arrow:
            _refuse_twice(arrow.schema.names, path)
            yield from map(arrow.get_batch, range(arrow.num_record_batches))
    else:  # as `datasets` writes it
        with pyarrow.ipc.open_stream(file) as stream:
            _refuse_twice(stream.schema.names, path)
            yield from stream


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row without null keys inside its values: Arrow gives each object all keys that other rows have."""
    return {name: _without_nulls(value) if isinstance(value, list | dict) else value for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
