"""Compiled kernels, kept in the user's cache folder, so that the second run finds what the first has compiled."""

import atexit
import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch
import torch.compiler.config

from qlora.cache import cache_folder

UNUSED_DAYS = 60  # after which the folder of another version is removed


def use(keep: bool) -> str | None:
    """Have torch.compile write to, and read from, a folder for this version of torch that only the user may write.

    Where there is none, it is a temporary folder of this process. A TORCHINDUCTOR_CACHE_DIR of the user's stays. (torch's own
    choice is a folder with a known name under /tmp.)

    Args:
        keep: whether kernels are kept for later runs, and those of earlier ones loaded.

    Returns:
        A line for the log if they are not kept although they should be.
    """
    torch.compiler.config.cache_key_tag += _code_digest()
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return None
    folder = cache_folder() / "compiled" / f"torch-{torch.__version__}-python-{sys.version_info[0]}.{sys.version_info[1]}"
    problem = _problem_of(folder) if keep else None
    if not keep or problem:
        temporary = tempfile.mkdtemp(prefix="qlora-compiled-")  # mode 0700
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = temporary
        return f"Compiled kernels are not kept: {problem}." if problem else None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.utime(folder)
    _remove_unused(folder)
    return None


def _problem_of(folder: Path) -> str | None:
    """Why kernels, which are code, must not be kept in a folder; it is made if it is not there."""
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        for place in (folder.parent, folder):
            found = place.stat()
            if found.st_uid != os.getuid() or found.st_mode & 0o022:
                return f"others than you may write to {place} (owner {found.st_uid}, mode {found.st_mode & 0o777:o})"
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    return None


def _code_digest() -> str:
    """Of what torch's own key leaves out: backward passes of operators, and what is recomputed. Users may edit ours."""
    here = Path(__file__).parent
    files = sorted((*here.glob("*.py"), *(here.parent / "model").glob("*.py")))
    versions = [metadata.version(name) for name in ("transformers", "peft", "bitsandbytes")]
    versions += [metadata.version("flash-attn")] if importlib.util.find_spec("flash_attn") else []
    return hashlib.sha256(repr(versions).encode() + b"".join(file.read_bytes() for file in files)).hexdigest()


def _remove_unused(folder: Path) -> None:
    """Remove the folders of other versions that no run has used for UNUSED_DAYS."""
    for other in folder.parent.iterdir():
        with contextlib.suppress(OSError):
            if other != folder and time.time() - other.stat().st_mtime > UNUSED_DAYS * 24 * 3600:
                shutil.rmtree(other)
