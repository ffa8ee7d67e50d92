"""The Triton kernels on a CPU, by Triton's own interpreter, against torch and bitsandbytes. On a GPU: tests/test_gpu.py."""

import copy
import os
import subprocess
import sys

import bitsandbytes
import pytest
import torch

from qlora.speed import nf4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton when it is imported, so these run in a process apart


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_kernels_are_interpreted_in_a_process_apart():
    pytest.importorskip("triton", minversion="3.7")  # older ones cannot be interpreted with NumPy 2.4
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "24 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs within test_the_kernels_are_interpreted_in_a_process_apart")


# -- cross-entropy -----------------------------------------------------------------------------------------------------


def reference(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [C] and the gradient of their sum [C, V], by torch in fp64."""
    leaf = logits.double().requires_grad_()  # [C, V]
    losses = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")  # [C]
    losses.sum().backward()
    return losses.detach(), leaf.grad


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [3, 4095, 4096, 4097, 9000])  # below, at and above a block of 4,096, and three blocks
def test_cross_entropy_and_its_gradient(dtype, vocabulary):
    from qlora.model.cross_entropy import cross_entropy_

    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(4, vocabulary, generator=generator)).to(dtype)  # [C, V]
    logits[1] += 300  # exp() of such logits overflows unless the largest is taken off first
    logits[2, vocabulary // 2] = 50  # the largest so far comes in the middle
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 2, vocabulary // 3])  # [C]
    losses, gradient = reference(logits, targets)
    ours = logits.clone()  # [C, V]
    found = cross_entropy_(ours, targets)  # [C]
    assert found.dtype == torch.float32 and torch.allclose(found.double(), losses, rtol=1e-5, atol=1e-5)
    assert torch.allclose(ours.double(), gradient, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-6)


# -- dequantization ----------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kind", "double"),
    [*((shape, "nf4", True) for shape in ((2, 64), (16, 128), (64, 576), (300, 64), (768, 192))),  # 1 to 73 blocks of 2,048
     ((64, 576), "nf4", False), ((64, 576), "fp4", True)],
)  # fmt: skip
def test_dequantized_weights_are_bitsandbytes_own(dtype, shape, kind, double):
    """Bit for bit in fp32. To bf16 the interpreter truncates where a GPU rounds: 2**-7 apart at most."""
    from qlora.speed.dequantize import dequantize

    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator) * torch.linspace(0.01, 2, shape[0])[:, None]  # [N, K]
    layer = bitsandbytes.nn.Linear4bit(shape[1], shape[0], bias=False, compress_statistics=double, quant_type=kind)
    layer.weight = bitsandbytes.nn.Params4bit(weight.bfloat16(), quant_type=kind, compress_statistics=double).to("cpu")
    state = copy.copy(layer.weight.quant_state)
    state.dtype = dtype
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)  # [N, K]
    ours = dequantize(nf4.frozen_weight(layer), shape, dtype)  # [N, K]
    assert ours.shape == expected.shape == shape
    assert torch.equal(ours, expected) if dtype == torch.float32 else torch.allclose(ours, expected, rtol=2**-7, atol=0)
    assert (ours.float() - weight).norm() < 0.2 * weight.norm()  # NF4 is off by a tenth of the spread
