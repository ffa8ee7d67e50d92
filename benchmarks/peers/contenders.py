"""The contenders: each trains the same samples for a few steps and tells a clock when its steps begin and end.

All read the same model, adapters on all linear layers, samples in the same order, fused AdamW, clipping at 1. The rest is their
own. unsloth has to be imported before transformers, so imports stand where they are needed.
"""

import functools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Clock, build, peak_gb, spread
from benchmarks.peers.work import RANK, Work, flops_per_token

PEAK_FLOPS = 790e12  # bf16 on an H100, as large products reach there
ALPHA, RATE, CLIP = 64, 5e-5, 1.0
LORA = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}  # which leaves out the head
PACKAGES = ("trl", "unsloth", "transformers", "torch", "peft", "bitsandbytes", "flash-attn", "liger-kernel")
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

TRL: dict[str, dict[str, Any]] = {  # what a user sets beside QLoRA and the shape: nothing, or what TRL's own pages advise
    "trl": {},
    "trl_best": {"tuned": True},
    "trl_selective": {"tuned": True, "gradient_checkpointing_kwargs": {"selective": True}},
    "trl_no_checkpointing": {"tuned": True, "gradient_checkpointing": False},
    "trl_liger": {"tuned": True, "use_liger_kernel": True},
    "trl_liger_no_checkpointing": {"tuned": True, "use_liger_kernel": True, "gradient_checkpointing": False},
}
UNSLOTH: dict[str, str | bool] = {"unsloth_offload": "unsloth", "unsloth_checkpointing": True, "unsloth_none": False}
OURS: dict[str, dict[str, Any]] = {  # flags
    "ours_none": {"gradient_checkpointing": "none"},
    "ours_cached": {"gradient_checkpointing": "none", "cache_dequantized": True},
    "ours_selective": {"gradient_checkpointing": "selective"},
    "ours_selective_layers": {"gradient_checkpointing": "selective", "compile": "layers"},
    "ours_full": {"gradient_checkpointing": "full"},
    "ours_full_layers": {"gradient_checkpointing": "full", "compile": "layers"},
    "ours_smallest": {"gradient_checkpointing": "full", "offload_checkpoints": True, "optimizer": "adamw_8bit"},
}
CONTENDERS = (*TRL, *UNSLOTH, *OURS, "naive")
IMPORTS = {  # what takes long, and none of the GPU's time
    "trl": ("trl.trainer.sft_trainer", "peft"),
    "unsloth": ("unsloth", "trl.trainer.sft_trainer"),
    "ours": ("train_loop",),
    "naive": ("peft",),
}


def family(contender: str) -> str:
    """trl, unsloth, ours or naive."""
    return contender.partition("_")[0]


# -- contenders: each trains, tells the clock, and gives back the model ------------------------------------------------


def dataset(work: Work) -> Any:
    """The samples as a Trainer takes them: those of all steps one after the other or, to be packed, once."""
    import datasets

    order = range(len(work.input_ids)) if work.packing else [index for step in work.samples_of_steps for index in step]
    columns = {"input_ids": work.input_ids, "labels": work.labels}
    return datasets.Dataset.from_dict({name: [values[index] for index in order] for name, values in columns.items()})


def trainer_arguments(work: Work, on_gpu: bool, **chosen: Any) -> dict[str, Any]:
    """What is the same for all who use a Trainer: the shape, the optimizer, and nothing written, evaluated or shuffled."""
    return {
        "output_dir": "trainer",
        "use_cpu": not on_gpu,
        "per_device_train_batch_size": work.batch,
        "gradient_accumulation_steps": work.accumulation,
        "max_steps": work.warm_up + work.steps,
        "max_length": work.max_length,
        "packing": work.packing,
        "learning_rate": RATE,
        "max_grad_norm": CLIP,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10**6,
        "logging_first_step": True,  # in the warm-up
        "disable_tqdm": True,
        **chosen,
    }


def train_with(trainer: Any, work: Work, clock: Clock) -> Any:
    """Run a Trainer from its first step to its last."""
    import datasets
    import transformers

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            clock.losses += [logs["loss"]] if "loss" in logs else []

    if work.packing:  # packed once; an epoch for each step would be timed with it
        rows = trainer.train_dataset
        if len(rows) != work.batch * work.accumulation:
            raise SystemExit(f"packed into {len(rows)} rows, not {work.batch * work.accumulation}")
        trainer.train_dataset = datasets.concatenate_datasets([rows] * (work.warm_up + work.steps))
    trainer.add_callback(Steps())
    clock.loaded()
    trainer.train()
    return trainer.model


def trl_options(contender: str) -> dict[str, Any]:
    """What a user of TRL sets for a contender beside QLoRA and the shape, as arguments of SFTConfig."""
    from transformers.utils import is_flash_attn_2_available

    chosen = dict(TRL[contender])
    if chosen.pop("tuned", False):  # its default loads fp32, so that what is not quantized is computed in fp32
        attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
        chosen["model_init_kwargs"] = {"dtype": "bfloat16", "attn_implementation": attention}
    return chosen


def trl(contender: str, work: Work, folder: Path, dropout: float, clock: Clock) -> Any:
    """SFTTrainer as its documentation has it: the model's path, the quantization, the adapters."""
    import peft
    import trl as library

    from qlora.model.load import quantization_of

    trainer = library.SFTTrainer(
        model=str(folder / "fused"),
        args=library.SFTConfig(**trainer_arguments(work, clock.on_gpu, **trl_options(contender))),
        train_dataset=dataset(work),
        quantization_config=quantization_of("nf4"),  # doubly quantized, computed in bf16
        peft_config=peft.LoraConfig(lora_dropout=dropout, **LORA),
    )
    if contender == "trl_selective":  # transformers from 5.23 on calls another name than the one that TRL 1.16 wraps
        enable = trainer.model.gradient_checkpointing_enable
        trainer.model.activation_checkpointing_enable = lambda activation_checkpointing_kwargs, **more: enable(
            gradient_checkpointing_kwargs=activation_checkpointing_kwargs, **more
        )
    return train_with(trainer, work, clock)


def unsloth(contender: str, work: Work, folder: Path, dropout: float, clock: Clock) -> Any:
    """FastLanguageModel and SFTTrainer as its notebooks have them."""
    import unsloth as library  # noqa: I001  before trl, which it patches
    import trl as patched

    checkpointing = UNSLOTH[contender]
    model, tokenizer = library.FastLanguageModel.from_pretrained(
        str(folder / "split"), max_seq_length=work.max_length, load_in_4bit=True, use_gradient_checkpointing=checkpointing
    )
    model = library.FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=SPLIT, use_gradient_checkpointing=checkpointing
    )
    chosen = {} if checkpointing else {"gradient_checkpointing": False}
    args = patched.SFTConfig(**trainer_arguments(work, clock.on_gpu, **chosen))
    trainer = patched.SFTTrainer(model=model, processing_class=tokenizer, args=args, train_dataset=dataset(work))
    return train_with(trainer, work, clock)


def ours(contender: str, work: Work, folder: Path, dropout: float, clock: Clock) -> Any:
    """What train_loop.main and train do, from the model to the step."""
    from qlora.config import TrainConfig
    from qlora.model import attention
    from train_loop import train_step

    config = TrainConfig(
        model=str((folder / "fused").resolve()),
        lora_r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        max_length=work.max_length,
        packing=work.packing,
        per_device_train_batch_size=work.batch,
        gradient_accumulation_steps=work.accumulation,
        **OURS[contender],
    )
    config, trainee = build(config)
    clock.attention = config.attn_implementation
    step = functools.partial(train_step, trainee.decoder, trainee.optimizer, loss_sum=trainee.loss_sum)
    with attention.for_training(trainee.model.train(), config):
        clock.loaded()
        for micro_batches in steps_of(work, clock.on_gpu, config.length_multiple):
            clock.begin()
            loss, _ = step(micro_batches=micro_batches, learning_rate=RATE, max_grad_norm=CLIP)
            clock.end()
            clock.losses += [] if clock.losses else [loss.item()]
    return trainee.model


def steps_of(work: Work, pin: bool, multiple: int = 1) -> Iterator[list[Any]]:
    """The micro-batches of each step, collated when they are asked for, as the loop does."""
    from qlora.data.batch import batched, iter_batches, pack
    from qlora.data.template import TokenizedExample

    lines = enumerate(zip(work.input_ids, work.labels, strict=True), start=1)
    samples = [TokenizedExample(ids, labels, line) for line, (ids, labels) in lines]
    lengths = [len(ids) for ids in work.input_ids]
    rows: list[Any] = []
    for step in work.samples_of_steps:
        rows += pack(lengths, step, work.max_length) if work.packing else step
    return batched(iter_batches(samples, rows, work.batch, pin, multiple), work.accumulation)


def naive(contender: str, work: Work, folder: Path, dropout: float, clock: Clock) -> Any:
    """What one writes who puts PEFT's and transformers' examples together."""
    import peft
    import torch
    import transformers

    from qlora.model.load import quantization_of

    if work.packing:
        raise SystemExit("such a loop packs nothing")
    options = {"quantization_config": quantization_of("nf4"), "dtype": torch.bfloat16, "device_map": {"": clock.device}}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "fused", **options)
    adapters = peft.LoraConfig(lora_dropout=dropout, **LORA)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), adapters).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=RATE, fused=True)
    clock.loaded()
    for micro_batches in steps_of(work, pin=clock.on_gpu):
        clock.begin()
        total = 0.0
        for micro_batch in micro_batches:
            batch = micro_batch.to(clock.device)
            lengths = torch.tensor([len(work.input_ids[line - 1]) for line in batch.lines])[:, None]  # [B, 1]
            mask = (torch.arange(batch.input_ids.shape[1]) < lengths).to(clock.device)  # [B, T]
            with torch.autocast(clock.device.type, torch.bfloat16):
                output = model(input_ids=batch.input_ids, attention_mask=mask, labels=batch.labels)
                loss = output.loss / len(micro_batches)  # []
            loss.backward()
            total += loss.item()  # such loops do wait
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        adamw.step()
        adamw.zero_grad()
        clock.end()
        clock.losses += [] if clock.losses else [total]
    return model


# -- a cell ----------------------------------------------------------------------------------------------------------


RUNS = {"trl": trl, "unsloth": unsloth, "ours": ours, "naive": naive}


def measure(contender: str, work: Work, folder: Path, dropout: float) -> dict[str, Any]:
    """Train, and say how long it took, what it needed, and what was trained."""
    from qlora.run.environment import versions_of

    clock = Clock(work.warm_up)
    model = RUNS[family(contender)](contender, work, folder, dropout, clock)
    timed_s = clock.now() - clock.timed_since
    all_ms = clock.milliseconds()
    step_ms = all_ms[work.warm_up :]
    tokens = work.tokens_of_steps[work.warm_up :]
    assert len(step_ms) == work.steps, f"{len(step_ms)} steps"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = sum(parameter.numel() for parameter in trained)
    shape = json.loads((folder / "fused" / "config.json").read_text())
    rate = statistics.median(1000 * count / taken for count, taken in zip(tokens, step_ms, strict=True))
    flops = flops_per_token(shape, map(len, work.input_ids), adapters)
    return {
        "tokens_per_s": round(rate, 1),
        "tokens_per_s_of_window": round(sum(tokens) / timed_s, 1),
        **spread("step_ms", step_ms),
        "peak_gb": peak_gb(),
        "reserved_gb": round(clock.cuda.max_memory_reserved() / 1e9, 3) if clock.on_gpu else None,
        "cold_peak_gb": clock.cold_peak_gb,
        "mfu": round(flops * rate / PEAK_FLOPS, 4) if clock.on_gpu else None,
        "gflop_per_token": round(flops / 1e9, 3),
        "adapter_dtype": ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained})),
        "adapter_parameters": adapters,
        "attention": clock.attention or getattr(model.config, "_attn_implementation", None),
        "first_loss": clock.losses[0] if clock.losses else None,
        "first_step_s": round(all_ms[0] / 1000, 2),
        "load_s": round(clock.load_s, 2),
        "tokens": sum(tokens),
        "versions": {name: version for name, version in versions_of(PACKAGES).items() if version},
    }
