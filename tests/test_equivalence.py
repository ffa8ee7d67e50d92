"""The loop against transformers.Trainer and trl.SFTTrainer, step by step, and against itself cut into other micro-batches.

Ours is the whole of `train_loop.main`, and what is compared are its files: it reads the data, orders, collates, accumulates,
schedules, clips, decays and saves. Theirs gets the same order by a sampler, and the same seed before each micro-batch. Both run
in NF4 with double quantization under bf16 autocast, each layer computed again in backward, on a CPU.

What differs on purpose is made theirs here, by hand: the rate of update 0, which is zero in transformers; adapters in bf16,
which TRL makes of them. What differs by rounding has a tolerance: our head, our layers, and, with sdpa, a padding mask.
"""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from safetensors.torch import load_file

import train_loop
from qlora.config import BUNDLED_EVAL, BUNDLED_TRAIN
from qlora.data.batch import Batch, batched, collate, dropout_seed, epoch_order, epoch_rows, iter_batches
from qlora.data.dataset import TokenizedDataset
from qlora.data.formats import Example, read_examples
from qlora.data.messages import Message
from qlora.data.template import IGNORED, TokenizedExample, encode
from qlora.model import loss
from qlora.model.loss import Head, read_head, token_loss_sum
from qlora.run.signals import Signals
from tests.helpers import SHORT_EVAL, SHORT_TRAIN, adapted_model, decoder_of, plain_loss_sum, relative_error, to_fp32
from train_loop import train_step

SEEDS = (42, 43, 44)  # of the order of samples, the start of the adapters, dropout
SHORT, BUNDLED = (
    {"train_file": str(train), "eval_file": str(evaluation)}
    for train, evaluation in ((SHORT_TRAIN, SHORT_EVAL), (BUNDLED_TRAIN, BUNDLED_EVAL))
)  # 22 samples each; tolerances are for the bundled ones, over whose tokens rounding averages out
EPOCHS, MICRO_BATCHES, STEPS, WARMUP = 3, 11, 18, 2  # 22 samples: 11 micro-batches per epoch, 6 steps, the last of one
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # an old name, still in TRL's


class Course(NamedTuple):
    """What a run leaves: three numbers of each step, and the adapter by PEFT's names."""

    rates: list[float]
    losses: list[float]
    norms: list[float]
    adapter: dict[str, torch.Tensor]


def transformers_multiplier(step: int, warmup_steps: int, total_steps: int) -> float:
    """In place of ours: k / warmup, so that update 0 does nothing."""
    unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return transformers.get_cosine_schedule_with_warmup(unused, warmup_steps, total_steps).lr_lambdas[0](step)


def trainers_loss_sum(hidden: torch.Tensor, batch: Batch, head: Head) -> torch.Tensor:
    """As transformers adds it up: over all T positions at once, the last of which has no label."""
    labels = F.pad(batch.labels, (0, 1), value=IGNORED)[:, 1:]  # [B, T]
    logits = head.logits(hidden).float()  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def trl_loss_sum(hidden: torch.Tensor, batch: Batch, head: Head) -> torch.Tensor:
    """TRL's own head, a chunk of the vocabulary at a time, over all positions, those without a label zeroed afterward."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    labels, rows = batch.labels[:, 1:], hidden[:, :-1].reshape(-1, hidden.shape[-1])  # [B, T - 1], [B * (T - 1), D]
    targets = labels.clamp(min=0).reshape(-1)  # [B * (T - 1)]
    settings = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, head.softcap, head.scale, ("log_probs",))
    log_probs = ChunkedLogProbFunction.apply(rows, head.weight, head.bias, targets, *settings)[0]  # [B * (T - 1)]
    return -log_probs.view(labels.shape).masked_fill(labels == IGNORED, 0).sum()


class EpochOrder(torch.utils.data.Sampler):
    """Our order of an epoch, as a DataLoader takes it."""

    def __init__(self, samples: TokenizedDataset, config: Any):
        self.samples, self.config, self.epoch = samples, config, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self):
        return iter(epoch_rows(self.samples, self.config, self.epoch + 1))


def without_mask(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Our collation, in the form that Trainer takes."""
    batch = collate([TokenizedExample(row["input_ids"], row["labels"], 0) for row in rows])
    return {"input_ids": batch.input_ids, "labels": batch.labels}


def theirs(config, samples, folder: Path, rows: list[dict[str, Any]], trainer=transformers.Trainer,
           arguments=transformers.TrainingArguments, exact: bool = False, **options) -> Course:  # fmt: skip
    """A run of a Trainer over `rows`, `samples` in the same order, in whatever form it takes them; in fp32 if exact."""

    class Seeded(trainer):
        """In our order, and with our seed before each micro-batch: a Trainer draws all masks of a run from one generator."""

        micro_batches_taken = 0

        def _get_train_sampler(self, *_):
            return EpochOrder(samples, config)

        def training_step(self, *arguments, **named):
            epoch, index = divmod(self.micro_batches_taken, MICRO_BATCHES)
            torch.manual_seed(dropout_seed(config.seed, epoch + 1, index))
            self.micro_batches_taken += 1
            return super().training_step(*arguments, **named)

    model = adapted_model(config, config.attn_implementation)
    if exact:
        to_fp32(model)
    settings = arguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=EPOCHS,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=not exact,
        use_cpu=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch_fused",
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    started = Seeded(model=model, args=settings, train_dataset=Dataset.from_list(rows), **options)
    started.train()
    assert started.micro_batches_taken == EPOCHS * MICRO_BATCHES
    logged = [row for row in started.state.log_history if "grad_norm" in row]
    numbers = ([float(row[name]) for row in logged] for name in ("learning_rate", "loss", "grad_norm"))
    return Course(*numbers, peft.get_peft_model_state_dict(model, save_embedding_layers=False))


def ours(config, folder: Path, monkeypatch, loss_sum=trainers_loss_sum, own_layers: bool = False,
         dtype: torch.dtype = torch.float32, exact: bool = False) -> Course:  # fmt: skip
    """A run of the loop, with PEFT's layers and the Trainer's schedule, and another head and dtype if asked for; or in fp32.

    The base becomes fp32 once it has its adapters, as PEFT draws their start in the base's dtype.
    """

    def add_lora(*arguments):
        model = original_adapters(*arguments)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        return to_fp32(model) if exact else model

    original_adapters = train_loop.add_lora
    with monkeypatch.context() as patch:
        patch.setattr(train_loop, "lr_multiplier", transformers_multiplier)
        patch.setattr(train_loop, "token_loss_sum", loss_sum)
        patch.setattr(train_loop, "add_lora", add_lora)
        patch.setattr("qlora.eval.generate.sample_responses", lambda *_: [])
        if not own_layers:
            patch.setattr("qlora.speed.lora_linear.install", lambda *_: [])
        train_loop.main(dataclasses.replace(config, output_dir=folder / "run"), Signals())
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    numbers = ([row[name] for row in steps] for name in ("learning_rate", "loss", "grad_norm"))
    return Course(*numbers, load_file(folder / "run" / "adapter" / "adapter_model.safetensors"))


@pytest.fixture
def course(config):
    """The configuration of both, with changes: compiled layers and their own dropout are not PEFT's, so none of them."""

    def build(**changes):
        usual = {"attn_implementation": "sdpa", "compile": "none", "gradient_checkpointing": "full"}
        return dataclasses.replace(config, num_train_epochs=EPOCHS, **(SHORT | usual | changes))

    return build


def encoded(samples) -> list[dict[str, Any]]:
    return [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples]


@pytest.fixture(scope="module")
def references() -> dict[float, Course]:
    """Runs of the Trainer by their dropout, each made by the first test that reads it."""
    return {}


def largest_difference(one: Course, other: Course) -> dict[str, float]:
    """Maximum absolute difference of each part, over all steps and elements."""
    assert len(one.rates) == STEPS and one.adapter.keys() == other.adapter.keys()
    assert {value.dtype for value in one.adapter.values()} == {value.dtype for value in other.adapter.values()}
    parts = {name: list(zip(getattr(one, name), getattr(other, name), strict=True)) for name in ("rates", "losses", "norms")}
    found = {name: max(abs(mine - yours) for mine, yours in pairs) for name, pairs in parts.items()}
    return found | {"adapter": max((one.adapter[name] - value).abs().max().item() for name, value in other.adapter.items())}


SAME = {"rates": 0.0, "losses": 0.0, "norms": 0.0, "adapter": 0.0}


def moved(config, run: Course) -> dict[str, torch.Tensor]:
    """What training added to the adapter."""
    start = peft.get_peft_model_state_dict(adapted_model(config), save_embedding_layers=False)
    return {name: value.float() - start[name].float() for name, value in run.adapter.items()}


# -- transformers.Trainer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_loop_is_the_trainer_bit_for_bit(course, samples, tmp_path, monkeypatch, seed):
    config = course(seed=seed)
    reference = theirs(config, samples, tmp_path, encoded(samples), data_collator=without_mask)
    assert largest_difference(ours(config, tmp_path, monkeypatch), reference) == SAME
    orders = [epoch_rows(samples, config, epoch) for epoch in (1, 2, 3)]
    assert orders[0] != orders[1] != orders[2] and reference.rates[:3] == [0.0, 5e-4, 1e-3]
    assert max(reference.norms) > 1.0  # clipped


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_so_it_is_with_a_collator_of_transformers_own(course, samples, bundled, tokenizer, tmp_path, monkeypatch, backend):
    """Its padding mask changes nothing with eager attention; sdpa takes another kernel for it, which rounds otherwise."""
    files, rows = (SHORT, samples) if backend == "eager" else (BUNDLED, bundled)
    config = course(attn_implementation=backend, **files)
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    reference = theirs(config, rows, tmp_path, encoded(rows), data_collator=collator)
    result = ours(config, tmp_path, monkeypatch)
    if backend == "eager":
        assert largest_difference(result, reference) == SAME
    else:
        error = relative_error(moved(config, result), moved(config, reference))
        assert error < 0.01 and result.norms == pytest.approx(reference.norms, rel=0.01), error


def test_dropout_masks_are_the_trainers_in_all_epochs(course, samples, tmp_path, monkeypatch):
    """With our seed before each of its micro-batches; those computed again in backward included."""
    config = course(lora_dropout=0.1)
    reference = theirs(config, samples, tmp_path, encoded(samples), data_collator=without_mask)
    assert largest_difference(ours(config, tmp_path, monkeypatch), reference) == SAME
    undropped = ours(course(), tmp_path / "undropped", monkeypatch)
    assert relative_error(moved(config, undropped), moved(config, reference)) > 0.05


@pytest.mark.parametrize(
    ("loss_sum", "own_layers", "dropout", "tolerance"),
    [
        (plain_loss_sum, False, 0.0, 0.0),  # only the reported loss differs, which is added up in another order
        (token_loss_sum, False, 0.0, 0.02),  # the gradient of the logits is rounded to bf16 elsewhere
        (plain_loss_sum, True, 0.0, 0.02),  # LoRA's product comes first, and is not rounded before it is added
        (token_loss_sum, True, 0.0, 0.025),  # as users run it
        (token_loss_sum, True, 0.1, 0.03),  # with PEFT's own draws
    ],
)
def test_our_head_and_layers_are_within_rounding(course, bundled, references, tmp_path, monkeypatch, operator_calls, loss_sum,
                                                 own_layers, dropout, tolerance):  # fmt: skip
    """Relative error of what 18 steps added to the adapter, tensor by tensor; about half of the tolerance is seen.

    AdamW forgives gradients that are too large throughout, so norms before clipping are compared too.
    """
    config = course(lora_dropout=dropout, **BUNDLED)
    if dropout not in references:
        references[dropout] = theirs(config, bundled, tmp_path, encoded(bundled), data_collator=without_mask)
    reference = references[dropout]
    assert not operator_calls
    losses, original = [], loss._cross_entropy
    monkeypatch.setattr(loss, "_cross_entropy", lambda *arguments: losses.append(1) or original(*arguments))
    result = ours(config, tmp_path, monkeypatch, loss_sum, own_layers)
    assert result.rates == reference.rates and result.losses == pytest.approx(reference.losses, rel=2e-4)
    assert result.norms == pytest.approx(reference.norms, rel=0.01 if tolerance else 0.0)
    assert relative_error(moved(config, result), moved(config, reference)) <= tolerance
    assert bool(operator_calls) == own_layers and bool(losses) == (loss_sum is token_loss_sum)


EXACT = 1e-5  # relative error of each tensor in fp32, where only the order of additions differs


def test_our_head_and_layers_train_as_the_trainer_does_in_fp32(course, samples, tmp_path, monkeypatch, operator_calls):
    """Operator and loss are ours here. In fp32 on a CPU both ways are exact but for the order of additions, so each module must
    agree on its own: 3e-7 is seen after 18 steps."""
    config = course(lora_alpha=3)  # r is 4: a scale that is no power of two
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    result = ours(config, tmp_path / "ours", monkeypatch, token_loss_sum, own_layers=True, exact=True)
    steps = len(operator_calls)
    reference = theirs(config, samples, tmp_path, encoded(samples), data_collator=without_mask, exact=True)
    assert steps and len(operator_calls) == steps  # ours in the loop, PEFT's in the Trainer
    assert relative_error(moved(config, result), moved(config, reference)) < EXACT
    assert result.losses == pytest.approx(reference.losses, rel=EXACT)
    assert result.norms == pytest.approx(reference.norms, rel=EXACT)


# -- trl.SFTTrainer ----------------------------------------------------------------------------------------------------


def sft(config, samples, folder: Path, template) -> Course:
    """SFTTrainer as shipped, from text on: its tokenization, masks, collator, head and bf16 adapters; the order is ours."""
    trl = pytest.importorskip("trl")
    rows = []
    for example in read_examples(config.train_file, "train"):
        user, answer = example.messages
        rows.append({"prompt": f"### Instruction:\n{user.content}\n\n### Response:\n", "completion": answer.content})
    return theirs(config, samples, folder, rows, trl.SFTTrainer, trl.SFTConfig, processing_class=template.tokenizer)


@pytest.mark.parametrize("seed", SEEDS)
def test_from_text_to_adapter_the_loop_is_trl_bit_for_bit(course, samples, template, tmp_path, monkeypatch, seed):
    """With TRL's head as the loss function and adapters in bf16."""
    config = course(seed=seed, attn_implementation="eager")
    reference = sft(config, samples, tmp_path, template)
    assert {value.dtype for value in reference.adapter.values()} == {torch.bfloat16}
    result = ours(config, tmp_path, monkeypatch, trl_loss_sum, dtype=torch.bfloat16)
    assert largest_difference(result, reference) == SAME


def test_as_both_are_shipped_they_differ_by_rounding(course, bundled, template, tmp_path, monkeypatch):
    """Ours has fp32 adapters, another head and other layers; most of it are updates that bf16 adapters round away."""
    config = course(**BUNDLED)
    reference = sft(config, bundled, tmp_path, template)
    results = [
        ours(config, tmp_path / str(dtype), monkeypatch, token_loss_sum, True, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    errors = [relative_error(moved(config, result), moved(config, reference)) for result in results]
    assert errors[1] < errors[0] < 0.05 and errors[1] < 0.02
    assert all(result.norms == pytest.approx(reference.norms, rel=0.01) for result in results)
    assert all(result.losses == pytest.approx(reference.losses, rel=5e-4) for result in results)


# -- equal among themselves --------------------------------------------------------------------------------------------


def fp32_run(config, samples, monkeypatch, batch_size: int, accumulation: int, backend: str = "sdpa"):
    """Losses and final adapters of two epochs of the loop's step on NF4 weights, computed in fp32."""
    model = to_fp32(adapted_model(config, backend))
    head = read_head(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.01, fused=True)
    loss_sum = functools.partial(token_loss_sum, head=head)
    losses = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
        for epoch in (1, 2):
            order = epoch_order(len(samples), config.seed, epoch)
            for micro_batches in batched(iter_batches(samples, order, batch_size), accumulation):
                losses.append(train_step(decoder_of(model), optimizer, micro_batches, loss_sum, 1e-3, 1.0)[0].item())
    return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def ragged(template) -> list[TokenizedExample]:
    """11 samples of 1 to 41 trained tokens: a step of 8, and a short one of 3."""
    rows = [Example((Message("user", f"q{i}"), Message("assistant", "ab" * i)), i) for i in range(1, 22, 2)]
    return [encode(row, template, "response") for row in rows]


def test_a_run_is_the_same_however_its_steps_are_cut(config, ragged, monkeypatch):
    """8 x 1 = 4 x 2 = 1 x 8, in fp32: only the order of additions differs."""
    assert len(ragged) == 11 and len({len(sample.input_ids) for sample in ragged}) > 5
    losses, whole = fp32_run(config, ragged, monkeypatch, 8, 1)
    assert len(losses) == 4
    for batch_size, accumulation in ((4, 2), (1, 8)):
        others, parts = fp32_run(config, ragged, monkeypatch, batch_size, accumulation)
        assert others == pytest.approx(losses, rel=1e-5)
        assert relative_error(parts, whole) < 1e-5


def test_eager_and_sdpa_are_one_function(config, ragged, monkeypatch):
    losses, adapters = fp32_run(config, ragged, monkeypatch, 4, 2)
    others, same = fp32_run(config, ragged, monkeypatch, 4, 2, "eager")
    assert others == pytest.approx(losses, rel=1e-5)
    assert relative_error(same, adapters) < 1e-5
