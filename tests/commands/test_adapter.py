"""A trained adapter and its base: found, checked, loaded; on the tiny model, nothing of which is trained here."""

import fcntl
import json
import shutil
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from qlora.cli import main
from qlora.commands import adapter
from qlora.commands.adapter import load_adapted, open_adapter
from qlora.config import TrainConfig
from qlora.errors import ExitCode, UserError
from qlora.model.loss import read_head
from qlora.model.third_party import peft
from qlora.run.files import MANIFEST
from qlora.run.folder import FINISHED, LOCK, is_going
from tests.helpers import adapted_model, of_peft, wake_adapters


@pytest.fixture
def bare(finished, tmp_path) -> Path:
    """The adapter as another program would leave it: no run, no manifest, no tokenizer."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(finished / "adapter" / name, folder)
    return folder


def change(folder: Path, **settings) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | settings))
    (folder / MANIFEST).unlink(missing_ok=True)


def refused(code: ExitCode, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        open_adapter(*arguments, **keywords)
    assert caught.value.exit_code == code and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_adapter_is_found_from_its_run_its_folder_its_checkpoint_and_alone(run, bare, tiny):
    plain = {"prompt_format": "plain"}
    found = [open_adapter(run), open_adapter(run / "adapter"), open_adapter(run / "checkpoints" / "step-000004")]
    found.append(open_adapter(bare, **plain))
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = []
    for each in found:
        assert each.source == str(tiny) and each.template.name == "plain" and each.device.type == "cpu"
        model = load_adapted(each)
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        logits.append(model(input_ids=ids).logits)
        with model.disable_adapter():
            assert not torch.equal(model(input_ids=ids).logits, logits[-1])
    assert all(torch.equal(other, logits[0]) for other in logits)
    assert [each.config.max_length for each in found] == [300, 300, 300, min(2048, adapter.positions_of(found[3]))]
    assert [each.config.eval_file for each in found] == [("held.jsonl",)] * 3 + [None]
    assert [each.run_info is None for each in found] == [False] * 3 + [True]


def test_a_run_from_before_there_were_other_bases_is_one_on_nf4(run, tmp_path):
    older = shutil.copytree(run, tmp_path / "older")
    info = json.loads((older / "run.json").read_text())
    assert info["config"].pop("quantization") == "nf4" and info["config"].pop("precision")
    (older / "run.json").write_text(json.dumps(info))
    opened = open_adapter(older)
    assert opened.config.quantization == "nf4" and opened.run_info is not None and load_adapted(opened)


def test_the_adapter_is_that_of_training_to_the_bit(run):
    config = TrainConfig(model=None, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    opened = open_adapter(run)
    trained = adapted_model(TrainConfig(**{**vars(config), "model": opened.source})).eval()
    wake_adapters(trained)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(trained(input_ids=ids).logits, load_adapted(opened)(input_ids=ids).logits)


@pytest.mark.parametrize("precision", ["int8", "none", "fp4"])
def test_other_precisions_are_near_and_not_the_same(run, precision):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    opened = open_adapter(run)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, nf4 = (load_adapted(opened, name)(input_ids=ids).logits.float() for name in (precision, "nf4"))
    error = ((ours - nf4).norm() / nf4.norm()).item()
    assert 1e-4 < error < 0.5


def test_what_is_no_adapter_is_told_apart(run, tiny, tmp_path):
    assert "does not exist" in refused(ExitCode.CHECKPOINT, tmp_path / "none")
    assert "is a file" in refused(ExitCode.CHECKPOINT, run / "run.json")
    assert "holds no adapter" in refused(ExitCode.CHECKPOINT, tmp_path)
    assert "whole model" in refused(ExitCode.CHECKPOINT, tiny)


def test_an_adapter_on_the_hub_is_to_be_downloaded_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hint = "on the hub, download it first: hf download some-one/My.lora_1 --local-dir My.lora_1"
    assert hint in refused(ExitCode.CHECKPOINT, Path("some-one/My.lora_1"))
    (tmp_path / "some-one").mkdir()  # so that it is a folder that was mistyped
    for path in ("some-one/My.lora_1", "a/b/c", "/a/b", "../a", "a"):
        assert "hf download" not in refused(ExitCode.CHECKPOINT, Path(path)), path


@pytest.mark.parametrize("command", ["evaluate", "generate", "merge", "report"])
def test_a_folder_that_is_not_there_ends_every_command_alike(command, tmp_path, capsys):
    assert main([command, str(tmp_path / "nowhere")]) == ExitCode.CHECKPOINT
    assert "nowhere" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_run_that_is_still_going_or_not_complete_is_refused_but_its_checkpoints_are_not(run):
    with (run / LOCK).open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for folder in (run, run / "adapter"):
            assert "still being trained" in refused(ExitCode.CHECKPOINT, folder)
        assert open_adapter(run / "checkpoints" / "step-000004").folder.name == "step-000004"
    assert not is_going(run)
    (run / FINISHED).unlink()
    assert "checkpoints/step-000004" in refused(ExitCode.CHECKPOINT, run)
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint" in refused(ExitCode.CHECKPOINT, run)
    assert open_adapter(run / "adapter").folder == run / "adapter"  # it is whole, and was named


def test_damage_is_found_before_anything_is_loaded(run, bare):
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "SHA-256 differs" in refused(ExitCode.CHECKPOINT, run)
    (run / "run.json").write_text("{")
    (run / "adapter" / MANIFEST).unlink()
    assert "run.json cannot be read" in refused(ExitCode.CHECKPOINT, run)
    (bare / "adapter_model.safetensors").write_bytes(b"short")
    assert "adapter_model.safetensors cannot be read" in refused(ExitCode.CHECKPOINT, bare, prompt_format="plain")
    (bare / "adapter_model.safetensors").rename(bare / "adapter_model.bin")
    assert "may run code" in refused(ExitCode.CHECKPOINT, bare, prompt_format="plain")
    (bare / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refused(ExitCode.CHECKPOINT, bare)


SETTINGS_DAMAGED = {
    "r": (None, "4", 0, -4, 4.5, [4], True, 10**30),
    "lora_alpha": (None, "8", [8], float("nan"), float("inf"), {}, 10**400),
    "lora_dropout": (None, "0", 1.5, -1),
    "target_modules": (5, {"a": 1}, [1], "[", "(*", [None]),
    "exclude_modules": (5, "[", [2]),
    "rank_pattern": (None, [], {"o_proj": "2"}, {"o_proj": 0}, {"[": 2}, "o_proj"),
    "alpha_pattern": (None, [], {"o_proj": [1]}, {"o_proj": float("nan")}),
    "modules_to_save": ("norm", {}, [1]),
    "layers_to_transform": ("1", {}, ["1"], 1.5),
    "layers_pattern": (1, {}),
    "trainable_token_indices": ("5", 5, {"embed_tokens": 5}, ["5"]),
    "bias": (None, "some", True),
    "lora_bias": (None, "yes", []),
    "use_dora": (None, "false", 1),
    "use_rslora": (None, {}),
    "fan_in_fan_out": ("x",),
    "init_lora_weights": (None, [True], {}),
    "base_model_name_or_path": (5, [], {}, 300 * "a"),
    "revision": (5, ["main"]),
    "task_type": (5, ["CAUSAL_LM"]),
    "peft_type": (None, 5, ["LORA"]),
    "no_such_setting": (True, 1, {"a": 1}),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in SETTINGS_DAMAGED for value in SETTINGS_DAMAGED[name]])
def test_damaged_settings_are_told_by_their_file(bare, name, value):
    change(bare, **{name: value})
    assert str(bare / "adapter_config.json") in refused(ExitCode.CHECKPOINT, bare, prompt_format="plain")


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"5", b'"LORA"', b"{}", b'{"peft_type": "LORA"}', b"\xff", b"[" * 10**5]
)
@pytest.mark.parametrize("name", ["adapter_config.json", "run.json", "state.json"])
def test_files_of_something_else_are_told_by_their_name(run, name, content):
    folder = run / "checkpoints" / "step-000004" if name == "state.json" else run / "adapter"
    path = (run if name == "run.json" else folder) / name
    path.write_bytes(content)
    (folder / MANIFEST).unlink()
    assert f"{path} cannot be read" in refused(ExitCode.CHECKPOINT, folder)


FACTS_DAMAGED = {
    "config": (None, [], "plain", {}, GONE := object()),
    "device": (None, 5, ["cpu"], GONE),
    "weights": (None, 5, {}, GONE),
    "config.model": (5, ["demo"], GONE),
    "config.revision": (5, GONE),
    "config.prompt_format": (None, "other", ["plain"], GONE),
    "config.loss_on": ("none", None, GONE),
    "config.max_length": (None, "300", 0, -1, 300.5, True, GONE),
    "config.on_long": ("cut", None, GONE),
    "config.allow_drop": ("yes", None, GONE),
    "config.train_file": (5, [], GONE),
    "config.eval_file": (5, [], GONE),
}


@pytest.mark.parametrize("of", ["run.json", "state.json"])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name in FACTS_DAMAGED for value in FACTS_DAMAGED[name]])
def test_damaged_facts_of_a_run_or_checkpoint_are_told_by_their_file(run, of, name, value):
    folder = run if of == "run.json" else run / "checkpoints" / "step-000004"
    run_info = json.loads((folder / of).read_bytes())
    owner = run_info["config"] if "." in name else run_info
    owner[name.rpartition(".")[2]] = value
    if value is GONE:
        del owner[name.rpartition(".")[2]]
    (folder / of).write_text(json.dumps(run_info))
    (folder / MANIFEST).unlink(missing_ok=True)
    assert str(folder / of) in refused(ExitCode.CHECKPOINT, folder)


def test_rank_shape_and_base_must_fit(run, bare, tmp_path, tiny):
    plain = {"prompt_format": "plain"}
    change(bare, r=8)
    text = refused(ExitCode.CONFIGURATION, bare, **plain)
    assert "with rank 8" in text and "of shape (4, " in text and "16 tensors differ" in text
    change(bare, r=4, target_modules=["qkv_proj"])
    assert "is of shape" in refused(ExitCode.CONFIGURATION, bare, **plain) and "not there" in refused(
        ExitCode.CONFIGURATION, bare, **plain
    )
    change(bare, target_modules=["q_proj", "v_proj"])
    assert "does not fit" in refused(ExitCode.CONFIGURATION, bare, **plain)
    wider = tmp_path / "wider"
    shutil.copytree(tiny, wider)
    settings = json.loads((wider / "config.json").read_bytes())
    settings["intermediate_size"] *= 2
    (wider / "config.json").write_text(json.dumps(settings))
    assert "does not fit" in refused(ExitCode.CONFIGURATION, run, model=str(wider))


def test_another_base_of_the_same_shape_is_told_by_its_weights(run, tmp_path, tiny):
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    weights = safetensors.torch.load_file(other / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name] = weights[name] + 0.1
    safetensors.torch.save_file(weights, other / "model.safetensors", {"format": "pt"})
    opened = open_adapter(run, model=str(other))
    assert any(str(other) in note for note in opened.notes)
    with pytest.raises(UserError, match=r"is not the base that .* was trained against") as caught:
        load_adapted(opened)
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    assert load_adapted(opened, "none")  # of which nothing is known


def test_what_is_not_told_must_be_given(bare):
    assert "--prompt-format" in refused(ExitCode.CONFIGURATION, bare)
    change(bare, base_model_name_or_path=None)
    assert "names no base" in refused(ExitCode.CONFIGURATION, bare, prompt_format="plain")
    change(bare, base_model_name_or_path="/no/such/folder")
    assert "--model" in refused(ExitCode.CONFIGURATION, bare, prompt_format="plain")
    assert open_adapter(bare, model="tiny-random", prompt_format="chat").template.name == "chat"


def test_only_methods_that_leave_the_base_alone_are_loaded(bare):
    change(bare, init_lora_weights="pissa")
    assert "changes the base" in refused(ExitCode.CONFIGURATION, bare, prompt_format="plain")
    other = {"peft_type": "POLY", "task_type": "CAUSAL_LM"}
    (bare / "adapter_config.json").write_text(json.dumps(other))
    assert "POLY. Supported are LORA, IA3" in refused(ExitCode.CONFIGURATION, bare, prompt_format="plain")


@pytest.mark.parametrize(
    ("name", "value"),
    [("task_type", "SEQ_CLS"), ("layer_replication", [[0, 2], [0, 2]]), ("target_parameters", ["weight"]),
     ("alora_invocation_tokens", [5]), ("use_qalora", True), ("use_bdlora", {"nblocks": 2})],
)  # fmt: skip
def test_kinds_of_lora_that_were_not_tried_are_refused(bare, name, value):
    change(bare, **{name: value})
    assert str(value if name == "task_type" else name) in refused(ExitCode.CONFIGURATION, bare, prompt_format="plain")


def test_biases_that_stay_when_the_adapter_is_off_are_refused(bare):
    weights = safetensors.torch.load_file(bare / "adapter_model.safetensors")
    weights["base_model.model.model.layers.0.self_attn.o_proj.base_layer.bias"] = torch.ones(192)
    safetensors.torch.save_file(weights, bare / "adapter_model.safetensors")
    change(bare, bias="all")
    assert "biases of the base itself (bias all)" in refused(ExitCode.CONFIGURATION, bare, prompt_format="plain")


@pytest.mark.parametrize(
    ("rows", "words"),
    [(390, "its vocabulary was resized to 390 tokens"), (384, "If they were not trained, save the adapter again")],
)
def test_an_adapter_with_an_embedding_is_refused_for_the_true_reason(bare, rows, words):
    weights = safetensors.torch.load_file(bare / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.weight"] = torch.ones(rows, 192)
    safetensors.torch.save_file(weights, bare / "adapter_model.safetensors")
    told = refused(ExitCode.CONFIGURATION, bare, prompt_format="plain")
    assert words in told and "model.embed_tokens.weight first" in told


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["qkv_proj", "lm_head"]}, "LoRA on the head"),
        ({"target_modules": ["qkv_proj", "embed_tokens"]}, "LoRA on the embedding"),
        ({"target_modules": ".*(embed_tokens|lm_head)", "save_embedding_layers": "auto"}, "LoRA on the embedding and the head"),
        ({"save_embedding_layers": True}, "holds weights of the base itself"),
    ],
)
def test_what_changes_the_ends_of_a_base_otherwise_than_whole_is_refused(tiny, tmp_path, tied, settings, words):
    folder = of_peft(tiny, tmp_path, tied, **settings)
    text = refused(ExitCode.CONFIGURATION, folder, prompt_format="plain")
    assert words in text and str(folder) in text


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("indices", [[5, 6], {"lm_head": [5]}])
def test_an_adapter_with_rows_of_an_embedding_or_head_is_opened(tiny, tmp_path, tied, indices):
    folder = of_peft(tiny, tmp_path, tied, trainable_token_indices=indices)
    if tied and isinstance(indices, dict):
        assert "one weight with the embedding" in refused(ExitCode.CONFIGURATION, folder, prompt_format="plain")
    else:
        assert open_adapter(folder, prompt_format="plain").lora.trainable_token_indices == indices


def test_the_gpu_that_is_not_there_is_missed_first(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in refused(ExitCode.ENVIRONMENT, run / "none", device="cuda")


def test_nf4_on_disk_gives_no_other_precision(run, tmp_path, tiny):
    stored = tmp_path / "stored"
    opened = open_adapter(run)
    load_adapted(opened).get_base_model()  # the base loads
    adapter.load_base_model(str(tiny), opened.config, "sdpa", torch.device("cpu"), "nf4").save_pretrained(stored)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny) / name, stored)
    opened = open_adapter(run, model=str(stored))
    with pytest.raises(UserError, match="stored in NF4") as caught:
        load_adapted(opened, "int8")
    assert caught.value.exit_code == ExitCode.CONFIGURATION


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (False, {"target_modules": "all-linear", "rank_pattern": {"o_proj": 2}, "use_dora": True}),
        (False, {"use_rslora": True, "alpha_pattern": {"o_proj": 3}, "layers_to_transform": [1], "task_type": None}),
        (False, {"target_modules": r".*\.(o|down)_proj", "exclude_modules": ["model.layers.0.mlp.down_proj"]}),
        (False, {"trainable_token_indices": [5, 6], "lora_bias": True}),
        (False, {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
        (True, {"modules_to_save": ["lm_head"]}),
        (True, {"modules_to_save": ["embed_tokens"]}),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
)
def test_adapters_with_other_settings_of_peft_compute_what_they_do_there(tiny, tmp_path, tied, settings):
    folder = of_peft(tiny, tmp_path, tied, **settings)
    ids = torch.tensor([[5, 6, 7, 8]])
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    whole = "modules_to_save" in settings  # in fp32 here, in the base's dtype there
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=whole):
        without = base(input_ids=ids).logits
        with warnings.catch_warnings(action="ignore"):
            theirs = peft.PeftModel.from_pretrained(base, folder).eval()(input_ids=ids).logits
        loaded = load_adapted(open_adapter(folder, prompt_format="chat"), "none")
        difference = (loaded(input_ids=ids).logits - theirs).norm() / (theirs - without).norm()
        assert difference < (0.05 if whole else 1e-9)
        with loaded.disable_adapter():
            assert torch.equal(loaded(input_ids=ids).logits, without)
        read_head(loaded)  # which refuses what it does not understand


def test_memory_that_runs_out_is_explained_and_other_errors_are_not():
    with pytest.raises(UserError, match="Lower it") as caught, adapter.oom_as_user_error_with("Lower it."):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert caught.value.exit_code == ExitCode.MEMORY
    with pytest.raises(RuntimeError, match="shape"), adapter.oom_as_user_error_with("Lower it."):
        raise RuntimeError("shape")
