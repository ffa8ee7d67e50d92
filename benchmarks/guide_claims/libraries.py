"""Claims about precision, schedule, steps and tokens: what transformers and TRL do with the guide's settings."""

import tempfile

import torch

import train_loop
from benchmarks.guide_claims.finding import LIBRARY, Figures, Finding, Source, right_if
from benchmarks.guide_claims.models import adapted, base_model, built, encoded, template_of
from qlora.config import BUNDLED_TRAIN
from qlora.data.batch import Batch, batched, collate
from qlora.data.formats import read_examples
from qlora.data.template import IGNORED, TokenizedExample
from qlora.model.third_party import transformers


def fp16_with_bf16(source: Source, f: Figures) -> Finding:
    """fp16=True goes with bf16 compute."""
    if not f:
        f, ids = {"error": {}}, torch.arange(8)[None]  # [1, 8]
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            model = adapted(base_model("tiny-random", "nf4_dq", dtype), ["qkv_proj"]).train()
            try:
                with torch.autocast("cpu", torch.float16):
                    model(input_ids=ids, labels=ids).loss.backward()
                f["error"][name] = None
            except RuntimeError as raised:
                f["error"][name] = str(raised).splitlines()[0]
    fact = f"""loaded in bf16, as transformers 5 does, on a CPU the first forward fails: {f["error"]["bf16"]}; loaded in fp16:
        {f["error"]["fp16"] or "it runs, and each product rounds to bf16 and back"}"""
    verdict = right_if(not any(f["error"].values()), "wrong" if all(f["error"].values()) else "depends")
    return Finding(verdict, fact, f, short=True)


def training_arguments() -> Figures:
    """What transformers takes where the configuration names no schedule, and whether it takes warmup_ratio."""
    f = {"default": transformers.TrainingArguments().lr_scheduler_type.value, "transformers": transformers.__version__}
    try:
        transformers.TrainingArguments(warmup_ratio=0.1)
        return f | {"warmup_ratio": None}
    except TypeError as error:
        return f | {"warmup_ratio": type(error).__name__}


def default_scheduler(source: Source, f: Figures) -> Finding:
    """The rate decays by a cosine by default."""
    f = f or training_arguments()
    fact = f"{f['default']} in transformers {f['transformers']}; the guide's script names none"
    return Finding(right_if(f["default"] == "cosine"), fact, f, LIBRARY, short=True)


def configuration_runs(source: Source, f: Figures) -> Finding:
    """The printed training configuration is accepted."""
    f = f or training_arguments()
    fact = f"transformers {f['transformers']} answers warmup_ratio with a {f['warmup_ratio']}; warmup_steps takes a share now"
    return Finding(right_if(f["warmup_ratio"] is None), fact, f)


def _110_steps(source: Source, f: Figures) -> Finding:
    """22 examples and 20 epochs make 110 steps."""
    if not f:
        arguments = transformers.TrainingArguments(
            tempfile.gettempdir(), per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=20,
            warmup_steps=0.1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        rows = [{"input_ids": [1, 2], "labels": [1, 2]} for _ in read_examples(BUNDLED_TRAIN, "train")]
        model = adapted(base_model("tiny-random", "bf16"), ["qkv_proj"])
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        total = trainer.train().global_step
        sizes = [len(batch["labels"]) for batch in trainer.get_train_dataloader()]
        windows = [sum(group) for group in batched(sizes, 2)]  # examples of each update in an epoch
        f = {"per_epoch": total // 20, "total": total, "warmup": arguments.get_warmup_steps(total), "windows": windows}
    fact = f"""transformers.Trainer makes {f["total"]}: {f["per_epoch"]} an epoch, the last of {f["windows"][-1]} examples;
        {f["warmup"]} are warmup"""
    return Finding(right_if(f["total"] == 110), fact, f, short=True)


def accumulation(source: Source, f: Figures) -> Finding:
    """Each micro-batch's loss is divided by the number of micro-batches."""
    if not f:
        f, trainee = {"windows": {}}, built(source.model, lora_dropout=0.0)

        def gradient(micro_batches: list[Batch]) -> torch.Tensor:
            # At a rate of 0 nothing moves.
            train_loop.train_step(trainee.decoder, trainee.optimizer, micro_batches, trainee.loss_sum, 0.0, None)
            return torch.cat([p.grad.flatten() for p in trainee.model.parameters() if p.requires_grad])  # [parameters]

        samples = encoded(template_of(source.model))
        end = samples[0].labels.count(IGNORED) + 12  # of a short answer
        short = TokenizedExample(samples[0].input_ids[:end], samples[0].labels[:end], 1)
        for name, rows in (("bundled", [samples[:2], samples[2:4]]), ("unlike", [[short], samples[1:2]])):
            batches = [collate(row) for row in rows]
            right = gradient(batches)  # [parameters]
            means = sum(gradient([batch]) for batch in batches) / 2  # [parameters]
            error = float((means - right).norm() / right.norm())
            f["windows"][name] = {"tokens": [batch.num_tokens for batch in batches], "error": error}
    errors = (f"{w['error']:.1%} for {w['tokens'][0]} and {w['tokens'][1]} tokens" for w in f["windows"].values())
    fact = f"then a token of a short answer weighs more: the gradient is off by {', '.join(errors)}"
    return Finding(right_if(max(window["error"] for window in f["windows"].values()) < 1e-3), fact, f, short=True)


def pad_eos(source: Source, f: Figures) -> Finding:
    """pad = eos prevents trouble in generation."""
    if not f:
        import trl.trainer.sft_trainer

        template = template_of("tiny-random")
        tokenizer, samples = template.tokenizer, encoded(template, loss_on="all")  # its pad is its eos, as the guide sets it
        by_length = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(tokenizer.pad_token_id)  # SFTTrainer's own
        by_id = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        rows = [{"input_ids": sample.input_ids, "attention_mask": [1] * len(sample.input_ids)} for sample in samples]
        labels = {"trl": by_length(rows)["labels"], "transformers": by_id(rows)["labels"], "here": collate(samples).labels}
        f = {name: int((rows == tokenizer.eos_token_id).sum()) for name, rows in labels.items()}
        f |= {"examples": len(samples), "trl_version": trl.__version__}
    of = f["examples"]
    fact = f"""it depends on who masks labels. The guide's SFTTrainer in TRL {f["trl_version"]}, by length: {f["trl"]} of {of}
        stop tokens stay trained. transformers' DataCollatorForLanguageModeling, by id: {f["transformers"]} of {of}, so that
        nothing teaches the model to stop. Here, by length: {f["here"]}"""
    keeps = [f[name] == of for name in ("trl", "transformers")]
    return Finding(right_if(all(keeps), "depends" if any(keeps) else "wrong"), fact, f, short=True)
