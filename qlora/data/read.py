"""From a file to rows of JSON or lines of text, with file and line in every error."""

import functools
import itertools
import json
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator
from pathlib import Path

from qlora.data.kinds import raw_lines
from qlora.errors import DataError

LINE_LIMIT = 10_000_000  # bytes; a file without a newline must not be read whole to be refused
LISTED = 10  # names or lines that a message lists at most
# JSON that cannot be JSONL. What else begins with an object is told apart by its first line.
WHOLE = re.compile(rb'(\xef\xbb\xbf)?\s*(\[|\{\s*"data"\s*:\s*\[)')
SPACE = re.compile(r"[ \t\n\r]*")
SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}  # names of splits
IN_AN_ARRAY = {"rows", "examples", "items", "records", "instances", "dataset"}  # keys that hold rows elsewhere


def listed(items: Iterable[object]) -> str:
    """The first few, each shortened and as repr writes it, so that nothing in a file can drive the terminal."""
    first = list(itertools.islice(items, LISTED + 1))
    names = [reprlib.repr(item).strip("'\"") for item in first[:LISTED]]
    return ", ".join([*names, "..."] if len(first) > LISTED else names)


# -- text ------------------------------------------------------------------------------------------------------------


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not empty, without the space at its end.

    Raises:
        DataError: for a line that is too long or not UTF-8.
    """
    name = str(path)  # once, as this is done for each line
    for line, raw in raw_lines(path, LINE_LIMIT):
        text = decoded(raw, f"{name}:{line}", is_first=line == 1).rstrip()
        if text:
            yield line, text


def decoded(raw: bytes, where: str, is_first: bool) -> str:
    """A line as text, without the byte-order mark that a first line may begin with.

    Raises:
        DataError: beginning with `where`.
    """
    if len(raw) > LINE_LIMIT:
        raise DataError(
            f"{where}: the line is longer than {LINE_LIMIT:,} bytes. JSONL has one object per line; shorten this one.",
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf_8(where, error.start + 1) from None
    return text.removeprefix("\ufeff") if is_first else text


def _not_utf_8(where: str, byte: int) -> DataError:
    return DataError(f"{where}: byte {byte} of the line is not UTF-8.", hint="Save the file as UTF-8.")


# -- JSON ------------------------------------------------------------------------------------------------------------


def json_rows(path: Path, head: bytes) -> Iterator[tuple[int, object]]:
    """Line and value of each row of JSONL, of a JSON array, of {"data": [...]}, or of one object spread over lines.

    JSONL is read line by line. Any other JSON is read whole, and its rows are decoded one by one. Items of an array that share
    a line are numbered on, so that each row has a number of its own.

    Args:
        path: of the file.
        head: its first bytes.

    Raises:
        DataError: naming file and line.
    """
    if WHOLE.match(head):
        yield from _whole(path)
        return
    lines = text_lines(path)
    line, text = next(lines, (0, ""))
    if not line:
        return
    if _is_spread(text):
        yield from _whole(path)
        return
    row = _parse(text, f"{path}:{line}")
    following: Iterable[tuple[int, str]] = lines
    if isinstance(row, dict) and any(isinstance(value, list | dict) for value in row.values()):  # perhaps all of the file
        ahead = list(itertools.islice(lines, 1))
        following = itertools.chain(ahead, lines)
        if not ahead and isinstance(row.get("data"), list):
            yield from _whole(path)
            return
        if not ahead:
            refuse_shape(row, f"{path}:{line}")
    yield line, row
    name = str(path)
    for line, text in following:
        yield line, _parse(text, f"{name}:{line}")


def _is_spread(text: str) -> bool:
    """Whether a line is the beginning of an object that following lines continue."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return text[0] == "{" and error.pos >= len(text)
    except (ValueError, RecursionError):
        return False
    return False


def refuse_shape(value: dict[str, object], where: str) -> None:
    """Refuse an object that is all of a file and holds rows in another way than {"data": [...]}.

    Raises:
        DataError: beginning with `where`.
    """
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    if lists and lists.keys() == value.keys() and lists.keys() <= SPLITS:
        raise DataError(f"{where}: the file is one object of splits, {listed(value)}.", hint="Save each split in its own file.")
    if len(lists) == 1 and (key := next(iter(lists))) in IN_AN_ARRAY:
        raise DataError(
            f"{where}: the file is one object with an array in {key!r}.", hint="Save that array alone, or as JSONL."
        )
    dicts = {key: item for key, item in value.items() if isinstance(item, dict)}
    columns: dict[str, Collection[object]] = {**(lists if len(lists) > 1 else dicts)}
    cells = itertools.chain.from_iterable(columns.values())  # of a dict its keys
    is_table = columns.keys() == value.keys() and len({len(column) for column in columns.values()}) == 1
    if is_table and not any(isinstance(cell, dict) for cell in cells):
        raise DataError(
            f"{where}: the file is one object of columns, {listed(value)}.",
            hint='Write one object per row; pandas does with to_json(path, orient="records", lines=True).',
        )


def _whole(path: Path) -> Iterator[tuple[int, object]]:
    raw = b"".join(raw for _, raw in raw_lines(path))
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _not_utf_8(f"{path}:{line}", error.start - raw.rfind(b"\n", 0, error.start)) from None
    del raw
    begin = _skip(text, 0)
    line = text.count("\n", 0, begin) + 1
    if text[begin] == "[":
        end = yield from _items(text, begin, path)
        _refuse_more(text, end, path)
        return
    value, end = _value(text, begin, path, line)
    _refuse_more(text, end, path)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        del value
        yield from _items(text, _begin_of(text, begin, "data"), path)
    else:
        if isinstance(value, dict):
            refuse_shape(value, f"{path}:{line}")
        yield line, value


def _items(text: str, begin: int, path: Path) -> Generator[tuple[int, object], None, int]:
    """Line and value of each item of the array that begins there; returns where it ends."""
    line, counted, number = 1, 0, 0
    at = _skip(text, begin + 1)
    if text[at : at + 1] == "]":
        return at + 1
    while True:
        line, counted = line + text.count("\n", counted, at), at
        value, at = _value(text, at, path, line)
        number = max(line, number + 1)
        yield number, value
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            return at + 1
        if text[at : at + 1] != ",":
            raise _not_json(json.JSONDecodeError("Expecting ',' delimiter", text, at), path)
        at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    """Where the space that begins there ends."""
    found = SPACE.match(text, at)
    assert found is not None  # it matches nothing too
    return found.end()


def _begin_of(text: str, at: int, wanted: str) -> int:
    """Where the value of a key begins, in the text of an object that is known to be JSON and to have it."""
    decoder = json.JSONDecoder()
    while True:
        key, at = decoder.raw_decode(text, _skip(text, at + 1))
        at = _skip(text, _skip(text, at) + 1)
        if key == wanted:
            return at
        at = _skip(text, decoder.raw_decode(text, at)[1])


def _refuse_more(text: str, at: int, path: Path) -> None:
    at = _skip(text, at)
    if at < len(text):
        error = _not_json(json.JSONDecodeError("Extra data", text, at), path)
        raise DataError(str(error), hint="A file has one JSON array, or one object per line: jq -c . FILE writes these.")


def _value(text: str, at: int, path: Path, line: int) -> tuple[object, int]:
    """The JSON value that begins there, and where it ends."""
    where = f"{path}:{line}"
    pairs, constant = functools.partial(_unique_keys, where), functools.partial(_refuse_constant, where)
    try:
        return json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant).raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _not_json(error, path) from None
    except (RecursionError, ValueError) as error:
        raise _not_readable(error, where) from None


def _parse(text: str, where: str) -> object:
    """json.loads, but strict: it would let later keys win over earlier ones, and take NaN for a number."""
    pairs, constant = functools.partial(_unique_keys, where), functools.partial(_refuse_constant, where)
    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise _not_json(error, where) from None
    except (RecursionError, ValueError) as error:
        raise _not_readable(error, where) from None


def _not_json(error: json.JSONDecodeError, where: str | Path) -> DataError:
    """The error in words; `where` is a line, or a file that is read whole."""
    place = f"{where}:{error.lineno}" if isinstance(where, Path) else where
    seen = error.doc[max(0, error.pos - 20) : error.pos + 20]
    return DataError(f"{place}:{error.colno}: not JSON: {error.msg}, near {seen!r}.")


def _not_readable(error: Exception, where: str) -> DataError:
    if isinstance(error, RecursionError):
        return DataError(f"{where}: the JSON is nested too deeply to be read.", hint="Remove the row.")
    # The ValueError that is left is int()'s, against thousands of digits.
    return DataError(f"{where}: an integer has too many digits to be read.", hint="Write it as text.")


def _unique_keys(where: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DataError(f"{where}: duplicate key {reprlib.repr(twice)}.", hint="Keep one of the two.")
    return row


def _refuse_constant(where: str, name: str) -> None:
    raise DataError(f"{where}: {name} is no JSON.", hint="Write a number, null or text.")
