"""The loop against transformers.Trainer, step by step: the same data, order, windows, schedule, clipping and decay."""

import functools

import pytest
import torch
import transformers

from qlora import data
from qlora.loss import read_head
from tests.conftest import adapted_model
from tests.test_loss import plain_loss_sum
from train_loop import train_step

STEPS, WARMUP = 12, 2  # two epochs of 22 samples: 11 micro-batches, 6 windows, the last of one micro-batch


class Collator:
    """Ours, in the form that Trainer wants."""

    def __call__(self, samples: list[data.Encoded]) -> dict[str, torch.Tensor]:
        batch = data.collate(samples)
        return {"input_ids": batch.input_ids, "labels": batch.labels}


def test_twelve_steps_end_with_the_trainers_adapter_bit_for_bit(config, samples, tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    theirs = adapted_model(config)
    trainer = transformers.Trainer(model=theirs, args=arguments, train_dataset=samples, data_collator=Collator())
    trainer.train()
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(logged) == STEPS

    ours = adapted_model(config)
    loss_sum = functools.partial(plain_loss_sum, head=read_head(ours))
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.0, weight_decay=0.01, fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), WARMUP, STEPS
    )
    rates = [1e-3 * schedule.lr_lambdas[0](step) for step in range(STEPS)]  # theirs starts at zero, ours does not
    step = 0
    for _ in range(2):
        for window in data.windows(data.micro_batches(samples, range(len(samples)), 2), 2):
            loss, norm = train_step(ours.get_decoder(), optimizer, window, loss_sum, rates[step], 1.0)
            assert logged[step]["learning_rate"] == rates[step]
            assert logged[step]["loss"] == pytest.approx(loss.item(), rel=1e-6)
            assert float(logged[step]["grad_norm"]) == norm.item()
            step += 1
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
