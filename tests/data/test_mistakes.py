"""Common mistakes are found where they are, and nowhere else."""

import pytest

from qlora.config import BUNDLED_EVAL, BUNDLED_TRAIN
from qlora.data import mistakes
from qlora.data.formats import Example, read_examples
from qlora.data.messages import TEXT, Message
from qlora.data.template import IGNORED, TokenizedExample

LONG = "This answer has more than thirteen words in it, so that runs of thirteen words can be compared"


def example(line: int, prompt: str, answer: str) -> Example:
    return Example((Message("user", prompt), Message("assistant", answer)), line)


def sound(count: int) -> list[Example]:
    return [example(line, f"question {line}", f"The answer is {line}.") for line in range(1, count + 1)]


def found(examples: list[Example], template) -> dict[str, list[int]]:
    return {finding.what: finding.lines for finding in mistakes.in_examples(iter(examples), template)}


def test_sound_data_has_none(template):
    assert found(sound(30), template) == {}
    for path in (BUNDLED_TRAIN, BUNDLED_EVAL):
        assert found(list(read_examples(path, "train")), template) == {}
    texts = [Example((Message(TEXT, f"<|user|>\n{n}<|end|>"),), n) for n in range(5)]  # rendered on purpose
    assert found(texts, template) == {}


@pytest.mark.parametrize(
    ("prompt", "answer", "words"),
    [
        ("q", "Yes.<|end|>", "a special token of the model"),
        ("an <|endoftext|> in it", "Yes.", "a special token of the model"),
        ("[INST] q [/INST]", "Yes.", "turns of a chat template"),
        ("<|im_start|>user\nq<|im_end|>", "Yes.", "turns of a chat template"),
        ("q", "### Response:\nYes.", "turns of a chat template"),
        ("q\nHuman: r", "Yes.", "turns of a chat template"),
        ("q", "Yes.</s>", "turns of a chat template"),
        ("question 4", "Another answer.", "the same prompt has another answer"),
        ("q", "It is the", "ends in the middle of a sentence"),
        ("q", "First,", "ends in the middle of a sentence"),
    ],
)
def test_each_is_found_with_its_line(template, prompt, answer, words):
    ((what, lines),) = found([*sound(20), example(77, prompt, answer)], template).items()
    assert words in what and lines == [77]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("question 4", "The answer is 4."), ("q", "[1, 2]"), ("q", "Is it?"), ("The Human: a study", "a ### b <s>.")],
)
def test_what_looks_like_one_and_is_none(template, prompt, answer):
    assert found([*sound(20), example(77, prompt, answer)], template) == {}


def test_the_same_question_with_other_tools_is_another_prompt(template):
    rows = [example(line, "q", f"Answer {line}.")._replace(tools=({"name": f"t{line}"},)) for line in (1, 2)]
    assert found(rows, template) == {}


def test_answers_that_are_no_sentences_need_no_full_stop(template):
    labels = [example(line, f"question {line}", "positive" if line % 2 else "negative") for line in range(30)]
    assert found(labels, template) == {}


def test_a_cut_answer_has_no_stop_token():
    whole = [TokenizedExample([1, 5, 6, 2], [IGNORED, 5, 6, 2], line) for line in (3, 4)]
    cut = [TokenizedExample([1, 5, 6], [IGNORED, 5, 6], 3), whole[1]]
    assert mistakes.without_stop(whole, whole) == []
    (finding,) = mistakes.without_stop(whole, cut)
    assert (finding.examples, finding.lines) == (1, [3])
    last = [TokenizedExample([1, 5, 2, 9], [IGNORED, 5, 2, IGNORED], 1)]  # ends with a prompt that is not trained
    assert mistakes.without_stop(last, [last[0]._replace(input_ids=[1, 5], labels=[IGNORED, 5])]) == []


def test_an_answer_most_of_which_is_in_the_training_data_is_found():
    train = [*sound(5), example(9, "q", f"Before it. {LONG} {LONG.upper()}")]
    others = [
        example(1, "another prompt", LONG.replace(" ", "  ").lower()),  # the same words
        example(2, "q", LONG.replace("thirteen", "twelve")),  # no run of 13 is the same
        example(3, "q", "The answer is 3."),  # too short to have one
        example(4, LONG, "The prompt is not compared."),
    ]
    (finding,) = mistakes.shared_text(iter(train), others)
    assert (finding.examples, finding.lines) == (1, [1]) and "80%" in finding.what
    assert mistakes.shared_text(iter(sound(5)), others) == []


def test_many_are_counted_and_the_first_are_listed(template):
    rows = [*sound(100), *(example(line, f"p {line}", "<|end|>.") for line in range(200, 230))]
    (finding,) = mistakes.in_examples(rows, template)
    assert finding.examples == 30 and finding.lines == list(range(200, 220))
