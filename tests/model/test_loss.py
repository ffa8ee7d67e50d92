"""The chunked head against the plain one, and against transformers' own loss."""

import math

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from qlora.data.batch import collate
from qlora.data.template import IGNORED, TokenizedExample
from qlora.errors import ExitCode, UserError
from qlora.model.loss import CHUNK_TOKENS, Head, read_head, token_loss_sum
from tests.helpers import SIZES, gradients, plain_loss_sum, relative_error, wake_adapters


def random_case(dtype: torch.dtype, bias: bool = False, scale: float = 1.0, softcap: float | None = None):
    generator = torch.Generator().manual_seed(0)
    rows = [
        TokenizedExample(ids := torch.randint(0, 97, (length,), generator=generator).tolist(), [IGNORED] * 2 + ids[2:], 1)
        for length in (9, 4, 7)
    ]
    weight = torch.randn(97, 16, generator=generator).to(dtype)
    head = Head(weight, torch.randn(97, generator=generator).to(dtype) if bias else None, scale, softcap)
    hidden = torch.randn(3, 9, 16, generator=generator).to(dtype).requires_grad_()
    return hidden, collate(rows), head


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1024])
@pytest.mark.parametrize(
    ("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.3, None), (False, 1.0, 2.0), (True, 0.5, 3.0)]
)
def test_chunked_equals_plain_in_loss_and_gradient(chunk_tokens, bias, scale, softcap):
    hidden, batch, head = random_case(torch.float64, bias, scale, softcap)
    plain = plain_loss_sum(hidden, batch, head)
    (expected,) = torch.autograd.grad(3 * plain, hidden)
    chunked = token_loss_sum(hidden, batch, head, chunk_tokens)
    (gradient,) = torch.autograd.grad(3 * chunked, hidden)
    # Both take the log-softmax in fp32; the products around it are fp64.
    torch.testing.assert_close(chunked.double(), plain.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert gradient[1, 3:].abs().sum() == 0 and gradient[:, :1].abs().sum() == 0  # padding and prompt
    assert chunked.grad_fn is not None and chunked.grad_fn.gradient is None  # gone, while the layers' backward runs


def test_chunked_in_bf16_rounds_like_plain():
    hidden, batch, head = random_case(torch.bfloat16)
    (expected,) = torch.autograd.grad(plain_loss_sum(hidden, batch, head), hidden)
    (gradient,) = torch.autograd.grad(token_loss_sum(hidden, batch, head), hidden)
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("tokens", "chunks"), [(1023, 1), (1024, 1), (1025, 2), (3072, 3)])
def test_logits_are_made_for_1024_tokens_at_a_time(tokens, chunks, monkeypatch):
    """By default, and no fewer: small products are slow. Of Phi-3 these are 131 MB in fp32."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (tokens + 1,), generator=generator).tolist()
    batch = collate([TokenizedExample(ids, [IGNORED, *ids[1:]], 1)])
    hidden = torch.randn(1, tokens + 1, 4, generator=generator)  # [1, N + 1, D]
    sizes = []

    def spy(head, rows):
        sizes.append(len(rows))
        return rows @ head.weight.T

    monkeypatch.setattr(Head, "logits", spy)
    token_loss_sum(hidden, batch, Head(torch.randn(7, 4, generator=generator), None, 1.0, None))
    assert len(sizes) == chunks == math.ceil(tokens / CHUNK_TOKENS)
    assert sum(sizes) == tokens == batch.num_tokens and max(sizes) <= CHUNK_TOKENS


def test_it_takes_two_products_and_one_without_gradient():
    """The plain way takes two as well, but of all positions; recomputing checkpoints take three."""
    hidden, batch, head = random_case(torch.float32)
    product = 2 * batch.num_tokens * head.weight.numel()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss = token_loss_sum(hidden, batch, head)
    assert counter.get_total_flops() == product and not loss.requires_grad
    torch.testing.assert_close(loss, plain_loss_sum(hidden.detach(), batch, head))
    with FlopCounterMode(display=False) as counter:
        token_loss_sum(hidden, batch, head).backward()
    assert counter.get_total_flops() == 2 * product


def test_equals_transformers_own_loss_and_its_adapter_gradients(model, head, samples):
    wake_adapters(model)
    batch = collate(samples[:3])
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
    theirs.backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.get_decoder()(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        ours = token_loss_sum(hidden, batch, head) / batch.num_tokens
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert relative_error(gradients(model), expected) < 0.01


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SIZES),
        transformers.MistralConfig(**SIZES),
        transformers.Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
        transformers.Gemma2Config(**SIZES, final_logit_softcapping=0.5),
        transformers.GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=8.0),
        transformers.CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25),
    ],
    ids=lambda config: config.model_type,
)
def test_what_a_model_does_to_its_logits_is_kept(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()  # logits large enough for a cap to matter
    head = read_head(model)
    batch = collate([TokenizedExample(list(range(3, 12)), [IGNORED] * 4 + list(range(7, 12)), 1)])
    theirs = model(input_ids=batch.input_ids, labels=batch.labels).loss
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=batch.input_ids).last_hidden_state
    torch.testing.assert_close(token_loss_sum(hidden, batch, head) / batch.num_tokens, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_that_does_something_unknown_to_its_logits_is_refused(model):
    base = model.get_base_model()
    forward = base.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + 1.0
        return output

    base.forward = scaled
    with pytest.raises(UserError, match="Phi3ForCausalLM does something to its logits") as caught:
        read_head(base)
    assert caught.value.exit_code == ExitCode.CONFIGURATION
