"""Which backend is chosen, and when the sliding window can be left out."""

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

from qlora import attention, data
from qlora.config import ExitCode, UserError
from qlora.data import Encoded
from qlora.loss import read_head, token_loss_sum
from tests.conftest import CPU, adapted_model, gradients, relative_error, wake_adapters

GPU = torch.device("cuda", 0)


PHI3 = transformers.Phi3ForCausalLM


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU of the given capability, with or without flash-attn, as far as the choice can tell."""

    def fake(capability: tuple[int, int], installed: bool):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace() if installed else None)

    return fake


def test_auto_takes_flash_only_where_it_can_run(fake_gpu):
    assert attention.choose_attention("auto", CPU, PHI3).implementation == "sdpa"
    fake_gpu((9, 0), installed=True)
    assert attention.choose_attention("auto", GPU, PHI3).implementation == "flash_attention_2"
    fake_gpu((9, 0), installed=False)
    chosen = attention.choose_attention("auto", GPU, PHI3)
    assert chosen.implementation == "sdpa" and "not installed" in chosen.reason
    fake_gpu((7, 5), installed=True)
    chosen = attention.choose_attention("auto", GPU, PHI3)
    assert chosen.implementation == "sdpa" and "7.5" in chosen.reason


def test_a_flash_attn_built_for_another_torch_is_an_obstacle_not_a_crash(fake_gpu, monkeypatch):
    fake_gpu((9, 0), installed=True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises ImportError
    chosen = attention.choose_attention("auto", GPU, PHI3)
    assert chosen.implementation == "sdpa" and "does not fit this torch" in chosen.reason


def test_auto_takes_what_the_model_supports(fake_gpu):
    chosen = attention.choose_attention("auto", CPU, transformers.Gemma2ForCausalLM)
    assert chosen.implementation == "eager" and "Gemma2ForCausalLM does not support it" in chosen.reason
    with pytest.raises(UserError, match="sdpa cannot run here: Gemma2ForCausalLM does not support it"):
        attention.choose_attention("sdpa", CPU, transformers.Gemma2ForCausalLM)
    fake_gpu((9, 0), installed=True)
    assert attention.choose_attention("auto", GPU, transformers.Gemma2ForCausalLM).implementation == "flash_attention_2"
    no_flash = type("NoFlash", (), {"_supports_flash_attn": False})
    assert attention.choose_attention("auto", GPU, no_flash).implementation == "sdpa"


def test_a_backend_asked_for_by_name_runs_or_fails(fake_gpu):
    assert attention.choose_attention("eager", CPU, PHI3) == ("eager", "as asked")
    assert attention.choose_attention("sdpa", CPU, PHI3) == ("sdpa", "as asked")
    with pytest.raises(UserError, match="needs a CUDA GPU") as caught:
        attention.choose_attention("flash_attention_2", CPU, PHI3)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    fake_gpu((9, 0), installed=False)
    with pytest.raises(UserError, match="not installed"):
        attention.choose_attention("flash_attention_2", GPU, PHI3)
    fake_gpu((9, 0), installed=True)
    assert attention.choose_attention("flash_attention_2", GPU, PHI3).reason == "as asked"


def test_a_package_named_kernels_is_never_asked(fake_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda *a, **k: pytest.fail("downloaded")))
    fake_gpu((9, 0), installed=False)
    assert attention.choose_attention("auto", GPU, PHI3).implementation == "sdpa"


@pytest.mark.parametrize(
    ("window", "layer_types", "max_length", "expected"),
    [
        (2047, None, 2048, None),
        (2047, None, 2049, 2047),
        (2047, None, 512, None),
        (None, None, 512, None),
        (16, ["sliding_attention"], 8, 16),
    ],
)
def test_the_window_is_left_out_only_where_it_changes_nothing(window, layer_types, max_length, expected):
    config = SimpleNamespace(sliding_window=window, layer_types=layer_types)
    assert attention.training_window(config, max_length) == expected


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(("length", "equal"), [(8, True), (9, True), (10, False)])
def test_rows_of_up_to_window_plus_one_tokens_lose_nothing(config, backend, length, equal):
    """T = w + 1: the last position loses a key, but nothing is predicted from it. T = w + 2: something is."""
    model = adapted_model(config, backend)
    wake_adapters(model)
    head = read_head(model)
    ids = torch.arange(20, 20 + length).tolist()
    batch = data.collate([Encoded(ids, ids, 1)])

    def loss_and_gradients(window):
        model.zero_grad()
        with attention.sliding_window(model, window):
            hidden = model.get_decoder()(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        loss = token_loss_sum(hidden, batch, head)
        loss.backward()
        return loss.item(), gradients(model)

    loss, with_window = loss_and_gradients(8)
    other, without = loss_and_gradients(None)
    if equal:
        assert loss == pytest.approx(other, rel=1e-6) and relative_error(without, with_window) < 1e-2
    else:
        assert abs(loss - other) > 1e-4 and relative_error(without, with_window) > 1e-2


def test_the_window_is_put_back(model):
    assert model.config.sliding_window == 2047
    with attention.sliding_window(model, None):
        assert model.get_base_model().config.sliding_window is None
    assert model.config.sliding_window == 2047
    with pytest.raises(ZeroDivisionError), attention.sliding_window(model, 5):
        raise ZeroDivisionError
    assert model.config.sliding_window == 2047


def test_the_model_runs_what_was_chosen(config):
    for backend in ("sdpa", "eager"):
        assert adapted_model(config, backend).config._attn_implementation == backend
