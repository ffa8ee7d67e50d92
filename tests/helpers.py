"""Helpers that several test modules share; fixtures are in conftest.py."""

import copy
import dataclasses
import hashlib
import json
import math
import shutil
import warnings
from pathlib import Path

import bitsandbytes
import peft
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from qlora.config import TrainConfig
from qlora.data.batch import Batch
from qlora.data.template import IGNORED
from qlora.model import attention
from qlora.model.load import load_meta_model, load_nf4_model
from qlora.model.lora import add_lora, checked_targets, with_init_adapter
from qlora.model.loss import Head, read_head, token_loss_sum
from qlora.model.peft_config import with_peft_config
from qlora.model.targets import audit_targets
from qlora.run import checkpoint
from qlora.run.environment import environment
from qlora.run.schema import FORMAT, Environment, RunInfo
from qlora.speed.accelerate import accelerate

CPU = torch.device("cpu")
# A fourth of the tokens of the bundled data, whose runs take five times as long on a CPU without bf16 instructions.
SHORT_TRAIN, SHORT_EVAL = (Path(__file__).with_name(f"short_{name}.jsonl") for name in ("train", "eval"))  # 22 and 8 rows
SHORT_DATA = ["--train-file", str(SHORT_TRAIN), "--eval-file", str(SHORT_EVAL)]
ENVIRONMENT = {"packages": {"torch": "2", "flash-attn": None}, "python": "3", "device": "cpu", "cuda": None, "commit": None}
RUN_INFO = RunInfo(
    format=FORMAT,
    config={"seed": 1},
    data="d",
    eval_data=None,
    targets=[],
    device="cpu",
    history=[],
    origin=None,
    weights="digest",
    environment=Environment(**ENVIRONMENT),
)


def adapted_model(config: TrainConfig, attn_implementation: str = "sdpa"):
    """The tiny model in NF4 with adapters, as train_loop.main builds it; the same one every time."""
    config = with_init_adapter(config)
    torch.manual_seed(config.seed)
    model = load_nf4_model(config.model, config, attn_implementation, CPU)
    model = add_lora(model, config, audit_targets(model, config), config.model)
    return model.train()


def prepared(model, config: TrainConfig, policy: str, compile: str = "none"):
    """The model, and as `model.accelerated` what trains it; compiled without a C compiler, so that no bit differs."""
    torch._dynamo.reset()  # each model of the session is new to it
    settings: dict = {"gradient_checkpointing": policy, "compile": compile}
    model.accelerated = accelerate(model, dataclasses.replace(config, **settings), backend="aot_eager_decomp_partition")
    return model


def save_checkpoint(checkpoints: Path, model, optimizer, state: checkpoint.TrainState, info: RunInfo) -> Path:
    """Write a checkpoint at once, which a run leaves to a thread."""
    return checkpoint.write(checkpoints, checkpoint.snapshot(model, optimizer, state, info))


def decoder_of(model):
    """What a training step runs: the accelerated decoder where there is one."""
    return getattr(model, "accelerated", None) or model.get_decoder()


def wake_adapters(model, scale: float = 0.05) -> None:
    """Give B values: at its start of zero A has no gradient and the adapter no effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def relative_error(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """The largest over all tensors: norm of the difference over norm of the reference.

    Not over all tensors together, where a small module that is wrong by a factor of 3 would pass.
    """
    assert ours.keys() == reference.keys()
    errors = []
    for name, value in reference.items():
        difference, norm = (ours[name].double() - value.double()).norm().item(), value.double().norm().item()
        errors.append(difference / norm if norm else math.inf if difference else 0.0)
    return max(errors)


def fp32_twin(model, config):
    """An ordinary fp32 model: each NF4 weight dequantized once, the same adapters; no bitsandbytes left in it."""
    twin = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    modules = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            owner, _, leaf = name.rpartition(".")
            layer = getattr(modules[owner], "base_layer", modules[owner])
            weight = getattr(layer, leaf)
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                state = copy.copy(weight.quant_state)
                state.dtype = torch.float32
                weight = bitsandbytes.functional.dequantize_4bit(weight.data, state)
            parameter.copy_(weight)
    twin = add_lora(twin, config, audit_targets(twin, config), config.model)
    twin.load_state_dict({n: p for n, p in model.named_parameters() if "lora_" in n}, strict=False)
    return twin.train()


def adapter_gradients(model, batch, head: Head, autocast: bool):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = decoder_of(model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        loss = token_loss_sum(hidden, batch, head) / batch.num_tokens
    loss.backward()
    return loss.item(), gradients(model)


def loss_and_gradients(model, config, batch: Batch):
    """Mean loss of a token and gradients of the adapters, as in training: its attention functions, under bf16 autocast."""
    model.zero_grad()
    head = read_head(model)
    with attention.for_training(model, config), torch.autocast("cpu", torch.bfloat16):
        hidden = decoder_of(model)(**attention.decoder_inputs(batch, model.config), use_cache=False).last_hidden_state
        loss = token_loss_sum(hidden, batch, head) / batch.num_tokens
        loss.backward()
    return loss.item(), gradients(model)


def to_fp32(model):
    """The NF4 model with fp32 compute: what is not packed becomes fp32, and the NF4 weights dequantize to fp32."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight.quant_state.dtype = module.compute_dtype = torch.float32
        else:
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.float(), requires_grad=parameter.requires_grad))
    return model


def plain_loss_sum(hidden: torch.Tensor, batch: Batch, head: Head) -> torch.Tensor:
    """The slow twin: all logits at once, autograd's own gradient."""
    logits = head.logits(hidden[:, :-1]).float()  # [B, T - 1, V]
    return F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}  # fmt: skip


HOSTILE = '<script>alert("x")</script> & <b>bold</b>'


LONG_WORD = "an_identifier_without_a_place_to_break_it" * 6


def write_run(folder: Path, finished: bool = True, steps: int = 60, **changes) -> Path:
    """A run folder as training leaves it, made up: 60 steps, 10 an epoch. `changes` replace options or keys of run.json."""
    run_info = {
        "format": FORMAT,
        "config": {},
        "device": "cpu",
        "data": "a" * 64,
        "eval_data": "b" * 64,
        "targets": ["qkv_proj x 2"],
        "total_steps": 60,
        "parameters": 1_000_000,
        "predicted_gb": 2.5,
        "predicted_terms_gb": {"base in NF4": 1.75, "base in bf16": 0, "kept until backward": 0.75},
        "counts": [
            {"read": 22, "examples": 22, "tokens": 2000, "input_tokens": 4000, "shortest": 90, "median": 120, "longest": 148,
             "cut": 0, "dropped": 0},
            {"read": 8, "examples": 8, "tokens": 700, "input_tokens": 1400, "shortest": 90, "median": 110, "longest": 140,
             "cut": 0, "dropped": 0},
        ],
        "history": [],
        "origin": None,
    }  # fmt: skip
    options = {name: changes.pop(name) for name in list(changes) if hasattr(TrainConfig(), name)}
    chosen = {"model": "tiny-random", "train_file": "/home/me/my.jsonl", "eval_file": "/home/me/eval.jsonl"}
    config, _ = TrainConfig(**{**chosen, "output_dir": folder, **options}).resolved(on_gpu=False)
    rows = [evaluation(0, 1.2)]
    for step in range(1, steps + 1):
        rows.append(
            {"event": "step", "step": step, "epoch": (step - 1) // 10 + 1, "learning_rate": 4e-4 * (1 - step / 61),
             "loss": 1.2 * 0.95**step, "grad_norm": 0.8, "num_tokens": 91, "num_input_tokens": 180,
             "lines": [2 * step % 22 + 1, (2 * step + 1) % 22 + 1], "tokens_per_s": 1500.0,
             "peak_memory_gb": 1.75}
        )  # fmt: skip
        rows += [evaluation(step, 0.02 + 0.95**step)] if step % 10 == 0 else []
    samples = [
        {"step": steps, "prompt": HOSTILE, "base": HOSTILE * 9, "tuned": LONG_WORD, "reference": "wanted"},
        {"step": steps, "prompt": "two\nlines " + LONG_WORD, "base": "```\n" * 40, "tuned": "[1]", "reference": "[1]"},
    ]
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    machine = {**environment(torch.device("cpu")), "command": ["train_loop.py", "--train-file", HOSTILE, LONG_WORD]}
    machine["device_memory_gb"] = changes.pop("device_memory_gb", None)
    (folder / "env.json").write_text(json.dumps(machine))
    (folder / "run.json").write_text(json.dumps({**run_info, **changes}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples if finished))
    tensors = {"a.lora_A.weight": torch.zeros(4, 50), "a.lora_B.weight": torch.zeros(60, 4)}
    safetensors.torch.save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "run.lock").touch()
    if finished:
        (folder / "finished.json").write_text(json.dumps({"step": steps}))
    return folder


def evaluation(step: int, loss: float, eval_data: str = "b" * 64) -> dict:
    return {"event": "eval", "step": step, "epoch": step // 10, "eval_loss": loss, "perplexity": math.exp(loss),
            "num_tokens": 700, "eval_data": eval_data}  # fmt: skip


SIDE = {"value": 0.5, "low": 0.25, "high": 0.75}


SIDES = {name: dict(SIDE) for name in ("base", "adapter", "difference")}


EVALUATED = {"adapter_sha256": "d" * 64, "eval_data_sha256": "b" * 64, "num_examples": 8, "metrics": {"loss": SIDES}}


def of_peft(tiny, folder, tied: bool = False, save_embedding_layers=False, **settings) -> Path:
    """An adapter as PEFT itself leaves it, and in base/ the tiny model, whose embedding may be its head."""
    base = Path(shutil.copytree(tiny, folder / "base"))
    if tied:
        (base / "config.json").write_text(
            json.dumps(json.loads((base / "config.json").read_bytes()) | {"tie_word_embeddings": True})
        )
        weights = safetensors.torch.load_file(base / "model.safetensors")
        del weights["lm_head.weight"]
        safetensors.torch.save_file(weights, base / "model.safetensors", {"format": "pt"})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with warnings.catch_warnings(action="ignore"):
        chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "o_proj"], "task_type": "CAUSAL_LM", **settings}
        adapted = peft.get_peft_model(model, peft.LoraConfig(**chosen))
        with torch.no_grad():
            for parameter in adapted.parameters():
                parameter += parameter.requires_grad * 0.05 * torch.randn_like(parameter)
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=save_embedding_layers)
    return folder / "adapter"


def tensors(folder: Path) -> list[str]:
    """Digests of what a checkpoint holds in tensors: adapter and moments."""
    names = (checkpoint.ADAPTER, checkpoint.TRAINER_STATE)
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]


def with_method(config, path: Path):
    """The tiny model with what a file of --peft-config trains, in training mode; its configuration, and targets."""
    config = with_peft_config(dataclasses.replace(config, peft_config=path, attn_implementation="sdpa"))
    torch.manual_seed(0)
    targets = checked_targets(load_meta_model(config.model, config), config, lambda _: None)
    model = add_lora(load_nf4_model(config.model, config, "sdpa", CPU), config, targets, config.model).train()
    return model, config, targets
