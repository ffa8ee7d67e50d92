"""How good answers are, against the libraries' own numbers, and how sure that is, against a formula."""

import math

import numpy
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from qlora.eval import scores

SCHEMA = '{"type": "record", "name": "A", "fields": [{"name": "x", "type": "int"}]}'
TEXTS = ["the cat sat on the mat", "a dog barked at the moon", "it rained all day long", "she sells sea shells here"]
WANTED = ["the cat sat on a mat", "the dog barked at the moon", "it rained all night", "she sells sea shells here"]


@pytest.mark.parametrize(
    ("text", "json", "avro"),
    [
        (SCHEMA, True, True),
        ('"string"', True, True),
        ("null", True, False),
        ("5", True, False),
        ('{"type": "strin"}', True, False),
        ('{"type": "record", "name": "A", "fields": [{"name": "x"}]}', True, False),
        ('{"type": "record", "name": "A", "fields": 3}', True, False),
        ('{"a": NaN}', False, False),
        ("```\n{}\n```", False, False),
        ("", False, False),
        ("[" * 5000, False, False),
    ],
)
def test_validity_is_that_of_the_format(text, json, avro):
    assert (scores.is_json(text), scores.is_avro(text)) == (json, avro)


def test_metrics_are_those_of_the_libraries():
    found = {name: float(metric(rows.sum(axis=0))) for name, (rows, metric) in scores.of_answers(TEXTS, WANTED).items()}
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(TEXTS, [WANTED]).score)
    each = [sacrebleu.sentence_chrf(text, [wanted]).score for text, wanted in zip(TEXTS, WANTED, strict=True)]
    assert found["chrf"] == pytest.approx(sum(each) / 4)
    assert found["exact_match"] == 0.25
    # The longest common subsequence by hand: 5 of 6 and 6, 5 of 6 and 6, 3 of 5 and 4, all of 5.
    assert found["rouge_l"] == pytest.approx((5 / 6 + 5 / 6 + 2 * 3 / 9 + 1) / 4)
    assert "valid_json" not in found and "valid_avro" not in found  # no reference is


@settings(max_examples=max(100, settings.default.max_examples))
@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_those_of_rouge_score(text):
    assert scores.Words().tokenize(text) == DefaultTokenizer().tokenize(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Привет, мир!", ["привет", "мир"]),
        ("我学习AI。", ["我", "学", "习", "ai"]),
        ("ที่ นี่", ["ที่", "นี่"]),  # a letter with the marks on it
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("e\u0301te\u0301_1", ["\xe9t\xe9", "1"]),
        ("+-= \N{GRINNING FACE}", []),
    ],
)
def test_words_are_found_in_every_script(text, words):
    assert scores.Words().tokenize(text) == words


def test_rouge_sees_letters_of_every_script():
    answers = ["Москва - столица", "我喜欢北京", "Größe", "x"]
    wanted = ["Москва - не столица", "我喜欢上海", "Große", "我"]
    rows, _ = scores.of_answers(answers, wanted)["rouge_l"]
    assert rows[:, 0] == pytest.approx([2 * 2 / (2 + 3), 3 / 5, 0.0, 0.0])


def test_validity_counts_only_where_every_reference_is_valid():
    both = scores.of_answers(["{}", SCHEMA], [SCHEMA, SCHEMA])
    assert {name: rows[:, 0].tolist() for name, (rows, _) in both.items() if "valid" in name} == {
        "valid_json": [1, 1],
        "valid_avro": [0, 1],
    }
    assert "valid_avro" not in scores.of_answers(["{}", SCHEMA], ["{}", SCHEMA])


def test_an_interval_is_that_of_the_mean_and_pairs_stay_together():
    generator = numpy.random.default_rng(0)
    base = generator.normal(3.0, 1.0, size=200)
    adapter = base - 1.0  # the same difference everywhere
    rows = [numpy.stack([values, numpy.ones(200)], axis=1) for values in (base, adapter)]
    found = scores.compare(*rows, scores.ratio, seed=1)
    half = 1.96 * base.std() / math.sqrt(200)
    assert found.base.value == pytest.approx(base.mean())
    assert found.base.high - found.base.low == pytest.approx(2 * half, rel=0.1)
    assert found.base.low < found.base.value < found.base.high
    assert found.difference == pytest.approx((-1.0, -1.0, -1.0))
    assert found == scores.compare(*rows, scores.ratio, seed=1) != scores.compare(*rows, scores.ratio, seed=2)


def test_a_ratio_weighs_by_what_it_is_divided_by():
    rows = numpy.array([[10.0, 1.0], [0.0, 9.0]] * 5)
    found = scores.compare(rows, rows, scores.ratio, seed=0)
    assert found.base.value == 1.0 and found.base.high > 3.0 and found.base.low < 0.4  # means of numbers: 5.0 and 2 to 8
    assert scores.compare(rows, rows, scores.perplexity, seed=0).base.value == pytest.approx(math.e)


def test_few_examples_have_a_value_and_no_interval():
    rows = numpy.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [6.0, 1.0], [8.0, 1.0]])
    found = scores.compare(rows[:4], rows[:4] + numpy.array([1.0, 0.0]), scores.ratio, seed=0)
    assert found == ((3.0, None, None), (4.0, None, None), (1.0, None, None))
    assert scores.shown(found.base, "token_accuracy") == ("300.0", "[-]")
    found = scores.compare(rows, rows, scores.ratio, seed=0)
    assert found.base.low < 4.0 < found.base.high
    assert scores.shown(found.base._replace(low=2.0, high=6.0), "loss") == ("4.000", "[2.000, 6.000]")


def test_bleu_is_resampled_as_a_corpus():
    rows, metric = scores.of_answers(TEXTS, WANTED)["bleu"]
    twice = numpy.array([2, 0, 1, 1]) @ rows
    texts, wanted = ([each[0], each[0], *each[2:]] for each in (TEXTS, WANTED))
    assert metric(numpy.stack([twice, rows.sum(axis=0)]))[0] == pytest.approx(sacrebleu.corpus_bleu(texts, [wanted]).score)
