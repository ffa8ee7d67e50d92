"""Bases in FP4, INT8 and without quantization: against PEFT's own layers, and whole runs on them."""

import copy
import dataclasses
import json

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora.cli import main as any_command
from qlora.cli import train as command_line
from qlora.commands import adapter as adapter_command
from qlora.config import TrainConfig
from qlora.data.batch import collate
from qlora.errors import ExitCode, UserError
from qlora.model import load
from qlora.model.load import load_meta_model, load_nf4_model, quantization_of
from qlora.model.lora import add_lora
from qlora.model.targets import audit_targets
from qlora.report import record
from qlora.report.model_card import model_card
from qlora.speed import layers, lora_linear, nf4
from qlora.speed.memory import memory_terms
from tests.helpers import CPU, SHORT_DATA, adapted_model, loss_and_gradients, prepared, relative_error, wake_adapters

OTHERS = ("fp4", "int8", "none")


def awake(config, quantization: str):
    """The tiny model in that quantization, adapters awake, in training mode."""
    config = dataclasses.replace(config, quantization=quantization, lora_dropout=0.0)
    torch.manual_seed(0)
    model = load_nf4_model(config.model, config, "sdpa", CPU)
    model = add_lora(model, config, audit_targets(load_meta_model(config.model, config), config), config.model).train()
    wake_adapters(model)
    return model, dataclasses.replace(config, attn_implementation="sdpa")


@pytest.mark.parametrize("quantization", OTHERS)
def test_a_step_is_that_of_peft_s_own_layers(config, samples, quantization):
    batch = collate(samples[:3])
    plain, trained = awake(config, quantization)
    loss, expected = loss_and_gradients(plain, trained, batch)
    for policy in ("none", "full"):
        model = prepared(copy.deepcopy(plain), trained, policy)
        found = [module for module in model.modules() if isinstance(module, lora_linear.LoRALinear)]
        assert len(found) == (0 if quantization == "int8" else 8)
        ours, ours_gradients = loss_and_gradients(model, trained, batch)
        assert ours == pytest.approx(loss, rel=1e-3) and relative_error(ours_gradients, expected) < 0.03


def test_without_quantization_layers_compile_to_the_same(config, samples):
    batch = collate(samples[:3])
    model, trained = awake(config, "none")
    plain = loss_and_gradients(prepared(copy.deepcopy(model), trained, "full"), trained, batch)
    compiled = loss_and_gradients(prepared(model, trained, "full", "layers"), trained, batch)
    assert compiled[0] == pytest.approx(plain[0], rel=1e-3) and relative_error(compiled[1], plain[1]) < 0.02


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("quantization", OTHERS)
def test_a_run_trains_resumes_bit_for_bit_and_is_used(tiny, tmp_path, capsys, monkeypatch, quantization):
    flags = ["--model", "tiny-random", "--quantization", quantization, "--lora-r", "4", "--max-length", "300", *SHORT_DATA]
    flags += ["--max-steps", "4", "--save-steps", "2", "--save-total-limit", "9", "--learning-rate", "1e-3"]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    assert command_line([*flags, "--output-dir", str(run)]) == 0
    half = run / "checkpoints" / "step-000002"
    assert command_line([*flags, "--output-dir", str(resumed), "--resume", str(half)]) == 0
    trained = adapter(run)
    assert all(torch.equal(tensor, adapter(resumed)[name]) for name, tensor in trained.items())
    assert all(tensor.any() for tensor in trained.values())
    assert json.loads((run / "run.json").read_text())["config"]["quantization"] == quantization
    assert command_line([*flags, "--output-dir", str(run), "--quantization", "nf4"]) == ExitCode.CONFIGURATION
    assert "quantization" in capsys.readouterr().err
    loaded = []
    original = load.load_base_model
    monkeypatch.setattr(adapter_command, "load_base_model", lambda *of: loaded.append(of[4]) or original(*of))
    assert any_command(["generate", str(run), "--prompt", "say one", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert loaded == [quantization]
    card = model_card(record.read(run))
    form = {"fp4": "FP4 with double quantization", "int8": "INT8 (LLM.int8)", "none": "16 bits"}[quantization]
    assert f"frozen in {form}; bf16 autocast" in card and ("as it was trained:" in card) == (quantization != "none")
    out = tmp_path / "merged"
    data = ["--eval-file", SHORT_DATA[3], "--limit", "2", "--device", "cpu"]
    assert any_command(["merge", str(run), *data, "--into", "recommended", "--output-dir", str(out)]) == 0
    shown = capsys.readouterr().out
    assert ("the only one, as the base was trained without quantization" in shown) == (quantization == "none")
    merged = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert merged.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("fp4", True), ("fp4", False)])
def test_a_checkpoint_in_4_bits_is_read_as_it_is(tiny, config, tokenizer, tmp_path, kind, double):
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    stored = transformers.AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=settings, dtype=torch.bfloat16, device_map={"": CPU}
    )
    stored.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = dataclasses.replace(config, model=str(tmp_path / "model"), quantization=kind)
    model = adapted_model(config)
    lora_linear.install(model)
    layer = next(module for module in model.modules() if isinstance(module, lora_linear.LoRALinear4bit))
    assert len(layer.frozen) == (6 if double else 3)
    for dtype in (torch.bfloat16, torch.float32):
        state = layer.base_layer.weight.quant_state
        state.dtype = dtype
        theirs = bitsandbytes.functional.dequantize_4bit(layer.base_layer.weight.data, state)  # [N, K]
        assert torch.equal(nf4.dequantized(layer.frozen, layer.out_features, dtype), theirs)
    other = "nf4" if kind == "fp4" else "fp4"
    with pytest.raises(UserError, match=f"is quantized already, in {kind}. .* with --quantization {kind}") as refused:
        load_meta_model(config.model, dataclasses.replace(config, quantization=other))
    assert refused.value.exit_code == ExitCode.CONFIGURATION


def test_what_excludes_each_other_is_refused():
    for flags, words in (
        ({"shard_base": True, "quantization": "fp4"}, "shard_base|--shard-base True cannot be used"),
        ({"cache_dequantized": True, "quantization": "none"}, "--cache-dequantized True cannot be used"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            TrainConfig(**flags).resolved(on_gpu=True)
        assert refused.value.exit_code == ExitCode.CONFIGURATION


def test_int8_is_never_compiled(config, model):
    config = dataclasses.replace(config, quantization="int8")
    chosen, _ = layers.choose_layers(config, model, audit_targets(model, config), 100, CPU)
    assert chosen.compile == "none"
    with pytest.raises(UserError, match="--compile layers cannot be used: layers in 8 bits run in bitsandbytes' own code"):
        layers.choose_layers(dataclasses.replace(config, compile="layers"), model, audit_targets(model, config), 100, CPU)


def test_memory_is_predicted_by_the_bytes_of_a_weight(config, tiny):
    meta_model = load_meta_model(config.model, config)
    plain = dataclasses.replace(config, compile="none", gradient_checkpointing="full")
    targets = audit_targets(meta_model, plain)
    found = {
        kind: memory_terms(meta_model, targets, dataclasses.replace(plain, quantization=kind), 99) for kind in ("nf4", *OTHERS)
    }
    base = {kind: next(iter(terms.values())) for kind, terms in found.items()}
    assert base["none"] == 2 * base["int8"] and base["nf4"] == base["fp4"] == pytest.approx(base["int8"] * 4.127 / 8)
    assert found["none"]["one weight dequantized"] == 0 < found["int8"]["one weight dequantized"]
    assert [next(iter(terms)) for terms in found.values()][1:] == ["base in FP4", "base in INT8", "base without quantization"]


def test_none_loads_no_quantization():
    assert quantization_of("none") is None and quantization_of("fp4").bnb_4bit_quant_type == "fp4"
