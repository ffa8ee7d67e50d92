"""Families other than Phi-3: what each can train, and what is refused before its weights are loaded."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora.cli import main as any_command
from qlora.cli import train as command_line
from qlora.config import TrainConfig
from qlora.errors import ExitCode, UserError
from qlora.eval import generate
from qlora.model.coverage import quantized_layers, uncovered
from qlora.model.families import attention_use
from qlora.model.load import load_meta_model, load_nf4_model
from qlora.model.lora import add_lora, checked_targets
from qlora.model.supported import check_model
from qlora.model.targets import audit_targets
from qlora.speed.memory import memory_terms
from tests.helpers import CPU

SIZES = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MOE = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2}
GPT = {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 4}
BY_POSITION = {  # their language models pass input_ids to the decoder by position
    "GPTNeoX": SIZES | {"intermediate_size": 128},
    "GPTJ": GPT | {"rotary_dim": 8},
    "Bloom": {"vocab_size": 384, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": 384, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
}
EXPERTS = {
    "Mixtral": MOE | {"num_local_experts": 4},
    "Qwen2Moe": MOE | {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "Qwen3Moe": MOE | {"num_experts": 4, "moe_intermediate_size": 64, "mlp_only_layers": [0], "head_dim": 16},
    "Phimoe": MOE | {"num_local_experts": 4},
    "DeepseekV3": MOE | {"n_routed_experts": 8, "moe_intermediate_size": 64, "first_k_dense_replace": 1, "q_lora_rank": 16,
                         "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2,
                         "topk_group": 1, "num_experts_per_tok": 2},
    "GptOss": MOE | {"num_local_experts": 4, "head_dim": 16},
    "Afmoe": MOE | {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16},
    "LongcatFlash": MOE | {"num_layers": 2, "n_routed_experts": 4, "expert_ffn_hidden_size": 64, "ffn_hidden_size": 64,
                           "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                           "v_head_dim": 8},
}  # fmt: skip


def on_meta(name: str, **settings):
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**settings)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Save a random model and the tiny tokenizer; flags of a short run on it."""

    def save(name: str, **settings) -> list[str]:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**settings)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        rows = [{"prompt": f"say {word}", "completion": word} for word in ("one", "three", "seven")]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--model", str(tmp_path / "model"), "--train-file", str(tmp_path / "rows.jsonl"), "--max-length", "128"]
        return [*flags, "--max-steps", "2", "--lora-r", "2", "--output-dir", str(tmp_path / "run")]

    return save


@pytest.fixture(autouse=True)
def no_answers(monkeypatch):
    monkeypatch.setattr(generate, "sample_responses", lambda *_: [])


# -- what layers ask of attention --------------------------------------------------------------------------------------

KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


@pytest.mark.parametrize(
    ("name", "settings", "use"),
    [
        ("Llama", MOE, (None, False, False, True)),
        ("Llama", MOE | {"sliding_window": 8}, (None, False, False, True)),  # which no layer of it reads
        ("Mistral", MOE | {"sliding_window": 8}, (None, True, False, True)),
        ("Qwen3", MOE, (None, False, False, True)),
        ("Gemma3Text", MOE | KINDS, (None, True, False, True)),
        ("Gemma2", MOE | KINDS, (None, True, True, True)),
        ("StableLm", MOE, (None, False, False, False)),
        ("Bert", SIZES, ("its attention is not causal",)),
        ("GptOss", MOE | {"num_local_experts": 4, "head_dim": 16}, ("its attention has s_aux",)),
        ("DiffLlama", MOE, ("its 2 layers call the function of transformers' AttentionInterface 4 times",)),
        ("CpmAnt", {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "dim_head": 16,
                    "dim_ff": 64}, ("its 0 layers call the function of transformers' AttentionInterface 0 times",)),
        ("Mpt", BY_POSITION["Mpt"], ("its 2 layers call the function of transformers' AttentionInterface 0 times",)),
        ("Llama4Text", MOE | {"num_local_experts": 2}, ("its decoder does not run with masks that are given (KeyError('ch",)),
        ("OPT", {"vocab_size": 384, "hidden_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 2,
                 "num_attention_heads": 4}, ("its decoder does not run with masks that are given (ValueError(",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_model_is_judged_by_what_its_layers_ask_of_attention(name, settings, use):
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**settings)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").train()
    before = config.to_dict()
    found = attention_use(model)
    if use[0] is None:
        assert found == use
    else:
        assert found.problem is not None and found.problem.startswith(use[0])
    assert config.to_dict() == before and config._attn_implementation == "eager" and model.training


def test_a_rotation_that_reads_lengths_is_judged_too_and_put_back():
    rotation = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for device in ("meta", "cpu"):
        with torch.device(device):
            config = transformers.LlamaConfig(**MOE, rope_parameters=rotation)
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        assert attention_use(model).problem is None and model.model.rotary_emb.rope_type == "dynamic"


# -- decoders that are called by position ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_POSITION)
def test_families_that_pass_ids_by_position_train(saved, tmp_path, name):
    assert command_line(saved(name, **BY_POSITION[name])) == 0
    moved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for key, tensor in moved.items() if "lora_B" in key) and len(moved) >= 16


def test_a_model_without_sdpa_is_evaluated_with_the_masks_of_training(saved, tmp_path):
    """Gemma 2's scores are capped, so that eager is what a CPU has."""
    flags = saved("Gemma2", **MOE, **KINDS, head_dim=16)
    assert command_line(flags) == 0
    rows = flags[flags.index("--train-file") + 1]
    assert (
        any_command(["evaluate", str(tmp_path / "run"), "--eval-file", rows, "--max-new-tokens", "2", "--device", "cpu"]) == 0
    )


# -- what is not in NF4 ------------------------------------------------------------------------------------------------


def test_linear_layers_of_another_class_are_refused_before_the_weights_are_loaded(saved, capsys):
    """transformers leaves FalconLinear in bf16, under the name of NF4."""
    flags = saved("Falcon", **SIZES)
    assert command_line(flags) == ExitCode.CONFIGURATION
    assert "It has FalconLinear, which this loop cannot adapt." in capsys.readouterr().err
    assert command_line([*flags, "--target-modules", "query_key_value"]) == ExitCode.CONFIGURATION
    assert "FalconLinear" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"No layer of .* is in NF4 after loading") as refused:
        load_nf4_model(flags[1], TrainConfig(), "eager", CPU)
    assert refused.value.exit_code == ExitCode.CONFIGURATION


def test_an_audited_layer_that_is_not_in_nf4_after_loading_is_refused(config):
    model = load_nf4_model(config.model, config, "sdpa", CPU)
    targets = audit_targets(model, config)
    layer = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    with pytest.raises(UserError, match=r"1 of 8 layers .* not quantized after loading, model.layers.1.mlp.down_proj first"):
        add_lora(model, config, targets, "base")


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPTNeoX", "Mpt"])
def test_what_will_be_in_nf4_is_what_is_in_nf4(saved, name):
    flags = saved(name, **(BY_POSITION.get(name) or MOE | ({"head_dim": 16} if name == "Gemma2" else {})))
    meta_model = load_meta_model(flags[1], TrainConfig(max_length=128))
    loaded = load_nf4_model(flags[1], TrainConfig(), "eager", CPU)
    assert (
        quantized_layers(meta_model).keys() == quantized_layers(loaded).keys() != set() and uncovered(meta_model).share == 0.0
    )


def test_a_head_in_nf4_is_refused_before_the_weights_are_loaded():
    meta_model = on_meta("Llama", **MOE)
    nf4 = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    meta_model.config.quantization_config = {**nf4, "llm_int8_skip_modules": ["lm_head"]}
    assert checked_targets(meta_model, TrainConfig(), lambda _: None)
    meta_model.config.quantization_config["llm_int8_skip_modules"] = ["vision_tower"]
    with pytest.raises(UserError, match=r"The head of LlamaForCausalLM is quantized too .* Name the model in bf16") as refused:
        checked_targets(meta_model, TrainConfig(), lambda _: None)
    assert refused.value.exit_code == ExitCode.CONFIGURATION


def test_layers_that_a_checkpoint_left_out_of_nf4_are_named_even_where_they_are_few():
    meta_model, said = on_meta("Llama", **{**MOE, "num_hidden_layers": 12}), []
    nf4 = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    meta_model.config.quantization_config = {**nf4, "llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp"]}
    targets = checked_targets(meta_model, TrainConfig(), said.append)
    assert {len(target.layers) for target in targets} == {11, 12} and len(said) == 1
    assert said[0].startswith("LlamaForCausalLM: ") and "neither in NF4 nor adapted: model.layers.N.mlp" in said[0]


def test_gpt_2_s_conv1d_is_in_nf4_but_cannot_be_adapted(tmp_path, capsys):
    config = transformers.GPT2Config(vocab_size=384, n_embd=64, n_layer=2, n_head=4)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert len(quantized_layers(model)) == 8 and uncovered(model).parameters == 0
    with pytest.raises(UserError, match=r"It has Conv1D, which this loop cannot adapt"):
        audit_targets(model, TrainConfig())


# -- mixtures of experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_stay_in_bf16_are_refused_by_default(name):
    model = on_meta(name, **EXPERTS[name])
    with pytest.raises(
        UserError, match=r"% of the weights \([\d,]+ parameters\).*neither in NF4 nor adapted: .*expert"
    ) as refused:
        checked_targets(model, TrainConfig(), lambda _: None)
    assert refused.value.exit_code == ExitCode.CONFIGURATION
    names = str(refused.value).rpartition("--target-modules ")[2].removesuffix(".").split()
    said: list[str] = []
    targets = checked_targets(model, TrainConfig(target_modules=tuple(names)), said.append)  # what it advises is accepted
    assert said and said[0].startswith("Warning: ") and "They stay in bf16, frozen." in said[0]
    layers = [layer for target in targets for layer in target.layers]
    assert layers and not any("rout" in layer or layer.endswith((".gate", "expert_gate")) for layer in layers)


def test_the_share_counts_weights_but_no_embeddings_head_and_norms():
    model = on_meta("Mixtral", **EXPERTS["Mixtral"])
    rest = uncovered(model)
    experts, router = 2 * 4 * 3 * 64 * 128, 2 * 4 * 64
    attention = 2 * (2 * 64 * 64 + 2 * 64 * 32)
    assert rest.parameters == experts + router and rest.share == pytest.approx(
        (experts + router) / (experts + router + attention)
    )
    assert rest.modules == ("model.layers.N.mlp.experts", "model.layers.N.mlp.gate")
    assert uncovered(on_meta("Phi3", **MOE)).parameters == 0


@pytest.mark.parametrize(("name", "router"), [("Phimoe", "router"), ("Afmoe", "gate"), ("Qwen2Moe", "shared_expert_gate")])
def test_a_router_is_never_a_target(name, router):
    model = on_meta(name, **EXPERTS[name])
    with pytest.raises(UserError, match=f"--target-modules {router} matches .* a router of experts, which is never adapted"):
        audit_targets(model, TrainConfig(target_modules=(router,)))


def test_what_peft_refuses_is_refused_before_the_weights_are_loaded():
    model = on_meta("Qwen3Moe", **EXPERTS["Qwen3Moe"])
    with pytest.raises(UserError, match=r"PEFT cannot adapt gate_proj of Qwen3MoeForCausalLM: .* Name other layers") as refused:
        checked_targets(model, TrainConfig(target_modules=("gate_proj",)), lambda _: None)
    assert refused.value.exit_code == ExitCode.CONFIGURATION
    settings = SIZES | {
        "intermediate_size": 128,
        "num_key_value_heads": 2,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
    }
    with pytest.raises(UserError, match=r"PEFT cannot adapt .*out_proj.* incompatible with Mamba-based models"):
        checked_targets(on_meta("FalconH1", **settings), TrainConfig(), lambda _: None)


def test_a_mixture_trains_its_attention_where_it_is_asked_to(saved, capsys, tmp_path):
    flags = saved("Mixtral", **EXPERTS["Mixtral"], output_router_logits=True)
    assert command_line(flags) == ExitCode.CONFIGURATION and not (tmp_path / "run" / "checkpoints").exists()
    assert "88.9 % of the weights" in capsys.readouterr().err
    assert command_line([*flags, "--target-modules", "q_proj", "v_proj"]) == 0
    out = capsys.readouterr().out
    assert "Warning: MixtralForCausalLM: " in out and "model.layers.N.mlp.experts" in out
    assert (
        any_command(["generate", str(tmp_path / "run"), "--prompt", "say one", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    )


def test_plan_has_a_row_for_experts_and_says_that_training_refuses_them(tmp_path, capsys):
    on_meta("Mixtral", **EXPERTS["Mixtral"]).config.save_pretrained(tmp_path)
    assert any_command(["plan", "--model", str(tmp_path), "--max-length", "128", "--gpu-memory", "24"]) == 0
    out = capsys.readouterr().out
    assert "neither in NF4 nor adapted" in " ".join(out.split()) and "--target-modules" in out
    with torch.device("meta"):
        big = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(), dtype=torch.bfloat16)
    terms = memory_terms(
        big, audit_targets(big, TrainConfig()), TrainConfig(compile="none", gradient_checkpointing="full"), 128
    )
    assert terms["weights not in NF4"] == pytest.approx(90, abs=1) and terms["embeddings, head, norms"] < 0.6
    dense = dataclasses.replace(TrainConfig(), compile="none", gradient_checkpointing="full")
    phi3 = on_meta("Phi3", **MOE)
    assert memory_terms(phi3, audit_targets(phi3, dense), dense, 128)["weights not in NF4"] == 0


SUPPORTED = "This loop trains decoder-only language models with attention, such as Phi-3"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (transformers.T5Config(architectures=["T5ForConditionalGeneration"]), "an encoder-decoder model (T5ForConditionalG"),
        (transformers.BertConfig(architectures=["BertForMaskedLM"]), "an encoder (BertForMaskedLM)"),
        (transformers.ViTConfig(architectures=["ViTForImageClassification"]), "no causal language model (ViTForImageClass"),
        (transformers.MambaConfig(architectures=["MambaForCausalLM"]), "a model without attention (MambaForCausalLM)"),
        (transformers.RwkvConfig(architectures=["RwkvForCausalLM"]), "a model without attention (RwkvForCausalLM)"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_is_no_decoder_with_attention_is_refused(tmp_path, capsys, settings, words):
    settings.save_pretrained(tmp_path)
    assert command_line(["--model", str(tmp_path), "--output-dir", str(tmp_path / "run")]) == ExitCode.CONFIGURATION
    told = capsys.readouterr().err
    assert f"{tmp_path} is {words}" in told and SUPPORTED in told


def test_hybrids_and_families_with_other_names_for_heads_are_not_refused():
    for settings in (transformers.GPT2Config(), transformers.FalconConfig(), transformers.BambaConfig(),
                     transformers.Gemma3Config(), transformers.DbrxConfig()):  # fmt: skip
        assert check_model("it", settings) is None


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
def test_other_quantizations_are_named(tiny, tmp_path, method):
    settings = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=f"is quantized already, by {method}. This loop reads models in bf16") as refused:
        load_meta_model(str(tmp_path), TrainConfig())
    assert refused.value.exit_code == ExitCode.CONFIGURATION


def test_weights_that_may_run_code_are_refused_and_never_read(tiny, tmp_path, config):
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a format that may run code.*use_safetensors=False") as refused:
        load_meta_model(str(tmp_path), TrainConfig())
    assert refused.value.exit_code == ExitCode.CONFIGURATION
    with pytest.raises(UserError, match="not a complete model"):
        load_nf4_model(str(tmp_path), config, "sdpa", CPU)
