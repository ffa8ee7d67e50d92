"""From a line of JSONL to a batch: reading, formatting, masking, collation, seeded order.

Shapes: B samples in a micro-batch, T positions (padding included), N trained tokens in a micro-batch.
A *token* is a label that is trained after the shift by one: the hidden state at position t predicts the id at t + 1.
"""

import bisect
import dataclasses
import datetime
import difflib
import functools
import hashlib
import itertools
import json
import mmap
import os
import re
import reprlib
import stat
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import jinja2
import torch

from qlora.config import ExitCode, PromptFormat, TrainConfig, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
IGNORED = -100  # cross-entropy's own default for "not trained"
COLUMNS = (("instruction", "response"), ("prompt", "completion"), ("messages",))
ROLES = ("system", "user", "assistant")
LINE_LIMIT = 10_000_000  # bytes; a file without a newline must not be read whole to be refused
LISTED = 10  # names or lines that a message lists at most
FOREIGN = {
    b"\x1f\x8b": "is packed with gzip. Unpack it first",
    b"\xff\xfe": "is UTF-16. Save it as UTF-8",
    b"\xfe\xff": "is UTF-16. Save it as UTF-8",
    b"PAR1": "is Parquet. Let its name end in .parquet",
}
# Around the text of a special token that a user wrote. Unicode promises that these two never stand for a character.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
PIECES = re.compile(f"{OPEN}[^{OPEN}{CLOSE}]+{CLOSE}|[^{OPEN}{CLOSE}]+")
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


class Encoded(NamedTuple):
    """Token ids of one example and, of the same length, what is trained: the id itself, or IGNORED."""

    input_ids: list[int]
    labels: list[int]
    line: int


Row = int | list[int]  # of a batch: the index of its sample or, with packing, of its samples


class Batch(NamedTuple):
    """A micro-batch, right-padded. No attention mask: under a causal mask nothing real sees the padding behind it.

    With packing a row holds several samples, one behind the other, and the last three fields tell where they are.
    """

    input_ids: torch.Tensor  # [B, T] int64
    labels: torch.Tensor  # [B, T] int64, IGNORED where not trained
    positions: torch.Tensor  # [N] int64: flat b * T + t of each hidden state that predicts a token, found on the CPU
    num_tokens: int  # N
    num_input_tokens: int  # without padding
    lines: tuple[int, ...]  # of the source, one of each sample
    position_ids: torch.Tensor | None = None  # [B, T] int64: from 0 in each sample, and in the padding of a row
    cu_seqlens: torch.Tensor | None = None  # [S + 1] int32: where each begins in the flattened rows, and B * T
    max_seqlen: int | None = None  # of the longest, padding included

    def to(self, device: torch.device) -> "Batch":
        """The same batch there; the copy does not wait when the source is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies by itself."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        moved: dict[str, Any] = {name: function(value) for name, value in self._asdict().items() if torch.is_tensor(value)}
        return self._replace(**moved)


# -- reading ---------------------------------------------------------------------------------------------------------


def check_source(source: str | Path, default_split: str) -> str:
    """Read all of a JSONL or Parquet file, or of a data set of the hub, and keep nothing of it.

    Args:
        source: a path, or NAME or NAME:SPLIT of a hub data set.
        default_split: the split of a hub data set whose SPLIT is not given.

    Returns:
        The columns that examples were found in, such as "instruction/response (ignored: id)".

    Raises:
        UserError: exit 3, naming file and line, if the source is missing, unreadable, empty or a row is not as it must be.
    """
    columns: tuple[str, ...] = ()
    ignored: set[str] = set()
    for row, columns, _ in _checked_rows(source, default_split):
        if len(ignored) <= LISTED:
            ignored |= row.keys() - set(columns)
    return "/".join(columns) + (f" (ignored: {_listed(sorted(ignored))})" if ignored else "")


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
    for line, row in _file_rows(path) if is_file else _hub_rows(source, default_split):
        where = f"{source}:{line}"
        if not isinstance(row, dict):
            hint = " The file looks like one JSON array; JSONL has one object a line." if isinstance(row, list) else ""
            raise _wrong(f"{where}: each line must be a JSON object, not {type(row).__name__}.{hint}")
        _refuse_ambiguous(row, where)
        columns = columns or _detect_columns(row, where)
        yield row, columns, Example(_messages(row, columns, where), line)
    if columns is None:
        raise _wrong(f"{source} holds no example. Give a file with one JSON object a line.")


def _wrong(text: str) -> UserError:
    return UserError(ExitCode.DATA, text)


def _listed(items: Iterable[object]) -> str:
    """The first few, each shortened and as repr writes it, so that nothing in a file can drive the terminal."""
    first = list(itertools.islice(items, LISTED + 1))
    names = [reprlib.repr(item).strip("'\"") for item in first[:LISTED]]
    return ", ".join([*names, "..."] if len(first) > LISTED else names)


def read_prompts(source: str | Path) -> list[Prompt]:
    """Prompts of a file, at least one: of the rows of JSONL or Parquet, whose answers may be missing, or the lines of a text.

    Raises:
        UserError: exit 3, naming file and line, as read_examples does.
    """
    path = Path(os.path.expanduser(source))
    is_text = path.suffix not in {".jsonl", ".json", ".parquet"}
    prompts = [as_prompt(row, f"{source}:{line}") for line, row in _file_rows(path, is_text)]
    if not prompts:
        raise _wrong(f"{source} holds no prompt. Give a text file with one a line, or JSONL.")
    return prompts


def as_prompt(row: object, where: str) -> Prompt:
    """A text, or a row with or without its answer, as the messages that are to be answered.

    Raises:
        UserError: exit 3, beginning with `where`.
    """
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise _wrong(f"{where}: each line must be a JSON object, not {type(row).__name__}.")
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


def _file_rows(path: Path, is_text: bool = False) -> Iterator[tuple[int, object]]:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise _wrong(f"{path} is a folder. Give one JSONL or Parquet file.")
        if not stat.S_ISREG(mode):
            raise _wrong(f"{path} is a pipe or a device, and data is read more than once. Save it to a file first.")
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
        else:
            yield from ((line, text if is_text else _parse(text, f"{path}:{line}")) for line, text in _lines(path))
    except FileNotFoundError:
        raise _wrong(
            f"{path} does not exist. Give the path of a JSONL or Parquet file, or a hub data set without a dot in front."
        ) from None
    except OSError as error:
        raise _wrong(f"{path} cannot be read: {error.strerror or error}.") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            twice = [name for name, count in Counter(file.schema_arrow.names).items() if count > 1]
            if twice:
                raise _wrong(f"{path}: there are two columns {reprlib.repr(twice[0])}. Keep one of them.")
            batches = file.iter_batches(batch_size=1000)
            yield from enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), start=1)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _wrong(f"{path} is not a Parquet file, or a broken one: {error}.") from None


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
            raise _wrong(f"{where}: the file {what}.")
    if len(raw) > LINE_LIMIT:
        raise _wrong(f"{where}: the line is longer than {LINE_LIMIT:,} bytes. JSONL has one object a line; shorten this one.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(f"{where}: byte {error.start + 1} of the line is not UTF-8. Save the file as UTF-8.") from None
    return (text.removeprefix("\ufeff") if is_first else text).rstrip()


def _parse(text: str, where: str) -> object:
    """json.loads, but strict: it would let later keys win over earlier ones, and take NaN for a number."""
    pairs, constant = functools.partial(_unique_keys, where), functools.partial(_refuse_constant, where)
    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        seen = text[max(0, error.pos - 20) : error.pos + 20]
        spread = text == "{" or text.startswith("[")
        hint = " The file looks like one JSON value spread over lines; JSONL has one object a line." if spread else ""
        raise _wrong(f"{where}:{error.colno}: not JSON: {error.msg}, near {seen!r}.{hint}") from None
    except RecursionError:
        raise _wrong(f"{where}: the JSON is nested too deeply to be read. Remove the row.") from None
    except ValueError:  # the one that is left is int()'s, against thousands of digits
        raise _wrong(f"{where}: an integer has too many digits to be read. Write it as text.") from None


def _unique_keys(where: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _wrong(f"{where}: key {reprlib.repr(twice)} stands twice in one object. Keep one of the two.")
    return row


def _refuse_constant(where: str, name: str) -> None:
    raise _wrong(f"{where}: {name} is no JSON. Write a number, null or text.")


def _hub_rows(source: str, default_split: str) -> Iterator[tuple[int, object]]:
    import datasets

    name, _, split = source.partition(":")
    split = split or default_split
    try:
        yield from enumerate(datasets.load_dataset(name, split=split), start=1)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise _wrong(
            f"{source} is no file here, and as hub data set {name!r}, split {split!r}, it cannot be had: {reason}"
        ) from None


def _refuse_ambiguous(row: dict[str, Any], where: str) -> None:
    complete = [columns for columns in COLUMNS if row.keys() >= set(columns)]
    if len(complete) > 1:
        both = " and of ".join("/".join(columns) for columns in complete)
        raise _wrong(f"{where}: the row has columns of {both}. Keep one of the two, so that none is trained on by mistake.")
    for ours, theirs in zip(*COLUMNS[:2], strict=True):  # two names of one role
        if ours in row and theirs in row and "messages" not in row:
            raise _wrong(f"{where}: the row has both {ours!r} and {theirs!r}. Keep one, so that none is trained on by mistake.")


def _detect_columns(row: dict[str, Any], where: str) -> tuple[str, ...]:
    complete = [columns for columns in COLUMNS if row.keys() >= set(columns)]
    found = complete or [columns for columns in COLUMNS if row.keys() & set(columns)]
    if not found:
        forms = ", ".join("/".join(columns) for columns in COLUMNS)
        raise _wrong(f"{where}: no known column among {_listed(row) or 'none'}. A row has one of {forms}.{_near(row)}")
    return found[0]


def _near(row: dict[str, Any]) -> str:
    known = [name for columns in COLUMNS for name in columns]
    unknown = (str(name)[:40] for name in row if name not in known)
    pairs = [(seen, difflib.get_close_matches(seen, known, n=1)) for seen in itertools.islice(unknown, LISTED)]
    return "".join(f" {seen!r} is perhaps meant to be {near[0]!r}." for seen, near in pairs if near)


def _messages(row: dict[str, Any], columns: tuple[str, ...], where: str) -> tuple[Message, ...]:
    missing = [name for name in columns if name not in row]
    if missing:
        raise _wrong(f"{where}: column {missing[0]!r} is missing; the row has {_listed(row) or 'none'}.{_near(row)}")
    if columns != ("messages",):
        turns = [Message(role, row[name]) for role, name in zip(("user", "assistant"), columns, strict=True)]
    else:
        turns = _conversation(row["messages"], where)
    for index, (role, content) in enumerate(turns):
        name = columns[index] if len(columns) == 2 else f"messages[{index}] ({role})"
        if not isinstance(content, str):
            raise _wrong(f"{where}: {name} must be text, not {type(content).__name__}.")
        if not content.strip():
            raise _wrong(f"{where}: {name} is empty. Remove the row or fill it in.")
        if found := NO_TEXT.search(content):
            what = "half of a surrogate pair" if found[0] < OPEN else "a noncharacter, which is used as a mark in here"
            raise _wrong(f"{where}: {name} holds U+{ord(found[0]):04X}, {what}. Remove it.")
    return tuple(turns)


def _conversation(messages: object, where: str) -> list[Message]:
    form = {"role", "content"}
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and form <= m.keys() for m in messages):
        raise _wrong(f'{where}: messages must be a list of {{"role": ..., "content": ...}}.')
    turns = [Message(message["role"], message["content"]) for message in messages]
    roles = [turn.role for turn in turns]
    unknown = [role for role in roles if role not in ROLES]  # no set: a role may be anything here
    if unknown:
        raise _wrong(f"{where}: unknown role {reprlib.repr(unknown[0])}. Roles are {', '.join(ROLES)}.")
    spoken = roles[1:] if roles[0] == "system" else roles
    if len(spoken) % 2 or not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise _wrong(
            f"{where}: after an optional system message, user and assistant must take turns and assistant end; "
            f"roles are {_listed(roles)}."
        )
    return turns


# -- formatting and masking ------------------------------------------------------------------------------------------


class Format(NamedTuple):
    """How text becomes ids: the tokenizer, the form, and the ids that begin a sample and end an answer."""

    tokenizer: "PreTrainedTokenizerBase"
    name: PromptFormat
    begin_ids: tuple[int, ...]  # a BOS, where the tokenizer puts one; in the chat form the template brings its own
    stop_id: int  # the tokenizer's eos in the plain form, the template's turn end in the chat form
    special: re.Pattern[str]  # finds the text of a special token
    date: str  # ISO 8601, local time; what a template that prints the date is told, so that ids do not change overnight

    def mark(self, message: Message) -> Message:
        """The message with marks around all that reads like a special token, so that `ids` takes it for plain text."""
        return message._replace(content=self.special.sub(rf"{OPEN}\g<0>{CLOSE}", message.content))

    def ids(self, text: str, after: str = "") -> list[int]:
        """Ids of `text` as it stands behind the text `after`.

        Tokenised alone it can differ: SentencePiece tokenizers (Phi-3's) put a space before whatever they see first, and
        the model would learn to answer " {"; some special tokens swallow the newline behind them. So both are tokenised
        together, and the ids of `after` cut off. Where a token would span the two they are tokenised apart after all.
        """
        if after:
            before, both = self.ids(after), self.ids(after + text)
            return both[len(before) :] if both[: len(before)] == before else self.ids(text)
        # No text of a user may become a special token. In the plain form all text is a user's; a chat template is made of
        # special tokens, so there what a user wrote of them stands between marks.
        if self.name == "plain":
            return self._tokenize(text, split_special=True)
        ids: list[int] = []
        for piece in PIECES.findall(text):
            bare = piece.strip(OPEN + CLOSE)
            ids += self._tokenize(bare, split_special=bare != piece, after="\n" if ids else "")
        return ids

    def _tokenize(self, text: str, split_special: bool, after: str = "") -> list[int]:
        before, both = (
            self.tokenizer(part, add_special_tokens=False, split_special_tokens=split_special).input_ids if part else []
            for part in (after, after + text)
        )
        return both[len(before) :] if both[: len(before)] == before else self._tokenize(text, split_special)


def read_format(tokenizer: "PreTrainedTokenizerBase", name: PromptFormat, date: str | None = None) -> Format:
    """The form to train and to prompt in.

    Args:
        tokenizer: with a chat template for the chat form.
        name: of the form.
        date: of the run (ISO 8601), for templates that print the date, such as Llama 3's; None takes the current time.

    Raises:
        UserError: exit 2 if the tokenizer has no eos, no template, or a template that ends a turn without a special token.
    """
    texts = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, texts)) or r"(?!)")  # the longest first; or what matches nothing
    date = date or datetime.datetime.now().isoformat(timespec="seconds")
    if name == "plain":
        if tokenizer.eos_token_id is None:
            why = "The tokenizer has no eos token, so nothing would teach the model to stop. Use --prompt-format chat."
            raise UserError(ExitCode.CONFIGURATION, why)
        first = tokenizer("a").input_ids[0]
        begin_ids = (first,) if first == tokenizer.bos_token_id else ()
        return Format(tokenizer, name, begin_ids, tokenizer.eos_token_id, special, date)
    if tokenizer.chat_template is None:
        why = "--prompt-format chat: the tokenizer has no chat template. Use --prompt-format plain."
        raise UserError(ExitCode.CONFIGURATION, why)
    try:
        turn = _render(tokenizer, date, [Message("user", "question"), Message("assistant", "answer")])
    except ValueError as error:
        raise UserError(ExitCode.CONFIGURATION, f"--prompt-format chat: {error}. Use --prompt-format plain.") from None
    tail = tokenizer(turn.rpartition("answer")[2].lstrip(), add_special_tokens=False).input_ids
    if not tail or tail[0] not in tokenizer.added_tokens_decoder:
        why = "the template ends an answer without a special token, so the model could not learn to stop"
        raise UserError(ExitCode.CONFIGURATION, f"--prompt-format chat: {why}. Use --prompt-format plain.")
    return Format(tokenizer, name, (), tail[0], special, date)


def encode_prompt(messages: tuple[Message, ...], form: Format) -> list[int]:
    """Ids that an answer to `messages` (the last one a user's) is generated from; training saw the same ids."""
    return _encode_turns((*messages, Message("assistant", "")), form, loss_on="response")[0]


def encode(example: Example, form: Format, loss_on: str) -> Encoded:
    """Tokenise prompts and answers apart and join their ids, so that no token hides where the loss begins.

    Returns:
        ids and labels of any length; every answer ends with the stop token, which is trained.

    Raises:
        ValueError: if the chat template refuses the conversation, or does not render an answer as it stands.
    """
    return Encoded(*_encode_turns(example.messages, form, loss_on), example.line)


def _encode_turns(messages: tuple[Message, ...], form: Format, loss_on: str) -> tuple[list[int], list[int]]:
    ids = list(form.begin_ids)
    labels = list(ids) if loss_on == "all" else [IGNORED] * len(ids)
    for before, context, answer in _chat_turns(messages, form) if form.name == "chat" else _plain_turns(messages):
        context_ids = form.ids(context, after=before)
        ids += context_ids
        labels += context_ids if loss_on == "all" else [IGNORED] * len(context_ids)
        if answer:  # else it is to be generated
            answer_ids = [*form.ids(answer, after=context), form.stop_id]
            ids += answer_ids
            labels += answer_ids
    return ids, labels


def _plain_turns(messages: tuple[Message, ...]) -> Iterator[tuple[str, str, str]]:
    """(text before, context, answer) of each turn; see _chat_turns."""
    context = ""
    for message in messages:
        if message.role == "system":
            context = message.content + "\n\n"
        elif message.role == "user":
            context += f"### Instruction:\n{message.content}\n\n### Response:\n"
        else:
            yield "", context, message.content
            context = "\n\n"


def _chat_turns(messages: tuple[Message, ...], form: Format) -> Iterator[tuple[str, str, str]]:
    """For each turn the stop token's text if one stands before it, what the template puts before the answer, and the answer.

    Whatever the template writes between its generation prompt and the answer (a space, an empty chain of thought) counts
    to the answer: when generating, the model has to write it.
    """
    messages = tuple(map(form.mark, messages))
    stop_text = str(form.tokenizer.convert_ids_to_tokens(form.stop_id))
    done = ""  # the rendered text up to and with the last stop token
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = _render(form.tokenizer, form.date, messages[:index], add_generation_prompt=True)
        before = stop_text if done else ""
        if not message.content:
            yield before, prompt.removeprefix(done), ""
            return
        marker = "(the answer)"
        marked = _render(form.tokenizer, form.date, (*messages[:index], message._replace(content=marker)))
        lead = marked.removeprefix(prompt).partition(marker)[0]
        rest = _render(form.tokenizer, form.date, messages[: index + 1]).removeprefix(prompt + lead)
        answer = message.content if rest.startswith(message.content) else message.content.strip()
        if not prompt.startswith(done):
            raise ValueError(
                "the chat template rewrites earlier turns of a conversation, so that only single turns can be trained"
            )
        end = rest.find(stop_text, len(answer))
        if not (marked.startswith(prompt) and marker in marked and rest.startswith(answer)) or end < 0:
            seen = re.sub(f"[{OPEN}{CLOSE}]", "", answer)[:40]
            raise ValueError(f"the chat template does not render the answer {seen!r} as it stands behind its prompt")
        yield before, prompt.removeprefix(done), lead + answer
        done = prompt + lead + rest[: end + len(stop_text)]


def _render(
    tokenizer: "PreTrainedTokenizerBase", date: str, messages: Iterable[Message], add_generation_prompt: bool = False
) -> str:
    from transformers.utils.chat_template_utils import _compile_jinja_template  # here, as it imports torch

    conversation = [message._asdict() for message in messages]
    try:
        # transformers compiles a template once and keeps it; `strftime_now` is all that a template can ask of the clock.
        clock = datetime.datetime.fromisoformat(date)
        _compile_jinja_template(tokenizer.get_chat_template()).globals["strftime_now"] = clock.strftime
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt))
    except jinja2.TemplateError as error:  # raised by templates themselves, against system messages for one
        raise ValueError(f"the chat template refuses the conversation: {error}") from None


# -- the samples of a run --------------------------------------------------------------------------------------------


class Samples(Sequence[Encoded]):
    """Encoded examples, in a temporary file that is mapped into memory: there may be more of them than memory holds.

    The file has no name and goes with the process. It holds int32: ids, then labels, of one sample after the other.

    Raises:
        UserError: exit 4 if the temporary folder has no room for them.
    """

    def __init__(self, encoded: Iterable[Encoded]):
        self._ends = array("q")  # of each sample, counted in ids from the first sample on
        self._lines = array("q")
        self._numbers = memoryview(b"")
        digest = hashlib.sha256()
        end = 0
        try:
            with tempfile.TemporaryFile() as file:
                for sample in encoded:
                    numbers = array("i", [*sample.input_ids, *sample.labels]).tobytes()
                    file.write(numbers)
                    digest.update(len(numbers).to_bytes(8, "little") + numbers)
                    end += len(sample.input_ids)
                    self._ends.append(end)
                    self._lines.append(sample.line)
                file.flush()
                if end:  # an empty file cannot be mapped
                    self._numbers = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast("i")
        except OSError as error:
            raise UserError(
                ExitCode.CHECKPOINT,
                f"The temporary folder ({tempfile.tempdir}) is full or cannot be written, so that encoded samples have no "
                f"place: {error.strerror}. Free space there, or set TMPDIR to a folder on a larger disk.",
            ) from None
        self.sha256 = digest.hexdigest()  # of all ids and labels, in order
        self.counts: dict[str, int] = {}  # what encode_all and encode_files have counted, for run.json

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        at = range(len(self))[index]  # as a list has it: from the end when negative, an IndexError behind it
        if isinstance(at, range):
            return [self[one] for one in at]
        length = self.length(at)
        start = 2 * (self._ends[at] - length)
        ids, labels = self._numbers[start : start + length], self._numbers[start + length : start + 2 * length]
        return Encoded(ids.tolist(), labels.tolist(), self._lines[at])

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


@dataclasses.dataclass
class _Tally:
    """What encode_all tells about the examples it has seen."""

    seen: int = 0
    tokens: int = 0
    longest: int = 0
    truncated: int = 0
    special: int = 0
    special_text: str = ""
    dropped: int = 0
    dropped_lines: list[int] = dataclasses.field(default_factory=list)  # the first few

    def drop(self, line: int) -> None:
        """Count one that is left out."""
        self.dropped += 1
        if len(self.dropped_lines) <= LISTED:
            self.dropped_lines.append(line)

    def keep(self, encoded: Encoded, special_text: str) -> None:
        """Count one that is trained on; `special_text` is that of a special token in its messages, if there is one."""
        self.tokens += sum(label != IGNORED for label in encoded.labels[1:])
        self.longest = max(self.longest, len(encoded.input_ids))
        self.special += bool(special_text)
        self.special_text = self.special_text or special_text


def encode_all(examples: Iterable[Example], source: str | Path, form: Format, config: TrainConfig) -> tuple[Samples, str]:
    """Encode examples one after the other and deal with those longer than `config.max_length`.

    Returns:
        The samples, each with at least one token to train on; and a line that counts them and names what was left out.

    Raises:
        UserError: exit 3 if none is left, if more than a fifth is dropped without `--allow-drop`, if one is too long under
            `--on-long error`, or the chat template fails on one. Exit 4 if the temporary folder is full.
    """
    tally = _Tally()
    samples = Samples(_fitting(examples, source, form, config, tally))
    limit = f"--max-length {config.max_length}"
    cut = "" if config.on_long == "truncate" else "use --on-long truncate, "
    if not samples:
        advice = "Raise it, or use --on-long truncate." if cut else "Raise it: their prompts alone are longer."
        raise _wrong(f"{source}: none of {tally.seen} examples fits {limit}. {advice}")
    lines = f"(lines {_listed(tally.dropped_lines)})"
    if tally.dropped * 5 > tally.seen and not config.allow_drop:
        raise _wrong(
            f"{source}: {tally.dropped} of {tally.seen} examples, more than a fifth, do not fit {limit} {lines}. "
            f"Give a larger --max-length, {cut}or go on without them with --allow-drop."
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
    if tally.special:
        notes += f"; {tally.special} hold special tokens such as {tally.special_text} in their text, encoded as plain text"
    return samples, notes


def _fitting(
    examples: Iterable[Example], source: str | Path, form: Format, config: TrainConfig, tally: _Tally
) -> Iterator[Encoded]:
    for example in examples:
        tally.seen += 1
        try:
            encoded = encode(example, form, config.loss_on)
        except ValueError as error:
            raise _wrong(f"{source}:{example.line}: {error}. Use --prompt-format plain.") from None
        length = len(encoded.input_ids)
        if length > config.max_length and config.on_long == "error":
            raise _wrong(f"{source}:{example.line}: {length} tokens, more than --max-length {config.max_length}.")
        kept = fitted(encoded, config)
        if kept is None:
            tally.drop(example.line)
            continue
        tally.truncated += kept is not encoded
        found = next(filter(None, (form.special.search(message.content) for message in example.messages)), None)
        tally.keep(kept, found[0] if found else "")
        yield kept


def fitted(encoded: Encoded, config: TrainConfig) -> Encoded | None:
    """The sample; cut to `config.max_length` if it is longer and is to be cut; None if it cannot be used."""
    if len(encoded.input_ids) <= config.max_length:
        return encoded
    cut = Encoded(encoded.input_ids[: config.max_length], encoded.labels[: config.max_length], encoded.line)
    return cut if config.on_long == "truncate" and any(label != IGNORED for label in cut.labels[1:]) else None


def count_shared(samples: Sequence[Encoded], held_out: Sequence[Encoded]) -> int:
    """How many held-out samples have the very ids of a training sample; memory for the held-out side alone."""
    wanted = [_digest(sample) for sample in held_out]
    distinct = set(wanted)
    shared = {digest for sample in samples if (digest := _digest(sample)) in distinct}
    return sum(digest in shared for digest in wanted)


def _digest(sample: Encoded) -> bytes:
    return hashlib.sha256(array("i", sample.input_ids).tobytes()).digest()


def check_files(config: TrainConfig) -> list[str]:
    """Read all data once and keep nothing but the columns found: a mistake in a last line should not cost a download.

    Raises:
        UserError: exit 3, as read_examples does.
    """
    return [check_source(file, split) for file, split, _ in _files(config)]


def encode_files(
    config: TrainConfig, columns: list[str], form: Format, say: Callable[[str], None]
) -> tuple[Samples, Samples | None]:
    """The training data and, if there is any, the held-out data, with a line about each.

    Raises:
        UserError: exit 3, as encode_all does.
    """
    sets = []
    for (file, split, name), found in zip(_files(config), columns, strict=True):
        encoded, notes = encode_all(read_examples(file, split), file, form, config)
        say(f"{name}: {notes}; columns {found}")
        sets.append(encoded)
    samples, held_out = sets[0], sets[1] if len(sets) > 1 else None
    if held_out and (shared := count_shared(samples, held_out)):
        held_out.counts["shared"] = shared
        say(f"Warning: {shared} of {len(held_out)} held-out samples stand in the training data too.")
    return samples, held_out


def _files(config: TrainConfig) -> list[tuple[str, str, str]]:
    """(file, split of a hub data set, name in the log) of the training data and, if there is any, the held-out data."""
    assert config.train_file is not None  # as resolved
    held_out = [(config.eval_file, "test", "Held out")] if config.eval_file else []
    return [(config.train_file, "train", "Data"), *held_out]


def first_examples(config: TrainConfig, samples: Samples, held_out: Samples | None, count: int) -> list[Example]:
    """The first `count` examples of the held-out data, or of the training data if there is none."""
    file, split, _ = _files(config)[-1]
    return kept_examples(read_examples(file, split), held_out or samples, count)


def kept_examples(examples: Iterable[Example], samples: Sequence[Encoded], count: int) -> list[Example]:
    """The first `count` examples that encode_all kept; the rest is not read."""
    lines = {sample.line for sample in samples[:count]}
    return list(itertools.islice((example for example in examples if example.line in lines), len(lines)))


# -- collation and order ---------------------------------------------------------------------------------------------


def collate(samples: Sequence[Encoded], multiple: int = 1, least: int = 1) -> Batch:
    """Pad on the right with id 0: any would do, as padding is told by length, never by its id.

    Args:
        samples: of the rows.
        multiple: of which T is the smallest that the longest sample fits into.
        least: rows; those behind the samples' are of padding alone.
    """
    longest = rounded(max(len(sample.input_ids) for sample in samples), multiple)
    input_ids = torch.zeros((max(len(samples), least), longest), dtype=torch.int64)  # [B, T]
    labels = torch.full(input_ids.shape, IGNORED)  # [B, T]
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)  # [T of this sample]
        labels[row, : len(sample.labels)] = torch.tensor(sample.labels)  # [T of this sample]
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)  # [N], [N]
    positions = rows * longest + columns  # [N]
    num_input_tokens, lines = sum(len(sample.input_ids) for sample in samples), tuple(sample.line for sample in samples)
    return Batch(input_ids, labels, positions, len(positions), num_input_tokens, lines)


def collate_packed(rows: Sequence[Sequence[Encoded]], multiple: int = 1, least: int = 1) -> Batch:
    """Put the samples of a row one behind the other: positions start anew in each, and no label is predicted across.

    What pads a row is a sample too; samples without a token make their number, and that of the ends, a multiple.
    """
    batch = collate([_joined(samples) for samples in rows], multiple, least)
    height, width = batch.input_ids.shape
    lengths: list[int] = []  # of samples, and of the padding behind them
    for samples in rows:
        own = [len(sample.input_ids) for sample in samples]
        lengths += own if sum(own) == width else [*own, width - sum(own)]
    lengths += (height - len(rows)) * [width]
    ends = [0, *itertools.accumulate(lengths)]
    ends += [ends[-1]] * (rounded(len(ends), multiple) - len(ends))
    return batch._replace(
        lines=tuple(sample.line for samples in rows for sample in samples),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).view_as(batch.input_ids),  # [B, T]
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),  # [S + 1]
        max_seqlen=max(lengths),
    )


def rounded(number: int, multiple: int) -> int:
    """Up to the next multiple."""
    return -(-number // multiple) * multiple


def _joined(samples: Sequence[Encoded]) -> Encoded:
    ids = [index for sample in samples for index in sample.input_ids]
    labels = [label for sample in samples for label in (IGNORED, *sample.labels[1:])]  # nothing precedes a sample's first id
    return Encoded(ids, labels, samples[0].line)


def pack(lengths: Sequence[int], order: Iterable[int], budget: int) -> list[list[int]]:
    """Best fit, longest first: each sample goes into the fullest row that has room for it, or into a new one.

    Args:
        lengths: of all samples, none above the budget.
        order: of their indices, kept among samples of one length; how many rows there are does not depend on it.
        budget: most tokens in a row.

    Source: best-fit-decreasing, as for language models in Ding et al., 2024 (arXiv 2404.10830).
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> rows
    rooms: list[int] = []  # its keys, ascending
    for index in sorted(order, key=lambda index: -lengths[index]):
        at = bisect.bisect_left(rooms, lengths[index])
        if at == len(rooms):
            room, row = budget, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(index)
        room -= lengths[index]
        if room not in with_room:
            with_room[room] = []
            bisect.insort(rooms, room)
        with_room[room].append(row)
    return rows


def epoch_rows(samples: "Samples", config: TrainConfig, epoch: int) -> Sequence[Row]:
    """The rows of an epoch in their order: one sample each or, with packing, as many as fit; always the same number.

    Packing goes by length, so that mostly the same samples share a row in each epoch; the order of rows changes.
    """
    order = epoch_order(len(samples), config.seed, epoch)
    if not config.packing:
        return order
    rows = pack(samples.lengths, order, config.max_length)
    return [rows[index] for index in epoch_order(len(rows), config.seed, epoch)]


def longest_rows(samples: "Samples", config: TrainConfig) -> list[Row]:
    """The rows of a micro-batch that needs the most memory, the longest last."""
    rows = sorted(epoch_rows(samples, config, epoch=1), key=lambda row: row_length(samples, row))
    return rows[-config.per_device_train_batch_size :]


def row_length(samples: "Samples", row: Row) -> int:
    """Tokens of a row, without padding."""
    return sum(map(samples.length, [row] if isinstance(row, int) else row))


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of samples in an epoch: a pure function, so that a resumed run needs no state to find it again."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_samples, generator=generator).tolist()


def micro_batches(
    samples: Sequence[Encoded], rows: Iterable[Row], batch_size: int, pin: bool = False, multiple: int = 1, least: int = 1
) -> Iterator[Batch]:
    """Collate `batch_size` rows at a time in the given order; the last batch may be smaller, but for padding."""
    for group in windows(rows, batch_size):
        packed = [[samples[index] for index in row] for row in group if isinstance(row, list)]
        if packed:
            batch = collate_packed(packed, multiple, least)
        else:
            batch = collate([samples[row] for row in group if isinstance(row, int)], multiple, least)
        yield batch.pin() if pin else batch


def training_batches(
    samples: Sequence[Encoded], rows: Iterable[Row], config: TrainConfig, pin: bool = False
) -> Iterator[Batch]:
    """The micro-batches of training. Where layers are compiled all have the same number of rows, so that one layer's code, and
    memory, is that of all: rows of padding fill up the last of an epoch."""
    size = config.per_device_train_batch_size
    least = 1 if config.compile == "none" else size
    return micro_batches(samples, rows, size, pin, config.length_multiple, least)


def windows(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`size` items at a time, the last window shorter: samples to a micro-batch, micro-batches to an optimizer step."""
    items = iter(items)
    while window := list(itertools.islice(items, size)):
        yield window
