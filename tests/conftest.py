"""Fixtures: the tiny random Phi-3 in real NF4, built in a temporary cache; no network, one thread."""

import dataclasses
import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported; a test that reaches out fails at once

from pathlib import Path

import pytest
import torch
import transformers

from qlora import data, demo, nf4_linear, report
from qlora.config import BUNDLED_TRAIN, TrainConfig
from qlora.layers import prepare_layers
from qlora.loss import Head, read_head
from qlora.model import add_adapters, audit_targets, load_nf4_model, load_skeleton, load_tokenizer, with_init_adapter

torch.set_num_threads(1)  # 30 times faster than 2 on a model this small
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny random Phi-3, in a cache that every test of the session uses."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    return demo.tiny_random_model()


@pytest.fixture(scope="session")
def tokenizer(tiny: Path):
    return load_tokenizer(str(tiny), load_skeleton(str(tiny), TrainConfig()), TrainConfig())


@pytest.fixture(scope="session")
def form(tokenizer) -> data.Format:
    return data.read_format(tokenizer, "plain")


@pytest.fixture(autouse=True)
def report_left_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no report, which takes as long as training here, but where it is what is tested."""
    if request.node.get_closest_marker("draws_report") is None:
        monkeypatch.setattr(report, "after_training", lambda folder: "left out")


@pytest.fixture
def config(tiny: Path) -> TrainConfig:
    """A resolved configuration for the tiny model, without dropout, so that two ways to compute agree."""
    config, _ = TrainConfig(model=str(tiny), lora_r=4, lora_alpha=8, lora_dropout=0.0, learning_rate=1e-3).resolved(
        on_gpu=False
    )
    return config


@pytest.fixture
def examples() -> list[data.Example]:
    return list(data.read_examples(BUNDLED_TRAIN, "train"))


@pytest.fixture
def samples(examples, form, config) -> list[data.Encoded]:
    return data.encode_all(examples, BUNDLED_TRAIN, form, config)[0]


def adapted_model(config: TrainConfig, attn_implementation: str = "sdpa"):
    """The tiny model in NF4 with adapters, as train_loop.main builds it; the same one every time."""
    config = with_init_adapter(config)
    torch.manual_seed(config.seed)
    model = load_nf4_model(config.model, config, attn_implementation, CPU)
    model = add_adapters(model, config, audit_targets(model, config), config.model)
    return model.train()


def prepared(model, config: TrainConfig, policy: str, compile: str = "none"):
    """The model with its layers as training runs them; compiled without a C compiler, so that no bit differs."""
    torch._dynamo.reset()  # each model of the session is new to it
    settings: dict = {"gradient_checkpointing": policy, "compile": compile}
    prepare_layers(model, dataclasses.replace(config, **settings), backend="aot_eager_decomp_partition")
    return model


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
    calls, original = [], nf4_linear.nf4_linear

    def counted(*arguments):
        calls.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(nf4_linear, "nf4_linear", counted)
    return calls


def wake_adapters(model, scale: float = 0.05) -> None:
    """Give B values: at its start of zero A has no gradient and the adapter no effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def relative_error(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """The largest over all tensors: norm of the difference over norm of the reference.

    Not over all tensors together, where a small module that is wrong by a factor of 3 would pass.
    """
    assert ours.keys() == reference.keys()
    errors = []
    for name, value in reference.items():
        difference, norm = (ours[name].double() - value.double()).norm().item(), value.double().norm().item()
        errors.append(difference / norm if norm else math.inf if difference else 0.0)
    return max(errors)
