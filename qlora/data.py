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
        The examples (at least one) and the columns they were found in, such as "instruction/response".

    Raises:
        UserError: exit 3, naming file and line, if the source is missing, unreadable, empty or a row is not as it must be.
    """
    source = str(source)
    path = Path(source).expanduser()
    is_file = path.exists() or path.suffix in {".jsonl", ".json", ".parquet"} or source.startswith((".", "/", "~"))
    rows = _file_rows(path) if is_file else _hub_rows(source, default_split)
    examples: list[Example] = []
    columns: tuple[str, ...] | None = None
    for line, row in rows:
        where = f"{source}:{line}"
        if not isinstance(row, dict):
            hint = " The file looks like one JSON array; JSONL has one object a line." if isinstance(row, list) else ""
            raise _wrong(f"{where}: each line must be a JSON object, not {type(row).__name__}.{hint}")
        columns = columns or _detect_columns(row, where)
        examples.append(Example(_messages(row, columns, where), line))
    if columns is None:
        raise _wrong(f"{source} holds no example. Give a file with one JSON object a line.")
    return examples, "/".join(columns)


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
    found = [columns for columns in COLUMNS if row.keys() & set(columns)]
    forms = ", ".join("/".join(columns) for columns in COLUMNS)
    if len(found) > 1:
        both = " and of ".join("/".join(columns) for columns in found)
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


def stop_token_id(tokenizer: "PreTrainedTokenizerBase", prompt_format: PromptFormat) -> int:
    """The id that ends an answer: the tokenizer's eos in the plain form, the template's turn end in the chat form.

    Raises:
        UserError: exit 2 if the tokenizer has no eos, no template, or a template that ends a turn without a special token.
    """
    if prompt_format == "plain":
        if tokenizer.eos_token_id is None:
            raise UserError(
                ExitCode.CONFIGURATION,
                "The tokenizer has no eos token, so nothing would teach the model to stop. Use --prompt-format chat.",
            )
        return tokenizer.eos_token_id
    if tokenizer.chat_template is None:
        raise UserError(
            ExitCode.CONFIGURATION, "--prompt-format chat: the tokenizer has no chat template. Use --prompt-format plain."
        )
    probe = _render(tokenizer, [Message("user", "question"), Message("assistant", "answer")], add_generation_prompt=False)
    tail = tokenizer(probe[probe.rindex("answer") + len("answer") :].lstrip(), add_special_tokens=False).input_ids
    if not tail or tail[0] not in tokenizer.added_tokens_decoder:
        raise UserError(
            ExitCode.CONFIGURATION,
            "--prompt-format chat: the template ends an answer without a special token, so the model could not learn to stop. "
            "Use --prompt-format plain.",
        )
    return tail[0]


def encode_prompt(
    messages: tuple[Message, ...], tokenizer: "PreTrainedTokenizerBase", prompt_format: PromptFormat
) -> list[int]:
    """Ids that an answer to `messages` (the last one a user's) is generated from; training saw the same ids."""
    ids, _ = _encode_turns((*messages, Message("assistant", "")), tokenizer, prompt_format, loss_on="response")
    return ids


def encode(example: Example, tokenizer: "PreTrainedTokenizerBase", config: TrainConfig) -> Encoded:
    """Tokenise prompts and answers apart and join their ids, so that no merge hides where the loss begins.

    Returns:
        ids and labels of any length; every answer ends with the stop token, which is trained.

    Raises:
        UserError: exit 3 if the chat template does not render an answer as it stands.
    """
    ids, labels = _encode_turns(example.messages, tokenizer, config.prompt_format, config.loss_on)
    return Encoded(ids, labels, example.line)


def _encode_turns(
    messages: tuple[Message, ...], tokenizer: "PreTrainedTokenizerBase", prompt_format: PromptFormat, loss_on: str
) -> tuple[list[int], list[int]]:
    stop = stop_token_id(tokenizer, prompt_format)
    turns = _chat_turns(messages, tokenizer, stop) if prompt_format == "chat" else _plain_turns(messages)
    ids: list[int] = []
    labels: list[int] = []
    for context, answer in turns:
        # A BOS stands once, where the tokenizer puts it; a template brings its own.
        begins = not ids and prompt_format == "plain"
        context_ids = (_leading_ids(tokenizer) if begins else []) + _ids(tokenizer, context, prompt_format)
        ids += context_ids
        labels += context_ids if loss_on == "all" else [IGNORED] * len(context_ids)
        if answer:
            answer_ids = [*_continued_ids(tokenizer, answer, prompt_format), stop]
            ids += answer_ids
            labels += answer_ids
    return ids, labels


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, prompt_format: PromptFormat) -> list[int]:
    # In the plain form no text of a user may become a special token; a chat template is made of them.
    return tokenizer(text, add_special_tokens=False, split_special_tokens=prompt_format == "plain").input_ids


def _leading_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    first = tokenizer("a").input_ids[0]
    return [first] if first == tokenizer.bos_token_id else []


def _continued_ids(tokenizer: "PreTrainedTokenizerBase", text: str, prompt_format: PromptFormat) -> list[int]:
    """Ids of text that goes on after other text. SentencePiece tokenizers (Phi-3's) put a space before whatever they see
    first, and the model would learn to answer " {"; so they are shown a newline first, which is cut off again."""
    newline = _ids(tokenizer, "\n", prompt_format)
    joined = _ids(tokenizer, "\n" + text, prompt_format)
    return joined[len(newline) :] if joined[: len(newline)] == newline else _ids(tokenizer, text, prompt_format)


def _plain_turns(messages: tuple[Message, ...]) -> Iterator[tuple[str, str]]:
    context = ""
    for message in messages:
        if message.role == "system":
            context = message.content + "\n\n"
        elif message.role == "user":
            context += f"### Instruction:\n{message.content}\n\n### Response:\n"
        else:
            yield context, message.content
            context = "\n\n"


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Iterable[Message], add_generation_prompt: bool) -> str:
    conversation = [message._asdict() for message in messages]
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt))


def _chat_turns(messages: tuple[Message, ...], tokenizer: "PreTrainedTokenizerBase", stop: int) -> Iterator[tuple[str, str]]:
    stop_text = str(tokenizer.convert_ids_to_tokens(stop))
    done = ""  # the rendered text up to and with the last stop token
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = _render(tokenizer, messages[:index], add_generation_prompt=True)
        if not message.content:  # the answer is to be generated
            yield prompt.removeprefix(done), ""
            return
        whole = _render(tokenizer, messages[: index + 1], add_generation_prompt=False)
        rest = whole.removeprefix(prompt)  # space before the answer, the answer, the turn's end
        answer = message.content.strip()
        start = rest.find(answer)
        if not (prompt.startswith(done) and whole.startswith(prompt)) or start < 0 or rest[:start].strip():
            raise _wrong(
                f"The chat template does not render the answer {answer[:40]!r} as it stands after its prompt. "
                "Use --prompt-format plain."
            )
        end = start + len(answer)
        yield prompt.removeprefix(done), rest[:end]
        done = prompt + rest[: rest.index(stop_text, end) + len(stop_text)]


def encode_all(
    examples: list[Example], source: str | Path, tokenizer: "PreTrainedTokenizerBase", config: TrainConfig
) -> tuple[list[Encoded], str]:
    """Encode examples and deal with those longer than `config.max_length`.

    Returns:
        The samples, each with at least one token to train on; and a line that counts them and names what was left out.

    Raises:
        UserError: exit 3 if none is left, or if one is too long under `--on-long error`.
    """
    kept: list[Encoded] = []
    dropped: list[int] = []
    truncated = 0
    for example in examples:
        encoded = encode(example, tokenizer, config)
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
        raise _wrong(
            f"{source}: none of {len(examples)} examples fits --max-length {config.max_length}. "
            "Raise it, or use --on-long truncate."
        )
    tokens = sum(label != IGNORED for encoded in kept for label in encoded.labels[1:])
    longest = max(len(encoded.input_ids) for encoded in kept)
    notes = f"{len(kept)} examples, {tokens:,} tokens to train on, the longest of {longest}"
    if truncated:
        notes += f"; {truncated} cut to {config.max_length}"
    if dropped:
        more = ", ..." if len(dropped) > 10 else ""
        notes += (
            f"; {len(dropped)} dropped as longer than {config.max_length} (lines {', '.join(map(str, dropped[:10]))}{more})"
        )
    return kept, notes


# -- collation and order ---------------------------------------------------------------------------------------------


def collate(samples: list[Encoded], pad_id: int) -> Batch:
    """Pad on the right to the longest sample. Padding is told by length, never by its id: pad may equal the stop token."""
    longest = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), longest), pad_id)  # [B, T]
    labels = torch.full((len(samples), longest), IGNORED)  # [B, T]
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        labels[row, : len(sample.labels)] = torch.tensor(sample.labels)
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)  # [N], [N]
    positions = rows * longest + columns  # [N]
    return Batch(input_ids, labels, positions, len(positions), sum(len(sample.input_ids) for sample in samples))


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of samples in an epoch: a pure function, so that a resumed run needs no state to find it again."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_samples, generator=generator).tolist()


def micro_batches(
    samples: list[Encoded], order: Iterable[int], batch_size: int, pad_id: int, pin: bool = False
) -> Iterator[Batch]:
    """Collate `batch_size` samples at a time in the given order; the last batch may be smaller."""
    for indices in windows(order, batch_size):
        batch = collate([samples[index] for index in indices], pad_id)
        yield batch.pin() if pin else batch


def windows(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`size` items at a time, the last window shorter: samples to a micro-batch, micro-batches to an optimizer step."""
    items = iter(items)
    while window := list(itertools.islice(items, size)):
        yield window
