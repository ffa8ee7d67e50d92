"""Fixtures: the tiny random Phi-3 in real NF4, built in a temporary cache; no network, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported; a test that reaches out fails at once
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start; see below

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers

from qlora.config import BUNDLED_TRAIN, TrainConfig
from qlora.data.dataset import encode_all
from qlora.data.formats import Example, read_examples
from qlora.data.template import PromptTemplate, TokenizedExample, load_template
from qlora.eval import generate
from qlora.model import demo
from qlora.model.load import load_meta_model, load_tokenizer
from qlora.model.loss import Head, read_head
from qlora.report import html
from qlora.speed import lora_linear
from tests.helpers import SHORT_TRAIN, adapted_model

hypothesis.settings.register_profile("small", deadline=None, max_examples=50)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)  # pytest --hypothesis-profile thorough
hypothesis.settings.load_profile("small")
torch.set_num_threads(1)  # 30 times faster than 2 on a model this small


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny random Phi-3, in a cache that every test of the session uses."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    return demo.tiny_random_model()


@pytest.fixture(scope="session")
def tokenizer(tiny: Path):
    return load_tokenizer(str(tiny), load_meta_model(str(tiny), TrainConfig()), TrainConfig())


@pytest.fixture(scope="session")
def template(tokenizer) -> PromptTemplate:
    return load_template(tokenizer, "plain")


@pytest.fixture(autouse=True)
def report_left_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no report, which takes as long as training here, but where it is what is tested."""
    if request.node.get_closest_marker("draws_report") is None:
        monkeypatch.setattr(html, "after_training", lambda folder: "left out")


@pytest.fixture(scope="session", autouse=True)
def short_answers() -> Iterator[None]:
    """At its end a run generates 8 tokens at most for each sample answer; what is generated is not what its tests are about."""
    original = generate.answer_limit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "answer_limit", lambda *arguments: min(original(*arguments), 8))
        yield


@pytest.fixture(scope="session")
def config(tiny: Path) -> TrainConfig:
    """A resolved configuration for the tiny model, without dropout, so that two ways to compute agree."""
    config, _ = TrainConfig(model=str(tiny), lora_r=4, lora_alpha=8, lora_dropout=0.0, learning_rate=1e-3).resolved(
        on_gpu=False
    )
    return config


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return list(read_examples(SHORT_TRAIN, "train"))


@pytest.fixture(scope="session")
def samples(examples, template, config) -> list[TokenizedExample]:
    return encode_all(examples, SHORT_TRAIN, template, config)[0]


@pytest.fixture(scope="session")
def bundled(template, config) -> list[TokenizedExample]:
    """The bundled samples, of 145 to 228 tokens; those of `samples` have 29 to 55."""
    return encode_all(read_examples(BUNDLED_TRAIN, "train"), BUNDLED_TRAIN, template, config)[0]


@pytest.fixture
def model(config):
    return adapted_model(config)


@pytest.fixture(scope="session")
def phi3():
    """Phi-3-mini's shape without weights."""
    with torch.device("meta"):
        settings = transformers.Phi3Config(pad_token_id=0)
        return transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16, attn_implementation="eager")


@pytest.fixture
def head(model) -> Head:
    return read_head(model)


@pytest.fixture
def operator_calls(monkeypatch) -> list[str]:
    """The layer of each call of our operator, in order: that it ran is counted, not told from how it rounds."""
    calls, original = [], lora_linear.nf4_linear

    def counted(*arguments):
        calls.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(lora_linear, "nf4_linear", counted)
    return calls
