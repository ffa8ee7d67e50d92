"""Common mistakes in training data: what trains without an error and is rarely meant."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qlora.data.formats import Example
from qlora.data.messages import TEXT, Message
from qlora.data.template import IGNORED, PromptTemplate, TokenizedExample

KEPT = 20  # lines that a finding keeps
GRAM = 13  # words: what studies of contaminated benchmarks compare
MOSTLY = 0.8  # a share that makes the rest an exception
# Turns of other models' templates, and of plain-text ones, inside a message: it was rendered before, or two turns are one.
MARKUP = re.compile(
    r"<\|(?:im_start|im_end|user|assistant|system|end|eot_id|start_header_id|begin_of_text|endoftext)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|^</?s>|</s>\s*$|^###? ?(?:Instruction|Response|Input|Human|Assistant):?"
    r"|^(?:Human|Assistant|USER|ASSISTANT): ",
    re.MULTILINE,
)
ENDS_A_TEXT = re.compile(r"[.!?:;\])}>\"'`*_~|\u2026\u3002\uff01\uff1f\u201d\u2019\u00bb]\s*\Z")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of mistake in one source."""

    what: str
    examples: int  # that have it
    lines: list[int]  # of the first KEPT
    advice: str


def in_examples(examples: Iterable[Example], template: PromptTemplate) -> list[Finding]:
    """Mistakes that a source shows before it is tokenized, those that occur.

    Args:
        examples: read once; a digest of each prompt is kept, 200 bytes per example.
        template: its special tokens are looked for.
    """
    marked, markup, open_ended, conflicting = (list[int]() for _ in range(4))
    answers: dict[bytes, tuple[int, bytes]] = {}  # digest of a prompt -> line and digest of its first answer
    total = 0
    for example in examples:
        total += 1
        if example.messages[0].role == TEXT:
            continue
        texts = [message.content or "" for message in example.messages]
        if any(map(template.special.search, texts)):
            marked.append(example.line)
        elif any(map(MARKUP.search, texts)):
            markup.append(example.line)
        if example.response and not ENDS_A_TEXT.search(example.response):
            open_ended.append(example.line)
        answer = _digest(example.messages[-1:])
        _, first = answers.setdefault(_digest(example.prompt, example.tools), (example.line, answer))
        if first != answer:
            conflicting.append(example.line)
    if len(open_ended) > (1 - MOSTLY) * total:  # answers of this source are no sentences
        open_ended = []
    found = [
        (
            "a special token of the model is written in the text",
            marked,
            "It is trained as plain text. If it is left over from a template, remove it.",
        ),
        (
            "turns of a chat template are written in the text",
            markup,
            "If the text was rendered before, split it into messages.",
        ),
        (
            "the same prompt has another answer than before",
            conflicting,
            "The model learns a mix. Keep one, or add what tells the prompts apart.",
        ),
        (
            "the answer ends in the middle of a sentence, unlike most others",
            open_ended,
            "Perhaps it was cut when it was written. Complete it or remove it.",
        ),
    ]
    return [Finding(what, len(lines), lines[:KEPT], advice) for what, lines, advice in found if lines]


def without_stop(everything: Sequence[TokenizedExample], kept: Iterable[TokenizedExample]) -> list[Finding]:
    """Answers that are cut before their stop token, so that they teach the model not to stop.

    Args:
        everything: all samples, as long as they are.
        kept: those of them that are trained, cut to --max-length.
    """
    stops = {sample.line: sample.labels[-1] for sample in everything}
    lines = [sample.line for sample in kept if stops[sample.line] != IGNORED and sample.labels[-1] != stops[sample.line]]
    advice = "They teach the model not to stop. Raise --max-length or use --on-long drop."
    return [Finding("the answer is cut before its stop token", len(lines), lines[:KEPT], advice)] if lines else []


def shared_text(train: Iterable[Example], eval_examples: Sequence[Example]) -> list[Finding]:
    """Eval examples most of whose text is in the training data: an exact duplicate need not be there.

    Args:
        train: read once; nothing of it is kept.
        eval_examples: all of it; 100 bytes of memory per word.
    """
    grams = [set(_grams(example)) for example in eval_examples]
    wanted = set().union(*grams)
    seen = {gram for example in train for gram in _grams(example) if gram in wanted}
    lines = [
        example.line for example, own in zip(eval_examples, grams, strict=True) if own and len(own & seen) >= MOSTLY * len(own)
    ]
    what = f"at least {MOSTLY:.0%} of the answer's {GRAM}-word sequences are in training answers"
    advice = "They make the eval loss look too good. Remove them from the training or the eval data."
    return [Finding(what, len(lines), lines[:KEPT], advice)] if lines else []


def _grams(example: Example) -> Iterator[int]:
    """Hashes of all runs of GRAM words of the answers. Prompts are left out: they often share an instruction."""
    for message in example.messages:
        if message.role in ("assistant", TEXT):
            words = (message.content or "").casefold().split()
            for start in range(len(words) - GRAM + 1):
                yield hash(tuple(itertools.islice(words, start, start + GRAM)))


def _digest(messages: Iterable[Message], tools: Sequence[dict[str, Any]] = ()) -> bytes:
    text = repr(([(message.role, message.content, dict(message.keys)) for message in messages], [*tools]))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
