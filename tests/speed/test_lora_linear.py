"""The operator for an NF4 layer with LoRA, against PEFT's layer and against dense fp32 arithmetic."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.bnb import Linear4bit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from qlora.data.batch import collate
from qlora.model.loss import read_head
from qlora.speed import lora_linear, nf4
from tests.helpers import adapted_model, adapter_gradients, fp32_twin, gradients, relative_error, to_fp32, wake_adapters

ROOT = Path(__file__).parents[2]


def first_layer(model, name: str = "gate_up_proj") -> lora_linear.LoRALinear:
    return next(module for path, module in model.named_modules() if path.endswith(name) and isinstance(module, Linear4bit))


@pytest.fixture
def installed(model):
    wake_adapters(model)
    lora_linear.install(model)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_weight_is_that_of_bitsandbytes_bit_for_bit(installed, dtype):
    layer = first_layer(installed)
    state = layer.base_layer.weight.quant_state
    state.dtype = dtype
    theirs = bitsandbytes.functional.dequantize_4bit(layer.base_layer.weight.data, state)  # [N, K]
    ours = nf4.dequantized(layer.frozen, layer.out_features, dtype)  # [N, K]
    assert ours.shape == (layer.out_features, layer.in_features) and torch.equal(ours, theirs)
    assert layer.frozen[0].data_ptr() == layer.base_layer.weight.data_ptr()  # no copy


def test_the_operator_is_dense_arithmetic_forward_and_backward(installed):
    layer = first_layer(to_fp32(installed), "down_proj")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()  # [2, 7, K]
    dense = nf4.dequantized(layer.frozen, layer.out_features, torch.float32).double()  # [N, K]
    weight = torch.randn(2, 7, layer.out_features, generator=torch.Generator().manual_seed(1))  # [2, 7, N]
    output = layer(x)
    (output * weight).sum().backward()
    found = [output.detach(), x.grad, a.grad, b.grad]
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, a, b)]
    wanted = leaves[0] @ dense.T + layer.scaling["default"] * (leaves[0] @ leaves[1].T) @ leaves[2].T  # [2, 7, N]
    (wanted * weight).sum().backward()
    for ours, theirs in zip(found, [wanted.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


@pytest.mark.parametrize("own", [False, True])
def test_the_operator_passes_torch_s_own_checks_of_one(installed, own):
    layer = first_layer(installed, "o_proj")
    x, b = torch.randn(5, layer.in_features), layer.lora_B["default"].weight.detach().clone().requires_grad_()  # [5, K], [N, r]
    reduced = torch.randn(5, b.shape[1]).requires_grad_()  # [5, r]
    a = layer.lora_A["default"].weight.detach() if own else None  # [r, K]
    arguments = (x.requires_grad_(), reduced, a, b, layer.frozen, "o_proj")
    assert set(torch.library.opcheck(torch.ops.qlora.nf4_linear.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_it_agrees_with_peft_s_layer_whose_dropout_it_draws(config, samples, dropout, operator_calls):
    """fp32 throughout, so that only the order of additions may differ; on some CPUs not even that does."""
    batch, found, calls = collate(samples[:3]), [], []
    for ours in (False, True):
        model = to_fp32(adapted_model(config))
        wake_adapters(model)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.lora_dropout["default"] = torch.nn.Dropout(dropout)
        if ours:
            lora_linear.install(model)
        torch.manual_seed(5)
        found.append(adapter_gradients(model, batch, read_head(model), autocast=False))
        calls.append(len(operator_calls))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert relative_error(found[1][1], found[0][1]) < 1e-5
    assert calls == [0, 8]  # PEFT's layer first, then ours in each of the model's 8


def test_in_bf16_it_is_at_least_as_near_to_fp32_as_peft_s_layer(model, config, bundled):
    wake_adapters(model)
    batch, twin = collate(bundled[:4]), fp32_twin(model, config)
    loss, expected = adapter_gradients(twin, batch, read_head(twin), autocast=False)
    head = read_head(model)
    _, plain = adapter_gradients(model, batch, head, autocast=True)
    lora_linear.install(model)
    model.zero_grad()
    ours, found = adapter_gradients(model, batch, head, autocast=True)
    assert ours == pytest.approx(loss, rel=1e-2)
    assert relative_error(found, expected) < 1.2 * relative_error(plain, expected)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_seeded_dropout_is_dropout(rate):
    """The share that is kept, by row and column as a binomial spreads; independent of its neighbors and of another seed."""
    x = torch.ones(2000, 3000, requires_grad=True)
    masks = []
    for seed in (5, 6, 5):
        dropped = lora_linear.seeded_dropout(x, rate, torch.tensor(seed, dtype=torch.int32))
        assert set(dropped.unique().tolist()) == {0.0, 1 / (1 - torch.tensor(rate).item())} or rate == 0.1
        masks.append((dropped > 0).double())
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])
    assert torch.autograd.grad(dropped.sum(), x)[0].equal(dropped)
    spread = (rate * (1 - rate)) ** 0.5
    one, other = ((mask - (1 - rate)) / spread for mask in masks[:2])
    for mask in (one, other):
        assert abs(mask.mean()) < 4 / mask.numel() ** 0.5
        assert mask.mean(0).std() * 2000**0.5 == pytest.approx(1, abs=0.1)
        assert mask.mean(1).std() * 3000**0.5 == pytest.approx(1, abs=0.1)
    pairs = [one * other, one[1:] * one[:-1], one[:, 1:] * one[:, :-1], one[1:] * other[:-1]]
    assert all(abs(pair.mean()) < 5 / pair.numel() ** 0.5 for pair in pairs)


COMPILED_DROPOUT = """
import torch
import torch._inductor.config

torch._inductor.config.cpp_cache_precompile_headers = False  # which takes longer than the kernel
from qlora.speed.lora_linear import seeded_dropout

x, seed = torch.ones(37, 64), torch.tensor(2**31 - 2, dtype=torch.int32)
compiled = torch.compile(seeded_dropout, fullgraph=True)(x, 0.3, seed)
assert torch.equal(compiled, seeded_dropout(x, 0.3, seed)) and 0.6 < (compiled > 0).float().mean() < 0.8
"""


class Products(TorchDispatchMode):
    """The dtypes of all products and sums."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator.name().startswith(("aten::mul", "aten::add")):
            self.dtypes.add(result.dtype)
        return result


def test_on_a_cpu_the_hash_of_dropout_multiplies_in_int64():
    """Overflow of int32 is undefined in the C++ that torch.compile writes; the test below shows what comes of it."""
    with Products() as products:
        lora_linear.seeded_dropout(torch.ones(37, 64), 0.3, torch.tensor(5, dtype=torch.int32))
    assert products.dtypes == {torch.int64}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_for_a_cpu_the_hash_of_dropout_overflows_nowhere(tmp_path):
    """g++ takes overflow of signed integers for impossible: whatever it then writes, a trap ends the process here instead."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0 -fsanitize=signed-integer-overflow -fsanitize-undefined-trap-on-error\n')
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILED_DROPOUT]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def test_dropout_hashes_as_murmurhash3_does_in_32_bits():
    """By Python's own integers; on a GPU int32 wraps around, on a CPU int64 is cut to 32 bits."""

    def mixed(bits):
        bits = (bits ^ bits >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        bits = (bits ^ bits >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return bits ^ bits >> 16

    seed = 2**31 - 2
    mask = lora_linear.seeded_dropout(torch.ones(7, 90), 0.3, torch.tensor(seed, dtype=torch.int32)) > 0  # [7, 90]
    for row, column in ((0, 0), (1, 1), (2, 63), (6, 89), (5, 40)):
        bits = mixed((mixed(row) ^ seed) + column * 0x9E3779B & 0xFFFFFFFF)
        assert mask[row, column].item() == ((bits & 0xFFFFFF) >= round(0.3 * 2**24))
    mixed_in_int64 = lora_linear._mixed(torch.arange(64))  # [64]
    assert ((mixed_in_int64 >= 0) & (mixed_in_int64 < 2**32)).all()  # so the next product has room in 63 bits


def test_evaluation_and_a_disabled_adapter_take_peft_s_way(installed, monkeypatch):
    layer = first_layer(installed)
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)  # [3, K]
    with monkeypatch.context() as patched:
        patched.setattr(lora_linear, "nf4_linear", None)  # calling it would fail
        evaluated = layer.eval()(x)
        with installed.disable_adapter():
            bare = layer.train()(x)
    assert (layer(x) - evaluated).norm() < 0.02 * evaluated.norm()
    assert torch.equal(bare, F.linear(x, nf4.dequantized(layer.frozen, layer.out_features, torch.bfloat16)))


def test_a_bias_of_the_base_layer_is_added(installed):
    layer = first_layer(installed)
    x = torch.randn(3, layer.in_features)  # [3, K]
    before = layer(x)
    bias = torch.randn(layer.out_features)  # [N]
    layer.base_layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    assert torch.allclose(layer(x), before + bias, rtol=0, atol=1e-6)


def test_names_in_a_checkpoint_stay_and_only_adapters_are_trained(model):
    names, trained = list(model.state_dict()), set(gradient_names(model))
    lora_linear.install(model)
    assert list(model.state_dict()) == names and set(gradient_names(model)) == trained


def gradient_names(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_products_are_counted_for_who_weighs_memory_against_time(installed):
    layer, positions, rank = first_layer(installed), 6, 4
    x = torch.randn(positions, layer.in_features)  # [M, K]
    with FlopCounterMode(display=False) as counted:
        layer(x).sum().backward()
    large, a, b = layer.in_features * layer.out_features, rank * layer.in_features, rank * layer.out_features
    # forward: W, B, A; backward: W, B and A for the inputs, B and A for themselves (x needs none here, but W has it made)
    assert counted.get_total_flops() == 2 * positions * (2 * large + 3 * b + 3 * a)


def test_gradients_reach_every_adapter(installed, samples):
    adapter_gradients(installed, collate(samples[:2]), read_head(installed), autocast=True)
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients(installed).values())
