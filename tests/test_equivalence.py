"""The loop against transformers.Trainer, step by step: the same data, order, windows, schedule, clipping and decay."""

import contextlib
import functools

import pytest
import torch
import transformers

from qlora import data
from qlora.loss import read_head, token_loss_sum
from tests.conftest import adapted_model, relative_error
from tests.test_loss import plain_loss_sum
from tests.test_model import to_fp32
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


# -- equal among themselves --------------------------------------------------------------------------------------------


def fp32_run(config, samples, monkeypatch, batch_size: int, window_size: int, backend: str = "sdpa"):
    """Losses and final adapters of two epochs of the loop's step on NF4 weights, computed in fp32."""
    model = to_fp32(adapted_model(config, backend))
    head = read_head(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.01, fused=True)
    loss_sum = functools.partial(token_loss_sum, head=head)
    losses = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
        for epoch in (1, 2):
            order = data.epoch_order(len(samples), config.seed, epoch)
            for window in data.windows(data.micro_batches(samples, order, batch_size), window_size):
                losses.append(train_step(model.get_decoder(), optimizer, window, loss_sum, 1e-3, 1.0)[0].item())
    return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def ragged(form) -> list[data.Encoded]:
    """11 samples of 1 to 41 trained tokens: a window of 8, and a short one of 3."""
    rows = [data.Example((data.Message("user", f"q{i}"), data.Message("assistant", "ab" * i)), i) for i in range(1, 22, 2)]
    return [data.encode(row, form, "response") for row in rows]


def test_a_run_is_the_same_however_its_windows_are_cut(config, ragged, monkeypatch):
    """8 x 1 = 4 x 2 = 1 x 8, in fp32: only the order of additions differs."""
    assert len(ragged) == 11 and len({len(sample.input_ids) for sample in ragged}) > 5
    losses, whole = fp32_run(config, ragged, monkeypatch, 8, 1)
    assert len(losses) == 4
    for batch_size, window_size in ((4, 2), (1, 8)):
        others, parts = fp32_run(config, ragged, monkeypatch, batch_size, window_size)
        assert others == pytest.approx(losses, rel=1e-5)
        assert relative_error(parts, whole) < 1e-5


def test_eager_and_sdpa_are_one_function(config, ragged, monkeypatch):
    losses, adapters = fp32_run(config, ragged, monkeypatch, 4, 2)
    others, same = fp32_run(config, ragged, monkeypatch, 4, 2, "eager")
    assert others == pytest.approx(losses, rel=1e-5)
    assert 0 < relative_error(same, adapters) < 1e-5  # two ways to compute it, not one
