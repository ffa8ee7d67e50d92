"""What --explain shows, counted by hand, and that looking changes nothing."""

import dataclasses
import functools
import io
import json

import pytest
import torch
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlora.cli import train as command_line
from qlora.data.batch import collate, collate_packed, iter_batches
from qlora.data.formats import Example
from qlora.data.messages import Message
from qlora.data.template import IGNORED, TokenizedExample, encode
from qlora.model.coverage import linear_layers
from qlora.model.load import load_meta_model
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.optimizer import build_optimizer
from qlora.run import explain
from qlora.run.explain import Count, Group, Token
from tests.helpers import SHORT_DATA, adapted_model, decoder_of, prepared, wake_adapters
from train_loop import train_step


def after_a_step(model, config, samples):
    optimizer = build_optimizer({name: each for name, each in model.named_parameters() if each.requires_grad}, config)
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    _, norm = train_step(decoder_of(model), optimizer, [collate(samples[:2])], loss_sum, 1e-3, None)
    return optimizer, norm.item()


def sums(groups) -> dict[tuple[str, str], tuple[int, int]]:
    assert len({group[:2] for group in groups}) == len(groups)
    return {group[:2]: group[2:] for group in groups}


@pytest.fixture
def expected(config):
    """The ledger of the tiny model before its first step, from its shapes."""
    meta_model = load_meta_model(config.model, config)
    sizes = [layer.weight.numel() for layer in linear_layers(meta_model).values()]
    adapters = sum(config.lora_r * sum(layer.weight.shape) for layer in linear_layers(meta_model).values())
    table = meta_model.get_input_embeddings().weight.numel()
    norms = meta_model.num_parameters() - sum(sizes) - 2 * table
    return {
        ("NF4 weights", "uint8"): (sum(sizes), sum(sizes) // 2),
        ("NF4 constants", "uint8"): (sum(sizes) // 64, sum(sizes) // 64),
        ("embeddings", "bfloat16"): (table, 2 * table),
        ("head", "bfloat16"): (table, 2 * table),
        ("norms", "bfloat16"): (norms, 2 * norms),
        ("adapters", "float32"): (adapters, 4 * adapters),
    }, sizes


def test_the_ledger_counts_what_shapes_say(model, config, samples, expected):
    wanted, sizes = expected
    before = sums(explain.dtype_ledger(model, torch.optim.AdamW([torch.zeros(1)])))
    constants, kept = before.pop(("NF4 constants", "float32"))
    own = sum(-(-size // 64 // 256) + 1 for size in sizes)  # scales of scales, an offset
    tables, rest = divmod(constants - own, 256 + 16)  # shared by layers, or not
    assert rest == 0 and 1 <= tables <= len(sizes) and kept == 4 * constants
    assert before.pop(("buffers", "float32"))[0] < 200  # of the rotary embedding
    assert before == wanted
    optimizer, _ = after_a_step(model, config, samples)
    after = sums(explain.dtype_ledger(model, optimizer))
    adapters = wanted["adapters", "float32"][0]
    assert after["gradients", "float32"] == (adapters, 4 * adapters)
    assert after["moments", "float32"] == (2 * adapters, 8 * adapters)
    assert {key: after[key] for key in wanted} == wanted and len(after) == len(wanted) + 4


def test_the_ledger_sees_bf16_adapters_8_bit_moments_tied_heads_and_caches(config, samples, expected):
    wanted, sizes = expected
    eight_bit = dataclasses.replace(config, optimizer="adamw_8bit", lora_r=16, cache_dequantized=True)
    model = prepared(adapted_model(eight_bit), eight_bit, "none")
    model.get_base_model().lm_head.weight = model.get_input_embeddings().weight
    optimizer, _ = after_a_step(model, eight_bit, samples)
    found = sums(explain.dtype_ledger(model, optimizer))
    adapters = 4 * wanted["adapters", "float32"][0]
    small = sum(2 * p.numel() for p in model.parameters() if p.requires_grad and p.numel() < 4096)  # keep fp32
    assert found["moments", "float32"] == (small, 4 * small) and small > 0
    assert found["moments", "uint8"] == (2 * adapters - small, 2 * adapters - small)
    assert found["constants of moments", "float32"][0] >= 2 * 256 + (2 * adapters - small) // 256  # two maps, scales
    assert ("head", "bfloat16") not in found and found["embeddings", "bfloat16"] == wanted["embeddings", "bfloat16"]
    assert found["NF4 weights, dequantized", "bfloat16"] == (sum(sizes), 2 * sum(sizes))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert sums(explain.dtype_ledger(model, optimizer))["adapters", "bfloat16"] == (adapters, 2 * adapters)


def test_packed_parameters_are_counted_one_by_one(model, config, expected):
    wanted, _ = expected
    adapters = wanted["adapters", "float32"][0]
    assert explain.parameter_counts(model) == (load_meta_model(config.model, config).num_parameters() + adapters, adapters)


def test_tokens_say_what_is_trained(template):
    example = Example((Message("user", "q"), Message("assistant", "ab")), 3)
    rows = explain.tokens(encode(example, template, "response"), template.tokenizer)
    assert "".join(token.text for token in rows if not token.trained) == "### Instruction:\nq\n\n### Response:\n"
    assert "".join(token.text for token in rows if token.trained) == "ab" + template.tokenizer.eos_token
    assert [token.position for token in rows] == list(range(len(rows)))
    everything = explain.tokens(encode(example, template, "all"), template.tokenizer)
    assert [token.trained for token in everything] == [False] + [True] * (len(rows) - 1)  # nothing predicts the first


def test_counts_of_a_step_add_up():
    rows = [TokenizedExample([1] * length, [IGNORED] * 2 + [1] * (length - 2), length) for length in (9, 4, 7)]
    micro_batches = list(iter_batches(rows, range(3), 2))
    assert explain.token_counts(micro_batches) == [Count(2, 9, 5, 4, 9), Count(1, 7, 0, 2, 5)]
    packed = [collate_packed([rows[:2], rows[2:]])]
    assert explain.token_counts(packed) == [Count(3, 13, 6, 6, 14)]


def test_gradient_norms_are_of_each_module_layer_by_layer(model, config, samples):
    wake_adapters(model)
    _, norm = after_a_step(model, config, samples)
    found = explain.gradient_norms(model)
    assert sorted(found) == sorted(f"{name}.lora_{side}" for name in
                                   ("qkv_proj", "o_proj", "gate_up_proj", "down_proj") for side in "AB")  # fmt: skip
    for name, norms in found.items():
        module, matrix = name.split(".")
        wanted = [p.grad.norm().item() for full, p in model.named_parameters() if f"{module}.{matrix}" in full]
        assert norms.tolist() == pytest.approx(wanted) and len(wanted) == 2 and wanted[0] != wanted[1]
    assert torch.cat(list(found.values())).norm().item() == pytest.approx(norm, rel=1e-5)


def test_the_middle_of_a_long_sample_is_left_out():
    def shown(count: int) -> str:
        out = io.StringIO()
        rows = [Token(index, index, f"[{index}]", index > 5) for index in range(count)]
        Console(file=out, width=100).print(explain.token_table(rows, 7))
        return out.getvalue()

    text = shown(1000)
    assert "Line 7: 994 of 1000 tokens trained" in text and "'[99]'" in text and "'[100]'" not in text
    assert "800 more" in text and "'[899]'" not in text and "'[900]'" in text
    whole = shown(explain.TOKEN_ROWS)
    assert all(f"'[{index}]'" in whole for index in range(explain.TOKEN_ROWS))


def cells(table: Table) -> list[list[str]]:
    """What a table prints, row by row."""
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    lines = [line.strip() for line in out.getvalue().splitlines()]
    return [
        [cell.strip() for cell in line.strip("\u2502\u2503").split("\u2502")] for line in lines if line.startswith("\u2502")
    ]


def test_what_is_printed_of_a_step_of_two_micro_batches():
    """Two samples, then one: of nine tokens four are trained, counted by hand."""
    prompt_and_answer = TokenizedExample([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8], 3)
    short, alone = TokenizedExample([5, 6], [IGNORED, 6], 4), TokenizedExample([5, 6, 7], [IGNORED, IGNORED, 7], 9)
    counts = explain.token_counts([collate([prompt_and_answer, short]), collate([alone])])
    assert counts == [Count(2, 4, 2, 3, 3), Count(1, 3, 0, 2, 1)]
    table = explain.count_table(counts)
    assert [column.header for column in table.columns] == [
        "micro-batch",
        "samples",
        "positions",
        "padding",
        "context",
        "trained",
    ]
    assert cells(table) == [["1", "2", "8", "2", "3", "3"], ["2", "1", "3", "0", "2", "1"]]
    assert "over 4 tokens" in str(table.caption)


def test_what_is_printed_of_tokens():
    rows = [Token(0, 5, "a", False), Token(1, 17, "[b]", False), Token(2, 6, " c\n", True)]
    table = explain.token_table(rows, 3)
    assert table.title == "Line 3: 1 of 3 tokens trained"
    assert [column.header for column in table.columns] == ["position", "id", "token", ""]
    assert cells(table) == [
        ["0", "5", "'a'", "masked"],
        ["1", "17", "'[b]'", "masked"],
        ["2", "6", "' c\\n'", "trained"],
    ]


def test_what_is_printed_of_the_ledger():
    groups = [Group("NF4 weights", "uint8", 6_000_000, 3_000_000), Group("adapters", "float32", 2**18, 2**20)]
    table = explain.ledger_table(groups)
    assert [column.header for column in table.columns] == ["tensors", "dtype", "elements", "bytes", "MB"]
    assert cells(table) == [
        ["NF4 weights", "uint8", "6,000,000", "3,000,000", "3.00"],
        ["adapters", "float32", "262,144", "1,048,576", "1.05"],
        ["all", "", "", "4,048,576", "4.05"],
    ]


@pytest.fixture(autouse=True)
def no_sample_answers(monkeypatch):
    monkeypatch.setattr("qlora.eval.generate.sample_responses", lambda *_: [])


def explained(folder, *flags: str) -> list[dict]:
    arguments = ["--model", "tiny-random", "--output-dir", str(folder), "--lora-r", "4", "--learning-rate", "1e-2", *SHORT_DATA]
    assert command_line([*arguments, *flags]) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("tokens_per_s", "peak_memory_gb")
    return [{name: value for name, value in row.items() if name not in measured} for row in rows]


def test_a_run_that_explains_is_the_run_that_does_not(tiny, tmp_path, capsys):
    titles = ("Parameters: ", "Line 1: 2 of 29 tokens trained", "Tokens of the first step", "Memory from step to step")
    silent = explained(tmp_path / "silent", "--max-steps", "8")
    text = capsys.readouterr().out
    assert "step 8/8" in text and not any(title in text for title in titles)
    told = explained(tmp_path / "told", "--max-steps", "8", "--explain")
    text = capsys.readouterr().out
    assert told == silent
    assert all(text.count(title) == 1 for title in titles)
    assert text.index("Tokens of the first step") < text.index("step 1/8") < text.index("Memory from step to step")
    steps = [row for row in told if row["event"] == "step"]
    assert f"Its loss is the sum of losses over {steps[0]['num_tokens']:,} tokens" in " ".join(text.split())
    board = EventAccumulator(str(tmp_path / "told" / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    assert len(board.Tags()["histograms"]) == 8
    for name in board.Tags()["histograms"]:
        events = board.Histograms(name)
        assert [event.step for event in events] == [1, 5, 6, 8]  # logged, end of an epoch, end
        assert all(event.histogram_value.num == 2 for event in events)  # layers
        assert (events[0].histogram_value.max == 0) == name.endswith("lora_A")  # while B is zero


def test_a_run_that_goes_on_explains_again(tiny, tmp_path, capsys):
    explained(tmp_path / "run", "--max-steps", "6")
    capsys.readouterr()
    explained(tmp_path / "run", "--max-steps", "8", "--override", "max_steps", "--explain")
    text = capsys.readouterr().out
    assert text.count("Memory from step to step") == 1 and "moments" in text and "gradients" in text
