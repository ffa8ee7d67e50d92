"""AdamW in fp32 and in 8 bits: which one is built, what its state weighs, and that it does what AdamW does."""

import copy
import dataclasses
import functools

import bitsandbytes
import pytest
import torch

from qlora.config import TrainConfig
from qlora.data.batch import collate
from qlora.errors import ExitCode, UserError
from qlora.model.loss import token_loss_sum
from qlora.model.optimizer import build_optimizer, init_optimizer_state
from train_loop import train_step


@pytest.mark.parametrize(
    ("name", "kind", "paged"),
    [
        ("adamw", torch.optim.AdamW, None),
        ("adamw_8bit", bitsandbytes.optim.AdamW8bit, False),
        ("paged_adamw_8bit", bitsandbytes.optim.PagedAdamW8bit, True),
    ],
)
def test_each_name_builds_its_optimizer_with_the_same_settings(name, kind, paged):
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = build_optimizer(dict(enumerate(parameters)), TrainConfig(optimizer=name, weight_decay=0.25))
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind and group["params"] == parameters
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.0, 0.25, (0.9, 0.999), 1e-8)
    assert bool(group.get("fused")) == (name == "adamw") and getattr(optimizer, "is_paged", None) == paged


def test_lion_steps_by_the_sign_of_its_moment():
    """Against the paper's algorithm 2; a tensor of fewer than 4,096 elements is not rounded."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 100))
    optimizer = build_optimizer({"p": parameter}, TrainConfig(optimizer="lion_8bit", weight_decay=0.25))
    assert type(optimizer) is bitsandbytes.optim.Lion8bit
    expected, moment = parameter.detach().clone(), torch.zeros(100)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(100, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
        expected -= 1e-2 * ((0.9 * moment + 0.1 * gradient).sign() + 0.25 * expected)
        moment = 0.99 * moment + 0.01 * gradient
    torch.testing.assert_close(parameter.detach(), expected)


def test_lora_plus_gives_b_a_higher_rate(model, samples, config, head):
    moved = {}
    for ratio in (1.0, 4.0):
        trained = copy.deepcopy(model)
        before = {name: each.detach().clone() for name, each in trained.named_parameters() if each.requires_grad}
        settings = dataclasses.replace(config, lora_plus_ratio=ratio, weight_decay=0.0)
        optimizer = build_optimizer({name: each for name, each in trained.named_parameters() if each.requires_grad}, settings)
        loss_sum = functools.partial(token_loss_sum, head=head)
        for _ in range(2):  # in the first step A has no gradient
            train_step(trained.get_decoder(), optimizer, [collate(samples[:2])], loss_sum, 1e-4, None)
        assert [group["lr"] for group in optimizer.param_groups] == ([1e-4] if ratio == 1.0 else [1e-4, 4e-4])
        moved[ratio] = {name: (trained.get_parameter(name) - start).norm().item() for name, start in before.items()}
    for name, norm in moved[1.0].items():
        assert moved[4.0][name] / norm == pytest.approx(4.0 if "lora_B" in name else 1.0, rel=0.05), name


def test_paging_without_a_gpu_is_refused_by_name():
    paged = TrainConfig(optimizer="paged_adamw_8bit")
    with pytest.raises(
        UserError, match="--optimizer paged_adamw_8bit cannot be used: it must be adamw, adamw_8bit or lion"
    ) as caught:
        paged.resolved(on_gpu=False)
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    assert paged.resolved(on_gpu=True)[0].optimizer == "paged_adamw_8bit"
    assert dataclasses.replace(paged, optimizer="adamw_8bit").resolved(on_gpu=False)[0].optimizer == "adamw_8bit"


@pytest.mark.parametrize(("size", "tolerance"), [(4095, 1e-6), (4096, 0.05)])
def test_updates_are_adamws_but_for_the_rounding_of_moments(size, tolerance):
    """Against torch's over gradients whose moments matter; a tensor of fewer than 4,096 elements is not rounded at all."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator)
    parameters = {name: torch.nn.Parameter(start.clone()) for name in ("adamw", "adamw_8bit")}
    optimizers = {name: build_optimizer({"p": p}, TrainConfig(optimizer=name)) for name, p in parameters.items()}
    slope = torch.randn(size, generator=generator)
    for _ in range(20):
        gradient = slope + torch.randn(size, generator=generator)
        for name, optimizer in optimizers.items():
            parameters[name].grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = 1e-3
            optimizer.step()
    moved, expected = (parameters[name].detach() - start for name in ("adamw_8bit", "adamw"))
    error = ((moved - expected).norm() / expected.norm()).item()
    assert error < tolerance and (error > 1e-3) == (size >= 4096)


def test_an_element_with_8_bit_moments_has_6_bytes_less_of_state():
    parameter = torch.nn.Parameter(torch.ones(1 << 16))
    sizes = {}
    for name in ("adamw", "adamw_8bit"):
        optimizer = build_optimizer({"p": parameter}, TrainConfig(optimizer=name))
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        values = (value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor))
        sizes[name] = sum(value.nbytes for value in values) / parameter.numel()
    assert sizes["adamw"] - sizes["adamw_8bit"] == pytest.approx(6, abs=0.1)


def test_state_that_is_begun_is_that_of_the_first_step():
    """In 8 bits; torch's optimizers make theirs when they step."""
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (5000, 100, 4096)]
    begun, stepped = (build_optimizer(dict(enumerate(parameters)), TrainConfig(optimizer="adamw_8bit")) for _ in range(2))
    init_optimizer_state(begun)
    assert all(not value.any() for p in parameters for kind, value in begun.state[p].items() if kind.startswith("state"))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    stepped.step()
    for parameter in parameters:
        ours, theirs = begun.state[parameter], stepped.state[parameter]
        assert list(ours) == list(theirs) and ours["step"] == 0 and theirs["step"] == 1
        assert ours["state1"].dtype == theirs["state1"].dtype == (torch.uint8 if parameter.numel() >= 4096 else torch.float32)
    assert begun.state[parameters[0]]["qmap1"] is begun.state[parameters[2]]["qmap1"]
    plain = build_optimizer(dict(enumerate(parameters)), TrainConfig())
    init_optimizer_state(plain)
    assert not plain.state
