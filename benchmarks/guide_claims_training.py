"""Short runs of the loop on the demo for guide_claims.py: targets, ranks, dropout, rates and decay against eval loss.

Shapes: B rows, T tokens, D hidden size. Losses are nats per token.
"""

import functools
import math
import pydoc_data.topics
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import train_loop
from qlora.config import BUNDLED_EVAL, BUNDLED_TRAIN, TrainConfig
from qlora.data.batch import batched, count_steps, epoch_rows, iter_batches
from qlora.data.dataset import encode_all
from qlora.data.formats import read_examples
from qlora.data.template import PromptTemplate, load_template
from qlora.eval.loss import evaluate_loss
from qlora.model import attention
from qlora.model.demo import model_source
from qlora.model.load import load_meta_model, load_nf4_model, load_tokenizer
from qlora.model.lora import add_lora, audit_targets
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.optimizer import build_optimizer
from qlora.model.random_state import seed_generators
from qlora.speed.accelerate import accelerate
from qlora.speed.memory import peak_memory_gb

CPU = torch.device("cpu")
EPOCHS = 4  # 24 steps
TEXT_ROWS, TEXT_LENGTH = 8, 512  # rows and tokens of the text that perplexity is taken on
Flags = dict[str, Any]  # of train_loop.py, where they differ from the defaults


class Trained(NamedTuple):
    """A run that is over: its row, and what it left in memory."""

    row: dict[str, Any]
    model: Any
    config: TrainConfig
    template: PromptTemplate


def configured(model: str, flags: Flags, epochs: int = EPOCHS) -> TrainConfig:
    """The demo's configuration with these flags, as the command line resolves it on a CPU."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    config, _ = TrainConfig(**{"model": model, "num_train_epochs": epochs, **values}).resolved(on_gpu=False)
    fixed: Any = {"attn_implementation": "sdpa", "gradient_checkpointing": "none", "compile": "none"}
    return TrainConfig(**{**vars(config), **fixed})


def text_rows(template: PromptTemplate, rows: int = TEXT_ROWS, length: int = TEXT_LENGTH) -> torch.Tensor:
    """[rows, length] ids of the reference text that comes with Python (pydoc_data.topics, PSF license), from its start."""
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    ids = template.ids(text[: 8 * rows * length])
    return torch.tensor(ids[: rows * length]).view(rows, length)  # [rows, length]


@torch.no_grad()
def text_losses(model: Any, ids: torch.Tensor, dtype: torch.dtype | None = torch.bfloat16) -> list[float]:
    """Mean loss of a token in each row.

    Args:
        model: a causal LM.
        ids: [rows, T].
        dtype: of autocast; None leaves it off.
    """
    training = model.training
    model.eval()
    losses = []
    for row in ids.split(1):  # [1, T]
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            logits = model(input_ids=row, use_cache=False).logits.float()[0]  # [T, V]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], row[0, 1:]).item())
    model.train(training)
    return losses


def start(model: str, flags: Flags, epochs: int = EPOCHS) -> tuple[TrainConfig, PromptTemplate, Any]:
    """What train_loop.main makes before its first step: configuration, template, and the NF4 model with its adapters."""
    config = configured(model, flags, epochs)
    source = model_source(str(config.model))
    meta_model = load_meta_model(source, config)
    template = load_template(load_tokenizer(source, meta_model, config), config.prompt_format)
    targets = audit_targets(meta_model, config)
    seed_generators(config.seed)
    return config, template, add_lora(load_nf4_model(source, config, "sdpa", CPU), config, targets, source)


def run(model: str, flags: Flags, epochs: int = EPOCHS) -> Trained:
    """Train with these flags as train_loop.py does, without files and samples, and evaluate after each epoch.

    Args:
        model: as --model.
        flags: of train_loop.py.
        epochs: passes over the 22 examples.
    """
    began = time.perf_counter()
    config, template, adapted = start(model, flags, epochs)
    assert config.learning_rate is not None  # as resolved
    samples, eval_set = (
        encode_all(read_examples(path, "train"), path, template, config)[0] for path in (BUNDLED_TRAIN, BUNDLED_EVAL)
    )
    decoder = accelerate(adapted, config)
    loss_sum = functools.partial(token_loss_sum, head=read_head(adapted))
    optimizer = build_optimizer([parameter for parameter in adapted.parameters() if parameter.requires_grad], config)
    step, (_, total) = 0, count_steps(config, len(samples))
    warmup = math.ceil(config.warmup_ratio * total)
    losses, norms, seconds = [], [], []
    evaluated = [eval_loss(adapted, eval_set, loss_sum, config)]
    adapted.train()
    with attention.for_training(adapted, config):
        for epoch in range(1, epochs + 1):
            rows = epoch_rows(samples, config, epoch)
            batches = iter_batches(samples, rows, config.per_device_train_batch_size)
            for micro_batches in batched(batches, config.gradient_accumulation_steps):
                since = time.perf_counter()
                rate = config.learning_rate * train_loop.lr_multiplier(step, warmup, total)
                step_loss, norm = train_loop.train_step(decoder, optimizer, micro_batches, loss_sum, rate, config.max_grad_norm)
                losses.append(step_loss.item())
                norms.append(norm.item())
                seconds.append(time.perf_counter() - since)
                step += 1
            evaluated.append(eval_loss(adapted, eval_set, loss_sum, config))
    row = {
        "flags": flags,
        "epochs": epochs,
        "trained_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "train_loss": losses,
        "grad_norm": norms,
        "eval_loss": evaluated,
        "train_loss_without_dropout": eval_loss(adapted, samples, loss_sum, config),
        "text_perplexity": math.exp(statistics.mean(text_losses(adapted, text_rows(template)))),
        "step_s": round(statistics.median(seconds), 3),
        "peak_rss_gb": round(peak_memory_gb(CPU), 3),
        "seconds": round(time.perf_counter() - began, 1),
    }
    return Trained(row, adapted, config, template)


def eval_loss(model: Any, samples: Sequence[Any], loss_sum: Any, config: TrainConfig) -> float:
    """Token-weighted loss in evaluation mode."""
    batches = iter_batches(samples, range(len(samples)), config.per_device_train_batch_size)
    return evaluate_loss(model, batches, loss_sum).loss


def training_row(model: str, flags: Flags, epochs: int = EPOCHS) -> dict[str, Any]:
    """The row of a run, for a process of its own."""
    torch.set_num_threads(1)
    return run(model, flags, epochs).row


# What claims about training are judged by; the first is the default that all are compared with.
BASE: Flags = {}
ANOTHER_SEED: Flags = {"seed": 43}
TARGETS: dict[str, Flags] = {
    "attention": {"target_modules": ["qkv_proj", "o_proj"]},
    "mlp": {"target_modules": ["gate_up_proj", "down_proj"]},
    "accidental": {"target_modules": ["o_proj", "down_proj"]},
    "all, r=12": {"lora_r": 12, "lora_alpha": 24},  # about as many parameters as the accidental pair at r=32
}
RANKS: dict[int, Flags] = {rank: {"lora_r": rank, "lora_alpha": 2 * rank} for rank in (2, 8, 128)}
DROPOUTS: dict[float, Flags] = {share: {"lora_dropout": share} for share in (0.0, 0.3)}
RATES: dict[float, Flags] = {rate: {"learning_rate": rate} for rate in (1e-5, 5e-5, 3e-3, 2e-2)}
NO_DECAY: Flags = {"weight_decay": 0.0}
