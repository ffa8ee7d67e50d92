"""Virtual tokens: prompt tuning, P-tuning and prefix tuning, which act in PeftModel.forward."""

import dataclasses
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from benchmarks import families
from qlora.cli import main as any_command
from qlora.cli import train as command_line
from qlora.commands.adapter import open_adapter, positions_of
from qlora.data.batch import collate
from qlora.errors import ExitCode, UserError
from qlora.eval.generate import generate_all
from qlora.eval.loss import evaluate_loss
from qlora.model import attention
from qlora.model.adapter_config import read_adapter_config
from qlora.model.load import load_meta_model
from qlora.model.lora import checked_targets
from qlora.model.loss import read_head
from qlora.model.peft_config import with_peft_config
from qlora.model.prompts import decoder_of, has_prompt
from qlora.report import record
from qlora.report.model_card import model_card
from qlora.run.checkpoint import adapter_files
from qlora.run.files import write_folder
from qlora.speed.decode import PromptedTokens, adapts_by_row
from qlora.speed.layers import choose_layers
from qlora.speed.memory import settings_to_try
from tests.helpers import CPU, SHORT_DATA, gradients, loss_and_gradients, prepared, relative_error, with_method

METHODS = {
    "PROMPT_TUNING": {"num_virtual_tokens": 5},
    "P_TUNING": {"num_virtual_tokens": 5, "encoder_hidden_size": 16, "encoder_reparameterization_type": "MLP"},
    "PREFIX_TUNING": {"num_virtual_tokens": 5},
    "PREFIX_TUNING, projected": {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 16},
}
LLAMA_ADAPTER = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 5, "adapter_layers": 1}


@pytest.fixture
def file(tmp_path):
    def write(name: str):
        path = tmp_path / "method.json"
        values = LLAMA_ADAPTER if name == "ADAPTION_PROMPT" else {"peft_type": name.partition(",")[0], **METHODS[name]}
        path.write_text(json.dumps(values))
        return path

    return write


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_are_those_of_peft(config, samples, file, name, policy):
    if policy == "full" and name.startswith("PREFIX"):
        pytest.skip("refused")
    model, trained, targets = with_method(config, file(name))
    batch = collate(samples[:1])  # one row, so that PEFT's mean over its tokens is ours
    with torch.autocast("cpu", torch.bfloat16):
        labels = batch.labels.clone()
        labels[:, 0] = -100  # virtual tokens would predict the first token, which this loop never counts
        expected = model(input_ids=batch.input_ids, labels=labels, use_cache=False).loss
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    loss, found = loss_and_gradients(prepared(model, trained, policy), trained, batch)
    assert loss == pytest.approx(expected.item(), rel=2e-3)
    assert relative_error(found, wanted) < 0.03 and all(gradient.any() for gradient in wanted.values())
    assert [(target.layers, target.adapter_parameters) for target in targets] == [
        ((), sum(parameter.numel() for parameter in found.values()))
    ]
    assert targets[0].name == "5 virtual tokens" and not adapts_by_row(model)


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_change_the_output_and_disabling_them_gives_the_base(config, samples, file, name):
    model, _, _ = with_method(config, file(name))
    batch = collate(samples[:2])
    assert has_prompt(model)

    def hidden() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            output = decoder_of(model.eval())(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # [B, T, D]
        assert output.shape[:2] == batch.input_ids.shape
        return output

    base, ours = model.get_decoder(), hidden()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = base(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    with model.disable_adapter():
        without = hidden()
    assert torch.equal(without, expected) and (ours - expected).norm() > 0.01 * expected.norm()
    loss_sum = lambda states, _: states.float().square().sum()  # noqa: E731
    results = [evaluate_loss(model, [batch], loss_sum).loss]
    with model.disable_adapter():
        results.append(evaluate_loss(model, [batch], loss_sum).loss)
    sums = [states.float().square().sum().item() / batch.num_tokens for states in (ours, expected)]
    assert results == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_llama_adapter_trains_where_peft_knows_the_attention(tiny, tmp_path, capsys, file, quantization):
    families.write_model("Llama", tmp_path / "model")
    path, run, resumed = file("ADAPTION_PROMPT"), tmp_path / "run", tmp_path / "resumed"
    flags = ["--model", str(tmp_path / "model"), "--peft-config", str(path), "--max-length", "300", *SHORT_DATA]
    flags += ["--max-steps", "4", "--save-steps", "2", "--save-total-limit", "9", "--learning-rate", "1e-2"]
    flags += ["--quantization", quantization]
    assert command_line([*flags, "--output-dir", str(run)]) == 0
    half = run / "checkpoints" / "step-000002"
    assert command_line([*flags, "--output-dir", str(resumed), "--resume", str(half)]) == 0
    folders = (run / "adapter", resumed / "adapter", half)
    ours, theirs, before = (load_file(each / "adapter_model.safetensors") for each in folders)
    assert {key.rsplit(".", 1)[-1] for key in ours} == {"adaption_prompt", "adaption_gate"} and len(ours) == 2
    for key, tensor in ours.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, theirs[key]) and not torch.equal(tensor, before[key])
    data = ["--eval-file", SHORT_DATA[3], "--limit", "2", "--device", "cpu"]
    assert any_command(["evaluate", str(run), *data, "--max-new-tokens", "2"]) == 0
    assert any_command(["merge", str(run), *data]) == ExitCode.CONFIGURATION
    assert "virtual tokens" in capsys.readouterr().err
    other = [*flags, "--model", "tiny-random", "--output-dir", str(tmp_path / "other")]
    assert command_line(other) == ExitCode.CONFIGURATION
    assert "Unsupported model type for adaption prompt: 'phi3'" in capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_a_run_resumes_bit_for_bit_is_used_and_peft_loads_it(tiny, tmp_path, capsys, file, name):
    flags = ["--model", "tiny-random", "--peft-config", str(file(name)), "--max-length", "300", *SHORT_DATA, "--explain"]
    flags += ["--max-steps", "4", "--save-steps", "2", "--save-total-limit", "9", "--learning-rate", "1e-2"]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    assert command_line([*flags, "--output-dir", str(run)]) == 0
    half = run / "checkpoints" / "step-000002"
    assert command_line([*flags, "--output-dir", str(resumed), "--resume", str(half)]) == 0
    shown = capsys.readouterr().out
    assert "5 virtual tokens" in shown
    ours, theirs, before = (
        load_file(each / "adapter_model.safetensors") for each in (run / "adapter", resumed / "adapter", half)
    )
    assert list(ours) == ["prompt_embeddings"] and ours["prompt_embeddings"].dtype == torch.float32
    assert torch.equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])
    assert not torch.equal(ours["prompt_embeddings"], before["prompt_embeddings"])
    states = [load_file(each / "checkpoints" / "step-000004" / "trainer_state.safetensors") for each in (run, resumed)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(each, states[1][key]) for key, each in states[0].items())
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.bfloat16)
    assert torch.equal(peft.get_peft_model_state_dict(loaded)["prompt_embeddings"], ours["prompt_embeddings"])
    data = ["--eval-file", SHORT_DATA[3], "--limit", "2", "--device", "cpu"]
    assert any_command(["evaluate", str(run), *data, "--max-new-tokens", "2"]) == 0
    assert any_command(["generate", str(run), "--prompt", "say one", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert any_command(["merge", str(run), *data]) == ExitCode.CONFIGURATION
    assert "virtual tokens" in capsys.readouterr().err
    card = model_card(record.read(run))
    assert f"{name.partition(',')[0]} in fp32" in card and "virtual" in card and "5 virtual tokens |" in card
    assert "python -m qlora generate ." in card and "python -m qlora generate" in shown
    assert "merge_and_unload" not in card and "vllm" not in card.lower() and "AutoPeftModel" not in card + shown


def test_what_cannot_be_combined_is_refused(config, file):
    with pytest.raises(UserError, match="--packing cannot be used with P_TUNING"):
        with_peft_config(dataclasses.replace(config, packing=True, peft_config=file("P_TUNING")))
    asked = dataclasses.replace(config, gradient_checkpointing="full", compile="none", peft_config=file("PREFIX_TUNING"))
    meta_model = load_meta_model(config.model, config)
    with pytest.raises(UserError, match="--gradient-checkpointing full cannot be used with PREFIX_TUNING"):
        choose_layers(asked, meta_model, [], 64, CPU)
    chosen, _ = choose_layers(
        dataclasses.replace(asked, gradient_checkpointing="auto", compile="auto"), meta_model, [], 64, CPU
    )
    assert (chosen.gradient_checkpointing, chosen.compile) == ("none", "none")


@pytest.mark.parametrize("family", ["Phi3", "Gemma3Text"])  # both have windows of 16 tokens
@pytest.mark.parametrize("name", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_answers_are_those_of_whole_rows_computed_anew(config, template, tmp_path, samples, file, name, family):
    """Of prompts of different lengths, asked for in one batch; the padding would be longer than the windows."""
    families.write_model(family, tmp_path / "model")
    model, _, _ = with_method(dataclasses.replace(config, model=str(tmp_path / "model")), file(name))
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter.mul_(8.0)
    head, prompts = read_head(model), [samples[0].input_ids[:30], samples[1].input_ids[:4], samples[2].input_ids[:30]]
    with torch.autocast("cpu", torch.bfloat16):
        answers = generate_all(model.eval(), prompts, template, 5, batch_size=3)
        with torch.no_grad():
            expected = []
            for prompt in prompts:
                row = list(prompt)
                for _ in range(5):
                    hidden = decoder_of(model)(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state  # [1, T, D]
                    row.append(int(head.logits(hidden[0, -1]).float().argmax()))
                expected.append(template.tokenizer.decode(row[len(prompt) :], skip_special_tokens=True))
        with model.disable_adapter():
            base = generate_all(model, prompts, template, 5, batch_size=3)
    assert answers == expected and answers != base


def test_padding_behind_virtual_tokens_is_an_error(config, file):
    model, _, _ = with_method(config, file("PROMPT_TUNING"))
    with pytest.raises(ValueError, match="cannot be padded"):
        PromptedTokens(model).prefill(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]))


def test_what_a_network_with_dropout_makes_is_saved_without_dropout(config, tmp_path):
    values = {"peft_type": "P_TUNING", "num_virtual_tokens": 5, "encoder_hidden_size": 16, "encoder_dropout": 0.5,
              "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2}  # fmt: skip
    (tmp_path / "method.json").write_text(json.dumps(values))
    model, _, _ = with_method(config, tmp_path / "method.json")
    files = dict(adapter_files(model))
    assert model.training
    write_folder(tmp_path / "adapter", files)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]  # [n, D]
    with torch.no_grad():
        assert torch.equal(saved, model.eval().get_prompt(1)[0]) and not torch.equal(saved, model.train().get_prompt(1)[0])


def test_positions_of_virtual_tokens_count(config, file, tmp_path, capsys):
    meta_model = load_meta_model(config.model, config)
    positions = meta_model.config.max_position_embeddings
    asked = with_peft_config(dataclasses.replace(config, max_length=positions - 4, peft_config=file("P_TUNING")))
    with pytest.raises(
        UserError, match=f"5 virtual tokens are more than the {positions} positions .* --max-length {positions - 5}"
    ):
        checked_targets(meta_model, asked, lambda _: None)
    checked_targets(meta_model, dataclasses.replace(asked, max_length=positions - 5), lambda _: None)
    model, _, _ = with_method(config, file("PROMPT_TUNING"))
    write_folder(tmp_path / "adapter", dict(adapter_files(model)))
    adapter = open_adapter(tmp_path / "adapter", model="tiny-random", prompt_format="plain", device="cpu")
    assert positions_of(adapter) == positions - 5


def test_varlen_is_not_chosen_beside_virtual_tokens(config, file, monkeypatch):
    monkeypatch.setattr(attention, "_varlen_unavailable_reason", lambda *_: None)
    asked = dataclasses.replace(config, attn_implementation="varlen")
    assert attention.choose_attention(asked, CPU).implementation == "varlen"
    with pytest.raises(UserError, match="virtual tokens require transformers' own attention functions"):
        attention.choose_attention(dataclasses.replace(asked, peft_config=file("PROMPT_TUNING")), CPU)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_layers": 1}, "sets num_layers, which follows from the model"),
        ({"token_dim": 32}, "sets token_dim, which follows from the model"),
        ({"num_transformer_submodules": 2}, "sets num_transformer_submodules, which follows"),
        ({"num_virtual_tokens": True}, "has num_virtual_tokens True. It must be a number"),
        ({"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "FOO"}, "has prompt_tuning_init 'FOO'. It must be RANDOM"),
        ({"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a",
          "tokenizer_name_or_path": "/no/such/folder"}, "PEFT refuses it for Phi3ForCausalLM"),
        ({"peft_type": "ADAPTION_PROMPT", "num_virtual_tokens": None, "adapter_len": 4}, "has adapter_layers None"),
        ({"peft_type": "ADAPTION_PROMPT", "num_virtual_tokens": None, "adapter_len": 4, "adapter_layers": 0}, "_layers 0"),
    ],
)  # fmt: skip
def test_files_that_peft_would_stumble_over_later_are_refused(config, tmp_path, values, words):
    values = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5} | values
    path = tmp_path / "method.json"
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    with pytest.raises(UserError) as refused:
        trained = with_peft_config(dataclasses.replace(config, peft_config=path))
        checked_targets(load_meta_model(config.model, config), trained, lambda _: None)
    assert words in str(refused.value) and refused.value.exit_code == ExitCode.CONFIGURATION


def test_advice_on_memory_can_be_followed(config, file):
    for name, checkpointing in (("PREFIX_TUNING", False), ("PROMPT_TUNING", True)):
        asked = dataclasses.replace(config, gradient_checkpointing="none", peft_config=file(name), lora_r=32)
        flags = " ".join(setting.flags for setting in settings_to_try(asked, 512))
        assert ("--gradient-checkpointing full" in flags) == checkpointing
        assert "--lora-r" not in flags and "--target-modules" not in flags and "--peft-config" in flags


def test_experts_outside_nf4_are_said_and_not_refused_where_no_layer_is_adapted(config, file):
    shape = transformers.MixtralConfig(
        **families.DENSE | {"intermediate_size": 256, "num_local_experts": 4, "max_position_embeddings": 4096}
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape)
    said: list[str] = []
    checked_targets(model, with_peft_config(dataclasses.replace(config, peft_config=file("PROMPT_TUNING"))), said.append)
    assert said[0].startswith("Warning: MixtralForCausalLM")


def test_an_adapter_for_another_task_is_refused(config, file, tmp_path):
    model, _, _ = with_method(config, file("PROMPT_TUNING"))
    write_folder(tmp_path / "adapter", dict(adapter_files(model)))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(UserError, match="was trained for the task SEQ_CLS"):
        read_adapter_config(tmp_path / "adapter")
