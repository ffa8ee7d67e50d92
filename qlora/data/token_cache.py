"""Tokenized data of earlier runs, found by content: the same examples, tokenizer, template and code give the same samples.

An entry is a folder with the samples' numbers and an index. Nothing in it is executed, and its digest is checked.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.cache import cache_folder
from qlora.config import TrainConfig

if TYPE_CHECKING:
    from qlora.data.template import PromptTemplate

MAX_ENTRIES = 10  # the ones that were used last
ABANDONED_S = 24 * 3600  # age of what a process that died was writing


def entry(examples_sha256: str, template: "PromptTemplate", config: TrainConfig) -> Path | None:
    """The folder of these samples, which may not exist yet; None for a tokenizer that cannot be identified, such as a slow one.

    Args:
        examples_sha256: of all examples.
        template: all of it that changes ids. The date counts where the chat template prints it.
        config: max_length, on_long and loss_on are read.
    """
    tokenizer = template.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    chat_template = repr(tokenizer.chat_template)
    settings = template._replace(tokenizer=None, special=template.special.pattern)  # type: ignore[arg-type]
    if template.name == "plain" or "strftime_now" not in chat_template:
        settings = settings._replace(date="")
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__} {getattr(tokenizer, 'split_special_tokens', None)}"
    versions = [importlib.metadata.version(package) for package in ("tokenizers", "transformers", "jinja2")]
    here = Path(__file__).parent
    code = [(here / f"{name}.py").read_text() for name in ("messages", "template", "dataset")]  # users may edit them
    parts = [examples_sha256, backend.to_str(), chat_template, repr(tokenizer.special_tokens_map), repr(settings), kind,
             *versions, repr((config.max_length, config.on_long, config.loss_on)), *code]  # fmt: skip
    return cache_folder() / "tokenized" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def numbers_of(folder: Path) -> Path:
    """The file of an entry's numbers."""
    return folder / "numbers.bin"


def read_index(folder: Path) -> dict[str, Any]:
    """What an entry holds beside the numbers.

    Raises:
        OSError, ValueError: if it is not there or damaged.
    """
    sha256, _, text = (folder / "index.json").read_text().partition("\n")
    if sha256 != hashlib.sha256(text.encode()).hexdigest():
        raise ValueError("the index is not what was written")
    index: dict[str, Any] = json.loads(text)
    return index


def touch(folder: Path) -> None:
    """Mark an entry as used now."""
    os.utime(folder)


def write(folder: Path, numbers: memoryview, index: Mapping[str, Any]) -> None:
    """Make an entry, whole or not at all, and remove those that were not used for the longest time.

    Raises:
        OSError: if the cache cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", ignore_cleanup_errors=True) as aside:
        whole = Path(aside) / "entry"
        whole.mkdir()
        numbers_of(whole).write_bytes(numbers)
        text = json.dumps(index)
        (whole / "index.json").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        shutil.rmtree(folder, ignore_errors=True)  # one that was damaged
        whole.rename(folder)
    for path in folder.parent.glob(".*"):
        if path.stat().st_mtime < time.time() - ABANDONED_S:
            shutil.rmtree(path, ignore_errors=True)
    by_age = sorted((path for path in folder.parent.iterdir() if path.name[0] != "."), key=lambda path: path.stat().st_mtime)
    for path in by_age[:-MAX_ENTRIES]:
        shutil.rmtree(path, ignore_errors=True)
