"""A frozen linear layer with LoRA beside it, as one operator: a weight in 4 bits is dequantized once in each pass.

PEFT's own layer multiplies by the weight, copies the result, multiplies by A and by B, scales, and adds: five tensors as large
as the output. Here A comes first; B's small product makes the output, and the large product adds to it while it is computed.
Nothing of the layer's size is kept for backward but its input, for the gradient of A. Only in training: evaluation and
generation take PEFT's way.

Shapes: M positions, K inputs, N outputs, r the rank.
"""

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import register_flop_formula

from qlora.model.third_party import Linear4bit, bitsandbytes, peft
from qlora.speed.nf4 import dequantized, frozen_weight


def require_plain_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Refuse gradient hooks on adapters: backward writes their `.grad` itself, so autograd would never call a hook.

    Raises:
        RuntimeError: if a parameter has a hook of `register_hook` or `register_post_accumulate_grad_hook`, or in a forward pass
            of DistributedDataParallel, whose reducer is such a hook.
    """
    if DistributedDataParallel._get_active_ddp_module() is not None:
        text = (
            "DistributedDataParallel would never reduce these gradients: this loop's backward pass writes the adapters' .grad"
        )
        raise RuntimeError(f"{text} itself, outside autograd. Leave the wrapper out, and all_reduce .grad after backward().")
    watched = sum(bool(p._backward_hooks) or bool(p._post_accumulate_grad_hooks) for p in parameters)
    if watched:
        text = f"{watched} adapter tensors have gradient hooks, which would never be called: this loop's backward pass writes"
        raise RuntimeError(f"{text} their .grad itself, outside autograd. Read .grad after backward() instead.")


def _dense(weight: Sequence[torch.Tensor], outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """[N, K]: dequantized from the tensors that nf4.py lists, or the weight itself if it is the only one."""
    return weight[0].to(dtype) if len(weight) == 1 else dequantized(weight, outputs, dtype)


def _inputs(tensors: int, elements: int, outputs: int) -> int:
    """K, from how many tensors a weight has, the elements of its first, and N: two values lie in a byte in 4 bits."""
    return (1 if tensors == 1 else 2) * elements // outputs


# -- the operator ------------------------------------------------------------------------------------------------------

# Opaque to torch.compile, which would otherwise keep dequantized weights for backward, at 2 bytes a parameter.
# Its last argument says which layer it is, for those who decide what is kept and what is recomputed.


@torch.library.custom_op("qlora::nf4_linear", mutates_args=())
def nf4_linear(
    x: torch.Tensor,
    reduced: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor,
    weight: Sequence[torch.Tensor],
    name: str,
) -> torch.Tensor:
    """x [M, K], reduced [M, r], b [N, r] -> x W^T + reduced b^T [M, N], all in the dtype of x.

    `reduced` is x a^T, without its gradient to x, if a [r, K] is given: backward then adds that to the one through W while it
    is computed. With dropout before a, `reduced` brings its own.
    """
    output = reduced @ b.T  # [M, N]
    return output.addmm_(x, _dense(weight, len(b), x.dtype).T)  # [M, N]


@nf4_linear.register_fake
def _nf4_linear_shape(x: torch.Tensor, reduced: torch.Tensor, a: Any, b: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], b.shape[0])  # [M, N]


@torch.library.custom_op("qlora::nf4_linear_backward", mutates_args=())
def nf4_linear_backward(
    d_output: torch.Tensor,
    reduced: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor,
    weight: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d_output [M, N] -> the gradients of x [M, K], reduced [M, r] and b [N, r]."""
    d_reduced = d_output @ b  # [M, r]
    d_x = d_output @ _dense(weight, len(b), d_output.dtype)  # [M, K]
    if a is not None:
        d_x.addmm_(d_reduced, a)  # [M, K]
    return d_x, d_reduced, d_output.T @ reduced


@nf4_linear_backward.register_fake
def _nf4_linear_backward_shapes(
    d_output: torch.Tensor, reduced: torch.Tensor, a: Any, b: torch.Tensor, weight: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d_x = d_output.new_empty(d_output.shape[0], _inputs(len(weight), weight[0].numel(), b.shape[0]))  # [M, K]
    return d_x, torch.empty_like(reduced), torch.empty_like(b)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, reduced, a, b, weight, _ = inputs
    ctx.save_for_backward(reduced, a, b, *weight)  # not x: W is frozen


def _differentiate(ctx: Any, d_output: torch.Tensor) -> tuple[Any, ...]:
    reduced, a, b, *weight = ctx.saved_tensors
    d_x, d_reduced, d_b = torch.ops.qlora.nf4_linear_backward(d_output, reduced, a, b, weight)
    return d_x, d_reduced, None, d_b, [None] * len(weight), None


nf4_linear.register_autograd(_differentiate, setup_context=_keep_for_backward)


@register_flop_formula(torch.ops.qlora.nf4_linear)
def _forward_flops(x: list[int], reduced: list[int], a: Any, b: list[int], *weight_and_name: Any, **_: Any) -> int:
    return 2 * x[0] * b[0] * (x[1] + b[1])


@register_flop_formula(torch.ops.qlora.nf4_linear_backward)
def _backward_flops(
    d_output: list[int], reduced: list[int], a: list[int] | None, b: list[int], weight: list[Any], **_: Any
) -> int:
    inputs = _inputs(len(weight), math.prod(weight[0]), b[0])
    return 2 * d_output[0] * (b[0] * (inputs + 2 * b[1]) + (b[1] * inputs if a else 0))


# -- the layer ---------------------------------------------------------------------------------------------------------


class LoRALinear:
    """PEFT's adapted layer, with the operator above as its forward in training; see its two subclasses."""

    frozen: list[torch.Tensor]  # the tensors that nf4.py lists, or W [N, K] itself if it is not in 4 bits, or cached
    training: bool
    disable_adapters: bool
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    scaling: dict[str, float]
    name: str
    copies: tuple[torch.Tensor, torch.Tensor] | None = None  # of A [r, K] and scaling * B [N, r], as copy_adapters made them
    copied_in: object = None  # the pass that they are of
    answering: tuple[torch.Tensor, torch.Tensor] | None = None  # the same copies while answers are generated
    rows: torch.Tensor | None = None  # [B, 1, 1]: 1 where an answer has the adapter, else 0; None: everywhere
    seed: torch.Tensor | None = None  # [] int32 of this pass's dropout; None: PEFT's, which draws from torch's generator

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., K] -> [..., N], in autocast's dtype if there is one, else in that of x."""
        if not self.training and self.answering is not None and not self.disable_adapters:
            return self._answer(x, *self.answering)
        if not self.training or self.disable_adapters:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]  # of PEFT's layer
        autocast, device = torch.is_autocast_enabled(x.device.type), x.device.type
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if self.copies is not None and self.copies[0].dtype == dtype:
            a, b = self.copies  # [r, K], [N, r]
        else:
            a, b = (weight.to(dtype) for weight in self.adapter)  # [r, K], [N, r]
            b = b * self.scaling["default"]  # [N, r]
        rows = x.to(dtype).flatten(0, -2)  # [M, K]
        dropout = self.lora_dropout["default"]
        drops = isinstance(dropout, torch.nn.Dropout)  # at a rate of 0 PEFT puts an Identity there
        if not drops:
            dropped = rows.detach()  # [M, K]: the operator differentiates
        else:
            dropped = dropout(rows) if self.seed is None else seeded_dropout(rows, dropout.p, self.seed)  # [M, K]
        reduced = dropped @ a.T  # [M, r]
        output: torch.Tensor = nf4_linear(rows, reduced, None if drops else a.detach(), b, self.frozen, self.name)  # [M, N]
        if self.base_layer.bias is not None:
            output = output + self.base_layer.bias.to(dtype)  # [M, N]
        return output.view(*x.shape[:-1], -1)  # [..., N]

    def _answer(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[B, T, K] -> [B, T, N]: bitsandbytes' product, which has a kernel for one token, and three launches for A and B."""
        x = x.to(a.dtype)
        output: torch.Tensor = self.base_layer(x)  # [B, T, N]
        reduced = x @ a.T  # [B, T, r]
        if self.rows is not None:
            reduced = reduced * self.rows.to(a.dtype)
        output.flatten(0, -2).addmm_(reduced.flatten(0, -2), b.T)
        return output

    @property
    def adapter(self) -> tuple[Any, Any]:
        """A [r, K] and B [N, r]."""
        return self.lora_A["default"].weight, self.lora_B["default"].weight


class LoRALinear4bit(LoRALinear, Linear4bit):
    """Beside a base layer in NF4 or FP4."""


class LoRALinear16bit(LoRALinear, peft.tuners.lora.Linear):
    """Beside a base layer that is not quantized."""


def seeded_dropout(x: torch.Tensor, rate: float, seed: torch.Tensor) -> torch.Tensor:
    """Dropout of x [M, K] whose mask is a function of the seed [], so that it needs no memory and is the same again.

    torch 2.11 cannot compile a layer that computes torch's own dropout again in backward, if lengths are dynamic.
    """
    # The hash is in 32 bits and wraps around. In the C++ that torch.compile writes for a CPU, int32 arithmetic must not: signed
    # overflow is undefined there, and g++ drops loop code that it takes to be unreachable. int64 has the room.
    dtype = torch.int64 if x.device.type == "cpu" else torch.int32
    rows, columns = (torch.arange(size, dtype=dtype, device=x.device) for size in x.shape)  # [M], [K]
    bits = _mixed(_low_32((_mixed(rows) ^ seed)[:, None] + columns * 0x9E3779B))  # [M, K]
    return torch.where((bits & 0xFFFFFF) >= round(rate * 2**24), x / (1.0 - rate), 0.0)  # [M, K]


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """32 bits each, every bit of the result depending on all: the finalizer of MurmurHash3 (Appleby, public domain)."""
    bits = _low_32((bits ^ (bits >> 16 & 0xFFFF)) * -0x7A143595)  # the shifts bring in zeros
    bits = _low_32((bits ^ (bits >> 13 & 0x7FFFF)) * -0x3D4D51CB)
    return bits ^ (bits >> 16 & 0xFFFF)


def _low_32(bits: torch.Tensor) -> torch.Tensor:
    """What wrapping around leaves of a sum or product; int32 does that itself."""
    return bits & 0xFFFFFFFF if bits.dtype == torch.int64 else bits


class _Copies(torch.autograd.Function):
    """anchor [] -> A and scaling * B of all layers in another dtype; backward adds to the gradients of A and B themselves.

    Layer by layer these would be a launch for each cast, each scale and each sum: 2,000 in a step of Phi-3-mini.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, layers: list[LoRALinear], dtype: torch.dtype, this_pass: object
    ) -> tuple[torch.Tensor, ...]:
        # Not the layers: they hold the copies, which hold this, and no collector of garbage sees through autograd.
        ctx.layers, ctx.this_pass = [weakref.ref(layer) for layer in layers], this_pass
        ctx.weights = [weight for layer in layers for weight in layer.adapter]  # [r, K], [N, r], [r, K], ...
        ctx.scales = [scale for layer in layers for scale in (1.0, layer.scaling["default"])]
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(weight, dtype=dtype) for weight in ctx.weights]  # the same
        torch._foreach_copy_(copies, ctx.weights)
        torch._foreach_mul_(copies, ctx.scales)
        return tuple(copies)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, None, None, None]:
        found = [entry for entry in zip(ctx.weights, ctx.scales, gradients, strict=True) if entry[2] is not None]
        added = [torch.empty_like(weight) for weight, _, _ in found]  # [r, K], [N, r], ...
        torch._foreach_copy_(added, [gradient for _, _, gradient in found if gradient is not None])
        torch._foreach_mul_(added, [scale for _, scale, _ in found])
        earlier = [(weight.grad, new) for (weight, _, _), new in zip(found, added, strict=True) if weight.grad is not None]
        if earlier:
            torch._foreach_add_([gradient for gradient, _ in earlier], [new for _, new in earlier])
        for (weight, _, _), new in zip(found, added, strict=True):
            if weight.grad is None:
                weight.grad = new
        # All recomputation is done by now. A forward pass that makes no copies must not find those of this one.
        alive = [layer for reference in ctx.layers if (layer := reference()) is not None]
        drop_copies([layer for layer in alive if layer.copied_in is ctx.this_pass])
        return None, None, None, None


def dropout_seeds(layers: list[LoRALinear]) -> torch.Tensor:
    """A seed for the dropout of each layer in one pass: [layers] int32, from torch's generator."""
    return torch.randint(2**31 - 1, (len(layers),), dtype=torch.int32, device=layers[0].adapter[0].device)


def copy_adapters(layers: list[LoRALinear], seeds: torch.Tensor | None) -> None:
    """Give layers what they need for one forward and its backward: copies of A and B in autocast's dtype, if it is on.

    Autograd knows the copies only. Their backward adds to `.grad` of A and B, so gradient hooks on A and B never fire, nor
    does the reducer of `DistributedDataParallel`. Both are refused: sum `.grad` over ranks after backward.

    Args:
        layers: all that are trained.
        seeds: [layers] from dropout_seeds, by which dropout is drawn again where a compiled layer is computed again; None
            leaves dropout to PEFT.
    """
    device = layers[0].adapter[0].device
    if seeds is not None:
        for layer, seed in zip(layers, seeds.unbind(), strict=True):
            layer.seed = seed
    require_plain_gradients([weight for layer in layers for weight in layer.adapter])
    this_pass = object()
    for layer in layers:
        layer.copies, layer.copied_in = None, this_pass  # those of the last pass go
    if torch.is_autocast_enabled(device.type):
        anchor = torch.zeros((), device=device, requires_grad=True)  # []
        dtype = torch.get_autocast_dtype(device.type)
        copies = _Copies.apply(anchor, layers, dtype, this_pass)  # type: ignore[no-untyped-call]
        for layer, *pair in zip(layers, copies[::2], copies[1::2], strict=True):
            layer.copies = (pair[0], pair[1])


def drop_copies(layers: list[LoRALinear]) -> None:
    """Forget copies and seeds, so that the next forward pass uses the adapters themselves, and PEFT's dropout."""
    for layer in layers:
        layer.copies = layer.seed = None


@contextlib.contextmanager
def answering(model: Any) -> Iterator[None]:
    """A block in which adapted layers in eval mode skip PEFT's casts: eight launches in each layer for every token.

    A and B are computed in the dtype of the model, or of autocast, as in training; PEFT computes them in fp32.

    Args:
        model: in no_grad; without adapters nothing changes.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)] or install(model)
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    try:
        for layer in layers:
            a, b = layer.adapter  # [r, K], [N, r]
            layer.answering = a.detach().to(dtype), (b.detach() * layer.scaling["default"]).to(dtype)
        yield
    finally:
        for layer in layers:
            layer.answering = None


def _is_plain(module: Any) -> bool:
    """Whether a layer is W x + scaling B A x and no more: without DoRA, a bias of B, or a second adapter."""
    if not isinstance(module, peft.tuners.lora.LoraLayer) or list(module.lora_A) != ["default"]:
        return False
    return not module.lora_variant and not module.lora_bias["default"]


def install(model: Any, cache: torch.dtype | None = None) -> list[LoRALinear]:
    """Make every adapted layer in 4 bits or without quantization a LoRALinear, in place: same weights, same names.

    Args:
        model: with adapters.
        cache: keep the weights dequantized in this dtype too, for training: 2 bytes a parameter in bf16, and the same numbers.

    Returns:
        These layers.
    """
    installed: list[LoRALinear] = []
    for name, module in model.named_modules():
        ours: Any = module
        if not _is_plain(module):
            continue
        if isinstance(module, Linear4bit) and isinstance(module.base_layer, bitsandbytes.nn.Linear4bit):
            frozen = frozen_weight(module.base_layer)
            ours.__class__ = LoRALinear4bit
            ours.frozen = frozen if cache is None else [dequantized(frozen, module.base_layer.out_features, cache)]
        elif isinstance(module, peft.tuners.lora.Linear) and type(module.base_layer) is torch.nn.Linear:
            ours.__class__ = LoRALinear16bit
            ours.frozen = [module.base_layer.weight]
        else:
            continue
        ours.name = name.rsplit(".", 1)[-1]
        installed.append(ours)
    return installed
