"""NF4 loading, the audit of targets, adapters, and gradients against an fp32 model with the same weights."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora.cli import train as command_line
from qlora.config import TrainConfig
from qlora.data.batch import collate
from qlora.errors import ExitCode, UserError
from qlora.eval.generate import generate
from qlora.eval.loss import evaluate_loss
from qlora.model.load import (
    fingerprint,
    load_meta_model,
    load_nf4_model,
    load_tokenizer,
    prepare_inference,
    quantization_of,
)
from qlora.model.lora import add_lora, with_init_adapter
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.targets import audit_targets
from qlora.run import checkpoint
from qlora.run.files import write_folder
from qlora.speed import lora_linear
from tests.helpers import (
    CPU,
    SHORT_DATA,
    adapted_model,
    adapter_gradients,
    fp32_twin,
    prepared,
    relative_error,
    to_fp32,
    wake_adapters,
)

LLAMA_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def phi3_mini():
    """The exact shape of Phi-3-mini-4k, without memory."""
    with torch.device("meta"):
        return transformers.Phi3ForCausalLM(transformers.Phi3Config(sliding_window=2047))


# -- the audit -------------------------------------------------------------------------------------------------------


def test_targets_of_phi3_mini_are_its_fused_projections(phi3_mini):
    targets = audit_targets(phi3_mini, TrainConfig())
    assert [(t.name, len(t.layers), t.shapes) for t in targets] == [
        ("down_proj", 32, ((3072, 8192),)),
        ("gate_up_proj", 32, ((16384, 3072),)),
        ("o_proj", 32, ((3072, 3072),)),
        ("qkv_proj", 32, ((9216, 3072),)),
    ]
    assert sum(t.adapter_parameters for t in targets) == 50_331_648
    assert phi3_mini.num_parameters() == 3_821_079_552


def test_the_seven_llama_names_are_refused_not_silently_cut_to_two(phi3_mini):
    with pytest.raises(
        UserError, match=r"q_proj matches no linear layer of Phi3ForCausalLM. It has down_proj, gate_up_proj, o_proj, qkv_proj"
    ) as caught:
        audit_targets(phi3_mini, TrainConfig(target_modules=LLAMA_NAMES))
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    two = audit_targets(phi3_mini, TrainConfig(target_modules=("o_proj", "down_proj")))
    assert sum(t.adapter_parameters for t in two) == 17_825_792  # what PEFT would have trained


@pytest.mark.parametrize("name", ["lm_head", "proj", "embed_tokens", "layers"])
def test_head_parts_of_names_and_other_modules_are_no_targets(phi3_mini, name):
    with pytest.raises(UserError, match=f"--target-modules {name} matches no linear layer"):
        audit_targets(phi3_mini, TrainConfig(target_modules=(name,)))


def test_a_whole_name_matches_one_layer(phi3_mini):
    (target,) = audit_targets(phi3_mini, TrainConfig(target_modules=("model.layers.3.mlp.down_proj",)))
    assert target.layers == ("model.layers.3.mlp.down_proj",)


def test_a_name_given_twice_or_within_another_counts_once(phi3_mini):
    once = audit_targets(phi3_mini, TrainConfig(target_modules=("qkv_proj", "o_proj")))
    again = audit_targets(phi3_mini, TrainConfig(target_modules=("qkv_proj", "qkv_proj", "self_attn.qkv_proj", "o_proj")))
    assert again == once


def test_a_vision_tower_gets_no_adapter():
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=small | {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 400},
        vision_config=small | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    targets = audit_targets(model, TrainConfig())
    assert sum(len(target.layers) for target in targets) == 7
    model = add_lora(model, TrainConfig(), targets, "org/model")
    adapted = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert len(adapted) == 7 and not any("vision" in name for name in adapted)


def test_a_model_without_linear_layers_is_refused():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2))
    with pytest.raises(UserError, match=r"GPT2LMHeadModel has no torch\.nn\.Linear layer"):
        audit_targets(model, TrainConfig())


SIZES = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 2048}  # fmt: skip


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Gemma", "Gemma2"])
def test_other_families_train_from_the_command_line_with_their_targets_derived(tmp_path, tokenizer, monkeypatch, capsys, name):
    kind = getattr(transformers, f"{name}Config")(**SIZES, **({"head_dim": 16} if "Gemma" in name else {}))
    transformers.AutoModelForCausalLM.from_config(kind).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "model", "--max-steps", "6", "--learning-rate", "1e-2", "--lora-r", "2", "--output-dir", "run"]
    assert command_line([*flags, *SHORT_DATA]) == 0
    saved = load_file("run/adapter/adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved} == set(LLAMA_NAMES)
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert ("Attention: eager (" if name == "Gemma2" else "Attention: sdpa (") in capsys.readouterr().out


# -- loading ---------------------------------------------------------------------------------------------------------


def test_linear_layers_are_nf4_twice_quantized_and_nothing_is_cast_up(model):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 8
    for layer in layers.values():
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.bfloat16 and not layer.support_avx512bf16_for_cpu
    base = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    assert {p.dtype for p in base.values()} == {torch.uint8, torch.bfloat16}
    assert not any(p.requires_grad for p in base.values())
    assert all(p.requires_grad and p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)


def test_the_meta_model_has_the_shape_and_true_count_of_the_model_and_no_memory(tiny, config, model):
    meta_model = load_meta_model(str(tiny), config)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    assert meta_model.num_parameters() == sum(p.numel() for p in whole.parameters())
    assert all(p.device.type == "meta" for p in meta_model.parameters())
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n) < 0.8 * meta_model.num_parameters()  # bytes
    assert audit_targets(meta_model, config) == audit_targets(load_nf4_model(str(tiny), config, "sdpa", CPU), config)


def test_a_checkpoint_that_is_quantized_already_is_the_same_model(tiny, config, tmp_path):
    base = load_nf4_model(str(tiny), config, "sdpa", CPU)
    base.save_pretrained(tmp_path)
    meta_model = load_meta_model(str(tmp_path), config)
    targets = audit_targets(meta_model, config)
    assert targets == audit_targets(load_meta_model(str(tiny), config), config)
    again = load_nf4_model(str(tmp_path), config, "sdpa", CPU)
    assert fingerprint(again) == fingerprint(base)
    assert len(lora_linear.install(add_lora(again, config, targets, str(tmp_path)))) == 8


@pytest.mark.parametrize("own", [torch.float16, torch.float32])
def test_a_checkpoint_that_is_quantized_already_computes_in_bf16(tiny, config, tmp_path, own):
    """fp16 is usual in such checkpoints, fp32 is bitsandbytes' default. Activations of 7e4 are infinite in fp16."""
    settings = quantization_of("nf4")
    settings.bnb_4bit_compute_dtype = own
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(tiny, quantization_config=settings, dtype=own, device_map={"": CPU}).save_pretrained(tmp_path)
    loaded = load(tmp_path, device_map={"": CPU})
    layers = [module for module in loaded.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {layer.weight.quant_state.dtype for layer in layers} == {own}
    model = load_nf4_model(str(tmp_path), config, "sdpa", CPU)
    model = add_lora(model, config, audit_targets(model, config), str(tmp_path))
    wake_adapters(model)
    (adapted,) = lora_linear.install(model)[:1]
    assert adapted.base_layer.compute_dtype == adapted.base_layer.weight.quant_state.dtype == torch.bfloat16
    x = 7e4 * torch.ones(2, adapted.in_features)  # [2, K]
    with torch.autocast("cpu", torch.bfloat16):
        trained, evaluated = adapted.train()(x), adapted.eval()(x)  # [2, N] each
    assert evaluated.isfinite().all() and (trained - evaluated).norm() < 0.01 * trained.norm()


def test_the_fingerprint_is_that_of_the_dtypes_that_are_stored(tiny, config, tmp_path):
    """Runs and adapters of versions that computed in the checkpoint's dtype know their base by it."""
    settings = quantization_of("nf4")
    settings.bnb_4bit_compute_dtype = torch.float16
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(tiny, quantization_config=settings, dtype=torch.float16, device_map={"": CPU}).save_pretrained(tmp_path)
    stored = load(tmp_path, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": CPU})
    model = load_nf4_model(str(tmp_path), config, "sdpa", CPU)
    assert fingerprint(model) == fingerprint(stored)
    assert model.model.layers[0].mlp.down_proj.weight.quant_state.dtype == torch.bfloat16  # put back


@pytest.mark.parametrize(("name", "value"), [("blocksize", 128), ("quant_type", "fp4")])
def test_nf4_in_another_layout_is_refused_after_loading(config, monkeypatch, name, value):
    original = bitsandbytes.functional.QuantState

    class Other(original):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            if self.state2 is not None:
                setattr(self, name, value)

    monkeypatch.setattr(bitsandbytes.functional, "QuantState", Other)
    with pytest.raises(UserError, match=r"holds a weight in .* Name the model in bf16") as refused:
        load_nf4_model(config.model, config, "sdpa", CPU)
    assert refused.value.exit_code == ExitCode.CONFIGURATION


@pytest.mark.parametrize(
    "change",
    [
        {"bnb_4bit_quant_type": "fp4"},
        {"load_in_4bit": False, "load_in_8bit": True},
        {"quant_method": "gptq"},
        {"bnb_4bit_quant_storage": "bfloat16"},
    ],
)
def test_a_checkpoint_that_is_quantized_otherwise_is_refused(tiny, config, tmp_path, change):
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    settings = json.loads(file.read_text())
    nf4 = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    file.write_text(json.dumps({**settings, "quantization_config": nf4}))
    load_meta_model(str(tmp_path / "model"), config)
    file.write_text(json.dumps({**settings, "quantization_config": {**nf4, "bnb_4bit_quant_storage": "uint8"}}))
    load_meta_model(str(tmp_path / "model"), config)
    file.write_text(json.dumps({**settings, "quantization_config": {**nf4, **change}}))
    with pytest.raises(UserError, match=r"is quantized already, (in|by|and stored) .*ame .*in bf16") as refused:
        load_meta_model(str(tmp_path / "model"), config)
    assert refused.value.exit_code == ExitCode.CONFIGURATION


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no-such-org/no-such-model", ["cannot be reached", "--model demo"]),
        ("./no-folder", ["no such folder"]),
    ],
)
def test_a_model_that_is_not_there_exits_7(source, words):
    with pytest.raises(UserError) as caught:
        load_meta_model(source, TrainConfig())
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert source in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_an_incomplete_folder_exits_7(tmp_path, tiny):
    with pytest.raises(UserError, match="not a complete model") as caught:
        load_meta_model(str(tmp_path), TrainConfig())
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    meta_model = load_meta_model(str(tmp_path), TrainConfig())
    with pytest.raises(UserError, match="not a complete model") as caught:
        load_tokenizer(str(tmp_path), meta_model, TrainConfig())
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    (tmp_path / "config.json").write_text('{"model_type": "phi3", "hidden_size": "wide"}')
    with pytest.raises(UserError, match="StrictDataclassFieldValidationError") as caught:
        load_meta_model(str(tmp_path), TrainConfig())
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny, tmp_path, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<more>"])
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 385 tokens, its model 384 embeddings") as caught:
        load_tokenizer(str(tmp_path), load_meta_model(str(tiny), TrainConfig()), TrainConfig())
    assert caught.value.exit_code == ExitCode.CONFIGURATION


def test_broken_weights_exit_7(tmp_path, tiny, config):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 2 tensors, model.layers.1.mlp.down_proj.weight first") as caught:
        load_nf4_model(str(tmp_path), config, "sdpa", CPU)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a complete model") as caught:
        load_nf4_model(str(tmp_path), config, "sdpa", CPU)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 1}, "6 tensors that its config.json does not know, model.layers.1"),
        ({"intermediate_size": 320}, "a weight of shape"),
        ({"hidden_size": 128}, "do not belong together"),
        ({"vocab_size": 400}, "do not belong together"),
    ],
)
def test_weights_of_another_configuration_exit_7(tmp_path, tiny, config, change, words):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | change))
    with pytest.raises(UserError, match=words) as caught:
        load_nf4_model(str(tmp_path), config, "sdpa", CPU)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def test_code_of_a_model_runs_only_when_asked(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}')
    (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    with pytest.raises(UserError, match="--trust-remote-code") as caught:
        load_meta_model(str(tmp_path), TrainConfig())
    assert caught.value.exit_code == ExitCode.ENVIRONMENT and not (tmp_path / "ran").exists()


def test_max_length_beyond_the_models_positions_is_refused(config):
    with pytest.raises(UserError, match="--max-length 4097 is more than the 4096 positions") as caught:
        load_meta_model(config.model, dataclasses.replace(config, max_length=4097))
    assert caught.value.exit_code == ExitCode.CONFIGURATION


def test_importing_downloads_nothing_where_the_package_kernels_is_installed(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(
        "def get_kernel(*a, **k):\n    print('DOWNLOAD', a)\n    raise SystemExit(9)\n"
    )
    code = (
        "import train_loop, sys; assert 'bitsandbytes.backends.cpu.ops' in sys.modules; import kernels; print(kernels.__file__)"
    )
    paths = (str(tmp_path), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "DOWNLOAD" not in done.stdout and str(tmp_path) in done.stdout  # and it is there again afterward
    assert "gemm_4bit_forward" not in done.stderr


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture
def reference(model, config, samples):
    """Model with adapters awake, a batch, and the fp32 twin's loss and gradients."""
    wake_adapters(model)
    batch = collate(samples[:4])
    twin = fp32_twin(model, config)
    loss, expected = adapter_gradients(twin, batch, read_head(twin), autocast=False)
    return model, batch, loss, expected


def test_gradients_in_fp32_compute_equal_those_of_the_fp32_twin(reference):
    model, batch, loss, expected = reference
    ours, found = adapter_gradients(to_fp32(model), batch, read_head(model), autocast=False)
    assert ours == pytest.approx(loss, rel=1e-5)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("disturbance", ["none", "evaluation", "generation"])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_gradients_in_bf16_are_close_also_after_evaluation_and_generation(reference, config, template, disturbance, policy):
    model, batch, loss, expected = reference
    head = read_head(model)
    prepared(model, config, policy)
    if disturbance == "evaluation":
        evaluate_loss(model, [batch], lambda hidden, batch: token_loss_sum(hidden, batch, head))
    elif disturbance == "generation":
        generate(model, [[5, 6, 7]], template, max_new_tokens=3)
    ours, found = adapter_gradients(model, batch, head, autocast=True)
    assert ours == pytest.approx(loss, rel=0.01)
    assert relative_error(found, expected) < 0.1


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16")
def test_the_trap_that_loading_disarms(reference):
    """With bitsandbytes' own setting one eval forward ruins every later gradient, under a loss that looks right."""
    model, batch, _, expected = reference
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    head = read_head(model.train())  # an eval forward
    _, found = adapter_gradients(model, batch, head, autocast=True)
    assert relative_error(found, expected) > 0.5


def test_a_fresh_adapter_changes_nothing(config, model):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, base)
    assert all((p == 0).all() for n, p in model.named_parameters() if "lora_B" in n)


def test_init_adapter_goes_on_from_a_saved_one_bit_for_bit(config, model, tmp_path):
    wake_adapters(model)
    write_folder(tmp_path / "adapter", dict(checkpoint.adapter_files(model)))
    again = adapted_model(dataclasses.replace(config, init_adapter=tmp_path / "adapter", lora_r=99, target_modules=("o_proj",)))
    for name, parameter in model.named_parameters():
        other = again.get_parameter(name)
        assert (
            torch.equal(parameter, other) and parameter.requires_grad == other.requires_grad and parameter.dtype == other.dtype
        )
    assert again.peft_config["default"].r == config.lora_r


def test_init_adapter_that_does_not_fit_is_refused(config, model, tmp_path):
    tmp_path = tmp_path / "adapter"
    write_folder(tmp_path, dict(checkpoint.adapter_files(model)))
    resumed = dataclasses.replace(config, init_adapter=tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(UserError, match="does not fit the model") as caught:
        adapted_model(resumed)
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read"):
        adapted_model(resumed)
    save_file(tensors, path)
    assert adapted_model(resumed)
    for harmless in (
        {"init_lora_weights": "gaussian"},
        {"modules_to_save": []},
        {"fan_in_fan_out": None},
        {"auto_mapping": {}},
    ):
        peft.LoraConfig(r=4, target_modules=["o_proj"], **harmless).save_pretrained(tmp_path)
        assert with_init_adapter(resumed).target_modules == ("o_proj",)
    for odd in (
        {"use_dora": True},
        {"bias": "all"},
        {"init_lora_weights": "olora"},
        {"layers_to_transform": [0]},
        {"rank_pattern": {"o": 2}},
    ):
        peft.LoraConfig(target_modules=["o_proj"], **odd).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=rf"(not a plain LoRA adapter.*it sets|begun with) {next(iter(odd))}"):
            adapted_model(resumed)
    for text in ("{", "[]", '{"peft_type": "NOVEL"}', "{}"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=r"cannot be read|not a plain LoRA adapter|Supported are LORA"):
            adapted_model(resumed)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (64, 48), (96, 64), (128, 33)])
def test_layers_of_any_shape_infer_on_a_cpu(inputs, outputs):
    """bitsandbytes repacks weights for AVX512-BF16, and fails for those whose shape its blocks do not divide."""
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)  # [N, K]
    layer = bitsandbytes.nn.Linear4bit(inputs, outputs, False, torch.bfloat16, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    layer = layer.to(CPU).eval()
    dense = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # [N, K]
    x = torch.randn(5, inputs, dtype=torch.bfloat16)  # [M, K]
    prepare_inference(torch.nn.Sequential(layer))
    with torch.no_grad():
        expected = x.float() @ dense.float().T  # [M, N]
        assert (layer(x).float() - expected).norm() < 0.01 * expected.norm()
