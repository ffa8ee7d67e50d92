"""Predicts the time of an optimizer step on several GPUs from shapes: computing, and sending between them."""

from typing import Any, NamedTuple

from qlora.config import TrainConfig
from qlora.model.coverage import quantized_layers
from qlora.model.targets import Target

# Seconds per position and parameter, by gradient checkpointing: Phi-3-mini on an H100, compiled (benchmarks/results/peers_*).
COMPUTE_S = {"none": 9.8e-15, "selective": 11.8e-15, "full": 13.2e-15}


class StepTime(NamedTuple):
    """Seconds of a step in which each GPU computes the same number of micro-batches."""

    compute_s: float
    reduce_s: float  # to sum gradients, after the last backward pass
    gather_s: float  # to gather layers twice per micro-batch, while others are computed

    @property
    def total_s(self) -> float:
        """Gathering is hidden as long as it takes less than computing."""
        return max(self.compute_s, self.gather_s) + self.reduce_s

    @property
    def efficiency(self) -> float:
        """Fraction of the step time spent computing."""
        return self.compute_s / self.total_s


def reduced_bytes(targets: list[Target]) -> int:
    """Bytes of all gradients, which are in fp32."""
    return 4 * sum(target.adapter_parameters for target in targets)


def step_time(model: Any, targets: list[Target], config: TrainConfig, tokens: int, gpus: int, gb_per_s: float) -> StepTime:
    """Predict a step.

    A ring sends 2 (N - 1) / N times the bytes that it sums, and (N - 1) / N times those that it gathers.

    Args:
        model: the base model or the meta model.
        targets: from audit_targets.
        config: shard_base, gradient_checkpointing and gradient_accumulation_steps (of each GPU) are read.
        tokens: positions in a micro-batch.
        gpus: N.
        gb_per_s: what a GPU sends and, at the same time, receives per second, in GB.
    """
    micro_batches, others = config.gradient_accumulation_steps, (gpus - 1) / gpus
    compute_s = micro_batches * tokens * model.num_parameters() * COMPUTE_S[config.gradient_checkpointing]
    packed = sum(layer.weight.numel() for layer in quantized_layers(model).values()) / 2  # bytes
    gathered = 2 * micro_batches * packed if config.shard_base else 0
    sent = 1e9 * gb_per_s  # bytes per second
    return StepTime(compute_s, 2 * others * reduced_bytes(targets) / sent, others * gathered / sent)
