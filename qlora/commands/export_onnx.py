"""A merged model as ONNX, and whether onnxruntime computes what torch computes.

The graph gives the logits of all positions, without a KV cache: for scoring, or to build on. Batch and length are free.
"""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qlora.errors import EnvironmentProblem

PACKAGES = {name: name for name in ("onnx", "onnxscript", "onnxruntime")}  # import name -> package
MODEL = "model.onnx"  # its weights beside it, in model.onnx.data
INPUTS = ("input_ids", "attention_mask")
ROWS = 4  # of eval samples that are compared
PARITY = 1e-4  # relative error of logits; fp32 in another order of sums is off by 1e-6
# torch tells that torchvision, which nobody needs here, is not there.
logging.getLogger("torch.onnx._internal.exporter._registration").addFilter(lambda r: "torchvision" not in r.getMessage())


class _Logits(torch.nn.Module):
    """(input_ids [B, T], attention_mask [B, T]) -> logits [B, T, V]."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


@torch.no_grad()
def export(model: Any, folder: Path, rows: list[list[int]]) -> float:
    """Write model.onnx, in fp32 as onnxruntime has no bf16 on a CPU, and compare it with torch.

    Args:
        model: a transformers model; it is in fp32 and on the CPU afterward.
        folder: that is there.
        rows: token ids to compare on, one and all together, padded on the left.

    Returns:
        The relative error of the logits.

    Raises:
        EnvironmentProblem: if it is more than rounding.
    """
    wrapped = _Logits(model.float().cpu()).eval()
    example = torch.arange(2, 36).view(2, 17) % model.config.get_text_config().vocab_size  # [2, 17]
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
        program: Any = torch.onnx.export(
            wrapped,
            (example, torch.ones_like(example)),
            dynamo=True,
            verbose=False,
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_shapes=(free, free),
        )
    program.save(folder / MODEL, external_data=True)
    error = _parity(wrapped, folder / MODEL, rows)
    if not error < PARITY:
        raise EnvironmentProblem(
            f"onnxruntime computes other logits than torch: relative error {error:.1e}, and {PARITY} is allowed.",
            hint="Leave out --onnx, or try other versions of torch and onnxruntime.",
        )
    return error


def _parity(model: torch.nn.Module, path: Path, rows: list[list[int]]) -> float:
    """Relative error of onnxruntime's logits, over all batches."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    error = total = 0.0
    for ids, mask in _batches(rows):
        wanted = model(ids, mask)[mask.bool()].double()  # [tokens, V]
        (logits,) = session.run(None, dict(zip(INPUTS, (ids.numpy(), mask.numpy()), strict=True)))
        found = torch.from_numpy(logits)[mask.bool()].double()  # [tokens, V]
        error += float((found - wanted).square().sum())
        total += float(wanted.square().sum())
    return float((error / total) ** 0.5)


def _batches(rows: list[list[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """ids and mask [1, T] of the first row, then [B, T] of all."""
    for group in (rows[:1], rows):
        longest = max(map(len, group))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in group])  # [B, T]
        yield ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in group])  # [B, T]
