"""The commands beside training: their help, and what is told to who mistypes."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.cli import COMMANDS, summary
from qlora.cli import main as command_line
from qlora.commands.options import require_packages
from qlora.errors import ExitCode, UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_command_all_are_named(arguments, capsys):
    assert command_line(arguments) == 0
    told = capsys.readouterr().out
    for name, (options, room) in COMMANDS.items():
        assert f"  {name}" in told and summary(options) in told
        assert importlib.util.find_spec(f"qlora.commands.{room}") and summary(options).endswith(".")


def test_a_mistyped_command_gets_the_nearest(capsys):
    assert command_line(["evalute"]) == ExitCode.CONFIGURATION
    assert capsys.readouterr().err == "error: python -m qlora knows no command 'evalute'. Perhaps you meant evaluate.\n"
    assert command_line(["frobnicate"]) == ExitCode.CONFIGURATION
    assert "There are plan, doctor, " in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_no_torch_and_tells_every_option(name):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "qlora", name, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "tyro" in imported and not imported & {
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "matplotlib",
        "datasets",
        "numpy",
    }
    words = done.stdout.lower()
    for field in dataclasses.fields(COMMANDS[name][0]):
        assert field.name.replace("_", "-") in words or field.name in words, field.name


def test_a_secret_in_a_wrong_flag_is_not_shown(capsys):
    with pytest.raises(SystemExit) as ended:
        command_line(["plan", "--shap", "hf_" + 34 * "a"])
    assert ended.value.code == 2
    assert "hf_***" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["evaluate", "nowhere"], ["generate", "nowhere", "--prompt", "a"]])
@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_a_seed_that_generators_do_not_take_is_refused_before_anything_is_read(command, seed, capsys):
    assert command_line([*command, "--seed", str(seed)]) == ExitCode.CONFIGURATION
    assert f"--seed {seed} cannot be used: it must be at least 0 and below 2**63." in capsys.readouterr().err


def test_missing_packages_are_named_with_the_extra_that_installs_them():
    with pytest.raises(UserError, match=r"^Scoring needs rouge-score, which .* pip install -e '\.\[evaluate\]'$") as caught:
        require_packages("Scoring", {"no_such_module": "rouge-score", "json": "json"}, extra="evaluate")
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    require_packages("Scoring", {"json": "json"}, extra="evaluate")
