"""Virtual tokens: prompt tuning, P-tuning and prefix tuning, which act in PeftModel.forward."""

import dataclasses
import functools
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from benchmarks import families
from qlora.cli import main as any_command
from qlora.cli import train as command_line
from qlora.data.batch import collate
from qlora.errors import ExitCode, UserError
from qlora.eval.loss import evaluate_loss
from qlora.model.load import load_meta_model, load_nf4_model
from qlora.model.lora import add_lora, checked_targets, with_peft_config
from qlora.model.loss import read_head
from qlora.model.prompts import base_of, decoder_of, has_prompt
from qlora.report import record
from qlora.report.model_card import model_card
from qlora.speed.decode import PromptedTokens, adapts_by_row, decode
from qlora.speed.layers import choose_layers
from tests.helpers import CPU, SHORT_DATA, gradients, loss_and_gradients, prepared, relative_error

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


def prompted(config, path):
    """The tiny model with virtual tokens, in training mode; and its configuration and targets."""
    config = with_peft_config(dataclasses.replace(config, peft_config=path, attn_implementation="sdpa"))
    torch.manual_seed(0)
    targets = checked_targets(load_meta_model(config.model, config), config, lambda _: None)
    model = add_lora(load_nf4_model(config.model, config, "sdpa", CPU), config, targets, config.model).train()
    return model, config, targets


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_are_those_of_peft(config, samples, file, name, policy):
    if policy == "full" and name.startswith("PREFIX"):
        pytest.skip("refused")
    model, trained, targets = prompted(config, file(name))
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
    model, _, _ = prompted(config, file(name))
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
    assert f"{name.partition(',')[0]} in fp32" in model_card(record.read(run))


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


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_answers_are_those_of_the_whole_row_computed_anew_for_each_token(config, template, samples, file, name):
    """Of prompts of different lengths in one batch, where PEFT's own generate puts padding behind the virtual tokens."""
    model, _, _ = prompted(config, file(name))
    model.eval()
    head, prompts = read_head(model), [samples[0].input_ids[:9], samples[1].input_ids[:4]]
    settings = GenerationConfig(max_new_tokens=6, eos_token_id=None, pad_token_id=0, do_sample=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        padded = torch.tensor([prompts[0], [0] * 5 + prompts[1]])  # [B, T]
        seen = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])  # [B, T]
        decoding = functools.partial(decode, graph=PromptedTokens(model), show=None)
        answers = base_of(model).generate(
            input_ids=padded, attention_mask=seen, generation_config=settings, custom_generate=decoding
        )
        others = []
        for prompt, answer in zip(prompts, answers[:, 9:].tolist(), strict=True):
            row = list(prompt)
            for token in answer:
                hidden = decoder_of(model)(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state  # [1, T, D]
                scores = head.logits(hidden[0, -1]).float()  # [V]
                assert scores[token] >= scores.max() - 0.02 * scores.std()  # a tie, but for rounding
                row.append(token)
            with model.disable_adapter():
                hidden = decoder_of(model)(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state  # [1, T, D]
            others.append(head.logits(hidden[0, 3:-1]).argmax(-1).tolist())
    assert any(answer != other[-6:] for answer, other in zip(answers[:, 9:].tolist(), others, strict=True))
