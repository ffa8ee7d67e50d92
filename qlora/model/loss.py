"""The loss: frozen head and cross-entropy over trained positions only, a chunk at a time, its gradient made in forward.

The plain way, `cross_entropy(lm_head(hidden))`, holds several [B * T, V] tensors (0.5 GB each at 4,096 tokens of Phi-3)
and multiplies by the head three times if it recomputes them. Here logits live for one chunk and two products suffice.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from qlora.data.batch import Batch
from qlora.errors import ConfigError
from qlora.model.precision import autocast_dtype
from qlora.model.prompts import base_of
from qlora.model.third_party import peft

FP16_SCALE = 256.0  # of the gradient of logits in fp16: that of a token of probability 0.9999 would be rounded by an eighth
CHUNK_TOKENS = 1024  # 1024 x 32064 fp32 logits are 131 MB


class Head(NamedTuple):
    """The output layer of a model: logits = softcap * tanh(scale * (W x + b) / softcap)."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    scale: float
    softcap: float | None
    layer: Any = None  # which computes its weight anew, where PEFT trains single rows of it

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V], in the dtype of the product."""
        logits = F.linear(hidden, self.weight, self.bias)  # [..., V]
        if self.scale != 1.0:
            logits = logits * self.scale  # [..., V]
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def read_head(model: Any) -> Head:
    """The head of a transformers model, checked against the model's own logits on a few tokens.

    Args:
        model: a causal LM, adapters or not; its head is frozen, or trained (modules_to_save, trainable_token_indices).

    Raises:
        ConfigError: if the model does something to its logits that `Head` does not know.
    """
    model = base_of(model)  # virtual tokens would add positions
    config = model.config.get_text_config()
    layer = model.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)  # Cohere; Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    changing = layer if isinstance(layer, peft.utils.other.TrainableTokensWrapper) else None
    head = Head(layer.weight, getattr(layer, "bias", None), scale, softcap, changing)
    probe = torch.arange(1, 9, device=layer.weight.device)[None] % config.vocab_size  # [1, 8]
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(probe.device.type, autocast_dtype(model)):
        # The decoder called directly, as training does. Not `output_hidden_states`, whose hooks transformers leaves in the
        # model, where no compiler can follow them.
        ours = head.logits(model.get_decoder()(input_ids=probe, use_cache=False).last_hidden_state).float()  # [1, 8, V]
        theirs = model(input_ids=probe, use_cache=False).logits.float()  # [1, 8, V]
    model.train(training)
    if ours.shape != theirs.shape or not (ours - theirs).norm() < 0.01 * theirs.norm():  # bf16 rounds at 0.004
        raise ConfigError(
            f"{type(model).__name__} does something to its logits that this loop does not know, so its loss would be wrong.",
            hint="Add it to Head.logits, and its derivative to the gradient, in qlora/model/loss.py.",
        )
    return head


def token_loss_sum(hidden: torch.Tensor, batch: Batch, head: Head, chunk_tokens: int = CHUNK_TOKENS) -> torch.Tensor:
    """Sum of cross-entropies over the N trained tokens of a micro-batch, in nats.

    Args:
        hidden: [B, T, D] last hidden states, on one device with the batch.
        batch: labels and the positions that predict them.
        head: the output layer.
        chunk_tokens: rows of logits alive at a time.

    Returns:
        fp32 scalar; differentiable with respect to `hidden`, and to the head if it requires a gradient.

    Source: after the fused linear cross-entropy of Hsu et al., 2024 (arXiv 2410.10989), for a frozen head.
    """
    if head.layer is not None:
        head = head._replace(weight=head.layer.weight)  # [V, D]
    rows = hidden.flatten(0, 1)[batch.positions]  # [N, D]
    targets = batch.labels.flatten()[batch.positions + 1]  # [N]: the shift by one, here and nowhere else
    if head.weight.requires_grad and torch.is_grad_enabled():  # trained: autograd makes its gradient too
        chunks = zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
        return torch.stack([checkpoint(_plain_loss_sum, *chunk, head, use_reentrant=False) for chunk in chunks]).sum()  # []
    total: torch.Tensor = _ChunkedCrossEntropy.apply(rows, targets, head, chunk_tokens)  # type: ignore[no-untyped-call]
    return total  # []


def _plain_loss_sum(rows: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    """rows [C, D], targets [C] -> [] fp32, differentiable with respect to rows and the head."""
    return F.cross_entropy(head.logits(rows).float(), targets, reduction="sum")


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[C, V], [C] -> losses [C] fp32, and `scale` times the gradient of their sum [C, V], perhaps in the logits' memory."""
    if logits.is_cuda:
        from qlora.model.cross_entropy import cross_entropy_  # here, as it needs Triton

        return cross_entropy_(logits, targets, scale), logits
    logits, wanted = logits.float(), targets[:, None]  # [C, V], [C, 1]
    log_normalizer = logits.logsumexp(dim=-1, keepdim=True)  # [C, 1]
    losses = (log_normalizer - logits.gather(1, wanted))[:, 0]  # [C]
    softmax = logits.sub_(log_normalizer).exp_()  # [C, V]
    return losses, softmax.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=softmax.dtype)).mul_(scale)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """rows [N, D], targets [N] -> fp32 sum. The head is frozen, so the one gradient is that of rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, targets: torch.Tensor, head: Head, chunk_tokens: int) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(rows) if needs_gradient else None  # [N, D]
        loss_sum = torch.zeros((), device=rows.device)  # []
        scale = FP16_SCALE if head.weight.dtype == torch.float16 else 1.0
        for start in range(0, len(rows), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = head.logits(rows[chunk])  # [C, V]
            slope = None if head.softcap is None else 1 - (logits.float() / head.softcap).square()  # [C, V]
            losses, d_logits = _cross_entropy(logits, targets[chunk], scale)  # [C], [C, V]; the logits are gone
            loss_sum += losses.sum()
            if gradient is not None:
                if slope is not None:
                    d_logits *= slope
                if head.scale != 1.0:
                    d_logits *= head.scale
                gradient[chunk] = d_logits.to(head.weight.dtype) @ head.weight  # [C, D]
        ctx.gradient, ctx.scale = gradient, scale
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.gradient is None:
            text = "This loss has had its backward pass, which frees the gradient that its forward pass made."
            raise RuntimeError(f"{text} Run forward again for a second backward pass.")
        gradient, ctx.gradient = ctx.gradient, None  # backward of what comes before needs the room
        return gradient.mul_(d_loss / ctx.scale), None, None, None
