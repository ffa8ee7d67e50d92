"""The loop: schedule, accumulation, the whole run, and what goes wrong in it."""

import dataclasses
import errno
import functools
import json
import math

import bitsandbytes
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

import train_loop
from qlora.cli import train as command_line
from qlora.config import parse
from qlora.data.batch import batched, collate, epoch_rows, iter_batches, training_batches
from qlora.data.template import IGNORED, TokenizedExample
from qlora.errors import ExitCode, UserError
from qlora.model.loss import read_head, token_loss_sum
from qlora.speed import layers
from tests.helpers import SHORT_DATA, SHORT_TRAIN, adapted_model, gradients, plain_loss_sum, relative_error, wake_adapters
from train_loop import lr_multiplier, train_step

# -- schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "total"), [(12, 120), (1, 1), (0, 5), (3, 3), (2, 7)])
def test_schedule_in_closed_form(warmup, total):
    rates = [lr_multiplier(step, warmup, total) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)  # no update is wasted on a rate of zero
    assert rates[:warmup] == [(k + 1) / warmup for k in range(warmup)]
    for k in range(warmup, total):
        assert rates[k] == pytest.approx(0.5 * (1 + math.cos(math.pi * (k - warmup) / (total - warmup))), abs=1e-15)


def test_schedule_is_transformers_own_but_for_the_warmup_offset():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 12, 120)
    theirs = []
    for _ in range(120):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [lr_multiplier(step, 12, 120) for step in range(120)]
    assert theirs[0] == 0.0
    assert ours[:11] == pytest.approx(theirs[1:12], abs=1e-12)
    assert ours[12:] == pytest.approx(theirs[12:], abs=1e-12)


# -- one step --------------------------------------------------------------------------------------------------------


def one_step(config, steps, loss_sum=None, **changes):
    """Final adapters, losses and norms after `steps`, from the same start."""
    model = adapted_model(config)
    wake_adapters(model)
    head = read_head(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    arguments = {"learning_rate": 1.0, "max_grad_norm": None} | changes
    loss_sum = functools.partial(loss_sum or token_loss_sum, head=head)
    results = [train_step(model.get_decoder(), optimizer, micro_batches, loss_sum, **arguments) for micro_batches in steps]
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, results


def updates(config, micro_batches, **changes):
    """What SGD at rate 1 subtracted: the gradient of the step."""
    start, _ = one_step(config, [])
    end, results = one_step(config, [micro_batches], **changes)
    return {name: start[name] - end[name] for name in start}, results[0]


def test_a_step_counts_as_one_batch_however_it_is_cut(config):
    """8 x 1 = 4 x 2 = 1 x 8 = uneven, for answers of 2 to 100 tokens: the sum over tokens, not a mean of means."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index, length in enumerate((2, 100, 5, 60, 12, 3, 80, 4)):
        ids = torch.randint(
            40 * index, 40 * index + 40, (length + 3,), generator=generator
        ).tolist()  # each on a topic of its own
        rows.append(TokenizedExample(ids, [IGNORED] * 3 + ids[3:], index))
    whole, (loss, norm) = updates(config, [collate(rows)])
    for size in (1, 2, 3):
        micro_batches = list(iter_batches(rows, range(8), size))
        parts, (other_loss, other_norm) = updates(config, micro_batches)
        assert other_loss.item() == pytest.approx(loss.item(), rel=1e-4)
        assert other_norm.item() == pytest.approx(norm.item(), rel=1e-2)
        assert relative_error(parts, whole) < 0.03  # what bf16 rounds
    means = [updates(config, [batch])[0] for batch in iter_batches(rows, range(8), 1)]
    mean_of_means = {name: sum(mean[name] for mean in means) / 8 for name in whole}
    assert relative_error(mean_of_means, whole) > 0.3  # the test would see it


def summed_gradients(config, micro_batches, num_tokens: int) -> dict[str, torch.Tensor]:
    """Adapter gradients of a step that takes only these of its micro-batches, as one of several processes would."""
    model = adapted_model(config)
    wake_adapters(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    share = num_tokens / sum(batch.num_tokens for batch in micro_batches)  # train_step divides by its own tokens
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    train_step(model.get_decoder(), optimizer, micro_batches, lambda *args: loss_sum(*args) / share, 0.0, None)
    return gradients(model)


def test_dropout_is_the_same_however_micro_batches_are_shared_among_processes(config, samples):
    """Gradients of micro-batch 0 alone and of micro-batch 1 alone add up to those of both in one step, dropout on."""
    config = dataclasses.replace(config, lora_dropout=0.1)
    both = list(training_batches(samples, range(4), config))
    num_tokens = sum(batch.num_tokens for batch in both)
    whole = summed_gradients(config, both, num_tokens)
    torch.rand(5)  # whatever else the other process draws
    parts = [summed_gradients(config, [batch], num_tokens) for batch in both]
    assert relative_error({name: parts[0][name] + parts[1][name] for name in whole}, whole) < 1e-5
    swapped = [batch._replace(seed=other.seed) for batch, other in zip(both, reversed(both), strict=True)]
    assert relative_error(summed_gradients(config, swapped, num_tokens), whole) > 0.05  # the test would see it


def test_dropout_does_not_depend_on_what_was_drawn_before(config, samples):
    config = dataclasses.replace(config, lora_dropout=0.1)
    steps = list(batched(training_batches(samples, range(8), config), 2))
    losses = []
    for garbage in (False, True):
        model = adapted_model(config)
        wake_adapters(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        loss_sum = functools.partial(token_loss_sum, head=read_head(model))
        losses.append([])
        for micro_batches in steps:
            if garbage:
                torch.rand(7)
            losses[-1].append(train_step(model.get_decoder(), optimizer, micro_batches, loss_sum, 1e-3, 1.0)[0].item())
    assert losses[0] == losses[1]


def test_a_step_equals_a_plain_loop_with_the_plain_head(config, samples):
    """Against the same thing written down without any of our code in it: logits, cross_entropy, AdamW, three steps."""
    batches = list(iter_batches(samples[:11], range(11), 2))  # six micro-batches, the last of one sample
    grouped = list(batched(batches, 2))
    model = adapted_model(config)
    head = read_head(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.01, fused=True)
    loss_sum = functools.partial(plain_loss_sum, head=head)
    ours = [
        train_step(model.get_decoder(), optimizer, w, loss_sum, lr, 0.5)
        for w, lr in zip(grouped, (1e-3, 2e-3, 5e-4), strict=True)
    ]

    plain = adapted_model(config)
    parameters = [p for p in plain.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, weight_decay=0.01, fused=True)
    for micro_batches, lr, (loss, norm) in zip(grouped, (1e-3, 2e-3, 5e-4), ours, strict=True):
        tokens = sum((batch.labels[:, 1:] != IGNORED).sum().item() for batch in micro_batches)
        total = 0.0
        for batch in micro_batches:
            with torch.autocast("cpu", torch.bfloat16):
                logits = plain(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
                part = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum") / tokens
            part.backward()
            total += part.item()
        expected = torch.stack([p.grad.norm() for p in parameters]).norm()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        adam.zero_grad()
        assert loss.item() == pytest.approx(total, rel=1e-6) and norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_the_norm_returned_is_that_before_clipping_and_the_step_obeys_the_limit(config, samples):
    micro_batches = [collate(samples[:2])]
    free, (_, norm) = updates(config, micro_batches)
    clipped, (_, same) = updates(config, micro_batches, max_grad_norm=0.01)
    assert norm.item() == same.item() > 0.01
    total = torch.stack([g.norm() for g in clipped.values()]).norm().item()
    assert total == pytest.approx(0.01, rel=1e-2)
    assert relative_error({n: g * norm / 0.01 for n, g in clipped.items()}, free) < 1e-2


def test_only_adapters_move(config, samples, model, head):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0, fused=True)
    train_step(model.get_decoder(), optimizer, [collate(samples[:2])], functools.partial(token_loss_sum, head=head), 1e-3, 1.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_B" not in name)  # A's first gradient is zero, as B is
        assert (parameter.grad is None) == ("lora_" not in name)


def test_gradients_of_the_last_step_do_not_leak_into_the_next(config, samples, model, head):
    wake_adapters(model)
    first, second = [collate(samples[:2])], [collate(samples[2:4])]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    step = functools.partial(train_step, model.get_decoder(), optimizer, loss_sum=functools.partial(token_loss_sum, head=head))
    step(micro_batches=first, learning_rate=0.0, max_grad_norm=None)  # moves nothing, leaves gradients behind
    _, norm = step(micro_batches=second, learning_rate=1.0, max_grad_norm=None)
    _, (_, alone) = updates(config, second)
    assert norm.item() == alone.item()


def test_padding_and_batch_mates_change_nothing(config, samples):
    short, long = sorted(samples, key=lambda s: len(s.input_ids))[:: len(samples) - 1]
    _, (together, _) = updates(config, [collate([short, long])])
    apart = [
        updates(config, [collate([row])])[1][0].item() * (len(row.labels) - row.labels.count(IGNORED))
        for row, pad in ((short, 0), (long, 7))
    ]
    tokens = sum(len(row.labels) - row.labels.count(IGNORED) for row in (short, long))
    assert together.item() == pytest.approx(sum(apart) / tokens, rel=1e-3)


# -- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    functools.partial(torch.optim.AdamW, fused=True), functools.partial(torch.optim.AdamW, fused=False),
    bitsandbytes.optim.AdamW8bit,
], ids=["fused", "plain", "8bit"])  # fmt: skip
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_weights_or_moments(config, samples, make, bad):
    """On the device, where the optimizer can: and the next step is the one that would have come without it."""
    model = adapted_model(dataclasses.replace(config, lora_r=16))
    head = read_head(model)
    wake_adapters(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(parameters, lr=0.0, weight_decay=0.01)
    good = functools.partial(token_loss_sum, head=head)

    def broken(hidden, batch):
        if bad == "loss":
            return good(hidden, batch) * math.nan
        hidden.register_hook(lambda gradient: gradient * math.inf)
        return good(hidden, batch)

    def state():
        values = [optimizer.state[p][kind] for p in parameters for kind in optimizer.state[p] if kind != "step"]
        steps = [torch.as_tensor(optimizer.state[p]["step"]).clone() for p in parameters]  # a number in bitsandbytes' state
        return [[p.detach().clone() for p in parameters], steps, [value.clone() for value in values]]

    step = functools.partial(train_step, model.get_decoder(), optimizer, learning_rate=1e-3, max_grad_norm=1.0)
    first, second = [collate(samples[:2])], [collate(samples[2:4])]
    step(micro_batches=first, loss_sum=good)
    before = state()
    loss, norm = step(micro_batches=second, loss_sum=broken)
    assert not torch.isfinite(norm) and torch.isfinite(loss) == (bad == "gradient")
    assert all(torch.equal(a, b) for was, now in zip(before, state(), strict=True) for a, b in zip(was, now, strict=True))
    loss, _ = step(micro_batches=second, loss_sum=good)
    assert torch.isfinite(loss) and not torch.equal(state()[0][-1], before[0][-1])
    assert all(torch.equal(now, was + 1) for was, now in zip(before[1], state()[1], strict=True))


def break_steps(monkeypatch, *numbers: int) -> list[list[int]]:
    """Make the loss of these steps NaN; returns the lines of each step, as they come."""
    original, lines_of_steps = train_loop.train_step, []

    def step(decoder, optimizer, micro_batches, loss_sum, *rest):
        lines_of_steps.append([line for batch in micro_batches for line in batch.lines])
        factor = math.nan if len(lines_of_steps) in numbers else 1.0
        return original(decoder, optimizer, micro_batches, lambda hidden, batch: factor * loss_sum(hidden, batch), *rest)

    monkeypatch.setattr(train_loop, "train_step", step)
    return lines_of_steps


def test_a_nan_ends_the_run_at_the_next_log_step_with_exit_5_and_all_that_is_known(tiny, tmp_path, monkeypatch, capsys):
    lines_of_steps = break_steps(monkeypatch, 8)
    code, rows = run(tmp_path, "--max-steps", "20")
    assert code == ExitCode.NUMERICS
    steps = [row for row in rows if row["event"] == "step"]
    assert [row["step"] for row in steps if row["loss"] is None] == [8] and len(steps) == 10  # the log step after it
    assert [row["lines"] for row in steps] == lines_of_steps
    err = capsys.readouterr().err
    before = ", ".join(f"{row['loss']:.4g}" for row in steps[2:7])
    for words in (
        "Step 8 is not finite: loss nan, gradient norm nan, learning rate 0.00",
        f"lines {', '.join(map(str, lines_of_steps[7]))} of the training data",
        f"Losses before it: {before}.",
        f"All up to step 6 is safe in {tmp_path / 'run' / 'checkpoints' / 'step-000006'}",
        "--skip-nonfinite",
    ):
        assert words in err, words
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "finished.json").exists()


def test_a_run_that_diverges_ends_too(tiny, tmp_path, capsys):
    code, rows = run(tmp_path, "--learning-rate", "1e25", "--max-grad-norm", "None", "--max-steps", "20")
    assert code == ExitCode.NUMERICS and rows[1]["loss"] is not None and None in [row.get("loss", 0) for row in rows]
    assert "No checkpoint was due yet" in capsys.readouterr().err and not list((tmp_path / "run" / "checkpoints").iterdir())


def test_some_steps_may_be_skipped_each_with_a_line_and_the_count_survives_a_resume(tiny, tmp_path, monkeypatch, capsys):
    flags = ("--max-steps", "12", "--skip-nonfinite", "2")
    with monkeypatch.context() as patch:
        break_steps(patch, 2, 4, 9)
        assert run(tmp_path, *flags)[0] == ExitCode.NUMERICS
    text = capsys.readouterr()
    assert "Step 2 is not finite" in text.out and "The step was skipped (2 of 2 allowed)." in text.out and "Step 9" in text.err
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000006" / "state.json").read_text())
    assert (state["step"], state["skipped"]) == (6, 2)
    with monkeypatch.context() as patch:
        break_steps(patch, 1)  # of the resumed run: step 7
        assert run(tmp_path, *flags)[0] == ExitCode.NUMERICS
    code, rows = run(tmp_path, *flags)
    assert code == 0 and [row["loss"] is None for row in rows if row["event"] == "step"] == [n in (2, 4) for n in range(1, 13)]
    steps = json.loads((tmp_path / "run" / "checkpoints" / "step-000012" / "state.json").read_text())
    assert steps["skipped"] == 2


# -- the first gradient ----------------------------------------------------------------------------------------------


def test_an_adapter_without_a_gradient_ends_the_run(config, model, head, samples):
    """As when the graph is cut: checkpointing over frozen embeddings, a layer never called."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in named], lr=0.0, fused=True)
    micro_batches = [collate(samples[:2])]
    loss_sum = functools.partial(token_loss_sum, head=head)
    model.get_decoder().layers[1].mlp.down_proj.forward = model.get_decoder().layers[1].mlp.down_proj.base_layer.forward
    _, norm = train_step(model.get_decoder(), optimizer, micro_batches, loss_sum, 1e-3, 1.0)
    with pytest.raises(UserError, match=r"2 of 16 adapter tensors got none, .*layers.1.mlp.down_proj.lora_A") as caught:
        train_loop.check_first_gradients(named, norm)
    assert caught.value.exit_code == ExitCode.NUMERICS


def test_a_first_gradient_of_zero_ends_the_run():
    with pytest.raises(UserError, match="zero everywhere") as caught:
        train_loop.check_first_gradients([], torch.tensor(0.0))
    assert caught.value.exit_code == ExitCode.NUMERICS


@pytest.mark.parametrize("more", [[], ["--skip-nonfinite", "3"]])
def test_a_first_gradient_that_is_not_finite_ends_the_run_at_once(tiny, tmp_path, monkeypatch, capsys, more):
    break_steps(monkeypatch, 1)
    assert run(tmp_path, *more)[0] == ExitCode.NUMERICS
    assert "The first gradient is not finite: its norm is nan" in capsys.readouterr().err


def test_a_cut_graph_ends_the_run_with_exit_5(tiny, tmp_path, monkeypatch, capsys):
    def cut(hidden, batch, head):
        return token_loss_sum(hidden.detach().requires_grad_(), batch, head)

    monkeypatch.setattr(train_loop, "token_loss_sum", cut)
    assert run(tmp_path)[0] == ExitCode.NUMERICS
    assert "16 of 16 adapter tensors got none" in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists() and not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_good_first_gradient_passes(config, model, head, samples):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in named], lr=0.0, fused=True)
    _, norm = train_step(
        model.get_decoder(), optimizer, [collate(samples[:2])], functools.partial(token_loss_sum, head=head), 1e-3, 1.0
    )
    train_loop.check_first_gradients(named, norm)
    assert norm > 0


# -- the whole run ---------------------------------------------------------------------------------------------------


def run(tmp_path, *flags: str) -> tuple[int, list[dict]]:
    """The command line, in this process, on the tiny model; its exit code and the rows of metrics.jsonl."""
    folder = tmp_path / "run"
    code = command_line(
        ["--model", "tiny-random", "--output-dir", str(folder), "--lora-r", "4", "--learning-rate", "1e-2", *SHORT_DATA, *flags]
    )
    metrics = folder / "metrics.jsonl"
    return code, [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


@pytest.mark.draws_report
def test_a_run_from_the_command_line_learns_and_leaves_everything(samples, tmp_path, capsys):
    tokens = sum(label != IGNORED for sample in samples for label in sample.labels[1:])
    code, rows = run(tmp_path, "--num-train-epochs", "4")
    assert code == 0
    steps = [row for row in rows if row["event"] == "step"]
    evaluations = [row for row in rows if row["event"] == "eval"]
    assert [row["step"] for row in steps] == list(range(1, 25))  # 22 examples: 11 micro-batches, 6 steps an epoch
    assert [row["epoch"] for row in steps] == [1] * 6 + [2] * 6 + [3] * 6 + [4] * 6
    assert [row["step"] for row in evaluations] == [0, 6, 12, 18, 24]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.4
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.4
    assert all(row["perplexity"] == pytest.approx(math.exp(row["eval_loss"])) for row in evaluations)
    assert [row["learning_rate"] for row in steps] == pytest.approx([1e-2 * lr_multiplier(k, 3, 24) for k in range(24)])
    for epoch in range(4):
        assert sum(row["num_tokens"] for row in steps if row["epoch"] == epoch + 1) == tokens
    assert all(row["grad_norm"] > 0 and row["tokens_per_s"] > 0 and row["peak_memory_gb"] > 0 for row in steps)
    folder = tmp_path / "run"
    assert (folder / "adapter" / "tokenizer.json").is_file()
    assert json.loads((folder / "env.json").read_text())["packages"]["torch"] == torch.__version__
    assert parse(["--config", str(folder / "config.yaml")]).learning_rate == 1e-2
    assert any(b"lora_dropout" in path.read_bytes() for path in (folder / "tensorboard").iterdir())
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "env.json",
        "finished.json",
        "metrics.jsonl",
        "plots",
        "report.html",
        "run.json",
        "run.lock",
        "samples.jsonl",
        "tensorboard",
    ]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000012", "step-000018", "step-000024"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [set(sample) for sample in samples] == [{"step", "prompt", "base", "tuned", "reference"}] * 3
    out = capsys.readouterr().out
    for words in (
        "Model: tiny-random (as asked",
        "Attention: sdpa (it needs no mask here)",
        "form instruction/response",
        "qkv_proj",
        "step 1/24",
        "step 5/24",
        "step 24/24",
        "epoch 4  eval loss",
        "tensorboard --logdir",
        "AutoPeftModelForCausalLM",
        "BitsAndBytesConfig",
    ):
        assert words in out, words
    assert "step 6/24" not in out


def test_a_packed_run_sees_every_sample_once_in_each_epoch(samples, tiny, tmp_path):
    """8 rows: 3 micro-batches, the last of 2 rows; 2 steps, the last of one micro-batch."""
    packing = ["--packing", "--max-length", "130"]
    code, rows = run(tmp_path, *packing, "--num-train-epochs", "3", "--per-device-train-batch-size", "3")
    steps = [row for row in rows if row["event"] == "step"]
    assert code == 0 and len(epoch_rows(samples, parse(packing), 1)) == 8
    assert [row["step"] for row in steps] == list(range(1, 3 * 2 + 1))
    epochs = [[row for row in steps if row["epoch"] == epoch] for epoch in (1, 2, 3)]
    lines = [[line for row in epoch for line in row["lines"]] for epoch in epochs]
    assert all(sorted(seen) == [sample.line for sample in samples] for seen in lines)
    assert lines[0] != lines[1] != lines[2]
    assert [len(epoch) for epoch in epochs] == [2, 2, 2]
    for kind, total in (
        ("num_tokens", sum(label != IGNORED for sample in samples for label in sample.labels[1:])),
        ("num_input_tokens", sum(len(sample.input_ids) for sample in samples)),
    ):
        assert [sum(row[kind] for row in epoch) for epoch in epochs] == [total] * 3
    evaluations = [row["eval_loss"] for row in rows if row["event"] == "eval"]
    assert len(evaluations) == 4 and evaluations[-1] < evaluations[0] - 0.1


def test_a_run_with_8_bit_moments_learns_as_one_with_fp32_moments(tiny, tmp_path):
    losses = {}
    for name in ("adamw", "adamw_8bit"):
        code, rows = run(tmp_path / name, "--optimizer", name, "--lora-r", "16", "--max-steps", "20")
        assert code == 0
        losses[name] = (
            [row["loss"] for row in rows if row["event"] == "step"],
            [row["eval_loss"] for row in rows if row["event"] == "eval"],
        )
    (steps, evaluations), (eight_bit_steps, eight_bit_evaluations) = losses.values()
    assert eight_bit_steps[0] == steps[0] and eight_bit_steps[2:] != steps[2:]  # other numbers, as --help says
    assert evaluations[-1] < evaluations[0] - 0.4 and eight_bit_evaluations[-1] < eight_bit_evaluations[0] - 0.4
    assert eight_bit_evaluations == pytest.approx(evaluations, rel=0.05)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny, tmp_path):
    losses = []
    for name, flags in (("a", []), ("b", ["--logging-steps", "1"]), ("c", ["--seed", "7"])):
        _, rows = run(tmp_path / name, "--max-steps", "7", *flags)
        losses.append([row["loss"] for row in rows if row["event"] == "step"])
    assert losses[0] == losses[1] and len(losses[0]) == 7
    assert losses[0][:3] != losses[2][:3]


def test_evaluation_disturbs_nothing(tiny, tmp_path):
    """With and without eval data: the same losses to the last bit, dropout on."""
    _, without = run(tmp_path / "a", "--num-train-epochs", "2", "--eval-file", "None")
    _, with_it = run(tmp_path / "b", "--num-train-epochs", "2", "--eval-file", str(SHORT_TRAIN))
    assert [r["loss"] for r in without] == [r["loss"] for r in with_it if r["event"] == "step"]
    assert len(with_it) > len(without)


@pytest.fixture(scope="module")
def usual(tiny, tmp_path_factory) -> list[dict]:
    """Metrics of a run of 8 steps without any option."""
    return run(tmp_path_factory.mktemp("usual"), "--max-steps", "8")[1]


@pytest.mark.parametrize(
    "flags",
    [
        "--prompt-format chat",
        "--loss-on all",
        "--gradient-checkpointing full",
        "--attn-implementation eager",
        "--target-modules qkv_proj o_proj",
        "--max-length 40 --on-long truncate",
        "--save-total-limit 2",
        "--per-device-train-batch-size 3 --gradient-accumulation-steps 1",
        "--max-grad-norm None",
        "--lora-dropout 0 --lora-alpha 16",
        "--weight-decay 0.5",
        "--warmup-ratio 0.5",
        "--seed 5",
        "--packing --max-length 100",
    ],
)
def test_every_option_runs_and_changes_the_run(usual, tmp_path, flags):
    code, rows = run(tmp_path / "with", *flags.split(), "--max-steps", "8")
    assert code == 0 and len([row for row in rows if row["event"] == "step"]) == 8
    same = [row["loss"] for row in rows if row["event"] == "step"] == [row["loss"] for row in usual if row["event"] == "step"]
    assert same == (flags in {"--gradient-checkpointing full", "--save-total-limit 2"})
    if "save-total-limit" in flags:
        assert len(list((tmp_path / "with" / "run" / "checkpoints").iterdir())) == 2


def test_max_steps_may_end_within_an_epoch_and_go_beyond_the_epochs(tiny, tmp_path):
    _, rows = run(tmp_path, "--max-steps", "8", "--num-train-epochs", "1")
    assert [row["step"] for row in rows if row["event"] == "eval"] == [0, 6, 8]
    assert (tmp_path / "run" / "checkpoints" / "step-000008").is_dir()


@pytest.mark.parametrize(("flag", "window"), [("2048", None), ("2049", 2047)])
def test_training_leaves_the_sliding_window_out_where_it_may(tiny, tmp_path, monkeypatch, flag, window):
    seen, checkpointed = [], []
    original, checkpoint = train_loop.train_step, layers.checkpoint

    def spy(decoder, *args, **kwargs):
        seen.append((decoder.config.sliding_window, decoder.config._attn_implementation, decoder.decoder.training))
        return original(decoder, *args, **kwargs)

    def counted(function, layer, *args, **kwargs):
        checkpointed.append(layer)
        return checkpoint(function, layer, *args, **kwargs)

    monkeypatch.setattr(layers, "checkpoint", counted)

    monkeypatch.setattr(train_loop, "train_step", spy)
    flags = ["--max-length", flag, "--gradient-checkpointing", "full", "--attn-implementation", "eager", "--max-steps", "2"]
    assert run(tmp_path, *flags)[0] == 0
    assert seen == [(window, "training_eager", True)] * 2
    assert len(checkpointed) == 2 * 2 * 2  # layers, micro-batches, steps


def test_no_mask_is_made_for_padding(tiny, tmp_path, monkeypatch):
    """A mask would cost sdpa its fast kernel: attention must be called without one, for padded rows too."""
    masks = []
    original = F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return original(*args, attn_mask=attn_mask, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        patch.setattr("qlora.eval.generate.sample_responses", lambda *a: [])
        assert run(tmp_path, "--max-steps", "2")[0] == 0
    assert masks and all(mask is None for mask in masks)


def test_dropped_samples_are_not_generated_from(tiny, tmp_path, capsys):
    rows = [{"prompt": "long " * 200, "completion": "a"}, *({"prompt": f"q{i}", "completion": "a"} for i in range(5))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--train-file", str(tmp_path / "rows.jsonl"), "--eval-file", "None", "--max-length", "100", "--max-steps", "1"]
    assert run(tmp_path, *flags)[0] == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == ["q0", "q1", "q2"]
    assert "Greedy answers to training prompts" in capsys.readouterr().out


def test_one_example_trains(tiny, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    code, rows = run(tmp_path, "--train-file", str(tmp_path / "one.jsonl"), "--eval-file", "None", "--num-train-epochs", "2")
    assert code == 0 and [row["num_tokens"] for row in rows] == [2, 2]


def test_rslora_scales_by_the_root_of_the_rank_and_is_saved_so(tiny, tmp_path):
    config, model = {}, {}
    for name, flags in (("plain", []), ("rs", ["--use-rslora"])):
        run(tmp_path / name, "--max-steps", "1", "--lora-r", "16", "--lora-alpha", "32", *flags)
        folder = tmp_path / name / "run" / "adapter"
        config[name] = json.loads((folder / "adapter_config.json").read_text())
        model[name] = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    scaling = {name: model[name].get_base_model().model.layers[0].mlp.down_proj.scaling["default"] for name in model}
    assert scaling == {"plain": 2.0, "rs": 8.0} and (config["plain"]["use_rslora"], config["rs"]["use_rslora"]) == (False, True)
    # It continues with the scaling that it had.
    again = tmp_path / "again"
    run(again, "--max-steps", "1", "--init-adapter", str(tmp_path / "rs" / "run" / "adapter"))
    assert json.loads((again / "run" / "adapter" / "adapter_config.json").read_text())["use_rslora"] is True


def test_init_adapter_goes_on_where_the_first_run_ended(tiny, tmp_path):
    _, first = run(tmp_path / "a", "--num-train-epochs", "2")
    _, second = run(tmp_path / "b", "--num-train-epochs", "1", "--init-adapter", str(tmp_path / "a" / "run" / "adapter"))
    assert second[0]["eval_loss"] == pytest.approx(first[-1]["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--target-modules q_proj v_proj", 2, "q_proj matches no linear layer"),
        ("--train-file none.jsonl", 3, "none.jsonl does not exist"),
        ("--train-file empty.jsonl", 3, "empty.jsonl holds no example"),
        ("--train-file broken.jsonl", 3, "broken.jsonl:2:"),
        ("--train-file folder", 3, "is a folder without a file that can be read"),
        ("--max-length 20", 3, "none of 22 examples fits --max-length 20"),
        ("--model ./nowhere", 7, "no such folder"),
        ("--attn-implementation flash_attention_2", 7, "needs a CUDA GPU"),
        ("--attn-implementation varlen --packing", 7, "varlen cannot run here: it needs a CUDA GPU"),
        ("--output-dir file/run", 4, "cannot be written"),
        ("--max-length 0", 2, "--max-length 0 cannot be used"),
        (
            "--optimizer paged_adamw_8bit --model ./nowhere",
            2,
            "adamw_8bit or lion_8bit, as there is no CUDA GPU",
        ),
    ],
)
def test_bad_input_is_one_paragraph_with_its_exit_code(tiny, tmp_path, monkeypatch, capsys, flags, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"instruction": "q", "response": "a"}\nnonsense\n')
    default = [] if "--output-dir" in flags else ["--output-dir", "run"]
    model = [] if "--model" in flags else ["--model", "tiny-random"]
    assert command_line([*flags.split(), *default, *model]) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_debug_shows_the_traceback(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("debug: true")
    for flag in (["--debug"], ["--config", "run.yaml"]):
        assert command_line(["--model", "./nowhere", *flag]) == ExitCode.ENVIRONMENT
        assert "Traceback (most recent call last)" in (err := capsys.readouterr().err) and "no such folder" in err


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, ExitCode.CHECKPOINT), (errno.EACCES, None)])
def test_a_full_disk_anywhere_is_exit_4(monkeypatch, capsys, number, code):
    def full(*_):
        raise OSError(number, "No room", "some/file")

    monkeypatch.setattr(train_loop, "main", full)
    if code is None:
        with pytest.raises(OSError, match="No room"):
            command_line([])
    else:
        assert command_line([]) == code
        assert "some/file cannot be written: No room. Nothing was to be saved yet" in capsys.readouterr().err


def test_frozen_configuration_cannot_drift(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
