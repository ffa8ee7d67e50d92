"""Versions, commit and hardware of this process."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """The version of each package, None where it is not installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit and hardware, for env.json and for benchmark files."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "accelerate", "datasets", "flash-attn")
    versions = versions_of(packages) | {"torch": torch.__version__}  # with its build: +cpu, +cu130
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": gpu.name if gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device_memory_gb": round(gpu.total_memory / 1e9, 2) if gpu else None,
        "cuda": torch.version.cuda,
        "packages": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this checkout; None where the code is installed without its repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None
