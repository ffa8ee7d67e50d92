"""From conversations to token ids and labels: the prompt template, and which tokens carry the loss."""

import datetime
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import jinja2

from qlora.config import PromptFormat
from qlora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from qlora.data.formats import CLOSE, OPEN, Example, Message

IGNORED = -100  # cross-entropy's own default for "not trained"
PIECES = re.compile(f"{OPEN}[^{OPEN}{CLOSE}]+{CLOSE}|[^{OPEN}{CLOSE}]+")


class TokenizedExample(NamedTuple):
    """Token ids of one example and, of the same length, what is trained: the id itself, or IGNORED."""

    input_ids: list[int]
    labels: list[int]
    line: int


# -- formatting and masking ------------------------------------------------------------------------------------------


class PromptTemplate(NamedTuple):
    """How text becomes ids: the tokenizer, the prompt format, and the ids that begin a sample and end an answer."""

    tokenizer: "PreTrainedTokenizerBase"
    name: PromptFormat
    begin_ids: tuple[int, ...]  # a BOS, where the tokenizer puts one; in the chat format the template brings its own
    stop_id: int  # the tokenizer's eos in the plain format, the template's turn end in the chat format
    special: re.Pattern[str]  # finds the text of a special token
    date: str  # ISO 8601, local time, for templates that print the date; kept in the run, so that ids do not change overnight

    def mark(self, message: Message) -> Message:
        """The message with marks around all that reads like a special token, so that `ids` takes it for plain text."""
        return message._replace(content=self.special.sub(rf"{OPEN}\g<0>{CLOSE}", message.content))

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


def load_template(tokenizer: "PreTrainedTokenizerBase", name: PromptFormat, date: str | None = None) -> PromptTemplate:
    """The prompt format to train and to prompt in.

    Args:
        tokenizer: with a chat template for the chat format.
        name: of the format.
        date: of the run (ISO 8601), for templates that print the date, such as Llama 3's; None takes the current time.

    Raises:
        ConfigError: if the tokenizer has no eos, no template, or a template that ends a turn without a special token.
    """
    texts = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, texts)) or r"(?!)")  # the longest first; or what matches nothing
    date = date or datetime.datetime.now().isoformat(timespec="seconds")
    if name == "plain":
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "The tokenizer has no eos token, so nothing would teach the model to stop.", hint="Use --prompt-format chat."
            )
        first = tokenizer("a").input_ids[0]
        begin_ids = (first,) if first == tokenizer.bos_token_id else ()
        return PromptTemplate(tokenizer, name, begin_ids, tokenizer.eos_token_id, special, date)
    if tokenizer.chat_template is None:
        raise ConfigError("--prompt-format chat: the tokenizer has no chat template.", hint="Use --prompt-format plain.")
    try:
        turn = _render(tokenizer, date, [Message("user", "question"), Message("assistant", "answer")])
    except ValueError as error:
        raise ConfigError(f"--prompt-format chat: {error}.", hint="Use --prompt-format plain.") from None
    tail = tokenizer(turn.rpartition("answer")[2].lstrip(), add_special_tokens=False).input_ids
    if not tail or tail[0] not in tokenizer.added_tokens_decoder:
        why = "the template ends an answer without a special token, so the model could not learn to stop"
        raise ConfigError(f"--prompt-format chat: {why}.", hint="Use --prompt-format plain.")
    return PromptTemplate(tokenizer, name, (), tail[0], special, date)


def encode_prompt(messages: tuple[Message, ...], template: PromptTemplate) -> list[int]:
    """Ids that an answer to `messages` (the last one a user's) is generated from; training saw the same ids."""
    return _encode_turns((*messages, Message("assistant", "")), template, loss_on="response")[0]


def encode(example: Example, template: PromptTemplate, loss_on: str) -> TokenizedExample:
    """Tokenize prompts and answers apart and join their ids, so that no token hides where the loss begins.

    Returns:
        ids and labels of any length; every answer ends with the stop token, which is trained.

    Raises:
        ValueError: if the chat template refuses the conversation, or does not render an answer as it stands.
    """
    return TokenizedExample(*_encode_turns(example.messages, template, loss_on), example.line)


def _encode_turns(messages: tuple[Message, ...], template: PromptTemplate, loss_on: str) -> tuple[list[int], list[int]]:
    ids = list(template.begin_ids)
    labels = list(ids) if loss_on == "all" else [IGNORED] * len(ids)
    for before, context, answer in _chat_turns(messages, template) if template.name == "chat" else _plain_turns(messages):
        context_ids = template.ids(context, after=before)
        ids += context_ids
        labels += context_ids if loss_on == "all" else [IGNORED] * len(context_ids)
        if answer:  # else it is to be generated
            answer_ids = [*template.ids(answer, after=context), template.stop_id]
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


def _chat_turns(messages: tuple[Message, ...], template: PromptTemplate) -> Iterator[tuple[str, str, str]]:
    """For each turn the stop token's text if one stands before it, what the template puts before the answer, and the answer.

    Whatever the template writes between its generation prompt and the answer (a space, an empty chain of thought) counts
    to the answer: when generating, the model has to write it.
    """
    messages = tuple(map(template.mark, messages))
    stop_text = str(template.tokenizer.convert_ids_to_tokens(template.stop_id))
    done = ""  # the rendered text up to and with the last stop token
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = _render(template.tokenizer, template.date, messages[:index], add_generation_prompt=True)
        before = stop_text if done else ""
        if not message.content:
            yield before, prompt.removeprefix(done), ""
            return
        marker = "(the answer)"
        marked = _render(template.tokenizer, template.date, (*messages[:index], message._replace(content=marker)))
        lead = marked.removeprefix(prompt).partition(marker)[0]
        rest = _render(template.tokenizer, template.date, messages[: index + 1]).removeprefix(prompt + lead)
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
