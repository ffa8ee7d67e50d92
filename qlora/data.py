"""From a line of JSONL to a batch: reading, formatting, masking, collation, seeded order.

Shapes: B samples in a micro-batch, T positions (padding included), N trained tokens in a micro-batch.
A *token* is a label that is trained after the shift by one: the hidden state at position t predicts the id at t + 1.
"""

import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jinja2
import torch

from qlora.config import ExitCode, PromptFormat, TrainConfig, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
IGNORED = -100  # cross-entropy's own default for "not trained"
COLUMNS = (("instruction", "response"), ("prompt", "completion"), ("messages",))
ROLES = ("system", "user", "assistant")


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


class Encoded(NamedTuple):
    """Token ids of one example and, of the same length, what is trained: the id itself, or IGNORED."""

    input_ids: list[int]
    labels: list[int]
    line: int


class Batch(NamedTuple):
    """A micro-batch, right-padded. No attention mask: under a causal mask nothing real sees the padding behind it."""

    input_ids: torch.Tensor  # [B, T] int64
    labels: torch.Tensor  # [B, T] int64, IGNORED where not trained
    positions: torch.Tensor  # [N] int64: flat b * T + t of each hidden state that predicts a token, found on the CPU
    num_tokens: int  # N
    num_input_tokens: int  # without padding

    def to(self, device: torch.device) -> "Batch":
        """The same batch there; the copy does not wait when the source is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies by itself."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return self._replace(
            input_ids=function(self.input_ids), labels=function(self.labels), positions=function(self.positions)
        )


# -- reading ---------------------------------------------------------------------------------------------------------


def read_examples(source: str | Path, default_split: str) -> tuple[list[Example], str]:
    """Read a JSONL or Parquet file, or a data set of the hub.

    Args:
        source: a path, or NAME or NAME:SPLIT of a hub data set.
        default_split: the split of a hub data set whose SPLIT is not given.

    Returns:
        The examples (at least one) and the columns they were found in, such as "instruction/response (ignored: id)".

    Raises:
        UserError: exit 3, naming file and line, if the source is missing, unreadable, empty or a row is not as it must be.
    """
    source = str(source)
    path = Path(source).expanduser()
    is_file = path.exists() or path.suffix in {".jsonl", ".json", ".parquet"} or source.startswith((".", "/", "~"))
    rows = _file_rows(path) if is_file else _hub_rows(source, default_split)
    examples: list[Example] = []
    columns: tuple[str, ...] | None = None
    ignored: set[str] = set()
    for line, row in rows:
        where = f"{source}:{line}"
        if not isinstance(row, dict):
            hint = " The file looks like one JSON array; JSONL has one object a line." if isinstance(row, list) else ""
            raise _wrong(f"{where}: each line must be a JSON object, not {type(row).__name__}.{hint}")
        columns = columns or _detect_columns(row, where)
        examples.append(Example(_messages(row, columns, where), line))
        ignored |= row.keys() - set(columns)
    if columns is None:
        raise _wrong(f"{source} holds no example. Give a file with one JSON object a line.")
    aside = f" (ignored: {', '.join(sorted(map(str, ignored)))})" if ignored else ""
    return examples, "/".join(columns) + aside


def _wrong(text: str) -> UserError:
    return UserError(ExitCode.DATA, text)


def _file_rows(path: Path) -> Iterator[tuple[int, object]]:
    if not path.exists():
        raise _wrong(
            f"{path} does not exist. Give the path of a JSONL or Parquet file, or a hub data set without a dot in front."
        )
    if path.is_dir():
        raise _wrong(f"{path} is a folder. Give one JSONL or Parquet file.")
    try:
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
    except OSError as error:
        raise _wrong(f"{path} cannot be read: {error.strerror or error}.") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
    except pyarrow.ArrowInvalid as error:
        raise _wrong(f"{path} is not a Parquet file: {error}.") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, object]]:
    # Lines end at \n alone (U+2028 may stand inside a string), so they are split as bytes and decoded one by one.
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise _wrong(
                    f"{path}:{line}: byte {error.start + 1} of the line is not UTF-8. Save the file as UTF-8."
                ) from None
            if not text:
                continue
            try:
                yield line, json.loads(text)
            except json.JSONDecodeError as error:
                seen = text[max(0, error.pos - 20) : error.pos + 20]
                raise _wrong(f"{path}:{line}:{error.colno}: not JSON: {error.msg}, near {seen!r}.") from None


def _hub_rows(source: str, default_split: str) -> Iterator[tuple[int, object]]:
    import datasets

    name, _, split = source.partition(":")
    split = split or default_split
    try:
        rows = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise _wrong(
            f"{source} is no file here, and as hub data set {name!r}, split {split!r}, it cannot be had: {reason}"
        ) from None
    yield from enumerate(rows, start=1)


def _detect_columns(row: dict, where: str) -> tuple[str, ...]:
    complete = [columns for columns in COLUMNS if row.keys() >= set(columns)]
    found = complete or [columns for columns in COLUMNS if row.keys() & set(columns)]
    forms = ", ".join("/".join(columns) for columns in COLUMNS)
    if len(complete) > 1:
        both = " and of ".join("/".join(columns) for columns in complete)
        raise _wrong(f"{where}: the row has columns of {both}. Keep one of the two, so that none is trained on by mistake.")
    if not found:
        raise _wrong(
            f"{where}: no known column among {', '.join(map(str, row)) or 'none'}. A row has one of {forms}.{_near(row)}"
        )
    return found[0]


def _near(row: dict) -> str:
    known = [name for columns in COLUMNS for name in columns]
    pairs = [(seen, difflib.get_close_matches(str(seen), known, n=1)) for seen in row if seen not in known]
    return "".join(f" {seen!r} is perhaps meant to be {near[0]!r}." for seen, near in pairs if near)


def _messages(row: dict, columns: tuple[str, ...], where: str) -> tuple[Message, ...]:
    missing = [name for name in columns if name not in row]
    if missing:
        raise _wrong(f"{where}: column {missing[0]!r} is missing; the row has {', '.join(map(str, row))}.{_near(row)}")
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
        if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
            raise _wrong(f"{where}: {name} holds half of a surrogate pair, which is no character. Remove it.")
    return tuple(turns)


def _conversation(messages: object, where: str) -> list[Message]:
    form = {"role", "content"}
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and form <= m.keys() for m in messages):
        raise _wrong(f'{where}: messages must be a list of {{"role": ..., "content": ...}}.')
    turns = [Message(message["role"], message["content"]) for message in messages]
    roles = [turn.role for turn in turns]
    if set(roles) - set(ROLES):
        raise _wrong(f"{where}: unknown role {min(set(roles) - set(ROLES))!r}. Roles are {', '.join(ROLES)}.")
    spoken = roles[1:] if roles[0] == "system" else roles
    if len(spoken) % 2 or not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise _wrong(
            f"{where}: after an optional system message, user and assistant must take turns and assistant end; "
            f"roles are {', '.join(roles)}."
        )
    return turns


# -- formatting and masking ------------------------------------------------------------------------------------------


class Format(NamedTuple):
    """How text becomes ids: the tokenizer, the form, and the ids that begin a sample and end an answer."""

    tokenizer: "PreTrainedTokenizerBase"
    name: PromptFormat
    begin_ids: tuple[int, ...]  # a BOS, where the tokenizer puts one; in the chat form the template brings its own
    stop_id: int  # the tokenizer's eos in the plain form, the template's turn end in the chat form

    def ids(self, text: str, after: str = "") -> list[int]:
        """Ids of `text` as it stands behind the text `after`.

        Tokenised alone it can differ: SentencePiece tokenizers (Phi-3's) put a space before whatever they see first, and
        the model would learn to answer " {"; some special tokens swallow the newline behind them. So both are tokenised
        together, and the ids of `after` cut off. Where a token would span the two they are tokenised apart after all.
        """
        if not after:
            # In the plain form no text of a user may become a special token; a chat template is made of them.
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=self.name == "plain").input_ids
        before, both = self.ids(after), self.ids(after + text)
        return both[len(before) :] if both[: len(before)] == before else self.ids(text)


def read_format(tokenizer: "PreTrainedTokenizerBase", name: PromptFormat) -> Format:
    """The form to train and to prompt in.

    Raises:
        UserError: exit 2 if the tokenizer has no eos, no template, or a template that ends a turn without a special token.
    """
    if name == "plain":
        if tokenizer.eos_token_id is None:
            why = "The tokenizer has no eos token, so nothing would teach the model to stop. Use --prompt-format chat."
            raise UserError(ExitCode.CONFIGURATION, why)
        first = tokenizer("a").input_ids[0]
        return Format(tokenizer, name, (first,) if first == tokenizer.bos_token_id else (), tokenizer.eos_token_id)
    if tokenizer.chat_template is None:
        why = "--prompt-format chat: the tokenizer has no chat template. Use --prompt-format plain."
        raise UserError(ExitCode.CONFIGURATION, why)
    try:
        turn = _render(tokenizer, [Message("user", "question"), Message("assistant", "answer")], add_generation_prompt=False)
    except ValueError as error:
        raise UserError(ExitCode.CONFIGURATION, f"--prompt-format chat: {error}. Use --prompt-format plain.") from None
    tail = tokenizer(turn.rpartition("answer")[2].lstrip(), add_special_tokens=False).input_ids
    if not tail or tail[0] not in tokenizer.added_tokens_decoder:
        why = "the template ends an answer without a special token, so the model could not learn to stop"
        raise UserError(ExitCode.CONFIGURATION, f"--prompt-format chat: {why}. Use --prompt-format plain.")
    return Format(tokenizer, name, (), tail[0])


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
    stop_text = str(form.tokenizer.convert_ids_to_tokens(form.stop_id))
    done = ""  # the rendered text up to and with the last stop token
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = _render(form.tokenizer, messages[:index], add_generation_prompt=True)
        before = stop_text if done else ""
        if not message.content:
            yield before, prompt.removeprefix(done), ""
            return
        marker = "(the answer)"
        marked = _render(form.tokenizer, (*messages[:index], message._replace(content=marker)), add_generation_prompt=False)
        lead = marked.removeprefix(prompt).partition(marker)[0]
        rest = _render(form.tokenizer, messages[: index + 1], add_generation_prompt=False).removeprefix(prompt + lead)
        answer = message.content if rest.startswith(message.content) else message.content.strip()
        if not prompt.startswith(done):
            raise ValueError(
                "the chat template rewrites earlier turns of a conversation, so that only single turns can be trained"
            )
        end = rest.find(stop_text, len(answer))
        if not (marked.startswith(prompt) and marker in marked and rest.startswith(answer)) or end < 0:
            raise ValueError(f"the chat template does not render the answer {answer[:40]!r} as it stands behind its prompt")
        yield before, prompt.removeprefix(done), lead + answer
        done = prompt + lead + rest[: end + len(stop_text)]


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Iterable[Message], add_generation_prompt: bool) -> str:
    conversation = [message._asdict() for message in messages]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt))
    except jinja2.TemplateError as error:  # raised by templates themselves, against system messages for one
        raise ValueError(f"the chat template refuses the conversation: {error}") from None


def encode_all(examples: list[Example], source: str | Path, form: Format, config: TrainConfig) -> tuple[list[Encoded], str]:
    """Encode examples and deal with those longer than `config.max_length`.

    Returns:
        The samples, each with at least one token to train on; and a line that counts them and names what was left out.

    Raises:
        UserError: exit 3 if none is left, if one is too long under `--on-long error`, or the chat template fails on one.
    """
    kept: list[Encoded] = []
    dropped: list[int] = []
    truncated = 0
    for example in examples:
        try:
            encoded = encode(example, form, config.loss_on)
        except ValueError as error:
            raise _wrong(f"{source}:{example.line}: {error}. Use --prompt-format plain.") from None
        length = len(encoded.input_ids)
        if length > config.max_length:
            if config.on_long == "error":
                raise _wrong(f"{source}:{example.line}: {length} tokens, more than --max-length {config.max_length}.")
            encoded = Encoded(encoded.input_ids[: config.max_length], encoded.labels[: config.max_length], example.line)
            if config.on_long == "drop" or all(label == IGNORED for label in encoded.labels[1:]):
                dropped.append(example.line)
                continue
            truncated += 1
        kept.append(encoded)
    if not kept:
        advice = (
            "Raise it, or use --on-long truncate." if config.on_long == "drop" else "Raise it: their prompts alone are longer."
        )
        raise _wrong(f"{source}: none of {len(examples)} examples fits --max-length {config.max_length}. {advice}")
    tokens = sum(label != IGNORED for encoded in kept for label in encoded.labels[1:])
    longest = max(len(encoded.input_ids) for encoded in kept)
    notes = f"{len(kept)} examples, {tokens:,} tokens to train on, the longest of {longest}"
    if truncated:
        notes += f"; {truncated} cut to {config.max_length}"
    if dropped:
        more = ", ..." if len(dropped) > 10 else ""
        lines = ", ".join(map(str, dropped[:10]))
        notes += f"; {len(dropped)} dropped as longer than {config.max_length} (lines {lines}{more})"
    return kept, notes


def kept_examples(examples: list[Example], samples: list[Encoded]) -> list[Example]:
    """The examples that encode_all kept."""
    lines = {sample.line for sample in samples}
    return [example for example in examples if example.line in lines]


# -- collation and order ---------------------------------------------------------------------------------------------


def collate(samples: list[Encoded]) -> Batch:
    """Pad on the right to the longest sample, with id 0: any would do, as padding is told by length, never by its id."""
    longest = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.zeros((len(samples), longest), dtype=torch.int64)  # [B, T]
    labels = torch.full((len(samples), longest), IGNORED)  # [B, T]
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)  # [T of this sample]
        labels[row, : len(sample.labels)] = torch.tensor(sample.labels)  # [T of this sample]
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)  # [N], [N]
    positions = rows * longest + columns  # [N]
    return Batch(input_ids, labels, positions, len(positions), sum(len(sample.input_ids) for sample in samples))


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of samples in an epoch: a pure function, so that a resumed run needs no state to find it again."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_samples, generator=generator).tolist()


def micro_batches(samples: list[Encoded], order: Iterable[int], batch_size: int, pin: bool = False) -> Iterator[Batch]:
    """Collate `batch_size` samples at a time in the given order; the last batch may be smaller."""
    for indices in windows(order, batch_size):
        batch = collate([samples[index] for index in indices])
        yield batch.pin() if pin else batch


def windows(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`size` items at a time, the last window shorter: samples to a micro-batch, micro-batches to an optimizer step."""
    items = iter(items)
    while window := list(itertools.islice(items, size)):
        yield window
