"""What the contenders train, and what it costs to compute: samples, the models, operations.

Model FLOP/s utilization divides what a step has to compute by what it took: for each token

    F = 4 P + 6 p + 7 S D L + 4 V D

P weights of the quantized layers (forward, and backward to their inputs alone: they are frozen), p of the adapters (a gradient
too), S D L of causal attention (2 forward, 5 backward; S is twice the mean number of tokens that a position sees, so the
length of a full row, less with short samples or a window; D of all heads together), V D of the frozen head. What is computed
again for checkpoints does not count. For Phi-3-mini at 2,048 tokens F is 16.6 GFLOP.
"""

import dataclasses
import functools
import itertools
import json
import math
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import write_random_model
from benchmarks.shapes import SHAPES, write_shape

RANK = 32
SAMPLES = 64  # of mixed lengths


@dataclasses.dataclass(frozen=True)
class Work:
    """What every contender of a shape trains on: samples in their order, again from the first when they are used up."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    batch: int  # rows in a micro-batch
    accumulation: int  # micro-batches in a step
    max_length: int
    packing: bool
    warm_up: int  # steps
    steps: int  # that are timed

    @functools.cached_property
    def samples_of_steps(self) -> list[list[int]]:
        """The samples of each step; with packing every step takes all of them."""
        each = len(self.input_ids) if self.packing else self.batch * self.accumulation
        order = itertools.cycle(range(len(self.input_ids)))
        return [list(itertools.islice(order, each)) for _ in range(self.warm_up + self.steps)]

    @functools.cached_property
    def tokens_of_steps(self) -> list[int]:
        """Tokens without padding, trained or not, of each step."""
        return [sum(len(self.input_ids[index]) for index in step) for step in self.samples_of_steps]


def draw(shape: str, folder: Path, seed: int, warm_up: int, steps: int) -> Work:
    """The samples of a shape, every id but the first trained: for a model folder, from a seed.

    Args:
        shape: ROWSxLENGTHxACCUMULATION; mixed, or mixed_packed for the same samples in packed rows; avro for the bundled data.
    """
    if shape == "avro":
        return bundled(folder, warm_up, steps)
    model = json.loads((folder / "config.json").read_text())
    generator = random.Random(seed)
    if full := re.fullmatch(r"(\d+)x(\d+)x(\d+)", shape):
        batch, longest, accumulation = map(int, full.groups())
        lengths = [longest] * (batch * accumulation * (warm_up + steps))
    else:
        longest = 2048 if model["hidden_size"] >= 2048 else 128  # small models run on a CPU
        lengths, rows = mixed_lengths(generator, longest)
        batch, accumulation = (2, rows // 2) if shape == "mixed_packed" else (4, SAMPLES // 4)
    ids = [[generator.randrange(4, model["vocab_size"]) for _ in range(length)] for length in lengths]
    return Work(ids, ids, batch, accumulation, longest, shape == "mixed_packed", warm_up, steps)


def mixed_lengths(generator: random.Random, longest: int) -> tuple[list[int], int]:
    """Lognormal lengths, 600 in the mean where 2,048 is the most; and the rows that they pack into, an even number."""
    from qlora.data.batch import pack

    median = 600 / 2048 * longest / math.exp(0.6**2 / 2)
    while True:
        lengths = [min(longest, max(8, round(generator.lognormvariate(0, 0.6) * median))) for _ in range(SAMPLES)]
        rows = len(pack(lengths, range(SAMPLES), longest))
        if rows % 2 == 0:
            return lengths, rows


def bundled(folder: Path, warm_up: int, steps: int) -> Work:
    """The examples of the demo as the loop encodes them, its batch size and accumulation, the loss on answers alone."""
    from benchmarks.guide_claims.models import encoded, template_of
    from qlora.config import TrainConfig

    config, samples = TrainConfig(), encoded(template_of(str(folder)))
    ids, labels = [sample.input_ids for sample in samples], [sample.labels for sample in samples]
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    return Work(ids, labels, batch, accumulation, config.max_length, False, warm_up, steps)


# -- what a token costs ----------------------------------------------------------------------------------------------


def width_of_queries(shape: dict[str, Any]) -> int:
    """Of all heads together."""
    heads: int = shape["num_attention_heads"]
    return heads * (shape.get("head_dim") or shape["hidden_size"] // heads)


def quantized_parameters(shape: dict[str, Any]) -> int:
    """P: weights of the four linear layers of each block."""
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    queries = width_of_queries(shape)
    keys = queries // heads * (shape.get("num_key_value_heads") or heads)
    # qkv_proj and o_proj, gate_up_proj and down_proj
    return shape["num_hidden_layers"] * hidden * (queries + 2 * keys + queries + 3 * inner)


def flops_per_token(shape: dict[str, Any], lengths: Iterable[int], adapters: int) -> float:
    """F of the module's first lines, for samples of these lengths and so many parameters of adapters."""
    lengths, depth, window = list(lengths), shape["num_hidden_layers"], shape.get("sliding_window")
    windows = [window if kind == "sliding_attention" else None for kind in shape.get("layer_types") or ()] or [window] * depth
    # Twice the pairs of positions that causal attention looks at, in all layers.
    pairs = sum(n * n - max(0, n - (each or n)) ** 2 for n in lengths for each in windows)
    attention = 7 * pairs / sum(lengths) * width_of_queries(shape)
    head = 4 * shape["vocab_size"] * shape["hidden_size"]
    return 4 * quantized_parameters(shape) + 6 * adapters + attention + head


# -- models ----------------------------------------------------------------------------------------------------------


def prepare(
    shape_of_model: str, folder: Path, split: bool, shapes: list[str], seed: int, warm_up: int, steps: int
) -> dict[str, Work]:
    """Write the models, and draw the samples of each shape."""
    write_models(shape_of_model, folder, split)
    return {shape: draw(shape, folder / "fused", seed, warm_up, steps) for shape in shapes}


def write_models(shape: str, folder: Path, split: bool) -> None:
    """`folder`/fused, which all contenders load: the pretrained demo, or a shape with random weights.

    With `split` there is `folder`/split beside it, with split projections, as unsloth knows no Phi-3 with fused ones.
    """
    from qlora.model.demo import demo_model

    if shape in SHAPES:  # whose projections are split
        write_shape(shape, folder / "fused")
        (folder / "split").symlink_to(folder / "fused")
        return
    if shape == "demo":
        (folder / "fused").symlink_to(demo_model())
    else:
        write_random_model(shape, folder / "fused")
    if split:
        write_split(folder / "fused", folder / "split")


def write_split(fused: Path, folder: Path) -> None:
    """The same function as a MistralForCausalLM: q, k, v apart, gate and up apart. One shard in memory at a time."""
    import transformers
    from safetensors.torch import load_file, save_file

    shape = json.loads((fused / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id",
            "eos_token_id", "sliding_window", "dtype")  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(fused)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(3)  # unsloth needs one that is not the end of a text
    width = shape["hidden_size"] // shape["num_attention_heads"]
    same = {name: shape[name] for name in kept}
    config = transformers.MistralConfig(**same, head_dim=width, pad_token_id=3, architectures=["MistralForCausalLM"])
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    queries = shape["num_attention_heads"] * width
    keys = shape["num_key_value_heads"] * width
    parts = {"qkv_proj": (("q_proj", "k_proj", "v_proj"), (queries, keys, keys)),
             "gate_up_proj": (("gate_proj", "up_proj"), (shape["intermediate_size"],) * 2)}  # fmt: skip
    index: dict[str, str] = {}
    for path in sorted(fused.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(path).items():
            layer = name.split(".")[-2]
            names, sizes = parts.get(layer, ((layer,), (len(tensor),)))
            for new, piece in zip(names, tensor.split(sizes), strict=True):
                tensors[name.replace(layer, new)] = piece.contiguous()  # [out, in]
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, path.name)
    if len(set(index.values())) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
