"""Compiled kernels, kept in the user's cache folder, so that the second run finds what the first has compiled."""

import contextlib
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.compiler.config

from qlora.cache import cache_folder
from qlora.errors import EnvironmentProblem

UNUSED_DAYS = 60  # after which the folder of another version is removed


def use(keep: bool) -> None:
    """Have torch.compile write to, and read from, a folder for this version of torch that only the user may write.

    A TORCHINDUCTOR_CACHE_DIR of the user's stays. torch's own choice is a folder with a known name under /tmp.

    Args:
        keep: whether what earlier runs have compiled is loaded.

    Raises:
        EnvironmentProblem: if the folder cannot be made, belongs to another user, or may be written by others.
    """
    torch.compiler.config.force_disable_caches = not keep
    torch.compiler.config.cache_key_tag = _code_digest()
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = cache_folder() / "compiled" / f"torch-{torch.__version__}-python-{sys.version_info[0]}.{sys.version_info[1]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise EnvironmentProblem(
            f"Compiled kernels cannot be kept in {folder}: {error.strerror}.",
            hint="Set TORCHINDUCTOR_CACHE_DIR to a folder of yours, or pass --compile none.",
        ) from None
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise EnvironmentProblem(
            f"Compiled kernels are code, and others than you may write to {folder} (owner {found.st_uid}, "
            f"mode {found.st_mode & 0o777:o}).",
            hint="Remove it, or set TORCHINDUCTOR_CACHE_DIR to a folder of yours.",
        )
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.utime(folder)
    _remove_unused(folder)


def _code_digest() -> str:
    """Of what torch's own key leaves out: backward passes of our operators, and what is recomputed. Users may edit them."""
    here = Path(__file__).parent
    files = sorted((*here.glob("*.py"), *(here.parent / "model").glob("*.py")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _remove_unused(folder: Path) -> None:
    """Remove the folders of other versions that no run has used for UNUSED_DAYS."""
    for other in folder.parent.iterdir():
        with contextlib.suppress(OSError):
            if other != folder and time.time() - other.stat().st_mtime > UNUSED_DAYS * 24 * 3600:
                shutil.rmtree(other)
