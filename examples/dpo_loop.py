"""Direct preference optimization in a plain loop: train an adapter on pairs of a better and a worse answer.

    python examples/dpo_loop.py --train-file pairs.jsonl        # the demo model on a CPU, Phi-3-mini on a GPU

Rows have `prompt`, `chosen` and `rejected`. The loss of a pair is -log sigmoid(beta * margin), where the margin is how much
more the adapter has raised the log-probability of the chosen answer than that of the rejected one (Rafailov et al., 2023,
arXiv 2305.18290, equation 7). The reference is the same model with the adapter switched off: no second copy in memory.
"""

import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from qlora.config import TrainConfig
from qlora.data.batch import Batch, batched, collate
from qlora.data.formats import Example
from qlora.data.messages import Message
from qlora.data.template import PromptTemplate, TokenizedExample, encode, load_template
from qlora.errors import DataError, UserError
from qlora.model import attention
from qlora.model.demo import model_source
from qlora.model.load import load_meta_model, load_nf4_model, load_tokenizer
from qlora.model.lora import add_lora, checked_targets
from qlora.model.loss import Head, read_head, token_loss_sum
from qlora.model.optimizer import build_optimizer
from qlora.model.random_state import seed_generators
from qlora.run import checkpoint
from qlora.run.files import write_folder
from qlora.run.prepare import resolve, set_up_torch
from qlora.speed.accelerate import accelerate
from train_loop import lr_multiplier

Pair = tuple[TokenizedExample, TokenizedExample]  # the chosen answer to a prompt, and the rejected one


@dataclass(frozen=True)
class Options:
    """Train an adapter on preferences."""

    train_file: Path
    """JSONL: prompt, chosen, rejected."""
    model: str | None = None
    """As of train_loop.py."""
    output_dir: Path = Path("runs/dpo")
    """The adapter goes into its folder adapter/."""
    beta: float = 0.1
    """How strongly the adapter is held to the reference."""
    learning_rate: float = 5e-6
    """Peak of warmup-cosine."""
    num_train_epochs: int = 1
    """Passes over the pairs."""
    pairs_per_step: int = 8
    """Pairs in one optimizer step, two at a time in a forward."""
    max_length: int = 2048
    """Longest prompt with its answer, in tokens; a longer one is an error."""
    lora_r: int = 32
    """Rank."""
    seed: int = 42
    """Order of pairs, start of the adapter."""


def read_pairs(path: Path, template: PromptTemplate, max_length: int) -> list[Pair]:
    """Tokenized pairs; raises DataError with the line of what is no pair, or too long."""
    pairs = []
    for line, text in enumerate(path.read_text(encoding="utf-8").rstrip().split("\n"), 1):
        try:
            row = json.loads(text)
            texts = [row[name] for name in ("prompt", "chosen", "rejected")]
            if not all(isinstance(each, str) and each for each in texts):
                raise TypeError("not a text, or empty")
            talks = [(Message("user", texts[0]), Message("assistant", answer)) for answer in texts[1:]]
            chosen, rejected = (encode(Example(talk, line), template, "response") for talk in talks)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{line}: A row needs prompt, chosen and rejected, as texts ({error!r}).") from None
        if (longest := max(len(chosen.input_ids), len(rejected.input_ids))) > max_length:
            raise DataError(f"{path}:{line}: It has {longest} tokens, more than --max-length {max_length}.")
        pairs.append((chosen, rejected))
    return pairs


def log_probabilities(decoder: Any, batch: Batch, head: Head) -> torch.Tensor:
    """Of each row's answer: the sum over its tokens. [B] fp32."""
    with torch.autocast(batch.input_ids.device.type, decoder.dtype):
        hidden = decoder(**attention.decoder_inputs(batch, decoder.config), use_cache=False).last_hidden_state  # [B, T, D]
        row_of = batch.positions // batch.input_ids.shape[1]  # [N]
        of_rows = (batch._replace(positions=batch.positions[row_of == row]) for row in range(len(batch.input_ids)))
        return torch.stack([-token_loss_sum(hidden, each, head) for each in of_rows])  # [B]


def dpo_loss(model: Any, decoder: Any, pairs: list[Pair], head: Head, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses of pairs, and how many have a positive margin: fp32 scalars. `decoder` is accelerate's."""
    batch = collate([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]).to(model.device)
    with torch.no_grad(), model.disable_adapter():
        reference = log_probabilities(model.eval().get_decoder(), batch, head)  # [2 * pairs]
    policy = log_probabilities(model.train() and decoder, batch, head)  # [2 * pairs]
    gained = policy - reference  # [2 * pairs]
    margin = gained[: len(pairs)] - gained[len(pairs) :]  # [pairs]
    return -torch.nn.functional.logsigmoid(beta * margin).sum(), (margin > 0).sum()


def main(options: Options) -> None:
    """Train, and write the adapter in PEFT's format."""
    config = TrainConfig(model=options.model, max_length=options.max_length, lora_r=options.lora_r, lora_dropout=0.0,
                         compile="none", gradient_checkpointing="full", seed=options.seed)  # fmt: skip
    config.check()
    device = set_up_torch(config)
    config = resolve(config, device, print)
    source = model_source(str(config.model))
    meta_model = load_meta_model(source, config)
    template = load_template(load_tokenizer(source, meta_model, config), config.prompt_format)
    pairs = read_pairs(options.train_file, template, options.max_length)  # before the weights: a mistake shows at once
    chosen = attention.choose_attention(config, device, meta_model)
    targets = checked_targets(meta_model, config, print)
    config = replace(config, attn_implementation=chosen.implementation)
    seed_generators(config.seed)
    model = add_lora(load_nf4_model(source, config, chosen.loaded_as, device), config, targets, source)
    decoder, head = accelerate(model, config), read_head(model)
    optimizer = build_optimizer({name: each for name, each in model.named_parameters() if each.requires_grad}, config)
    epochs = (random.Random(options.seed + each).sample(pairs, len(pairs)) for each in range(options.num_train_epochs))
    steps = [step_pairs for epoch in epochs for step_pairs in batched(epoch, options.pairs_per_step)]
    for step, step_pairs in enumerate(steps):
        optimizer.zero_grad(set_to_none=True)
        loss, right = torch.zeros(2, device=device)  # [] each
        for two in batched(step_pairs, 2):
            with attention.for_training(model, config):
                summed, positive = dpo_loss(model, decoder, two, head, options.beta)  # [] each
                (summed / len(step_pairs)).backward()  # in here, as layers are computed again with the same attention
            loss, right = loss + summed.detach() / len(step_pairs), right + positive / len(step_pairs)  # [] each
        norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * lr_multiplier(step, max(len(steps) // 10, 1), len(steps))
        optimizer.step()
        print(f"step {step + 1}/{len(steps)}  loss {loss:.4f}  accuracy {right:.2f}  grad_norm {norm:.3f}")  # sync
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_folder(options.output_dir / "adapter", dict(checkpoint.adapter_files(model, template.tokenizer)))
    print(f"Adapter: {options.output_dir / 'adapter'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(int(getattr(error, "exit_code", 3))) from None
