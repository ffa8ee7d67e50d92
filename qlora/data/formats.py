"""From rows to conversations: the forms that rows have, recognized by their columns, and what each column becomes."""

import contextlib
import difflib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator

from qlora.data.messages import SAME_ROLE, TEXT, MaybeText, Message, Text, Tools, Turns, checked, read_turns
from qlora.data.read import LISTED, listed
from qlora.data.sources import AnySource, as_source
from qlora.errors import ConfigError, DataError
from qlora.validation import STRICT, validated

# What looks like part of a prompt. A row in which one of these is filled in and not used is refused.
OF_A_PROMPT = {
    "instruction", "prompt", "question", "query", "input", "context", "system", "system_prompt", "history", "tools",
    "functions", "documents", "image", "images", "audio", "audios", "video", "videos",
}  # fmt: skip
OF_AN_ANSWER = {"response", "output", "completion", "answer"}
DOUBTFUL = {*OF_A_PROMPT, *OF_AN_ANSWER, "messages", "conversations"}
PLANS = 1000  # sets of columns of one source that are kept in memory


class Example(NamedTuple):
    """One conversation: user and assistant in turns, ending with an answer, perhaps after a system message.

    Or one text, trained as a whole: a single message of the role TEXT.
    """

    messages: tuple[Message, ...]
    line: int  # 1-based line of a file with lines, else 1-based row; see sources.Source for several files
    tools: tuple[dict[str, Any], ...] = ()  # that the chat template may describe

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All that comes before the last answer."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The last answer; empty if it only calls tools."""
        return self.messages[-1].content or ""


class Prompt(NamedTuple):
    """A conversation that is to be answered, or a text that is to be continued, and where it stands, for messages."""

    messages: tuple[Message, ...]
    where: str
    tools: tuple[dict[str, Any], ...] = ()


class ColumnOptions(NamedTuple):
    """--columns and --ignore-columns."""

    names: Mapping[str, str] = {}  # our name -> the file's; never changed
    ignored: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, columns: Sequence[str], ignored: Sequence[str]) -> "ColumnOptions":
        """From the words of the command line.

        Raises:
            ConfigError: naming the word that is wrong.
        """
        known = list(dict.fromkeys(name for form in FORMS for name in form.model_fields))
        names: dict[str, str] = {}
        for word in columns:
            ours, equals, theirs = word.partition("=")
            if not (ours and equals and theirs):
                raise ConfigError(f"--columns {word} cannot be used: it must be OUR_NAME=NAME_IN_THE_FILE.")
            if ours not in known:
                near = difflib.get_close_matches(ours, known, n=1)
                advice = f"Perhaps you meant {near[0]}." if near else ""
                raise ConfigError(f"--columns {word}: there is no column {ours!r}. {advice} Known: {', '.join(known)}.")
            if ours in names or theirs in names.values():
                raise ConfigError(f"--columns {word}: one of the two names was given before.", hint="Keep one.")
            names[ours] = theirs
        if both := set(names.values()) & set(ignored):
            raise ConfigError(f"--columns and --ignore-columns both name {listed(both)}.", hint="Keep one of them.")
        return cls(names, frozenset(ignored))

    @property
    def ignored_keys(self) -> frozenset[str]:
        """Keys of messages that are left out: KEY of messages.KEY."""
        return frozenset(name.removeprefix("messages.") for name in self.ignored if name.startswith("messages."))

    def their(self, ours: str) -> str:
        """The file's name of a column, for messages."""
        return self.names.get(ours, ours)


NO_OPTIONS = ColumnOptions()


class SourceSummary(NamedTuple):
    """What was found when a source was read for the first time: its form, what became of its columns, and its content."""

    form: str  # "instruction/input/output"
    used: dict[str, str]  # our name -> the file's
    ignored: tuple[str, ...]
    rows: int
    sha256: str  # of all examples, as they are read
    empty: dict[str, int]  # our name of an optional column -> in how many rows it is empty
    keys: dict[str, int]  # key of messages that the chat template gets -> how many rows have it

    def __str__(self) -> str:
        """For the log."""
        notes = [f"{ours} is {theirs}" for ours, theirs in self.used.items() if ours != theirs]
        notes += [f"ignored: {listed(self.ignored)}"] if self.ignored else []
        return self.form + (f" ({'; '.join(notes)})" if notes else "")


# -- forms -----------------------------------------------------------------------------------------------------------


class Row(BaseModel):
    """A row of some form: required columns are what the form is recognized by."""

    model_config = STRICT

    def turns(self, ignored: Collection[str]) -> list[Message]:
        """Its conversation; `ignored` are keys of messages that are left out.

        Raises:
            ValueError: saying what is wrong.
        """
        raise NotImplementedError


class WithSystem(Row):
    """A conversation, perhaps with a system message and tools in columns of their own."""

    system: MaybeText = None
    tools: Tools = None


def _as_turns(role: str, value: object) -> object:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


class Pair(WithSystem):
    """A question, with what follows it after a blank line, and its answer: the two required columns."""

    def turns(self, ignored: Collection[str]) -> list[Message]:
        """Two messages."""
        asked, answered = (getattr(self, name) for name in REQUIRED[type(self)])
        more = (getattr(self, name, None) for name in ("input", "context"))
        parts = [asked, *(part for part in more if part and part.strip())]
        return [Message("user", "\n\n".join(parts)), Message("assistant", answered)]


class Instruction(Pair):
    """An instruction, perhaps with an input or a context."""

    instruction: Text
    input: MaybeText = None
    context: MaybeText = None


class Alpaca(Instruction):
    """Alpaca's form."""

    output: Text


class Dolly(Instruction):
    """Dolly's form, and the bundled data's."""

    response: Text


class PromptCompletion(Pair):
    """A prompt and its completion."""

    prompt: Text
    completion: Text

    def turns(self, ignored: Collection[str]) -> list[Message]:
        """Two messages; CSV can hold lists of messages as text alone, which must not be trained as text."""
        if _is_text_of_turns(self.prompt) and _is_text_of_turns(self.completion):
            raise ValueError(
                "prompt and completion are lists of messages as JSON text; save them as lists, in JSONL or Parquet"
            )
        return super().turns(ignored)


def _is_text_of_turns(text: str) -> bool:
    if not text.lstrip().startswith("[{"):
        return False
    with contextlib.suppress(ValueError, RecursionError):
        turns = json.loads(text)
        return all(isinstance(turn, dict) and "content" in turn for turn in turns)
    return False


class PromptCompletionLists(WithSystem):
    """The same as lists of messages; one of the two may be a text."""

    prompt: Annotated[Turns, BeforeValidator(partial(_as_turns, "user"))]
    completion: Annotated[Turns, BeforeValidator(partial(_as_turns, "assistant"))]

    def turns(self, ignored: Collection[str]) -> list[Message]:
        """The messages of both; answers in the prompt are not trained."""
        prompt = read_turns(self.prompt, "prompt", ignored)
        completion = read_turns(self.completion, "completion", ignored)
        return [*(message._replace(trained=message.role != "assistant") for message in prompt), *completion]


class QuestionAnswer(Pair):
    """A question and its answer."""

    question: Text
    answer: Text


class Messages(WithSystem):
    """A conversation as chat templates take it."""

    messages: Turns

    def turns(self, ignored: Collection[str]) -> list[Message]:
        """All of them."""
        return read_turns(self.messages, "messages", ignored)


class ShareGpt(WithSystem):
    """A conversation in ShareGPT's column, with `from` and `value` or with `role` and `content`."""

    conversations: Turns

    def turns(self, ignored: Collection[str]) -> list[Message]:
        """All of them."""
        return read_turns(self.conversations, "conversations", ignored)


class PlainText(Row):
    """A text that is trained as a whole; special tokens written in it are real."""

    text: Text

    def turns(self, ignored: Collection[str]) -> list[Message]:
        """The text."""
        return [Message(TEXT, self.text)]


FORMS: tuple[type[Row], ...] = (Alpaca, Dolly, PromptCompletion, QuestionAnswer, Messages, ShareGpt, PlainText)
LISTS = (Messages, ShareGpt)
REQUIRED = {form: [name for name, field in form.model_fields.items() if field.is_required()] for form in FORMS}


def form_name(form: type[Row], columns: Collection[str]) -> str:
    """Those columns of the form that a row has, as the log names them."""
    order = [*REQUIRED[form][:-1], "input", "context", REQUIRED[form][-1], "system", "tools"]
    return "/".join(name for name in order if name in columns and name in form.model_fields)


# -- columns ---------------------------------------------------------------------------------------------------------


BECOMES = {  # column -> what it becomes
    **dict.fromkeys(("instruction", "prompt", "question"), "the user's message"),
    **dict.fromkeys(("input", "context"), "follows the instruction after a blank line"),
    **dict.fromkeys(sorted(OF_AN_ANSWER), "the answer, trained"),
    **dict.fromkeys(("messages", "conversations"), "the conversation; answers are trained"),
    "text": "trained as a whole",
    "system": "the system message",
    "tools": "described by the chat template",
}


class Plan(NamedTuple):
    """How rows with certain columns are read."""

    form: type[Row]
    used: dict[str, str]  # our name -> the file's
    ignored: tuple[str, ...]
    doubtful: tuple[str, ...]  # of the ignored, those that may be part of a prompt or an answer: refused if filled in


def make_plan(columns: Collection[str], form: type[Row] | None, options: ColumnOptions, where: str) -> Plan:
    """Recognize the form of a row.

    Args:
        columns: of the row.
        form: of the rows before; None before the first.
        options: of the command line.
        where: file and line, for messages.

    Raises:
        DataError: if no form fits, or two do equally well.
        ConfigError: if --columns names a column that the form does not have.
    """
    theirs = set(options.names.values())
    own = {name: name for name in columns if name not in theirs and name not in options.ignored and name not in options.names}
    named = own | {ours: name for ours, name in options.names.items() if name in columns}  # our name -> the file's
    form = form or _recognized(named, options, where)
    missing = [name for name in REQUIRED[form] if name not in named]
    if missing:
        raise _missing(missing[:1], columns, options, where)
    for name in options.names:
        if name not in form.model_fields:
            text = (
                f"--columns {name}={options.names[name]}: rows of the form {form_name(form, REQUIRED[form])} have no {name!r}"
            )
            raise ConfigError(f"{text} ({where}).", hint=f"They have {', '.join(form.model_fields)}.")

    def uses(other: type[Row]) -> int:
        return len(other.model_fields.keys() & named.keys())

    used = {name: named[name] for name in form.model_fields if name in named}
    ignored = tuple(name for name in columns if name not in used.values())
    # Logged alone: what the user named, what a form holds that uses fewer columns, and beside messages a pair, as ultrachat
    # repeats its first question in `prompt`.
    lesser = [other for other in FORMS if form in LISTS or (named.keys() >= set(REQUIRED[other]) and uses(other) < uses(form))]
    known = {*options.ignored, *options.names, *(name for other in lesser for name in REQUIRED[other])}
    return Plan(form, used, ignored, tuple(name for name in ignored if name in DOUBTFUL and name not in known))


def _recognized(named: Mapping[str, str], options: ColumnOptions, where: str) -> type[Row]:
    complete = [form for form in FORMS if named.keys() >= set(REQUIRED[form])]
    if len(complete) > 1:
        complete = [form for form in complete if form is not PlainText]  # often the other columns, rendered
    if not complete:
        parts = [form for form in FORMS if named.keys() & set(REQUIRED[form])]
        if not parts:
            raise _unknown(named, where)
        asked = REQUIRED[parts[0]]
        beside = [form for form in parts if REQUIRED[form][0] == asked[0]] if asked[0] in named else parts[:1]
        missing = dict.fromkeys(name for form in beside for name in REQUIRED[form] if name not in named)
        raise _missing(list(missing), list(named.values()), options, where)
    uses = {form: len(form.model_fields.keys() & named.keys()) for form in complete}
    best = [form for form in complete if uses[form] == max(uses.values())]
    if len(best) > 1:
        both = " and of ".join("/".join(REQUIRED[form]) for form in best)
        raise DataError(
            f"{where}: the row has columns of {both}.",
            hint="Leave out those of one with --ignore-columns, so that none is trained on by mistake.",
        )
    return best[0]


def _missing(names: list[str], columns: Collection[str], options: ColumnOptions, where: str) -> DataError:
    wanted = " or ".join(repr(options.their(name)) for name in names)
    theirs = [f"{name}={options.names[name]}" for name in names if name in options.names]
    source = f" (--columns {theirs[0]})" if theirs else ""
    text = f"{where}: column {wanted}{source} is missing; the row has {listed(columns) or 'none'}.{_near(columns)}"
    return DataError(text, hint=f"If it has another name, give it: --columns {names[-1]}=NAME.")


def _unknown(named: Mapping[str, str], where: str) -> DataError:
    forms = ", ".join("/".join(REQUIRED[form]) for form in FORMS)
    text = (
        f"{where}: no known column among {listed(named.values()) or 'none'}. A row has one of {forms}.{_near(named.values())}"
    )
    return DataError(text, hint="Name yours: --columns instruction=NAME response=NAME.")


def _near(columns: Collection[str]) -> str:
    known = [name for form in FORMS for name in REQUIRED[form]]
    unknown = (str(name)[:40] for name in columns if name not in known)
    pairs = [(seen, difflib.get_close_matches(seen, known, n=1)) for seen in itertools.islice(unknown, LISTED)]
    return "".join(f" {seen!r} is perhaps meant to be {near[0]!r}." for seen, near in pairs if near)


def _is_filled(value: object) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {})


def read_row(row: Mapping[str, Any], plan: Plan, line: int, where: str, options: ColumnOptions = NO_OPTIONS) -> Example:
    """The conversation of a row.

    Raises:
        DataError: naming the column and the value that is wrong.
    """
    for name in plan.doubtful:
        if _is_filled(row[name]):
            kind = "part of a prompt" if name in OF_A_PROMPT else "the answer" if name in OF_AN_ANSWER else "the conversation"
            used = form_name(plan.form, plan.used)
            raise DataError(
                f"{where}: column {name!r} looks like {kind}, and rows of the form {used} do not use it.",
                hint=f"Leave it out with --ignore-columns {name}, or name the columns to use with --columns.",
            )
    try:
        columns = {ours: row[theirs] for ours, theirs in plan.used.items()}
        lists = plan.form is PromptCompletion and any(isinstance(columns[name], list) for name in REQUIRED[PromptCompletion])
        values: Row = validated(PromptCompletionLists if lists else plan.form, columns)
        messages = values.turns(options.ignored_keys)
        if not isinstance(values, WithSystem):
            return Example(tuple(messages), line)
        if values.system and values.system.strip():
            if messages[0].role == "system":
                raise ValueError("there is a column system and a system message too")
            messages = [Message("system", values.system), *messages]
        return Example(checked(messages), line, tuple(values.tools or ()))
    except ValueError as error:
        raise DataError(f"{where}: {error}.", hint="Fix the row or remove it.") from None


# -- reading ---------------------------------------------------------------------------------------------------------


def check_source(source: AnySource, default_split: str, options: ColumnOptions = NO_OPTIONS) -> SourceSummary:
    """Read all of a source and keep nothing of it.

    Args:
        source: paths, globs, folders, or hub data sets; see sources.Source.
        default_split: of a data set whose SPLIT is not given.
        options: names of columns, and what is ignored.

    Returns:
        What became of its columns.

    Raises:
        UserError: naming file and line, if the source is missing, unreadable, empty or a row is not as it must be; exit 2 if
            --columns does not fit it.
    """
    used: dict[str, str] = {}
    ignored: set[str] = set()
    before: Plan | None = None
    rows, digest = 0, hashlib.sha256()
    empty, keys = Counter[str](), Counter[str]()
    for example, plan, row in _examples(source, default_split, options):
        rows += 1
        digest.update(repr(example).encode())
        keys.update({key for message in example.messages for key in message.keys})
        empty.update(
            ours for ours, theirs in plan.used.items() if ours not in REQUIRED[plan.form] and not _is_filled(row[theirs])
        )
        if plan is not before:
            used, before = used | plan.used, plan
            ignored |= set(plan.ignored[: LISTED + 1]) if len(ignored) <= LISTED else set()
    assert before is not None  # as there is an example
    for ours, theirs in options.names.items():
        if ours not in used:
            raise DataError(f"{source}: no row has the column {theirs!r} (--columns {ours}={theirs}).", hint="Check its name.")
    in_order = {name: used[name] for name in before.form.model_fields if name in used}
    form = form_name(before.form, in_order)
    return SourceSummary(form, in_order, tuple(sorted(ignored)), rows, digest.hexdigest(), {**empty}, {**keys})


def read_examples(source: AnySource, default_split: str, options: ColumnOptions = NO_OPTIONS) -> Iterator[Example]:
    """The examples of a source, at least one, read as they are asked for.

    Raises:
        UserError: as check_source, and as late as at the row in question.
    """
    return (example for example, _, _ in _examples(source, default_split, options))


def _examples(
    source: AnySource, default_split: str, options: ColumnOptions
) -> Iterator[tuple[Example, Plan, Mapping[str, Any]]]:
    """The example in each row, how the row was read, and the row; the form of the first row is that of all."""
    source = as_source(source, default_split)
    plans: dict[tuple[str, ...], Plan] = {}
    form: type[Row] | None = None
    for line, where, row in source.rows():
        if not isinstance(row, dict):
            hint = 'Write texts as {"text": ...}.' if isinstance(row, str) else "JSONL has one object per line."
            raise DataError(f"{where}: each line must be a JSON object, not {type(row).__name__}.", hint=hint)
        plan = plans.get(tuple(row))
        if plan is None:
            if len(plans) == PLANS:
                plans.clear()
            plan = plans[tuple(row)] = make_plan(row, form, options, where)
            form = plan.form
        yield read_row(row, plan, line, where, options), plan, row
    if form is None:
        raise DataError(f"{source} holds no example.", hint="Give a file with one JSON object per line.")


def read_prompts(source: AnySource, options: ColumnOptions = NO_OPTIONS) -> list[Prompt]:
    """Prompts of a source, at least one: of rows, whose answers may be missing, or the lines of a text.

    Raises:
        DataError: naming file and line, as read_examples does.
    """
    source = as_source(source, "test")
    prompts = [as_prompt(row, where, options) for _, where, row in source.rows(as_prompts=True)]
    if not prompts:
        raise DataError(f"{source} holds no prompt.", hint="Give a text file with one per line, or JSONL.")
    return prompts


def as_prompt(row: object, where: str, options: ColumnOptions = NO_OPTIONS) -> Prompt:
    """A text, or a row with or without its answer, as the messages that are to be answered.

    Raises:
        DataError: beginning with `where`.
    """
    if isinstance(row, str):
        row, options = {"prompt": row}, NO_OPTIONS
    if not isinstance(row, dict):
        raise DataError(f"{where}: each line must be a JSON object, not {type(row).__name__}.")
    completed = dict(row)  # with some answer, so that a row is checked as one of training is; it goes again below
    for form in LISTS:
        column = options.their(REQUIRED[form][0])
        if isinstance(turns := row.get(column), list) and _is_open(turns):
            completed[column] = [*turns, {"role": "assistant", "content": "any"}]
    pairs = [REQUIRED[form] for form in FORMS if len(REQUIRED[form]) == 2 and options.their(REQUIRED[form][0]) in row]
    if pairs and not any(options.their(name) in row for name in OF_AN_ANSWER):
        answers = [answer for _, answer in pairs]
        completed[options.their(next(filter(options.names.get, answers), answers[0]))] = "any"
    example = read_row(completed, make_plan(completed, None, options, where), 0, where, options)
    is_text = example.messages[0].role == TEXT
    return Prompt(example.messages if is_text else example.prompt, where, example.tools)


def _is_open(turns: list[Any]) -> bool:
    """Whether a list of messages ends with one that is to be answered."""
    last = turns[-1] if turns else None
    role = last.get("role", last.get("from")) if isinstance(last, dict) else None
    return isinstance(role, str) and SAME_ROLE.get(role, role) in ("user", "tool")
