"""Conversations: what a message holds, how rows of data write it, and which answers are trained."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Required

import pydantic
from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from qlora.data.read import listed

# Around the text of a special token that a user wrote. Unicode promises that these two never stand for a character.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
NO_TEXT = re.compile(f"[\ud800-\udfff{OPEN}{CLOSE}]")
# ShareGPT's names of roles, and those of other programs, beside the names that chat templates know.
Role = Literal[
    "system", "developer", "user", "assistant", "tool",
    "human", "gpt", "chatgpt", "model", "bing", "bard", "function_call", "function", "function_response", "observation",
]  # fmt: skip
SAME_ROLE = {"human": "user", "observation": "tool", "function_response": "tool", "function": "tool"}
SAME_ROLE |= dict.fromkeys(("gpt", "chatgpt", "model", "bing", "bard", "function_call"), "assistant")
# Which role may follow which. A conversation ends with an answer.
FOLLOWS = {
    "": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
TEXT = "text"  # the role of a row that is one text, trained as a whole


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # system, developer, user, assistant or tool; TEXT for a text that is no conversation
    content: str | None  # None only beside tool_calls
    trained: bool = True  # of an answer: whether it may carry loss
    keys: Mapping[str, Any] = {}  # what else the chat template is given, such as tool_calls; never changed


# -- how rows write it -----------------------------------------------------------------------------------------------


def _sound(text: str) -> str:
    """The text, unless it is blank or holds what cannot be tokenized.

    Raises:
        PydanticCustomError: saying what is wrong.
    """
    if not text.strip():
        raise PydanticCustomError("blank", "is empty")
    return _without_marks(text)


def _without_marks(text: str) -> str:
    if found := NO_TEXT.search(text):
        what = "half of a surrogate pair" if found[0] < OPEN else "a noncharacter, which is used as a mark in here"
        raise PydanticCustomError("mark", "holds U+{code}, {what}", {"code": f"{ord(found[0]):04X}", "what": what})
    return text


def _named_as_templates_do(turns: object) -> object:
    """A list of messages with `role` and `content`, which ShareGPT calls `from` and `value`; CSV keeps it as JSON text."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = _from_json(turns)
    return [_named(turn) if isinstance(turn, dict) else turn for turn in turns] if isinstance(turns, list) else turns


def _named(turn: dict[str, Any]) -> dict[str, Any]:
    if "from" in turn and "role" not in turn:
        turn = {{"from": "role", "value": "content"}.get(key, key): value for key, value in turn.items()}
    content = turn.get("content")
    if not isinstance(content, list):
        return turn
    parts = [part["text"] for part in content if isinstance(part, dict) and part.keys() == {"type", "text"}]
    return {**turn, "content": parts[0]} if len(parts) == len(content) == 1 else turn


def _from_json(value: object) -> object:
    """A list that may be kept as the text of a JSON array, as tools often are."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError:
        raise PydanticCustomError("json", "must be a list, or the text of a JSON array") from None


Text = Annotated[str, AfterValidator(_sound)]
MaybeText = Annotated[str, AfterValidator(_without_marks)] | None
Tools = Annotated[list[dict[str, Any]] | None, BeforeValidator(_from_json)]


class _Turn(TypedDict, total=False):
    """A message as a row writes it; other keys are the chat template's."""

    __pydantic_config__ = pydantic.ConfigDict(strict=True, extra="allow")  # type: ignore[misc]  # as pydantic documents it

    role: Required[Role]
    content: MaybeText
    weight: Literal[0, 1] | None
    train: bool | None
    tool_calls: Tools


Turns = Annotated[list[_Turn], pydantic.Field(min_length=1), BeforeValidator(_named_as_templates_do)]


def read_turns(turns: Sequence[Mapping[str, Any]], column: str, ignored: Collection[str]) -> list[Message]:
    """Messages of validated turns.

    Args:
        turns: at least one.
        column: that holds them, named in errors.
        ignored: keys that are left out.

    Raises:
        ValueError: naming the message and the value that is wrong.
    """
    messages = []
    for index, turn in enumerate(turns):
        if turn.keys() == {"role", "content"} and turn["role"] != "function_call":  # most are; a shortcut
            messages.append(Message(SAME_ROLE.get(turn["role"], turn["role"]), turn["content"]))
        else:
            # A null key is one that Arrow filled in because another message has it.
            filled = {key: value for key, value in turn.items() if value is not None and key not in ignored}
            messages.append(_read_turn(filled, f"{column}[{index}]"))
        if not (messages[-1].content or "").strip() and not messages[-1].keys.get("tool_calls"):
            raise ValueError(f"{column}[{index}] ({messages[-1].role}) is empty")
    return messages


def _read_turn(turn: dict[str, Any], where: str) -> Message:
    where = f"{where} ({turn['role']})"
    written = turn.pop("role")
    role = SAME_ROLE.get(written, written)
    if role != "assistant" and (turn.get("weight") or turn.get("train")):
        raise ValueError(f"{where} is marked to be trained, and only answers can be; --loss-on all trains all prompts")
    content, weight, train = turn.pop("content", None), turn.pop("weight", 1), turn.pop("train", True)
    if written == "function_call":
        turn, content = {**turn, "tool_calls": _calls_of_text(content, where)}, None
    if not turn.get("tool_calls", True):
        del turn["tool_calls"]  # an empty list calls nothing, yet templates may ask only whether the key is there
    if "tool_calls" in turn:
        turn["tool_calls"] = [_with_parsed_arguments(call) for call in turn["tool_calls"]]
    if found := NO_TEXT.search("".join(_strings(turn))):
        raise ValueError(f"{where} holds U+{ord(found[0]):04X}, which is no character")
    return Message(role, content, bool(weight and train), turn)


def _calls_of_text(content: str | None, where: str) -> list[dict[str, Any]]:
    """ShareGPT writes a call as the JSON text of its name and arguments, or of a list of such."""
    try:
        calls = json.loads(content or "")
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError(f'{where} must be the JSON text of {{"name": ..., "arguments": ...}}, not {(content or "")[:60]!r}')
    return [{"type": "function", "function": call} for call in calls]


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object: OpenAI keeps them as text, chat templates expect the object, as vLLM does."""
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            return call
        if isinstance(arguments, dict):
            return {**call, "function": {**function, "arguments": arguments}}
    return call


def _strings(value: object) -> Iterable[str]:
    """All text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def checked(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, if each role may follow the one before and an answer ends them.

    Raises:
        ValueError: with the roles seen.
    """
    before = ""
    for message in messages:
        if message.role not in FOLLOWS.get(before, ()):
            break
        before = message.role
    else:
        if before == "assistant":
            return tuple(messages)
    raise ValueError(
        "after an optional system message, user and assistant must take turns (tool messages between two of assistant aside), "
        f"and assistant end; roles are {listed(message.role for message in messages)}"
    )
