"""The doctor says what works, and what is broken costs its own row."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import bitsandbytes.diagnostics.main
import pytest
import torch
import torch.utils.collect_env

from qlora.cli import main
from qlora.commands import doctor
from qlora.commands.doctor import Row
from qlora.commands.options import DoctorOptions
from qlora.errors import ExitCode
from qlora.model import attention
from qlora.speed import nf4

ROOT = Path(__file__).parents[2]


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Put modules of our own making before those that are installed, for children to import; their names are checked alone."""

    def make(modules: dict[str, str], *names: str) -> list[Row]:
        for module, body in modules.items():
            (tmp_path / f"{module}.py").write_text(body)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        known = doctor.checks()
        monkeypatch.setattr(doctor, "checks", lambda: {name: known[name] for name in names})
        monkeypatch.setattr(doctor, "_requirements", list)
        return doctor.examine()

    return make


def test_this_machine_can_start_a_run(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["can_start"] and found["reason"] is None
    rows = {row["check"]: row for row in found["checks"]}
    needed = {name for name, row in rows.items() if row["needed"]}
    assert needed == {"Python", "train_loop", "NF4 forward and backward", "NF4 dequantized", "temporary files"}
    assert all(rows[name]["ok"] for name in needed)
    assert rows["package torch"]["detail"] == torch.__version__
    assert f"torch {torch.__version__}, built " in rows["CUDA"]["detail"] and rows["accelerate env"]["ok"]
    assert rows["python -m bitsandbytes"]["ok"] and re.search(
        "success", rows["python -m bitsandbytes"]["detail"], re.IGNORECASE
    )
    assert list(rows)[:4] == ["Python", "CUDA", "accelerate env", "python -m bitsandbytes"]
    listed = (ROOT / "setup.cfg").read_text().partition("install_requires =")[2].partition("\n\n")[0].split()
    assert [name for name in rows if name.startswith("package ")] == [f"package {text.split('>')[0]}" for text in listed]
    if not torch.cuda.is_available():
        assert not rows["GPU"]["ok"] and not rows["compiled layers"]["ok"] and not rows["attention varlen"]["ok"]
        assert rows["attention sdpa"]["ok"] and "GB free" in rows["host memory"]["detail"]


def test_what_raises_dies_or_hangs_costs_its_own_row(broken, monkeypatch):
    monkeypatch.setattr(doctor, "CHILD_S", 1)
    original = subprocess.run

    def patient(command, *, timeout, **options):
        """However busy the machine is, only the child that hangs is given up."""
        return original(command, timeout=timeout if command[3] == "package pyyaml" else None, **options)

    monkeypatch.setattr(subprocess, "run", patient)
    modules = {
        "jinja2": "raise OSError('libx.so: cannot open shared object file')",
        "gguf": "import os; os.kill(os.getpid(), 11)",
        "yaml": "import time; time.sleep(600)",
        "rich": "print('noise'); import sys; sys.exit('gone')",
    }
    names = ["package jinja2", "host memory", "package gguf", "package pyyaml", "package rich", "temporary files"]
    rows = broken(modules, *names)
    assert [row.check for row in rows] == ["Python", *names]
    assert [row.ok for row in rows] == [True, False, True, False, False, False, True]
    details = [row.detail for row in rows]
    assert details[1] == "OSError: libx.so: cannot open shared object file"
    assert "GB free" in details[2] and "SIGSEGV" in details[3] and "1 s" in details[4] and details[5] == "gone"


def test_what_torch_finds_is_told_in_a_row(monkeypatch):
    empty = torch.utils.collect_env.SystemEnv(*[None] * len(torch.utils.collect_env.SystemEnv._fields))
    built = {"torch_version": "2.13.0", "cuda_compiled_version": "13.0", "nvidia_driver_version": "580.65"}
    for found, detail in (
        (
            built | {"nvidia_gpu_models": "GPU 0: A\nGPU 1: B"},
            "2.13.0, built for CUDA 13.0; NVIDIA driver 580.65; GPU 0: A; GPU 1: B",
        ),
        (built | {"nvidia_driver_version": None}, "2.13.0, built for CUDA 13.0; no NVIDIA driver"),
        (
            built | {"cuda_compiled_version": None},
            "2.13.0, built without CUDA; NVIDIA driver 580.65. Use the GPU by pip install",
        ),
    ):
        monkeypatch.setattr(torch.utils.collect_env, "get_env_info", lambda found=found: empty._replace(**found))
        (row,) = doctor._collect_env()
        assert row.check == "CUDA" and row.ok == (found["cuda_compiled_version"] is not None) and not row.needed
        assert row.detail.startswith(f"torch {detail}")


@pytest.mark.parametrize(
    ("last", "code", "ok"),
    [("SUCCESS!", None, True), ("CPU library loaded successfully.", None, True), ("CPU library failed to load.", None, False),
     ("WARNING: bitsandbytes is running as CPU-only!", 1, False)],
)  # fmt: skip
def test_what_bitsandbytes_says_of_itself_is_told_in_a_row(monkeypatch, last, code, ok):
    def diagnose():
        bitsandbytes.diagnostics.main.print_header("bitsandbytes v0")
        bitsandbytes.diagnostics.main.print_header("")
        print(f"Checking that it is\n{last}")
        if code:
            sys.exit(code)

    monkeypatch.setattr(bitsandbytes.diagnostics.main, "main", diagnose)
    assert list(doctor._bitsandbytes()) == [Row("python -m bitsandbytes", ok, f"Checking that it is {last}")]


def test_diagnostics_of_others_that_crash_or_hang_cost_their_own_row(broken, monkeypatch):
    monkeypatch.setattr(doctor, "CHILD_S", 3)
    modules = {"accelerate": "import os; os.kill(os.getpid(), 11)", "bitsandbytes": "import time; time.sleep(60)"}
    rows = broken(modules, "accelerate env", "python -m bitsandbytes", "temporary files")
    assert [row.ok for row in rows] == [True, False, False, True] and not rows[1].needed and not rows[2].needed
    assert "SIGSEGV" in rows[1].detail and "3 s" in rows[2].detail


def test_without_torch_no_run_can_start_and_the_rest_is_told_of(broken, monkeypatch, capsys):
    rows = broken({"torch": "raise ImportError('libtorch_cpu.so: undefined symbol')"}, "train_loop", "GPU", "host memory")
    assert [row.ok for row in rows] == [True, False, False, True] and "undefined symbol" in rows[1].detail
    monkeypatch.setattr(doctor, "examine", lambda: rows)
    assert doctor.run(DoctorOptions()) == ExitCode.ENVIRONMENT == 7
    assert "No run can start: train_loop: ImportError: libtorch_cpu.so" in " ".join(capsys.readouterr().out.split())
    assert doctor.run(DoctorOptions(json=True)) == 7
    assert json.loads(capsys.readouterr().out)["can_start"] is False


def test_a_version_out_of_range_is_no_obstacle_but_a_no():
    (row,) = doctor._package("rich<1.0")
    assert not row.ok and not row.needed and "wanted <1.0" in row.detail
    (row,) = doctor._package("rich>=1.0")
    assert row.ok


def test_away_from_a_clone_versions_wanted_are_those_of_the_installed_package(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "qlora" / "commands" / "doctor.py"))
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["torch<2.14", 'trl; extra == "test"'])
    assert doctor._requirements() == ["torch<2.14"] and "package torch" in doctor.checks()


def test_a_wrong_gradient_and_wrong_bits_are_seen(monkeypatch):
    assert all(row.ok and row.needed for row in doctor._nf4())
    functions = bitsandbytes.autograd._functions.MatMul4Bit
    backward = functions.backward
    with monkeypatch.context() as patch:
        patch.setattr(functions, "backward", staticmethod(lambda ctx, d: (backward(ctx, d)[0] * 1.05, None, None, None, None)))
        products, bits = doctor._nf4()
    assert not products.ok and "0.05" in products.detail and bits.ok
    with monkeypatch.context() as patch:
        patch.setattr(nf4, "dequantized", lambda *_: torch.zeros(128, 256, dtype=torch.bfloat16))
        products, bits = doctor._nf4()
    assert products.ok and not bits.ok and doctor.verdict([products, bits]) == f"{bits.check}: {bits.detail}"


def test_an_obstacle_stands_in_its_row(monkeypatch):
    monkeypatch.setattr(attention, "_varlen_unavailable_reason", lambda *_: None)
    monkeypatch.setattr(attention, "_flash_unavailable_reason", lambda *_: "why not")
    rows = {row.check: row for row in doctor._attention()}
    assert rows["attention varlen"].ok and not rows["attention flash_attention_2"].ok
    assert rows["attention flash_attention_2"].detail == "why not"


def test_without_rich_rows_are_lines(monkeypatch, capsys):
    rows = [Row("one", True, "fine"), Row("two", False, "[bad]", needed=True)]
    doctor.show(rows)
    assert "[bad]" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    doctor.show(rows)
    assert capsys.readouterr().out == "yes  one: fine\nno   two: [bad]\n"


def test_without_tyro_the_command_line_says_so(tmp_path):
    (tmp_path / "tyro.py").write_text("raise ImportError('broken')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "qlora", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 7 and done.stderr.count("\n") == 1 and "tyro" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("built_for", "capability", "words"),
    [
        (["sm_75", "sm_80", "sm_90", "compute_120"], (7, 0), "needs 7.5 (CUDA 13 no longer supports a V100)"),
        (["sm_75", "sm_80", "sm_90"], (7, 5), ""),
        (["sm_70", "sm_90"], (7, 0), ""),
        ([], (7, 0), ""),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_named(monkeypatch, built_for, capability, words):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    assert words in doctor._too_old(capability) and bool(words) == bool(doctor._too_old(capability))


def test_a_gpu_without_bf16_trains_in_fp16(monkeypatch):
    monkeypatch.setattr(doctor, "_device", lambda: torch.device("cuda", 0))
    for native, words in ((False, "--precision auto trains in fp16"), (True, "in hardware")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        (row,) = doctor._bf16()
        assert row.ok == native and words in row.detail
