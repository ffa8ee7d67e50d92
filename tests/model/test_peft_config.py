"""--peft-config: a peft.LoraConfig from a file, on the fast path where the operator can do it."""

import copy
import dataclasses
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import families
from qlora.cli import main as any_command
from qlora.cli import train as command_line
from qlora.commands.adapter import load_adapted, open_adapter
from qlora.config import TrainConfig
from qlora.data.batch import collate
from qlora.data.template import encode_prompt
from qlora.errors import ExitCode, UserError
from qlora.eval.generate import generate_all, sample_responses
from qlora.model.load import load_meta_model
from qlora.model.lora import checked_targets, with_init_adapter
from qlora.model.peft_config import with_peft_config
from qlora.report import record
from qlora.report.model_card import model_card
from qlora.speed import layers, lora_linear
from qlora.speed.decode import adapts_by_row
from tests.helpers import CPU, SHORT_DATA, gradients, loss_and_gradients, prepared, relative_error, wake_adapters, with_method

DORA = {"peft_type": "LORA", "use_dora": True, "r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "down_proj"]}
PATTERNS = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["qkv_proj", "down_proj", "o_proj"],
            "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"qkv_proj": 32}, "layers_to_transform": [1]}  # fmt: skip


METHODS = {
    "patterns": (PATTERNS, "nf4"),
    "DoRA": (DORA, "nf4"),
    "IA3": ({"peft_type": "IA3", "target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, "nf4"),
    "VERA": ({"peft_type": "VERA", "r": 16}, "nf4"),
    "OFT": ({"peft_type": "OFT", "oft_block_size": 16}, "fp4"),
    "LOHA": ({"peft_type": "LOHA", "r": 2, "alpha": 4}, "none"),
    "LOKR": ({"peft_type": "LOKR", "r": 2, "alpha": 4}, "none"),
}  # name -> file, quantization


@pytest.fixture
def file(tmp_path):
    def write(**values):
        path = tmp_path / "lora.json"
        path.write_text(json.dumps(values))
        return path

    return write


def awake(config, path):
    """The tiny model with the adapter of a file and B other than 0, in training mode; its configuration, and targets."""
    model, config, targets = with_method(config, path)
    wake_adapters(model)
    return model, config, targets


@pytest.mark.parametrize(("values", "fast"), [(PATTERNS, 3), (DORA, 0)], ids=["patterns", "DoRA"])
def test_a_step_is_that_of_peft(config, samples, file, values, fast):
    plain, trained, targets = awake(config, file(**values))
    expected = loss_and_gradients(plain, trained, collate(samples[:3]))
    model = prepared(copy.deepcopy(plain), trained, "full")
    assert sum(isinstance(module, lora_linear.LoRALinear) for module in model.modules()) == fast
    found = loss_and_gradients(model, trained, collate(samples[:3]))
    assert found[0] == pytest.approx(expected[0], rel=1e-3) and relative_error(found[1], expected[1]) < 0.03
    assert sum(target.adapter_parameters for target in targets) == sum(each.numel() for each in expected[1].values())
    if values is PATTERNS:
        ranks = {name.split(".")[-4]: each.shape[0] for name, each in expected[1].items() if "lora_A" in name}
        assert ranks == {"qkv_proj": 4, "down_proj": 2, "o_proj": 4} and all(".layers.1." in name for name in expected[1])
    assert adapts_by_row(model) == (values is PATTERNS)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_resumes_bit_for_bit_is_used_and_peft_loads_its_adapter(tiny, tmp_path, capsys, file, name):
    values, quantization = METHODS[name]
    flags = ["--model", "tiny-random", "--peft-config", str(file(**values)), "--max-length", "300", *SHORT_DATA]
    flags += ["--max-steps", "4", "--save-steps", "2", "--save-total-limit", "9", "--learning-rate", "1e-2", "--explain"]
    flags += ["--quantization", quantization]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    assert command_line([*flags, "--output-dir", str(run)]) == 0
    half = run / "checkpoints" / "step-000002"
    assert command_line([*flags, "--output-dir", str(resumed), "--resume", str(half)]) == 0
    ours, theirs = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (run, resumed))
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())
    before = load_file(half / "adapter_model.safetensors")
    fixed = {key for key, tensor in ours.items() if torch.equal(tensor, before[key])}
    assert len(fixed) == (2 if name == "VERA" else 0)  # its projections are random and stay
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.bfloat16)
    assert all(torch.equal(peft.get_peft_model_state_dict(loaded)[key], tensor) for key, tensor in ours.items())
    data = ["--eval-file", SHORT_DATA[3], "--limit", "2", "--device", "cpu"]
    assert any_command(["evaluate", str(run), *data, "--max-new-tokens", "2"]) == 0
    assert any_command(["generate", str(run), "--prompt", "say one", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert any_command(["merge", str(run), *data, "--into", "recommended", "--output-dir", str(tmp_path / "merged")]) == 0
    card = model_card(record.read(run))
    assert f"{'LoRA' if name == 'patterns' else name} in fp32" in card and "vLLM takes no such adapter" in card
    assert json.dumps(values | {"peft_type": values.get("peft_type", "LORA")}) in card
    assert ("Rank, alpha, dropout" in card) == (name in ("patterns", "DoRA"))
    shown = capsys.readouterr().out
    assert "vLLM serves" in shown
    changed = ["--peft-config", str(file(**values | {"target_modules": ["down_proj"]}))]
    assert command_line([*flags, *changed, "--max-steps", "6", "--override", "max_steps", "--output-dir", str(run)]) == 2
    assert "peft_config" in capsys.readouterr().err


def test_a_name_that_is_a_pattern_or_all_linear_is_peft_s_own(config, file):
    meta_model = load_meta_model(config.model, config)
    for names, count in ((r".*layers\.0\.mlp\..*_proj", 2), ("all-linear", 8), (None, 8)):
        trained = with_peft_config(dataclasses.replace(config, peft_config=file(r=2, target_modules=names)))
        targets = checked_targets(meta_model, trained, lambda _: None)
        assert sum(len(target.layers) for target in targets) == count
    excluding = with_peft_config(dataclasses.replace(config, peft_config=file(r=2, exclude_modules=["o_proj", "qkv_proj"])))
    names = {target.name for target in checked_targets(meta_model, excluding, lambda _: None)}
    assert names == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "POLY"}, "is of PEFT's kind POLY. Supported are LORA, IA3, VERA, OFT, LOHA, LOKR"),
        ({"peft_type": "PROMPT_TUNING"}, "has num_virtual_tokens None. It must be a number of 1 or more"),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 0}, "has num_virtual_tokens 0. It must be"),
        ({"peft_type": "LOHA"}, "PEFT has no LOHA for quantized layers. Pass --quantization none"),
        ({"peft_type": "IA3"}, "PEFT refuses it for Phi3ForCausalLM: Please specify `target_modules`"),
        ({"peft_type": "IA3", "r": 3}, "sets r, which PEFT's IA3 does not have"),
        ({"rank": 3}, "sets rank, which PEFT's LORA does not have"),
        ({"modules_to_save": ["down_proj"], "target_modules": ["o_proj"]}, "down_proj, which is quantized"),
        ({"modules_to_save": ["lm_hat"]}, "modules_to_save lm_hat matches no module of Phi3ForCausalLM"),
        ({"peft_type": "IA3", "modules_to_save": ["lm_head"]}, "modules_to_save, which is supported with LORA only"),
        ({"trainable_token_indices": [384]}, "has 384 in trainable_token_indices. It must be a row of the embedding's 384"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "has -1 in trainable_token_indices"),
        ({"bias": "all"}, "sets bias, which this loop cannot train"),
        ({"init_lora_weights": "pissa"}, "was begun with init_lora_weights 'pissa', which changes the base"),
        ({"r": 0}, "cannot be read"),
        ({"target_modules": ["q_proj"]}, "q_proj matches no linear layer"),
        ({"target_modules": ".*nothing"}, "PEFT refuses it for Phi3ForCausalLM"),
        ({"target_modules": ".*lm_head"}, "adapts lm_head, which cannot have an adapter here"),
        ({"megatron_config": {"a": 1}}, "LoRA of a kind that is not known here: it sets megatron_config"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(config, file, values, words):
    with pytest.raises(UserError) as refused:
        trained = with_peft_config(dataclasses.replace(config, peft_config=file(**values)))
        checked_targets(load_meta_model(config.model, config), trained, lambda _: None)
    assert words in str(refused.value) and refused.value.exit_code == ExitCode.CONFIGURATION


def test_it_excludes_the_flags_that_it_replaces(tmp_path, file):
    path = file(r=2)
    for flags, words in (
        ({"lora_r": 8}, "--lora-r 8 cannot be used: it must be left out with --peft-config"),
        ({"init_adapter": tmp_path}, "--init-adapter"),
    ):
        with pytest.raises(UserError, match=words):
            TrainConfig(peft_config=path, **flags).check()
    with pytest.raises(UserError, match=r"--peft-config .* it must be a file"):
        TrainConfig(peft_config=tmp_path / "no.json").check()
    with pytest.raises(UserError, match="--lora-plus-ratio is for LoRA"):
        with_peft_config(TrainConfig(peft_config=file(peft_type="VERA"), lora_plus_ratio=4.0))
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        with_peft_config(TrainConfig(peft_config=path))


def test_dora_beside_8_bits_is_refused(config, file):
    with pytest.raises(UserError, match="cannot dequantize the weights in 8 bits that DoRA needs") as refused:
        with_peft_config(dataclasses.replace(config, quantization="int8", peft_config=file(**DORA)))
    assert refused.value.exit_code == ExitCode.CONFIGURATION


def test_another_method_is_no_start_for_lora(tmp_path, config):
    values = {"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["o_proj"], "feedforward_modules": []}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="is not a plain LoRA adapter: it is IA3") as refused:
        with_init_adapter(dataclasses.replace(config, init_adapter=tmp_path))
    assert refused.value.exit_code == ExitCode.CONFIGURATION


def test_dora_is_never_compiled(config, model, file):
    config = dataclasses.replace(config, peft_config=file(**DORA))
    with pytest.raises(UserError, match="--compile layers cannot be used: layers run as they are written with DoRA"):
        layers.choose_layers(dataclasses.replace(config, compile="layers"), model, [], 100, CPU)


WHOLE = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "down_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}


ROWS = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "down_proj"],
        "trainable_token_indices": {"embed_tokens": [100, 101, 102], "lm_head": [101]}}  # fmt: skip


@pytest.mark.parametrize("values", [WHOLE, ROWS], ids=["whole", "rows"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_embeddings_and_heads_have_the_gradients_of_peft(config, samples, file, policy, values):
    model, trained, targets = awake(config, file(**values))
    batch = collate(samples[:1])  # one row, so that PEFT's mean over its tokens is ours
    batch.input_ids[0, 3:6] = torch.tensor([100, 101, 102])
    labels = batch.labels.clone()
    labels[:, 0] = -100  # which nothing predicts
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=batch.input_ids, labels=labels, use_cache=False).loss
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    loss, found = loss_and_gradients(prepared(model, trained, policy), trained, batch)
    ends = [name for name in wanted if "embed_tokens" in name or "lm_head" in name]
    assert len(ends) == 2 and all(found[name].dtype == torch.float32 and found[name].any() for name in ends)
    assert loss == pytest.approx(expected.item(), rel=2e-3) and relative_error(found, wanted) < 0.03
    names = {target.name: target.adapter_parameters for target in targets}
    sizes = {name: found[name].numel() for name in ends}
    kind = "whole" if values is WHOLE else "rows"
    assert {names[f"embed_tokens ({kind})"], names[f"lm_head ({kind})"]} == set(sizes.values())
    assert sum(names.values()) == sum(gradient.numel() for gradient in found.values())


DELTA = "token_adapter.trainable_tokens_delta"
ENDS = {
    "whole": ("Phi3", {"modules_to_save": ["lm_head", "model.norm"]}, {"lm_head.weight", "model.norm.weight"}),
    "whole, tied": ("Gemma", {"modules_to_save": ["lm_head", "model.norm"]}, {"lm_head.weight", "model.norm.weight"}),
    "rows": ("Phi3", ROWS, {f"lm_head.{DELTA}", f"model.embed_tokens.{DELTA}"}),
    "rows, tied": ("Gemma", {"trainable_token_indices": [47, 111]}, {f"model.embed_tokens.{DELTA}"}),
}  # name -> family, settings, what the adapter has beside LoRA


@pytest.mark.parametrize("name", ENDS)
def test_a_run_with_embeddings_or_heads_resumes_and_is_used(tiny, tmp_path, capsys, file, name):
    family, changes, ends = ENDS[name]
    families.write_model(family, tmp_path / "model")
    values = {"r": 4, "lora_alpha": 8} | changes | {"target_modules": ["down_proj", "o_proj"]}
    flags = ["--model", str(tmp_path / "model"), "--peft-config", str(file(**values)), *SHORT_DATA, "--explain"]
    flags += ["--max-length", "300", "--max-steps", "4", "--save-steps", "2", "--save-total-limit", "9"]
    flags += ["--learning-rate", "1e-2"]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    assert command_line([*flags, "--output-dir", str(run)]) == 0
    half = run / "checkpoints" / "step-000002"
    assert command_line([*flags, "--output-dir", str(resumed), "--resume", str(half)]) == 0
    folders = (run / "adapter", resumed / "adapter", half)
    ours, theirs, before = (load_file(each / "adapter_model.safetensors") for each in folders)
    assert {key for key in ours if "lora_" not in key} == {f"base_model.model.{end}" for end in ends}
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert not any(torch.equal(tensor, before[key]) for key, tensor in ours.items())
    with warnings.catch_warnings(action="ignore"):  # of tied weights
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32)
    state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert all(torch.equal(state[key], tensor) for key, tensor in ours.items())
    data = ["--eval-file", SHORT_DATA[3], "--device", "cpu"]
    report = tmp_path / "evaluation.json"
    assert any_command(["evaluate", str(run), *data, "--max-new-tokens", "2", "--json", str(report)]) == 0
    assert any_command(["generate", str(run), "--prompt", "say one", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert any_command(["merge", str(run), *data, "--into", "recommended", "--output-dir", str(tmp_path / "merged")]) == 0
    shown = capsys.readouterr().out
    assert ("lm_head (whole)" if "whole" in name else "embed_tokens (rows)") in shown
    assert ("ties its head to its embedding" in shown) == (name == "whole, tied")
    losses = json.loads(report.read_text())["metrics"]["loss"]
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    in_training = [row["eval_loss"] for row in rows if row["event"] == "eval"]
    assert losses["base"]["value"] == pytest.approx(in_training[0], rel=1e-3)
    assert losses["adapter"]["value"] == pytest.approx(in_training[-1], rel=1e-3) and in_training[-1] < in_training[0]
    assert "vLLM takes no such adapter" in model_card(record.read(run))


def test_the_base_s_sample_answers_are_those_of_the_base(config, template, examples, file):
    """Also where the head and the embedding are trained, so that no row of a batch can do without them."""
    model, _, _ = awake(config, file(**WHOLE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    assert not adapts_by_row(model)
    samples = sample_responses(model.eval(), examples[:2], template)
    prompts = [encode_prompt(example.prompt, template) for example in examples[:2]]
    with model.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
        expected = generate_all(model, prompts, template, 8, batch_size=2)
    assert [sample.base for sample in samples] == expected and all(sample.base != sample.tuned for sample in samples)


@pytest.mark.parametrize("family", ["Phi3", "StableLm"])  # StableLM has LayerNorm, which a CPU does not compute in two dtypes
def test_small_updates_of_whole_modules_are_not_rounded_away(tiny, tmp_path, capsys, file, family):
    families.write_model(family, tmp_path / "model")
    values = {"r": 2, "target_modules": ["down_proj"], "modules_to_save": ["embed_tokens", "norm", "layernorm"]}
    flags = ["--model", str(tmp_path / "model"), "--peft-config", str(file(**values)), *SHORT_DATA, "--max-length", "300"]
    run = tmp_path / "run"
    assert command_line([*flags, "--max-steps", "4", "--learning-rate", "5e-4", "--output-dir", str(run)]) == 0
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    model = load_adapted(open_adapter(run, device="cpu"))
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert saved.keys() == state.keys() and all(torch.equal(state[key], tensor) for key, tensor in saved.items())
    norm = saved["base_model.model.model.norm.weight"]
    assert not torch.equal(norm, norm.to(torch.bfloat16).float())
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    in_training = [row["eval_loss"] for row in rows if row["event"] == "eval"][-1]
    report = tmp_path / "evaluation.json"
    data = ["--eval-file", SHORT_DATA[3], "--device", "cpu", "--max-new-tokens", "2", "--json", str(report)]
    assert any_command(["evaluate", str(run), *data]) == 0
    assert json.loads(report.read_text())["metrics"]["loss"]["adapter"]["value"] == pytest.approx(in_training, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("GPTJ", {"trainable_token_indices": {"wte": [5], "lm_head": [5]}}, "rows of a head with a bias"),
        ("Gemma", {"trainable_token_indices": {"lm_head": [5]}}, "head that is one weight with the embedding"),
        (
            "Gemma",
            {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [6]}},
            "head that is one weight with the embedding",
        ),
        ("Llama", {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, "mlp.gate_proj, which is quantized"),
        ("Llama", {"trainable_token_indices": {"embed_tokens": []}}, "an empty list in trainable_token_indices"),
        ("Llama", {"trainable_token_indices": [5, 5]}, "names a row twice"),
        ("Llama", {"trainable_token_indices": {"o_proj": [5]}, "target_modules": ["q_proj"]}, "Only rows of the embedding"),
    ],
)
def test_rows_and_modules_that_cannot_be_trained_are_refused(config, tiny, tmp_path, file, family, values, words):
    families.write_model(family, tmp_path / "model")
    asked = dataclasses.replace(config, model=str(tmp_path / "model"), peft_config=file(**{"r": 2} | values))
    with pytest.raises(UserError) as refused:
        checked_targets(load_meta_model(asked.model, asked), with_peft_config(asked), lambda _: None)
    assert words in str(refused.value) and refused.value.exit_code == ExitCode.CONFIGURATION
