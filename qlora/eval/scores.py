"""How good answers are beside what was wanted, and how sure that is: text metrics, validity, bootstrap. No torch in here."""

import json
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy

RESAMPLES = 2000
FEWEST = 5  # examples that have an interval: of n there are only (2n-1 over n) resamplings, 35 of 4
LOW, HIGH = 2.5, 97.5  # percentiles of an interval of 95 %
SHOWN = {  # name in the JSON -> label in the table, factor for people, decimals
    "loss": ("eval loss", 1, 3),  # in nats a token
    "perplexity": ("perplexity", 1, 3),
    "token_accuracy": ("token accuracy", 100, 1),  # this and what follows in percent
    "exact_match": ("exact match", 100, 1),
    "valid_json": ("valid JSON", 100, 1),
    "valid_avro": ("valid AVRO", 100, 1),
    "rouge_l": ("ROUGE-L", 100, 1),
    "bleu": ("BLEU", 1, 1),  # of the corpus
    "chrf": ("chrF", 1, 1),  # mean of the answers
}
UNSPACED = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")  # scripts whose words no space parts
# Import name -> package.
PACKAGES = {"fastavro": "fastavro", "rouge_score": "rouge-score", "sacrebleu": "sacrebleu", "regex": "regex"}


class Estimate(NamedTuple):
    """A value and its bootstrap interval of 95 %, which fewer than FEWEST examples do not have."""

    value: float | None  # None in a file, where it is not finite
    low: float | None
    high: float | None


class Comparison(NamedTuple):
    """A metric of base and adapter on the same examples, and of adapter minus base: resampled in pairs."""

    base: Estimate
    adapter: Estimate
    difference: Estimate


# -- one answer --------------------------------------------------------------------------------------------------------


def is_exact(answer: str, reference: str) -> bool:
    """Whether the two are the same text, ignoring leading and trailing whitespace."""
    return answer.strip() == reference.strip()


def is_json(text: str) -> bool:
    """Whether the text is one JSON value, NaN and infinities excluded."""
    return _parsed(text) is not None


def is_avro(text: str) -> bool:
    """Whether the text is an AVRO schema in JSON, as fastavro reads it."""
    import fastavro

    found = _parsed(text)
    if found is None:
        return False
    try:
        fastavro.parse_schema(found[0])
    except (fastavro.schema.SchemaParseException, fastavro.schema.UnknownType, AttributeError, KeyError, TypeError, ValueError):
        return False  # the last four are what it stumbles over in JSON that is no schema at all
    except RecursionError:
        return False
    return True


def _parsed(text: str) -> tuple[dict[str, object] | list[object]] | None:
    """The JSON value in a tuple, as None is one too."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return (json.loads(text, parse_constant=refuse),)
    except (ValueError, RecursionError):
        return None


class Words:
    """A tokenizer for rouge-score, whose own knows a-z and 0-9 alone: a word is a run of letters, marks and digits.

    On ASCII both find the same. Where a script has no spaces between words (UNSPACED), each
    character stands for itself, with the marks on it.
    """

    def __init__(self) -> None:
        # Not Unicode's own segmentation (UAX 29), which keeps "can't" and "3.14" whole, where published scores part them.
        unspaced = "".join(rf"\p{{Script={name}}}" for name in UNSPACED)
        import regex

        self.pattern = regex.compile(rf"(?V1)[\p{{L}}\p{{N}}&&[{unspaced}]]\p{{M}}*|[\p{{L}}\p{{M}}\p{{N}}--[{unspaced}]]+")

    def tokenize(self, text: str) -> list[str]:
        """Words in lower case, in their order; a letter and its accent are one character."""
        words: list[str] = self.pattern.findall(unicodedata.normalize("NFC", text).lower())
        return words


# -- all of them -------------------------------------------------------------------------------------------------------


def ratio(sums: numpy.ndarray) -> numpy.ndarray:
    """[..., 2] sums of a quantity and of what it is divided by -> [...]."""
    quotient: numpy.ndarray = sums[..., 0] / sums[..., 1]
    return quotient


def perplexity(sums: numpy.ndarray) -> numpy.ndarray:
    """[..., 2] sums of losses in nats and of tokens -> [...]."""
    exponential: numpy.ndarray = numpy.exp(numpy.minimum(ratio(sums), 700.0))
    return exponential


def bleu(sums: numpy.ndarray) -> numpy.ndarray:
    """[..., 10] sums of matched and all n-grams of orders 1 to 4, and of both lengths -> [...] BLEU of the corpus, 0 to 100."""
    from sacrebleu.metrics import BLEU

    rows = sums.reshape(-1, 10).astype(int).tolist()  # [R, 10]
    values = [BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score for row in rows]
    return numpy.array(values).reshape(sums.shape[:-1])


def of_answers(answers: Sequence[str], references: Sequence[str]) -> dict[str, tuple[numpy.ndarray, Callable[..., Any]]]:
    """Every text metric as what it sums over answers, so that any resampling of them is a sum too.

    Args:
        answers: to score, one at least.
        references: what was wanted, in the same order.

    Returns:
        Name -> statistics of each answer [n, k], and the function from their sum [..., k] to the metric. JSON and AVRO
        validity are shares of the answers, and are there only where every reference is valid.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    pairs = list(zip(answers, references, strict=True))
    scorer, corpus_bleu, chrf = RougeScorer(["rougeL"], tokenizer=Words()), BLEU(), CHRF()
    shares: dict[str, list[float]] = {
        "exact_match": [is_exact(answer, reference) for answer, reference in pairs],
        "rouge_l": [scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs],
        "chrf": [chrf.sentence_score(answer, [reference]).score for answer, reference in pairs],  # their mean
    }
    for name, is_valid in (("valid_json", is_json), ("valid_avro", is_avro)):
        if all(map(is_valid, references)):
            shares[name] = [is_valid(answer) for answer in answers]
    found: dict[str, tuple[numpy.ndarray, Callable[..., Any]]] = {
        name: (numpy.array([[float(value), 1.0] for value in values]), ratio) for name, values in shares.items()
    }
    each = [corpus_bleu.corpus_score([answer], [[reference]]) for answer, reference in pairs]
    found["bleu"] = (numpy.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in each], dtype=float), bleu)
    return found


def compare(base: numpy.ndarray, adapter: numpy.ndarray, metric: Callable[..., Any], seed: int) -> Comparison:
    """A metric of both, with intervals from a paired percentile bootstrap over FEWEST examples or more.

    Args:
        base: statistics of each example [n, k].
        adapter: the same of the same examples.
        metric: from their sum [..., k] to the metric [...].
        seed: of the resampling; two metrics of one seed and one n are resampled alike.

    Source: Efron and Tibshirani, 1993, chapter 13; in pairs, as Koehn, 2004, for BLEU.
    """
    n, k = base.shape
    values = [metric(each.sum(axis=0)) for each in (base, adapter)]
    if n < FEWEST:
        return Comparison(*(Estimate(float(value), None, None) for value in (*values, values[1] - values[0])))
    both = numpy.concatenate([base, adapter], axis=1)  # [n, 2 k]
    generator = numpy.random.default_rng(seed)
    # A resampling is how often each example was drawn; one at a time, so that memory is that of the examples.
    sums = numpy.stack([generator.multinomial(n, numpy.full(n, 1 / n)) @ both for _ in range(RESAMPLES)])  # [R, 2 k]
    resampled = [metric(sums[:, :k]), metric(sums[:, k:])]  # [R] each
    difference = _estimate(values[1] - values[0], resampled[1] - resampled[0])
    return Comparison(_estimate(values[0], resampled[0]), _estimate(values[1], resampled[1]), difference)


def shown(estimate: Estimate, name: str) -> tuple[str, str]:
    """A value and its interval for people, in the unit of SHOWN[name]; a dash for what there is not."""
    _, factor, decimals = SHOWN[name]
    value, low, high = ("-" if number is None else f"{factor * number:.{decimals}f}" for number in estimate)
    return value, "[-]" if estimate.low is None else f"[{low}, {high}]"


def _estimate(value: float, resampled: numpy.ndarray) -> Estimate:
    low, high = numpy.percentile(resampled, (LOW, HIGH))
    return Estimate(float(value), float(low), float(high))
