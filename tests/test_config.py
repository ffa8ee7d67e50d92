"""Options: flags over YAML over defaults, checks of values, what depends on the machine."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlora import config as config_module
from qlora.config import BUNDLED_EVAL, BUNDLED_TRAIN, PHI3_MINI, TrainConfig, parse
from qlora.errors import ExitCode, UserError
from qlora.terminal import redact

ROOT = Path(__file__).parents[1]


def test_defaults_are_those_of_the_script_it_replaces():
    config = parse([])
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (32, 64, 0.1)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (2, 2)
    assert (config.num_train_epochs, config.max_length, config.warmup_ratio, config.weight_decay) == (20, 2048, 0.1, 0.01)
    assert (config.logging_steps, config.save_total_limit, config.max_grad_norm, config.seed) == (5, 3, 1.0, 42)
    assert config.resolved(on_gpu=True)[0].learning_rate == 5e-5


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 1e-4\nlora-r: 8\ntarget_modules: [qkv_proj, o_proj]\ntrust_remote_code: true\nmax_grad_norm: null\n"
    )
    config = parse(["--config", str(file), "--lora_r", "16"])
    assert config.learning_rate == 1e-4  # YAML reads it as a string
    assert config.lora_r == 16
    assert config.target_modules == ("qkv_proj", "o_proj")
    assert config.trust_remote_code is True
    assert config.max_grad_norm is None
    assert config.lora_alpha == 64


def test_flags_take_dashes_and_underscores():
    assert parse(["--max-length", "7"]) == parse(["--max_length", "7"]) == dataclasses.replace(TrainConfig(), max_length=7)


def test_resolved_configuration_reads_back_from_its_yaml(tmp_path):
    config, _ = TrainConfig(target_modules=("o_proj",), max_steps=3, output_dir=tmp_path, debug=True).resolved(on_gpu=False)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert parse(["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learing_rate: 1", ["learing_rate", "learning_rate"]),
        ("xyzzy: 1", ["xyzzy", "max_length"]),
        ("- a\n- b", ["name: value", "list"]),
        ("a: [", ["not YAML"]),
    ],
)
def test_a_wrong_yaml_file_is_refused_with_a_suggestion(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        parse(["--config", str(file)])
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    assert all(word in str(caught.value) for word in [*words, str(file)])


def test_a_missing_yaml_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        parse(["--config", str(tmp_path / "none.yaml")])


def test_a_wrong_type_in_yaml_names_the_file(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("lora_r: many")
    with pytest.raises(SystemExit) as caught:
        parse(["--config", str(file)])
    assert caught.value.code == 2
    assert str(file) in capsys.readouterr().err


def test_an_unknown_flag_exits_2_and_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--learing-rate", "1"])
    assert caught.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    ["--max-length 0", "--lora-r 0", "--learning-rate 0", "--learning-rate nan", "--learning-rate inf", "--lora-dropout 1",
     "--lora-dropout nan", "--warmup-ratio -0.1", "--weight-decay -1", "--max-grad-norm 0", "--seed -1", "--max-steps 0",
     "--per-device-train-batch-size 0", "--gradient-accumulation-steps 0", "--num-train-epochs 0", "--logging-steps 0",
     "--save-total-limit 0", "--target-modules", "--init-adapter nowhere", "--revision main"],
)  # fmt: skip
def test_a_value_that_no_run_could_use_is_refused_by_name(arguments):
    flag, *value = arguments.split()
    with pytest.raises(UserError) as caught:
        parse([flag, *value])
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    assert str(caught.value).startswith(flag) and all(word in str(caught.value) for word in value)


def test_what_depends_on_the_machine_and_the_model():
    cpu, cpu_line = TrainConfig().resolved(on_gpu=False)
    gpu, gpu_line = TrainConfig().resolved(on_gpu=True)
    assert (cpu.model, cpu.output_dir, gpu.model) == ("demo", Path("runs/demo-avro"), PHI3_MINI)
    assert gpu.output_dir == Path("runs/Phi-3-mini-4k-instruct-avro")
    assert cpu.learning_rate > gpu.learning_rate
    assert "no CUDA GPU" in cpu_line and "a CUDA GPU" in gpu_line and PHI3_MINI in gpu_line
    assert (cpu.train_file, cpu.eval_file) == ((str(BUNDLED_TRAIN),), (str(BUNDLED_EVAL),))
    own, line = TrainConfig(train_file=("a/my set.jsonl",), model="org/Name-7B", gradient_checkpointing="none").resolved(
        on_gpu=True
    )
    assert own.eval_file is None and own.gradient_checkpointing == "none" and "as asked" in line
    assert own.output_dir == Path("runs/Name-7B-my-set.jsonl")


def test_help_has_a_screen_for_each_group_and_a_text_for_each_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    screens = text.split(" options ")[2:]  # behind the usage line's and the first box's
    assert len(screens) == 6 and all(len(screen.splitlines()) <= 50 for screen in screens)
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    tree = ast.parse(Path(config_module.__file__).read_text())
    for group in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Options")):
        documented = [
            isinstance(after, ast.Expr)
            for field, after in zip(group.body, [*group.body[1:], None], strict=True)
            if isinstance(field, ast.AnnAssign)
        ]
        assert all(documented), group.name


@pytest.mark.parametrize("argument", ["--help", "--learing-rate"])
def test_help_and_a_typo_answer_without_importing_torch(argument):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "train_loop.py", argument], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == (0 if argument == "--help" else 2)
    assert "learning-rate" in done.stdout + done.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "tyro" in imported and not imported & {"torch", "transformers", "peft", "bitsandbytes", "rich.progress"}


def test_every_option_is_read_outside_config():
    sources = [ROOT / "train_loop.py", *(path for path in (ROOT / "qlora").rglob("*.py") if path.name != "config.py")]
    read = set()
    for node in (node for path in sources for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            read |= {node.attr} if owner in ("config", "resolved") else set()
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= read


def test_yaml_of_a_configuration_is_plain():
    assert yaml.safe_load(TrainConfig().to_yaml())["lora_r"] == 32


@pytest.mark.parametrize("flags", [["--hf-token", "TOKEN"], ["--learning-rate", "TOKEN"], ["--lora-r", "a-very-secret-value"]])
def test_a_secret_on_the_command_line_is_not_printed_back(monkeypatch, capsys, flags):
    monkeypatch.setenv("HF_TOKEN", "a-very-secret-value")
    token = "hf_" + "AbCdEf123456" * 3
    with pytest.raises(SystemExit):
        parse([flag.replace("TOKEN", token) for flag in flags])
    told = "".join(capsys.readouterr())
    assert "***" in told and token not in told and "a-very-secret-value" not in told


def test_names_that_only_look_like_the_start_of_a_secret_are_left_alone():
    assert redact("/data/hf_downloads/hf_baseline01 and hf_") == "/data/hf_downloads/hf_baseline01 and hf_"
