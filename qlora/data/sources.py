"""What --train-file and --eval-file name: files, globs, folders and hub data sets, read in order as one source of rows."""

import ast
import bisect
import glob
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qlora.data.kinds import PACKED, READ, Kind, first_bytes, kind_of, refuse_foreign
from qlora.data.read import LISTED, json_rows, listed, text_lines
from qlora.data.tables import arrow_rows, csv_rows, without_nulls
from qlora.errors import DataError

SHOWN = 3  # files that stand for all in the name of a source
SAVED, SAVED_SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"  # in folders of datasets' save_to_disk
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"), **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
}  # fmt: skip


class Part(NamedTuple):
    """A file, a folder that `datasets` saved, or a data set of the hub."""

    name: str  # for messages: as the user wrote it, or as it was found
    kind: Literal["file", "saved", "hub"]
    path: Path = Path()  # of a file or folder
    config: str | None = None  # of a hub data set
    split: str = ""  # of a hub data set


class Source:
    """Rows of one or several parts, numbered from 1 on: within the first by its lines or rows, in the next from there on.

    Attributes:
        parts: at least one, in order.
        notes: lines for the log, on what folders hold that is not read.
    """

    def __init__(self, words: str | Path | Sequence[str | Path], default_split: str):
        """Find the parts; nothing is read yet.

        Args:
            words: paths, globs, folders, FOLDER:SPLIT, or NAME, NAME:SPLIT or NAME:CONFIG:SPLIT of the hub.
            default_split: where a split is not given.

        Raises:
            DataError: for a glob or a folder without a file that can be read, and for a file that is given twice.
        """
        self.notes: list[str] = []
        self.parts = [part for word in names_of(words) for part in _parts(word, default_split, self.notes)]
        self._begins = [0]  # of each part read so far and of the one after: the number before its first
        self._begun = 0  # parts
        seen: set[tuple[str | None, ...]] = set()
        for part in self.parts:
            place = part.name.partition(":")[0] if part.kind == "hub" else os.path.realpath(part.path)
            identity = (part.kind, place, part.config, part.split)
            if identity in seen:
                raise DataError(f"{part.name} is given twice.", hint="Give each file once.")
            seen.add(identity)

    def __str__(self) -> str:
        """The names of its parts, the first few of many."""
        names = [part.name for part in self.parts]
        return ", ".join(names) if len(names) <= SHOWN else f"{', '.join(names[:SHOWN])}, ... ({len(names)} files)"

    def rows(self, as_prompts: bool = False) -> Iterator[tuple[int, str, object]]:
        """Number, place for messages, and value of each row.

        Args:
            as_prompts: lines of a text are values, instead of rows with the one column `text`.

        Raises:
            DataError: naming file and line or row.
        """
        for index, part in enumerate(self.parts):
            begin, line, name = self._begins[index], 0, part.name
            self._begun = max(self._begun, index + 1)
            for line, row in _rows(part, as_prompts):
                yield begin + line, f"{name}:{line}", row
            if not line and len(self.parts) > 1:
                raise DataError(f"{part.name} holds no row.", hint="Leave it out.")
            if len(self._begins) == index + 1:
                self._begins.append(begin + line)

    def where(self, number: int) -> str:
        """file:line of a row."""
        if len(self.parts) == 1:
            return f"{self.parts[0].name}:{number}"
        if number > self._begins[-1] and self._begun < len(self._begins):  # nobody is reading that part
            for _ in self.rows():
                pass
        index = bisect.bisect_left(self._begins, number) - 1
        return f"{self.parts[index].name}:{number - self._begins[index]}"

    def line(self, number: int) -> str:
        """The line of a row; of several parts, file:line."""
        return str(number) if len(self.parts) == 1 else self.where(number)

    def lines(self, numbers: Iterable[int]) -> str:
        """Lines of rows, the first few: "lines 3, 7", or "a.jsonl:3, b.csv:1" of several parts."""
        if len(self.parts) == 1:
            return f"lines {listed(numbers)}"
        first = list(itertools.islice(numbers, LISTED + 1))
        return ", ".join([*map(self.where, first[:LISTED]), *(["..."] if len(first) > LISTED else [])])

    @property
    def count(self) -> str:
        """For the log: how many parts there are, if there are several, and what is left out of folders."""
        what = "files" if all(part.kind == "file" for part in self.parts) else "sources"
        several = [f"{len(self.parts)} {what}"] if len(self.parts) > 1 else []
        return "".join(f"; {note}" for note in [*several, *self.notes])


AnySource = str | Path | Sequence[str | Path] | Source


def names_of(words: str | Path | Sequence[str | Path] | None) -> tuple[str, ...]:
    """Names of files as a tuple; older runs kept one alone, as text."""
    if words is None:
        return ()
    return (str(words),) if isinstance(words, str | Path) else tuple(map(str, words))


def as_source(source: AnySource, default_split: str) -> Source:
    """A source of its names, or the very one.

    Raises:
        DataError: as Source does.
    """
    return source if isinstance(source, Source) else Source(source, default_split)


def place_of(source: str | Path | Source, number: int) -> str:
    """file:line of a row, also of a source of which only the name is known."""
    return source.where(number) if isinstance(source, Source) else f"{source}:{number}"


def lines_of(source: str | Path | Source, numbers: Iterable[int]) -> str:
    """As Source.lines, also of a source of which only the name is known."""
    return source.lines(numbers) if isinstance(source, Source) else f"lines {listed(numbers)}"


def is_local(name: str) -> bool:
    """Whether a name is one of a file or folder, rather than of a data set of the hub; it need not be there any more."""
    path = Path(os.path.expanduser(name))
    is_file = kind_of(path) is not None or path.suffix in PACKED or glob.has_magic(name)
    return is_file or name.startswith((".", "/", "~")) or name.endswith("/") or os.path.exists(path) or _saved(name) is not None


# -- parts -----------------------------------------------------------------------------------------------------------


def _parts(word: str, default_split: str, notes: list[str]) -> list[Part]:
    path = Path(os.path.expanduser(word))
    if os.path.isdir(path):
        return _of_folder(word, path, default_split, notes)
    if glob.has_magic(word) and not os.path.exists(path):
        found = sorted(name for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if found:
            return [Part(name, "file", Path(name)) for name in found]
        if "*" in word or "?" in word:  # brackets alone may be part of a name
            raise DataError(f"{word} matches no file.", hint="Check the pattern, and the folder it starts from.")
    if (saved := _saved(word)) and not os.path.exists(path):
        return [saved]
    if is_local(word):
        return [Part(word, "file", path)]
    name, *rest = word.split(":")
    if len(rest) > 2 or not name:
        raise DataError(f"{word} names no data set of the hub.", hint="Give NAME, NAME:SPLIT or NAME:CONFIG:SPLIT.")
    return [Part(word, "hub", config=rest[0] if len(rest) == 2 else None, split=(rest[-1] if rest else "") or default_split)]


def _saved(word: str) -> Part | None:
    """FOLDER:SPLIT of a folder that `datasets` saved with its splits."""
    folder, _, split = word.rpartition(":")
    path = Path(os.path.expanduser(folder))
    if not folder or not os.path.exists(path / SAVED_SPLITS):
        return None
    return Part(word, "saved", path / split)


def _of_folder(word: str, path: Path, default_split: str, notes: list[str]) -> list[Part]:
    if all((path / name).exists() for name in SAVED):
        return [Part(word, "saved", path)]
    if (path / SAVED_SPLITS).exists():
        splits = _splits(path / SAVED_SPLITS)
        if default_split not in splits:
            hint = f"Name one: {word}:{splits[0]}" if splits else ""
            raise DataError(f"{word} holds the splits {listed(splits) or 'none'}, and not {default_split!r}.", hint=hint)
        return [Part(word, "saved", path / default_split)]
    visible = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    if visible and all(file.is_dir() for file in visible):  # a folder of folders is read with all that they hold
        below = (file for file in sorted(path.rglob("*")) if file.is_file())
        visible = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [file for file in visible if file.is_file() and kind_of(file)]
    others = [str(file.relative_to(path)) for file in visible if file not in files]
    if not files:
        holds = f"It holds {listed(others)}." if others else "It is empty."
        raise DataError(f"{word} is a folder without a file that can be read. {holds}", hint=f"Files that are read: {READ}.")
    _refuse_splits(word, [str(file.relative_to(path)) for file in files])
    notes += [f"{word}: left out {listed(others)}"] if others else []
    return [Part(str(Path(word) / file.relative_to(path)), "file", file) for file in files]


def _splits(path: Path) -> list[str]:
    try:
        splits = json.loads(path.read_bytes())["splits"]
        return [str(split) for split in splits]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is not what save_to_disk writes.", hint="Save the data set again.") from None


def _refuse_splits(word: str, names: Sequence[str]) -> None:
    """Refuse a folder whose files are of several splits by their names: held-out data would be trained on."""
    found: dict[str, str] = {}
    for name in names:
        splits = {SPLIT_OF[part] for part in re.split(r"[^a-z]+", name.lower()) if part in SPLIT_OF}
        if len(splits) == 1:
            found.setdefault(splits.pop(), name)
    if len(found) > 1:
        text = f"{word} holds files of several splits: {listed(found.values())}."
        raise DataError(text, hint="Name the files to read, or a pattern such as 'FOLDER/train*'.")


# -- rows ------------------------------------------------------------------------------------------------------------


def _rows(part: Part, as_prompts: bool) -> Iterator[tuple[int, object]]:
    if part.kind == "file":
        return file_rows(part.path, as_prompts)
    return _saved_rows(part) if part.kind == "saved" else _hub_rows(part)


def file_rows(path: Path, as_prompts: bool = False) -> Iterator[tuple[int, object]]:
    """Number of the line or row, and value, of each row of a file.

    Args:
        path: of a file; its kind is that of its name, else JSON.
        as_prompts: lines of a text are values; its kind is text if its name does not say.

    Raises:
        DataError: naming file and line or row.
    """
    try:
        _check_regular(path)
        kind = kind_of(path) or ("text" if as_prompts else "json")
        head = first_bytes(path)
        refuse_foreign(head, kind, path)
        yield from _rows_of(path, kind, head, as_prompts)
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist.",
            hint="Give the path of a file or folder, or a hub data set without a dot in front.",
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _rows_of(path: Path, kind: Kind, head: bytes, as_prompts: bool) -> Iterator[tuple[int, object]]:
    if kind == "json":
        return json_rows(path, head)
    if kind == "csv":
        return csv_rows(path, "\t" if ".tsv" in path.suffixes else ",")
    if kind == "text":
        return text_lines(path) if as_prompts else _text_rows(path, head)
    return arrow_rows(path, head, kind == "parquet")


def _text_rows(path: Path, head: bytes) -> Iterator[tuple[int, object]]:
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b'{"', b'[{"')):
        raise DataError(f"{path}:1: the text looks like JSON.", hint="Let its name end in .jsonl.")
    return ((line, {"text": text}) for line, text in text_lines(path))


def _check_regular(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(
            f"{path} is a pipe or a device, and data is read more than once.",
            hint="Save it to a file first.",
        )


def _saved_rows(part: Part) -> Iterator[tuple[int, object]]:
    import datasets
    import pyarrow

    try:
        yield from _numbered(datasets.load_from_disk(str(part.path)))
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{part.name} is not a data set that save_to_disk wrote, or a broken one: {reason}.") from None


def _hub_rows(part: Part) -> Iterator[tuple[int, object]]:
    import datasets

    name = part.name.partition(":")[0]
    try:
        yield from _numbered(datasets.load_dataset(name, *([part.config] if part.config else []), split=part.split))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if found := re.search(r"(?:available configs|not found\. Available): (\[.*?\])", reason):
            configs = ast.literal_eval(found[1])
            what = f"has no configuration {part.config!r}" if part.config else "needs a configuration"
            first = configs[0] if configs else "CONFIG"
            raise DataError(
                f"{part.name}: the hub data set {name!r} {what}. It has {listed(configs)}.",
                hint=f"Name one together with the split: {name}:{first}:{part.split}",
            ) from None
        config = f"configuration {part.config!r}, " if part.config else ""
        hint = f"With a configuration, write {name}:CONFIG:SPLIT." if "nknown split" in reason and not part.config else ""
        raise DataError(
            f"{part.name} is not a local file, and loading it as hub data set {name!r}, {config}split {part.split!r} failed: "
            f"{reason}",
            hint=hint,
        ) from None


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, object]]:
    return enumerate(map(without_nulls, rows), start=1)
