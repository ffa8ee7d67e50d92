"""The DPO example: its loss and gradients are those of TRL, it learns preferences, and it refuses bad rows."""

import dataclasses
import json

import peft
import pytest
import torch
import transformers
import trl
from trl.trainer.dpo_trainer import DataCollatorForPreference

from examples import dpo_loop
from qlora.data.template import load_template
from qlora.errors import ExitCode, UserError
from qlora.model.load import quantization_of
from qlora.speed.accelerate import accelerate
from tests.helpers import adapted_model, gradients, relative_error, wake_adapters

WORDS = ("one", "three", "seven", "eleven")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"say {word}", "chosen": word, "rejected": f"no, not {word} again"} for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def trl_trainer(config, tmp_path):
    """TRL's trainer on the same base, with an adapter of the same shape."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        config.model, quantization_config=quantization_of("nf4"), dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    lora = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = trl.DPOConfig(output_dir=str(tmp_path / "trl"), beta=0.1, use_cpu=True, report_to="none", max_length=None,
                              activation_checkpointing=False, disable_tqdm=True)  # fmt: skip
    import datasets

    data = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    return trl.DPOTrainer(base, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def test_a_step_is_that_of_trl(config, tokenizer, head, rows, tmp_path):
    """Loss and gradients of four pairs, with an adapter that has values."""
    pairs = dpo_loop.read_pairs(rows, load_template(tokenizer, "plain"), 200)
    model = adapted_model(config)
    wake_adapters(model)
    decoder = accelerate(model, dataclasses.replace(config, gradient_checkpointing="full", compile="none"))
    summed, positive = dpo_loop.dpo_loss(model, decoder, pairs, head, 0.1)
    (summed / 4).backward()
    trainer = trl_trainer(config, tmp_path)
    theirs = trainer.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                theirs.get_parameter(name).copy_(parameter)
    split = [next(i for i, label in enumerate(chosen.labels) if label != -100) for chosen, _ in pairs]
    features = [
        {"prompt_ids": chosen.input_ids[:at], "chosen_ids": chosen.input_ids[at:], "rejected_ids": rejected.input_ids[at:]}
        for at, (chosen, rejected) in zip(split, pairs, strict=True)
    ]  # fmt: skip
    inputs = DataCollatorForPreference(pad_token_id=0)(features)
    with torch.autocast("cpu", torch.bfloat16):
        loss = trainer.compute_loss(theirs.train(), inputs)
    loss.backward()
    assert (summed / 4).item() == pytest.approx(loss.item(), rel=2e-3) and 0 <= positive <= 4
    expected = {name: each for name, each in gradients(theirs).items() if "lora_" in name}
    assert relative_error(gradients(model), expected) < 0.1


def test_it_learns_which_answer_is_better(tiny, rows, tmp_path, capsys):
    options = dpo_loop.Options(rows, "tiny-random", tmp_path / "run", learning_rate=1e-2, num_train_epochs=12,
                               pairs_per_step=4, max_length=200, lora_r=4)  # fmt: skip
    dpo_loop.main(options)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    first, last = (float(line.split()[3]) for line in (lines[0], lines[-1]))
    # B is 0, so the margin is too: log 2.
    assert first == pytest.approx(0.6931, abs=1e-3) and last < 0.5 and "accuracy 1.00" in lines[-1] and len(lines) == 12
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
    assert any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"prompt": "a", "chosen": "b"}',
            "pairs.jsonl:2: A row needs prompt, chosen and rejected",
        ),
        ("not json", "pairs.jsonl:2: A row needs prompt, chosen and rejected"),
        (
            '{"prompt": "a", "chosen": null, "rejected": "b"}',
            "pairs.jsonl:2: A row needs prompt, chosen and rejected, as texts",
        ),
        ('{"prompt": "a", "chosen": [{"role": "user"}], "rejected": "b"}', "as texts (TypeError('not a text, or empty'))"),
        (json.dumps({"prompt": "a" * 300, "chosen": "b", "rejected": "c"}), "tokens, more than --max-length 200"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tokenizer, rows, text, words):
    rows.write_text(rows.read_text().splitlines()[0] + "\n" + text + "\n")
    with pytest.raises(UserError) as refused:
        dpo_loop.read_pairs(rows, load_template(tokenizer, "plain"), 200)
    assert words in str(refused.value) and refused.value.exit_code == ExitCode.DATA


def test_the_example_is_short():
    assert len(dpo_loop.Path(dpo_loop.__file__).read_text().splitlines()) <= 150
