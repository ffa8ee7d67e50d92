"""What holds for any file and any batch: a file is refused with its line or every sample is sound; mates change no loss."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.config import TrainConfig
from qlora.data.batch import Batch, collate
from qlora.data.dataset import encode_all
from qlora.data.formats import REQUIRED, Example, check_source, read_examples
from qlora.data.messages import OPEN, TEXT
from qlora.data.template import IGNORED, PromptTemplate, TokenizedExample, encode, load_template
from qlora.errors import ExitCode, UserError
from qlora.model.loss import Head, read_head, token_loss_sum
from tests.helpers import adapted_model, wake_adapters

pytestmark = pytest.mark.faults

COLUMNS = [tuple(names) for names in REQUIRED.values()]
NAMES = [*(name for columns in COLUMNS for name in columns), "input", "context", "system", "tools", "weight", "train"]
WITHOUT_LINE = ("holds no example", "more than a fifth", "examples fits")

# Of all planes, lone surrogates and noncharacters too, with special tokens among them.
tokens = st.sampled_from(["<|end|>", "<|user|>\n", "<|endoftext|>", "<|<|end|>end|>", "\n\n", OPEN, "\ud800"])
texts = st.lists(st.one_of(st.text(max_size=9), st.characters(), tokens), max_size=5).map("".join)
sound_texts = st.lists(st.one_of(st.text(max_size=9), tokens.filter(str.isascii)), max_size=5).map("".join).filter(str.strip)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.sampled_from(NAMES), texts), inner)),
    max_leaves=5,
)


@st.composite
def rows(draw, columns: tuple[str, ...]) -> dict:
    """A row that is as it must be, unless a text in it is blank or holds U+FDD0."""
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * draw(st.integers(1, 3))
    if columns == ("conversations",):
        return {"conversations": [{"from": role, "value": draw(sound_texts)} for role in roles]}
    if columns == ("messages",):
        return {"messages": [{"role": role, "content": draw(sound_texts)} for role in roles]}
    return {name: draw(sound_texts) for name in columns}


@st.composite
def mutated_lines(draw, columns: tuple[str, ...]) -> str:
    """A line that has lost something, or has something of another type, too much, or broken."""
    row = draw(rows(columns))
    fault = draw(st.sampled_from(["missing", "type", "extra", "message", "cut", "typed", "unescaped"]))
    if fault == "missing":
        del row[draw(st.sampled_from(sorted(row)))]
    elif fault == "type":
        row[draw(st.sampled_from(sorted(row)))] = draw(values)
    elif fault == "extra":
        row |= draw(st.dictionaries(st.one_of(st.sampled_from(NAMES), texts), values, max_size=3))
    elif fault == "message" and "messages" in row:
        message = draw(st.sampled_from(row["messages"]))
        message[draw(st.sampled_from(["role", "content", "weight", "train", "tool_calls", "name"]))] = draw(values)
    line = json.dumps(row, ensure_ascii=fault != "unescaped")
    at = draw(st.integers(0, len(line)))
    return line[:at] if fault == "cut" else line[:at] + draw(texts) + line[at:] if fault == "typed" else line


@st.composite
def files(draw) -> bytes:
    """Mostly sound rows of one form, and among them one that may not be."""
    columns = draw(st.sampled_from(COLUMNS))
    lines = [json.dumps(row) for row in draw(st.lists(rows(columns), max_size=4))]
    if draw(st.booleans()):
        lines.insert(draw(st.integers(0, len(lines))), draw(mutated_lines(columns)))
    return draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines).encode("utf-8", "surrogatepass")


configs = st.builds(
    TrainConfig,
    max_length=st.sampled_from([40, 2048]),
    on_long=st.sampled_from(["drop", "truncate", "error"]),
    loss_on=st.sampled_from(["response", "all", "last"]),
    allow_drop=st.booleans(),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "rows.jsonl"


@pytest.fixture(scope="module", params=["plain", "chat"])
def either_form(tokenizer, request) -> PromptTemplate:
    return load_template(tokenizer, request.param)


def check_refused_or_sound(path: Path, content: bytes, template: PromptTemplate, config: TrainConfig) -> None:
    """The whole way from a file to samples ends in a UserError that names a line, or in samples that hold what was written."""
    path.write_bytes(content)
    try:
        check_source(path, "train")
        examples = {example.line: example for example in read_examples(path, "train")}
        samples, _ = encode_all(examples.values(), path, template, config)
    except UserError as error:
        text = str(error)
        assert error.exit_code == ExitCode.DATA and text.isprintable(), text
        assert re.search(rf"{re.escape(str(path))}:\d+:", text) or any(words in text for words in WITHOUT_LINE), text
        return
    assert samples
    for sample in samples:
        check_sound(sample, examples[sample.line], template, config)


def check_sound(sample: TokenizedExample, example: Example, template: PromptTemplate, config: TrainConfig) -> None:
    assert all(label in (IGNORED, id) for id, label in zip(sample.input_ids, sample.labels, strict=True))
    assert any(label != IGNORED for label in sample.labels[1:])
    assert len(sample.input_ids) <= config.max_length
    if example.messages[0].role == TEXT:
        assert sample.labels == sample.input_ids
        return
    answers = [message.content for message in example.messages if message.role == "assistant" and message.trained]
    whole = encode(example, template, "response")
    if sample.input_ids == whole.input_ids:
        stop = template.tokenizer.convert_ids_to_tokens(template.stop_id)
        trained = [label for label in whole.labels if label != IGNORED]
        assert template.tokenizer.decode(trained) == "".join(answer + stop for answer in answers)
        assert trained.count(template.stop_id) == len(answers)
        assert config.loss_on != "response" or sample.labels == whole.labels
    else:
        assert config.on_long == "truncate" and sample.input_ids == whole.input_ids[: config.max_length]


@settings(max_examples=max(30, settings.default.max_examples))
@given(content=st.binary(max_size=60))
def test_any_bytes_are_refused(path, either_form, content):
    check_refused_or_sound(path, content, either_form, TrainConfig())


@settings(max_examples=max(30, settings.default.max_examples))
@given(lines=st.lists(st.one_of(texts, values.map(json.dumps)), max_size=4))
def test_any_lines_are_refused(path, either_form, lines):
    check_refused_or_sound(path, "\n".join(lines).encode("utf-8", "surrogatepass"), either_form, TrainConfig())


@settings(max_examples=max(70, settings.default.max_examples))
@given(content=files(), config=configs)
def test_rows_and_mutated_rows_are_refused_or_sound(path, either_form, content, config):
    check_refused_or_sound(path, content, either_form, config)


# -- padding and batch mates -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(tiny: Path) -> tuple[torch.nn.Module, Head]:
    """The decoder of the tiny NF4 model with awake adapters, and its head: all that is computed, in fp32."""
    config, _ = TrainConfig(model=str(tiny), lora_r=4, lora_alpha=8, lora_dropout=0.0).resolved(on_gpu=False)
    model = adapted_model(dataclasses.replace(config)).float().eval()
    wake_adapters(model)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers and all(layer.weight.dtype == torch.uint8 for layer in layers)
    for layer in layers:
        layer.compute_dtype = torch.float32
    return model.get_decoder(), read_head(model)


@st.composite
def samples_of_any_length(draw) -> TokenizedExample:
    ids = draw(st.lists(st.integers(0, 383), min_size=2, max_size=40))
    first = draw(st.integers(1, len(ids) - 1))
    return TokenizedExample(ids, [IGNORED] * first + ids[first:], 1)


@torch.no_grad()
def losses(exact: tuple[torch.nn.Module, Head], batch: Batch) -> list[float]:
    """The sum of losses of each row of the batch."""
    decoder, head = exact
    hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # [B, T, D]
    assert hidden.dtype == torch.float32
    length = batch.input_ids.shape[1]
    own = [batch.positions[batch.positions // length == row] for row in range(len(batch.input_ids))]
    return [token_loss_sum(hidden, batch._replace(positions=positions), head).item() for positions in own]


@settings(max_examples=max(40, settings.default.max_examples))
@given(rows=st.lists(samples_of_any_length(), min_size=1, max_size=4), padding=st.integers(0, 383))
def test_padding_and_mates_change_no_samples_loss(exact, rows, padding):
    batch = collate(rows)
    for row, sample in enumerate(rows):
        batch.input_ids[row, len(sample.input_ids) :] = padding
    alone = [losses(exact, collate([sample]))[0] for sample in rows]
    assert losses(exact, batch) == pytest.approx(alone, rel=1e-5)
