"""What of this machine works, and whether a run can start.

Checks run in a process of their own, which tells of each as it ends. A library that is broken, or takes the process along,
costs its own row: the next process continues with the row after it.
"""

import argparse
import collections
import configparser
import contextlib
import functools
import importlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora.commands.options import DoctorOptions
from qlora.errors import ExitCode
from qlora.terminal import echo, printable

if TYPE_CHECKING:
    import torch

DISTRIBUTION = "qlora-train-loop"
MODULES = {"pyyaml": "yaml"}  # what a distribution is imported as, where that is not its own name
MARK = "qlora-doctor "  # before the rows in a child's output, where libraries may print too
CHILD_S = 300  # for all checks together: torch, transformers and datasets from a cold disk take a minute
ERROR_BOUND = 0.02  # relative, of products in bf16: one rounding is 2**-9


class Row(NamedTuple):
    """What a check found."""

    check: str
    ok: bool
    detail: str
    needed: bool = False  # for a run to start at all


# -- the checks: each yields its rows; one that raises is a row with the reason ------------------------------------------


def _collect_env() -> Iterator[Row]:
    """torch.utils.collect_env: what torch was built for, and the driver and cards of this machine."""
    from torch.utils.collect_env import get_env_info

    found = get_env_info()
    built, driver = found.cuda_compiled_version, found.nvidia_driver_version
    parts = [f"torch {found.torch_version}, " + (f"built for CUDA {built}" if built else "built without CUDA")]
    parts += [f"NVIDIA driver {driver}" if driver else "no NVIDIA driver", *(found.nvidia_gpu_models or "").splitlines()]
    advice = ". Use the GPU by pip install --force-reinstall torch" if driver and not built else ""
    yield Row("CUDA", built is not None, "; ".join(parts) + advice)


def _accelerate_env() -> Iterator[Row]:
    """`accelerate env`: the accelerator that it finds."""
    from accelerate.commands.env import env_command

    found = env_command(argparse.Namespace(config_file=None))
    shown = [f"{name} {found[name]}" for name in ("PyTorch accelerator", "GPU type") if name in found]
    yield Row("accelerate env", True, ", ".join(shown))


def _bitsandbytes() -> Iterator[Row]:
    """`python -m bitsandbytes`: whether its library loads, and takes a step of its optimizer on a GPU."""
    from bitsandbytes.diagnostics.main import main

    output = io.StringIO()
    code: int | str | None = 0
    try:
        with contextlib.redirect_stdout(output):
            main()
    except SystemExit as end:
        code = end.code
    result = " ".join(output.getvalue().rpartition("====\n")[2].split())  # what comes after the versions
    yield Row("python -m bitsandbytes", not code and "failed to load" not in result, result[:300])


def _package(requirement: str) -> Iterator[Row]:
    """The version of a dependency, and whether it is one that we work with and can be imported."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    found = importlib.metadata.version(wanted.name)
    importlib.import_module(MODULES.get(wanted.name, wanted.name.replace("-", "_")))
    fits = wanted.specifier.contains(found, prereleases=True)
    yield Row(f"package {wanted.name}", fits, found if fits else f"{found}, wanted {wanted.specifier}")


def _loop() -> Iterator[Row]:
    """All that a run imports, together."""
    importlib.import_module("train_loop")
    yield Row("train_loop", True, "imports, with all dependencies", needed=True)


def _device() -> "torch.device":
    """Where a run would be."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _gpu() -> Iterator[Row]:
    """The card, or why torch sees none."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            free, total = (size / 1e9 for size in torch.cuda.mem_get_info(index))
            detail = f"{card.name}, compute capability {card.major}.{card.minor}, {free:.1f} of {total:.1f} GB free"
            too_old = _too_old((card.major, card.minor))
            name = f"GPU {index}" + (" (used by runs)" if index == 0 else "")
            yield Row(name, not too_old, detail + too_old, needed=index == 0)
    else:
        yield Row("GPU", False, _no_gpu())


def _too_old(capability: tuple[int, int]) -> str:
    """What to do if this build of torch has no code for a GPU, as those for CUDA 13 have none for a V100; else nothing."""
    import torch

    built_for = [int(name.removeprefix("sm_")) for name in torch.cuda.get_arch_list() if name.removeprefix("sm_").isdigit()]
    if not built_for or 10 * capability[0] + capability[1] >= min(built_for):
        return ""
    least = f"{min(built_for) // 10}.{min(built_for) % 10}"
    return (
        f"; this torch, for CUDA {torch.version.cuda}, needs {least} (CUDA 13 no longer supports a V100). Install one for CUDA "
        "12.6: pip install torch --index-url https://download.pytorch.org/whl/cu126"
    )


def _no_gpu() -> str:
    import torch

    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # torch without CUDA; no driver, or one that is too old
        return f"{' '.join(str(error).split())}; a run takes the CPU"
    return "torch sees none; a run takes the CPU"


def _bf16() -> Iterator[Row]:
    """Whether products in bf16 are the hardware's own. A GPU without (T4, RTX 20) trains in fp16; RTX 30 and newer have it."""
    import torch

    device = _device()
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        missing = "not in hardware before compute capability 8.0 (RTX 30); --precision auto trains in fp16"
        yield Row("bf16", native, "in hardware" if native else missing)
        return
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    native = bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", text))
    yield Row("bf16", native, "this CPU has instructions for it" if native else "this CPU has none for it: right, but slower")


def _nf4() -> Iterator[Row]:
    """Forward and backward of a layer in NF4, as bitsandbytes and our operator compute them, against its weight in fp32."""
    import torch

    from qlora.model.third_party import bitsandbytes
    from qlora.speed import nf4  # which imports bitsandbytes

    device = _device()
    generator = torch.Generator().manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight.data.copy_(torch.randn(128, 256, generator=generator))
    quantized: Any = layer.to(device).weight
    weight = bitsandbytes.functional.dequantize_4bit(quantized.data, quantized.quant_state).float()  # [128, 256]
    x = torch.randn(64, 256, generator=generator).bfloat16().to(device).requires_grad_()  # [64, 256]
    d_output = torch.randn(64, 128, generator=generator).bfloat16().to(device)  # [64, 128]
    output = layer(x)  # [64, 128]
    output.backward(d_output)
    assert x.grad is not None
    errors = _relative(output, x.detach().float() @ weight.T), _relative(x.grad, d_output.float() @ weight)
    detail = f"on {_named(device)}: relative error {errors[0]:.4f} forward, {errors[1]:.4f} of the gradient"
    yield Row("NF4 forward and backward", max(errors) < ERROR_BOUND, detail, needed=True)
    packed = nf4.frozen_weight(layer)
    same = torch.equal(nf4.dequantized(packed, 128, torch.bfloat16), weight.bfloat16())
    how = "in one launch by Triton" if device.type == "cuda" else "by bitsandbytes' two operators"
    yield Row("NF4 dequantized", same, f"{how}, {'the same bits' if same else 'other bits than bitsandbytes'}", needed=True)


def _relative(found: "torch.Tensor", wanted: "torch.Tensor") -> float:
    return float((found.detach().float() - wanted).norm() / wanted.norm())


def _named(device: "torch.device") -> str:
    return "the GPU" if device.type == "cuda" else "the CPU"


def _attention() -> Iterator[Row]:
    """Each value of --attn-implementation, for a model such as Phi-3."""
    from qlora.model import attention

    for name, unavailable_reason in attention.unavailable_reasons(_device(), _meta_model()).items():
        yield Row(f"attention {name}", unavailable_reason is None, unavailable_reason or "can run")


def _meta_model() -> Any:
    """A Phi-3 of no weights."""
    import torch
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    with torch.device("meta"):
        return transformers.Phi3ForCausalLM(transformers.Phi3Config(**shape, pad_token_id=0))


def _layers() -> Iterator[Row]:
    """Whether decoder layers are compiled, and recorded as CUDA graphs, where --compile is auto."""
    from qlora.speed import graphs, layers

    device, meta_model = _device(), _meta_model()
    compiled = layers.compile_unavailable_reason(meta_model, device)
    recorded = compiled or graphs.graphs_unavailable_reason(meta_model)
    yield Row("compiled layers", compiled is None, compiled or "available")
    yield Row("CUDA graphs", recorded is None, recorded or "available")


def _memory() -> Iterator[Row]:
    """Free memory of the host, or of the container that this runs in, if that has less."""
    import psutil

    host = psutil.virtual_memory()
    free, total, where = host.available, host.total, ""
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        bound = int(limit.read_text())
        if bound < total:
            free, total, where = min(free, bound - int(used.read_text())), bound, " (container limit)"
    yield Row("host memory", True, f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free{where}")


def _disk() -> Iterator[Row]:
    """Room where runs, models and temporary files go, and whether they may be written."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from qlora.cache import cache_folder

    places = {"runs": Path("runs"), "model cache": Path(HF_HUB_CACHE), "demo models": cache_folder()}
    for name, path in places.items():
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        may = os.access(there, os.W_OK)
        free = f"{shutil.disk_usage(there).free / 1e9:.1f} GB free"
        yield Row(f"disk for {name}", may, f"{free} in {there}" + ("" if may else ", which cannot be written"))


def _temporary() -> Iterator[Row]:
    """Encoded samples lie in a temporary file."""
    with tempfile.TemporaryFile() as file:
        file.write(b"0" * 2**20)
        file.flush()
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    yield Row("temporary files", True, f"{free:.1f} GB free in {tempfile.gettempdir()}", needed=True)


def _requirements() -> list[str]:
    """Our dependencies with the versions wanted, extras left out: of the clone that this runs in, else as installed."""
    settings = configparser.ConfigParser()
    if settings.read(Path(__file__).parents[2] / "setup.cfg"):
        return settings["options"]["install_requires"].split()
    return [text for text in importlib.metadata.requires(DISTRIBUTION) or [] if "extra ==" not in text]


def checks() -> dict[str, tuple[Callable[[], Iterator[Row]], bool]]:
    """Check by name, in their order, and whether a run needs it. A check that dies has this name in its row."""
    found: dict[str, tuple[Callable[[], Iterator[Row]], bool]] = {
        "torch.utils.collect_env": (_collect_env, False),
        "accelerate env": (_accelerate_env, False),
        "python -m bitsandbytes": (_bitsandbytes, False),
    }
    for text in _requirements():
        name = re.split(r"[^A-Za-z0-9_-]", text, maxsplit=1)[0]
        found[f"package {name}"] = functools.partial(_package, text), False
    found |= {"train_loop": (_loop, True), "GPU": (_gpu, False), "bf16": (_bf16, False)}
    found |= {"NF4 forward and backward": (_nf4, True), "attention": (_attention, False), "layers": (_layers, False)}
    return found | {"host memory": (_memory, False), "disk": (_disk, False), "temporary files": (_temporary, True)}


# -- carried out -------------------------------------------------------------------------------------------------------


def print_rows(names: list[str]) -> None:
    """In the child: carry out these checks and print their rows. An exception ends the process, and the parent continues."""
    sys.modules["kernels"] = None  # type: ignore[assignment]  # where it is installed, importing bitsandbytes uses the network
    known = checks()
    for name in names:
        rows = list(known[name][0]())
        print(MARK + json.dumps([name, rows]), flush=True)


def examine() -> list[Row]:
    """The rows of all checks, whatever is broken."""
    known = checks()
    rows = [Row("Python", True, f"{platform.python_version()}, {platform.platform()}", needed=True)]
    left = collections.deque(known)
    while left:
        checked, reason = _run_child(list(left))
        for name, found in checked:
            assert name == left.popleft(), "a child tells of checks in their order"
            rows += [Row(*row) for row in found]
        if left:
            name = left.popleft()
            rows.append(Row(name, False, reason, known[name][1]))
    return rows


def _run_child(names: list[str]) -> tuple[list[Any], str]:
    """The rows that a child printed, and why it ended."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    code = "import sys; from qlora.commands.doctor import print_rows; print_rows(sys.argv[1:])"
    command = [sys.executable, "-c", code, *names]
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=CHILD_S, check=False)
        output, reason = done.stdout, _reason(done)
    except subprocess.TimeoutExpired as late:
        output, reason = late.stdout or b"", f"timed out after {CHILD_S} s"
    lines = output.decode(errors="replace").splitlines()
    return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)], reason


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """The exception, which is the last line of stderr that is not indented; or the signal."""
    if done.returncode < 0:
        return f"the process was ended by {signal.Signals(-done.returncode).name}"
    lines = done.stderr.decode(errors="replace").splitlines()
    ends = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Warning|Interrupt|NotFound)\b", line)]
    return (ends or lines or [f"the process ended with {done.returncode}"])[-1][:300]


def verdict(rows: list[Row]) -> str | None:
    """Why no run can start, or None."""
    missing = [f"{row.check}: {row.detail}" for row in rows if row.needed and not row.ok]
    return "; ".join(missing) or None


def run(options: DoctorOptions) -> int:
    """Examine this machine and show what was found; see DoctorOptions.

    Returns:
        0, or 7 if no run can start as `python train_loop.py` would.
    """
    rows = examine()
    why = verdict(rows)
    if options.json:
        print(json.dumps({"can_start": why is None, "reason": why, "checks": [row._asdict() for row in rows]}, indent=1))
    else:
        show(rows)
        echo(f"No run can start: {why}." if why else "A run can start.")
    return ExitCode.ENVIRONMENT if why else 0


def show(rows: list[Row]) -> None:
    """Print the rows as a table, or as lines where rich is among what is broken."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        echo("\n".join(f"{'yes' if row.ok else 'no':3}  {row.check}: {row.detail}" for row in rows))
        return
    table = Table("check", "", "detail")
    for row in rows:
        style = "green" if row.ok else "bold red" if row.needed else "yellow"
        table.add_row(row.check, Text("yes" if row.ok else "no", style=style), Text(printable(row.detail), overflow="fold"))
    Console().print(table)
