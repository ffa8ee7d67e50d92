"""From rows to conversations: which columns count, and what a row must hold."""

import difflib
import itertools
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qlora.data.read import LISTED, file_rows, hub_rows, listed
from qlora.errors import DataError

COLUMNS = (("instruction", "response"), ("prompt", "completion"), ("messages",))
ROLES = ("system", "user", "assistant")
# Around the text of a special token that a user wrote. Unicode promises that these two never stand for a character.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
NO_TEXT = re.compile(f"[\ud800-\udfff{OPEN}{CLOSE}]")


class Message(NamedTuple):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


class Example(NamedTuple):
    """One conversation: user and assistant in turns, ending with an answer, perhaps after a system message."""

    messages: tuple[Message, ...]
    line: int  # 1-based line of a JSONL file, else 1-based row

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All that comes before the last answer."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The last answer."""
        return self.messages[-1].content


class Prompt(NamedTuple):
    """A conversation whose last message, a user's, is to be answered, and where it stands, for messages."""

    messages: tuple[Message, ...]
    where: str


# -- reading ---------------------------------------------------------------------------------------------------------


def check_source(source: str | Path, default_split: str) -> str:
    """Read all of a JSONL or Parquet file, or of a data set of the hub, and keep nothing of it.

    Args:
        source: a path, or NAME or NAME:SPLIT of a hub data set.
        default_split: the split of a hub data set whose SPLIT is not given.

    Returns:
        The columns that examples were found in, such as "instruction/response (ignored: id)".

    Raises:
        DataError: naming file and line, if the source is missing, unreadable, empty or a row is not as it must be.
    """
    columns: tuple[str, ...] = ()
    ignored: set[str] = set()
    for row, columns, _ in _checked_rows(source, default_split):
        if len(ignored) <= LISTED:
            ignored |= row.keys() - set(columns)
    return "/".join(columns) + (f" (ignored: {listed(sorted(ignored))})" if ignored else "")


def read_examples(source: str | Path, default_split: str) -> Iterator[Example]:
    """The examples of a source, at least one, read as they are asked for.

    Raises:
        UserError: as check_source, and as late as at the row in question.
    """
    return (example for _, _, example in _checked_rows(source, default_split))


def _checked_rows(source: str | Path, default_split: str) -> Iterator[tuple[dict[str, Any], tuple[str, ...], Example]]:
    """Each row, the columns that count in all of them, and the example in it."""
    source = str(source)
    path = Path(os.path.expanduser(source))
    is_file = os.path.exists(path) or path.suffix in {".jsonl", ".json", ".parquet"} or source.startswith((".", "/", "~"))
    columns: tuple[str, ...] | None = None
    for line, row in file_rows(path) if is_file else hub_rows(source, default_split):
        where = f"{source}:{line}"
        if not isinstance(row, dict):
            hint = " The file looks like one JSON array; JSONL has one object per line." if isinstance(row, list) else ""
            raise DataError(f"{where}: each line must be a JSON object, not {type(row).__name__}.{hint}")
        _refuse_ambiguous(row, where)
        columns = columns or _detect_columns(row, where)
        yield row, columns, Example(_messages(row, columns, where), line)
    if columns is None:
        raise DataError(f"{source} holds no example.", hint="Give a file with one JSON object per line.")


def read_prompts(source: str | Path) -> list[Prompt]:
    """Prompts of a file, at least one: of the rows of JSONL or Parquet, whose answers may be missing, or the lines of a text.

    Raises:
        DataError: naming file and line, as read_examples does.
    """
    path = Path(os.path.expanduser(source))
    is_text = path.suffix not in {".jsonl", ".json", ".parquet"}
    prompts = [as_prompt(row, f"{source}:{line}") for line, row in file_rows(path, is_text)]
    if not prompts:
        raise DataError(f"{source} holds no prompt.", hint="Give a text file with one per line, or JSONL.")
    return prompts


def as_prompt(row: object, where: str) -> Prompt:
    """A text, or a row with or without its answer, as the messages that are to be answered.

    Raises:
        DataError: beginning with `where`.
    """
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise DataError(f"{where}: each line must be a JSON object, not {type(row).__name__}.")
    _refuse_ambiguous(row, where)
    completed = dict(row)
    for asked, answered in COLUMNS[:2]:
        if asked in row:
            completed[answered] = "any"  # so that a row is checked as one of training is; it goes again below
    turns = row.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "user":
        completed["messages"] = [*turns, {"role": "assistant", "content": "any"}]
    columns = _detect_columns(completed, where)
    return Prompt(_messages(completed, columns, where)[:-1], where)


def _refuse_ambiguous(row: dict[str, Any], where: str) -> None:
    complete = [columns for columns in COLUMNS if row.keys() >= set(columns)]
    if len(complete) > 1:
        both = " and of ".join("/".join(columns) for columns in complete)
        raise DataError(
            f"{where}: the row has columns of {both}.",
            hint="Keep one of the two, so that none is trained on by mistake.",
        )
    for ours, theirs in zip(*COLUMNS[:2], strict=True):  # two names of one role
        if ours in row and theirs in row and "messages" not in row:
            raise DataError(
                f"{where}: the row has both {ours!r} and {theirs!r}.",
                hint="Keep one, so that none is trained on by mistake.",
            )


def _detect_columns(row: dict[str, Any], where: str) -> tuple[str, ...]:
    complete = [columns for columns in COLUMNS if row.keys() >= set(columns)]
    found = complete or [columns for columns in COLUMNS if row.keys() & set(columns)]
    if not found:
        forms = ", ".join("/".join(columns) for columns in COLUMNS)
        raise DataError(f"{where}: no known column among {listed(row) or 'none'}. A row has one of {forms}.{_near(row)}")
    return found[0]


def _near(row: dict[str, Any]) -> str:
    known = [name for columns in COLUMNS for name in columns]
    unknown = (str(name)[:40] for name in row if name not in known)
    pairs = [(seen, difflib.get_close_matches(seen, known, n=1)) for seen in itertools.islice(unknown, LISTED)]
    return "".join(f" {seen!r} is perhaps meant to be {near[0]!r}." for seen, near in pairs if near)


def _messages(row: dict[str, Any], columns: tuple[str, ...], where: str) -> tuple[Message, ...]:
    missing = [name for name in columns if name not in row]
    if missing:
        raise DataError(f"{where}: column {missing[0]!r} is missing; the row has {listed(row) or 'none'}.{_near(row)}")
    if columns != ("messages",):
        turns = [Message(role, row[name]) for role, name in zip(("user", "assistant"), columns, strict=True)]
    else:
        turns = _conversation(row["messages"], where)
    for index, (role, content) in enumerate(turns):
        name = columns[index] if len(columns) == 2 else f"messages[{index}] ({role})"
        if not isinstance(content, str):
            raise DataError(f"{where}: {name} must be text, not {type(content).__name__}.")
        if not content.strip():
            raise DataError(f"{where}: {name} is empty.", hint="Remove the row or fill it in.")
        if found := NO_TEXT.search(content):
            what = "half of a surrogate pair" if found[0] < OPEN else "a noncharacter, which is used as a mark in here"
            raise DataError(f"{where}: {name} holds U+{ord(found[0]):04X}, {what}.", hint="Remove it.")
    return tuple(turns)


def _conversation(messages: object, where: str) -> list[Message]:
    keys = {"role", "content"}
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and keys <= m.keys() for m in messages):
        raise DataError(f'{where}: messages must be a list of {{"role": ..., "content": ...}}.')
    turns = [Message(message["role"], message["content"]) for message in messages]
    roles = [turn.role for turn in turns]
    unknown = [role for role in roles if role not in ROLES]  # no set: a role may be anything here
    if unknown:
        raise DataError(f"{where}: unknown role {reprlib.repr(unknown[0])}. Roles are {', '.join(ROLES)}.")
    spoken = roles[1:] if roles[0] == "system" else roles
    if len(spoken) % 2 or not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise DataError(
            f"{where}: after an optional system message, user and assistant must take turns and assistant end; roles are "
            f"{listed(roles)}.",
        )
    return turns
