"""Where this program keeps what it can make again: demo models and tokenized data. Imports no torch."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """qlora-train under XDG_CACHE_HOME, which is ~/.cache if unset; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-train"
