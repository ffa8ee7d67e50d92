"""From conversations to token ids and labels: the prompt template, and which tokens carry the loss."""

import contextlib
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jinja2

from qlora.config import LossOn, PromptFormat
from qlora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from qlora.data.formats import Example
from qlora.data.messages import CLOSE, OPEN, TEXT, Message

T = TypeVar("T")

IGNORED = -100  # cross-entropy's own default for "not trained"
PIECES = re.compile(f"{OPEN}[^{OPEN}{CLOSE}]+{CLOSE}|[^{OPEN}{CLOSE}]+")
MARKS_AND_SPACE = re.compile(rf"[\s{OPEN}{CLOSE}]+")
THOUGHTS = ("<think>", "</think>")  # users write thoughts with these, so they are tokens also where a user wrote them
OPENED_THOUGHT = re.compile(r"<think>\s*\Z")  # what some generation prompts end in
# An empty block that others end in, which switches thinking off: Gemma 4's large models, QwQ.
NO_THOUGHT = re.compile(r"(?:<think>\s*</think>|<\|channel>thought\s*<channel\|>)\s*\Z")
LINKS = ("name", "tool_call_id")  # of a tool message: they point at a call, which is in the conversation anyway
ENDING = 200  # characters: what a template writes behind an answer is shorter
PLAIN = "Use --prompt-format plain."


class TokenizedExample(NamedTuple):
    """Token ids of one example and, of the same length, what is trained: the id itself, or IGNORED."""

    input_ids: list[int]
    labels: list[int]
    line: int


class CannotRender(ValueError):
    """A conversation that the prompt template loses a part of, or refuses.

    Attributes:
        hint: what to do.
    """

    def __init__(self, text: str, hint: str = PLAIN):
        """Keep the two apart: a caller puts file and line in front.

        Args:
            text: what is wrong, without a full stop.
            hint: what to do.
        """
        super().__init__(text)
        self.hint = hint


# -- formatting and masking ------------------------------------------------------------------------------------------


class PromptTemplate(NamedTuple):
    """How text becomes ids: the tokenizer, the prompt format, and the ids that begin a sample and end an answer."""

    tokenizer: "PreTrainedTokenizerBase"
    name: PromptFormat
    begin_ids: tuple[int, ...]  # a BOS, where the tokenizer puts one; in the chat format the template brings its own
    stop_id: int  # the tokenizer's eos in the plain format, the template's turn end in the chat format
    special: re.Pattern[str]  # finds the text of a special token
    date: str  # ISO 8601, local time, for templates that print the date; kept in the run, so that ids do not change overnight
    text_begin_ids: tuple[int, ...] = ()  # a BOS for a row that is one text, in either format
    renders_system: bool = True  # some chat templates leave out a system message without a word

    def mark(self, value: T) -> T:
        """A JSON value with marks around all that reads like a special token, so that `ids` takes it for plain text."""
        marked: Any = value
        if isinstance(value, str):
            marked = self.special.sub(rf"{OPEN}\g<0>{CLOSE}", value)
        elif isinstance(value, Mapping):
            marked = {self.mark(key): self.mark(item) for key, item in value.items()}
        elif isinstance(value, list | tuple):
            marked = [self.mark(item) for item in value]
        return marked  # type: ignore[no-any-return]

    def ids(self, text: str, after: str = "") -> list[int]:
        """Ids of `text` as it stands behind the text `after`.

        Tokenized alone it can differ: SentencePiece tokenizers (Phi-3's) put a space before whatever they see first, and
        the model would learn to answer " {"; some special tokens swallow the newline behind them. So both are tokenized
        together, and the ids of `after` cut off. Where a token would span the two they are tokenized apart after all.
        """
        if after:
            before, both = self.ids(after), self.ids(after + text)
            return both[len(before) :] if both[: len(before)] == before else self.ids(text)
        # No text of a user may become a special token. In the plain format all text is a user's; a chat template is made of
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

    @property
    def stop_text(self) -> str:
        """The stop token as text."""
        return str(self.tokenizer.convert_ids_to_tokens(self.stop_id))


def load_template(tokenizer: "PreTrainedTokenizerBase", name: PromptFormat, date: str | None = None) -> PromptTemplate:
    """The prompt format to train and to prompt in.

    Args:
        tokenizer: with a chat template for the chat format.
        name: of the format.
        date: of the run (ISO 8601), for templates that print the date, such as Llama 3's; None takes the current time.

    Raises:
        ConfigError: if the tokenizer has no eos, no template, or a template that ends a turn without a special token.
    """
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - {*THOUGHTS}
    date = date or datetime.datetime.now().isoformat(timespec="seconds")
    first = tokenizer("a").input_ids[0]
    bos_ids = (first,) if first == tokenizer.bos_token_id else ()
    if name == "plain":
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "The tokenizer has no eos token, so nothing would teach the model to stop.", hint="Use --prompt-format chat."
            )
        return PromptTemplate(tokenizer, name, bos_ids, tokenizer.eos_token_id, _any_of(texts), date, bos_ids)
    if tokenizer.chat_template is None:
        raise ConfigError("--prompt-format chat: the tokenizer has no chat template.", hint=PLAIN)
    simplest = [Message("user", "question"), Message("assistant", "answer")]
    try:
        turn = _render(tokenizer, date, simplest)
    except CannotRender as error:
        raise ConfigError(f"--prompt-format chat: {error}.", hint=PLAIN) from None
    if not ("question" in turn and "answer" in turn):
        raise ConfigError("--prompt-format chat: the template does not render messages that are plain text.", hint=PLAIN)
    tail = tokenizer(turn.rpartition("answer")[2].lstrip(), add_special_tokens=False).input_ids
    if not tail or tail[0] not in tokenizer.added_tokens_decoder:
        why = "the template ends an answer without a special token, so the model could not learn to stop"
        raise ConfigError(f"--prompt-format chat: {why}.", hint=PLAIN)
    texts.add(str(tokenizer.convert_ids_to_tokens(tail[0])))
    renders_system = True
    with contextlib.suppress(CannotRender):  # one that is refused is refused with its line
        renders_system = "(a system message)" in _render(tokenizer, date, [Message("system", "(a system message)"), *simplest])
    return PromptTemplate(tokenizer, name, (), tail[0], _any_of(texts), date, bos_ids, renders_system)


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """The longest first; or what matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))) or r"(?!)")


def encode_prompt(messages: tuple[Message, ...], template: PromptTemplate, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
    """Ids that an answer to `messages` is generated from; training saw the same ids.

    Raises:
        CannotRender: as encode does.
    """
    if messages[0].role == TEXT:
        return _text_ids(messages[0].content or "", template)
    return _encode_turns(_turns(messages, tools, template, "last"), template, "response")[0]


def encode(example: Example, template: PromptTemplate, loss_on: LossOn) -> TokenizedExample:
    """Tokenize prompts and answers apart and join their ids, so that no token hides where the loss begins.

    Returns:
        ids and labels of any length; every answer ends with the stop token, which is trained.

    Raises:
        CannotRender: if the template refuses the conversation or loses a part of it.
    """
    if example.messages[0].role == TEXT:
        return _encode_text(example, template)
    turns = _turns(example.messages, example.tools, template, loss_on)
    return TokenizedExample(*_encode_turns(turns, template, loss_on), example.line)


def _encode_text(example: Example, template: PromptTemplate) -> TokenizedExample:
    """All of it is trained, and a stop token behind it, which a text that was rendered before has already."""
    text = example.response
    stripped = text.rstrip()
    stops = tuple(filter(None, (template.stop_text, template.tokenizer.eos_token)))
    # White space behind a stop token begins another turn.
    ids = _text_ids(stripped, template) if stripped.endswith(stops) else [*_text_ids(text, template), template.stop_id]
    return TokenizedExample(ids, [*ids], example.line)


def _text_ids(text: str, template: PromptTemplate) -> list[int]:
    """Ids of a text as it stands. Special tokens are real: such a text often is a conversation that was rendered before."""
    ids: list[int] = template.tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids
    begin = [*template.text_begin_ids]
    return ids if ids[: len(begin)] == begin else begin + ids


class _Turn(NamedTuple):
    """An answer and what comes before it, from the stop token of the answer before on."""

    before: str  # that stop token's text, or nothing: what the context stands behind
    context: str
    answer: str | None  # as it is rendered, without its stop token; None is to be generated
    stop_id: int
    trained: bool = True


def _turns(
    messages: tuple[Message, ...], tools: Sequence[dict[str, Any]], template: PromptTemplate, loss_on: LossOn
) -> list[_Turn]:
    if template.name == "plain":
        return _plain_turns(messages, tools, template)
    conversation = _Conversation(template, template.mark([*tools]))
    marked = tuple(
        message._replace(content=template.mark(message.content), keys=template.mark(message.keys)) for message in messages
    )
    if tools or any(message.keys or message.role not in ("user", "assistant") for message in messages):
        marked = conversation.presentable(marked)
        conversation.check_used(marked)
    return conversation.turns(marked, loss_on == "last")


def _encode_turns(turns: list[_Turn], template: PromptTemplate, loss_on: LossOn) -> tuple[list[int], list[int]]:
    ids = list(template.begin_ids)
    labels = list(ids) if loss_on == "all" else [IGNORED] * len(ids)
    for turn in turns:
        context_ids = template.ids(turn.context, after=turn.before)
        ids += context_ids
        labels += context_ids if loss_on == "all" else [IGNORED] * len(context_ids)
        if turn.answer is not None:
            answer_ids = [*template.ids(turn.answer, after=turn.context), turn.stop_id]
            ids += answer_ids
            is_trained = turn.trained and (loss_on != "last" or turn is turns[-1])
            labels += answer_ids if is_trained else [IGNORED] * len(answer_ids)
    if turns[-1].answer is not None and all(label == IGNORED for label in labels[1:]):
        which = "the last answer" if loss_on == "last" else "every answer"
        raise CannotRender(f"nothing is trained: weight or train leaves out {which}", "Remove the row.")
    return ids, labels


def _plain_turns(messages: tuple[Message, ...], tools: Sequence[dict[str, Any]], template: PromptTemplate) -> list[_Turn]:
    keys = [key for message in messages for key in message.keys]
    roles = [f"messages of the role {message.role}" for message in messages if message.role in ("developer", "tool")]
    if lost := [*keys, *roles, *(["tools"] if tools else [])]:
        advice = f"Use --prompt-format chat, or leave it out: --ignore-columns {_column(lost[0])}." if not roles else ""
        raise CannotRender(f"the plain prompt format does not render {lost[0]}", advice or "Use --prompt-format chat.")
    turns, context = [], ""
    for message in messages:
        if message.role == "system":
            context = f"{message.content}\n\n"
        elif message.role == "user":
            context += f"### Instruction:\n{message.content}\n\n### Response:\n"
        else:
            turns.append(_Turn("", context, message.content, template.stop_id, message.trained))
            context = "\n\n"
    if messages[-1].role != "assistant":
        turns.append(_Turn("", context, None, template.stop_id))
    return turns


def _column(key: str) -> str:
    """What --ignore-columns calls a key of a message, or a column."""
    return key if key == "tools" else f"messages.{key}"


# -- chat templates --------------------------------------------------------------------------------------------------


class _Conversation(NamedTuple):
    """A chat template with the tools of one conversation. All messages that it gets are marked.

    What is trained is what the model has to write: all that follows the generation prompt in the render of the conversation up
    to and with the answer, whatever the template makes of it (an empty block of thoughts, a tool call), up to and with the
    token that ends the turn. What a template loses, it refuses.
    """

    template: PromptTemplate
    tools: Sequence[dict[str, Any]]

    def render(self, messages: Sequence[Message], to_be_answered: bool = False) -> str:
        """The text of some messages, and the generation prompt."""
        return _render(self.template.tokenizer, self.template.date, messages, to_be_answered, self.tools)

    def turns(self, messages: tuple[Message, ...], last_only: bool) -> list[_Turn]:
        """The answers, and what comes before each.

        A template may rewrite earlier turns, as Qwen3's drops their thoughts. What was rendered for the first answer is then no
        beginning of what is rendered for the second, so only the last can be trained, behind the render of all before it.
        """
        try:
            return self._all_turns(messages)
        except CannotRender:
            if not last_only:
                raise
        is_answered = messages[-1].role == "assistant"
        before = messages[:-1] if is_answered else messages
        prompt = self.render(before, to_be_answered=True)
        self._check_prompt(before, prompt)
        return [self._turn("", prompt, prompt, messages)]

    def _all_turns(self, messages: tuple[Message, ...]) -> list[_Turn]:
        turns: list[_Turn] = []
        done, stop_text, prompt = "", "", ""  # `done` is the rendered text up to and with the last stop token
        ends = [index for index, message in enumerate(messages) if message.role == "assistant"]
        for end in ends if messages[-1].role == "assistant" else [*ends, len(messages)]:
            prompt = self.render(messages[:end], to_be_answered=True)
            if not prompt.startswith(done):
                raise CannotRender(
                    "the chat template rewrites earlier turns of a conversation, so that its answers cannot all be trained",
                    "Train the last one with --loss-on last, or use --prompt-format plain.",
                )
            turns.append(self._turn(stop_text, prompt, prompt.removeprefix(done), messages[: end + 1]))
            stop_text = str(self.template.tokenizer.convert_ids_to_tokens(turns[-1].stop_id))
            done = f"{prompt}{turns[-1].answer}{stop_text}"
        self._check_prompt(messages[: ends[-1]] if messages[-1].role == "assistant" else messages, prompt)
        return turns

    def _turn(self, before: str, prompt: str, context: str, messages: tuple[Message, ...]) -> _Turn:
        """The last message as an answer behind `prompt`, or a turn without an answer if it is no answer."""
        message = messages[-1]
        if message.role != "assistant":
            return _Turn(before, context, None, self.template.stop_id)
        whole, content = self.render(messages), message.content or ""
        opened = OPENED_THOUGHT.search(prompt)
        answer, stop_id = self._behind(prompt, whole, content)
        is_lost = answer is None or not _is_in(content, prompt, answer)
        is_doubled = (answer or "").count(THOUGHTS[0]) + bool(opened) > content.count(THOUGHTS[0])
        if content.lstrip().startswith(THOUGHTS[0]) and (is_lost or is_doubled):
            answer, stop_id = self._thoughts_as_written(prompt, whole, content)
            is_lost = answer is None
        if is_lost and opened:
            advice = f"Begin the answer with {''.join(THOUGHTS)}, thoughts in between, or use --prompt-format plain."
            raise CannotRender(f"the chat template's prompt opens a thought, and the answer {_seen(content)} has none", advice)
        if answer is None or is_lost:
            raise CannotRender(f"the chat template does not render the answer {_seen(content)} as it stands behind its prompt")
        return _Turn(before, context, answer, stop_id, message.trained)

    def _behind(self, prompt: str, whole: str, content: str) -> tuple[str | None, int]:
        """What the template renders behind its generation prompt, and the stop token; None if it renders something else there.

        Nemotron's writes an empty block of thoughts without the newline that its generation prompt has, and Gemma 4's leaves
        out the empty block of its generation prompt.
        """
        if whole.startswith(prompt):
            return self._until_stop(whole.removeprefix(prompt))
        opened = OPENED_THOUGHT.search(prompt)
        if opened and not content.lstrip().startswith(THOUGHTS[0]) and whole.startswith(prompt.rstrip()):
            return self._until_stop(whole.removeprefix(prompt.rstrip()).lstrip())
        switched_off = NO_THOUGHT.search(prompt)
        if switched_off and not content.lstrip().startswith(THOUGHTS[0]) and whole.startswith(prompt[: switched_off.start()]):
            return self._until_stop(whole[switched_off.start() :])
        return None, self.template.stop_id

    def _until_stop(self, text: str) -> tuple[str, int]:
        """The answer at the beginning of a text, and the stop token behind it.

        Behind an answer a template writes special tokens and white space alone (Phi-3's ends each conversation with another
        eos). The turn end that load_template found is preferred; a call of a tool may have another.
        """
        special = self.template.special
        ending = re.compile(rf"(?:{special.pattern}|\s)+\Z").search(text, max(len(text) - ENDING, 0))
        if ending:
            at = text.find(self.template.stop_text, ending.start())
            if at >= 0:
                return text[:at], self.template.stop_id
            if stop := special.search(text, ending.start()):
                return text[: stop.start()], self.template.tokenizer.added_tokens_encoder[stop[0]]
        raise CannotRender("the chat template does not end an answer with a special token")

    def _thoughts_as_written(self, prompt: str, whole: str, content: str) -> tuple[str | None, int]:
        """An answer that begins with its thoughts, as it is written; None if the template lost more of it than these.

        DeepSeek-R1's template drops the thoughts of every answer, Qwen3.8's and Kimi K2's put an empty block before them.
        """
        opened = OPENED_THOUGHT.search(prompt)
        begin = prompt[: opened.start()] if opened else prompt
        if not whole.startswith(begin):
            return None, self.template.stop_id
        shown, stop_id = self._until_stop(whole.removeprefix(begin))
        written = content.lstrip()
        written = written if written.endswith(shown) else written.rstrip()
        if not written.endswith(shown) and not shown.endswith(written):
            return None, stop_id
        if opened is None:
            return written, stop_id
        tag = opened[0]  # with the newline that the generation prompt has behind it
        return written.removeprefix(tag) if written.startswith(tag) else written[len(tag.strip()) :].lstrip(), stop_id

    def _check_prompt(self, messages: Sequence[Message], prompt: str) -> None:
        """Refuse a template that leaves out a question or a system message."""
        for message in messages:
            if message.role == "system" and not self.template.renders_system:
                raise CannotRender(
                    "the chat template does not render a system message", "Remove it, or use --prompt-format plain."
                )
            if message.role == "user" and not _is_in(message.content or "", "", prompt):
                raise CannotRender(f"the chat template does not render the message {_seen(message.content)} as it stands")

    # What is below runs only for conversations with tools, other keys or other roles; it renders each a few times more.

    def presentable(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The messages as the template takes them: some want the arguments of calls as JSON text, some an empty content.

        Raises:
            CannotRender: if it takes them in no way.
        """
        if not any("tool_calls" in message.keys for message in messages):
            return messages
        ways = [messages, tuple(map(_with_arguments_as_text, messages))]
        ways += [tuple(message._replace(content=message.content or "") for message in way) for way in ways]
        found = next((way for way in ways if self._try(way) is not None), None)
        if found is None:
            self.render(messages, to_be_answered=messages[-1].role != "assistant")  # which raises
        return found or messages

    def check_used(self, messages: tuple[Message, ...]) -> None:
        """Refuse what the template does not render: the same text with and without it.

        A key is looked at in the conversation that ends with the answer it belongs to, or leads to: thoughts of earlier turns,
        which templates drop, are used there.

        Raises:
            CannotRender: naming the key or the role.
        """
        if self.tools and self._try(messages) == self._replace(tools=[])._try(messages):
            advice = "Leave them out with --ignore-columns tools, or use a model whose template has tools."
            raise CannotRender("the chat template does not render the column tools", advice)
        for index, message in enumerate(messages):
            end = next((at for at in range(index, len(messages)) if messages[at].role == "assistant"), len(messages) - 1)
            before, after = messages[:index], messages[index + 1 : end + 1]
            whole = self._try((*before, message, *after))
            for key in message.keys:
                others = {name: value for name, value in message.keys.items() if name != key}
                is_link = message.role == "tool" and key in LINKS
                if not is_link and whole == self._try((*before, message._replace(keys=others), *after)):
                    advice = f"Leave it out with --ignore-columns {_column(key)}, or use a model whose template has it."
                    raise CannotRender(
                        f"the chat template does not render {key} of a message of the role {message.role}", advice
                    )
            if message.role in ("tool", "developer"):
                other = message._replace(content=f"{message.content}.")
                if whole == self._try((*before, other, *after)):
                    advice = "Remove them, or use a model whose template has them."
                    raise CannotRender(f"the chat template does not render messages of the role {message.role}", advice)

    def _try(self, messages: tuple[Message, ...]) -> str | None:
        """The text of some messages, or None if the template refuses them."""
        try:
            return self.render(messages, to_be_answered=messages[-1].role != "assistant")
        except CannotRender:
            return None


def _with_arguments_as_text(message: Message) -> Message:
    calls = []
    for call in message.keys.get("tool_calls", ()):
        function = call.get("function")
        if isinstance(function, dict) and not isinstance(function.get("arguments", ""), str):
            call = {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
        calls.append(call)
    return message._replace(keys={**message.keys, "tool_calls": calls}) if calls else message


def _is_in(content: str, before: str, text: str) -> bool:
    """Whether `content` is in `text`; or, apart from white space, at its beginning with some of it at the end of `before`.

    Templates strip texts, and put thoughts on lines of their own; some begin them in the generation prompt.
    """
    if content.strip() in text:
        return True
    wanted, before, text = (MARKS_AND_SPACE.sub("", part) for part in (content, before, text))
    return (before + text).rfind(wanted) + len(wanted) > len(before) and wanted in before + text


def _seen(content: str | None) -> str:
    return repr(re.sub(f"[{OPEN}{CLOSE}]", "", content or "")[:40])


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    date: str,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    from transformers.utils.chat_template_utils import _compile_jinja_template  # here, as it imports torch

    conversation = [
        {"role": message.role, **({} if message.content is None else {"content": message.content}), **message.keys}
        for message in messages
    ]
    given: Any = list(tools) or None
    try:
        # transformers compiles a template once and keeps it; `strftime_now` is all that a template can ask of the clock.
        clock = datetime.datetime.fromisoformat(date)
        _compile_jinja_template(tokenizer.get_chat_template(tools=given)).globals["strftime_now"] = clock.strftime
        return str(
            tokenizer.apply_chat_template(
                conversation, tools=given, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    # Raised by templates themselves, against system messages for one; and by Python where they join what is no text.
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise CannotRender(f"the chat template refuses the conversation: {error}") from None
