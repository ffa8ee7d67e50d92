"""Atomic files and folders: written aside, flushed, verified, and only then renamed."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy

from qlora.errors import CheckpointError, ConfigError, UserError
from qlora.run.schema import with_current_keys

MANIFEST = "MANIFEST.json"
READ_BYTES = 2**23  # at a time; after each, this thread waits for Python's lock, which training holds
RUN_FILES = r"step-\d{6,}|adapter|plots|(config|env|run|finished|metrics|samples|report|README)\.\w+"
Pieces = Sequence[bytes | memoryview]  # of a file's content, in order; memoryviews of bytes
Content = bytes | Pieces | Path
LEFTOVER_FILES = re.compile(rf"\.({RUN_FILES})(\.old)?\.tmp")


# -- files and folders, whole or not at all ----------------------------------------------------------------------------


def write_file(path: Path, data: bytes) -> None:
    """Replace a file: its old content stays until the new one is safe on disk.

    Raises:
        CheckpointError: if it cannot be written.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.unlink(missing_ok=True)
        _write(aside, data)
        aside.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise cannot_write(path, len(data), error) from None


def write_folder(folder: Path, files: Mapping[str, Content]) -> None:
    """Write a folder so that it is seen whole or not at all, whenever the process dies; one of that name is replaced.

    Files, then the manifest with their sizes and SHA-256, each flushed to disk, in a folder beside; then that takes the name.
    What was written is read again and compared.

    Args:
        folder: to be made; its parent is there.
        files: content by name: in one piece or in several, or a file on the same disk, too large for memory, that is moved;
            names may have folders in them.

    Raises:
        CheckpointError: if it cannot be written, or does not read back as it was written.
    """
    aside, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old.tmp")
    manifest: dict[str, dict[str, Any]] = {}
    try:
        for leftover in (aside, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        aside.mkdir()
        manifest |= {name: size_and_sha256(data) for name, data in files.items() if isinstance(data, Path)}
        with ThreadPoolExecutor(1) as hasher:  # beside the disk's work
            hashed = {name: hasher.submit(size_and_sha256, data) for name, data in files.items() if name not in manifest}
            for name, data in files.items():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                _write(aside / name, data)
            manifest = {name: manifest.get(name) or hashed[name].result() for name in files}
        _write(aside / MANIFEST, json.dumps({"files": manifest}, indent=1).encode())
        for path in {aside, *((aside / name).parent for name in files)}:
            sync_folder(path)
        if folder.exists():
            folder.rename(old)  # it comes back if the process dies here: see remove_leftovers
        aside.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise cannot_write(folder, sum(map(size_of, files.values())), error) from None
    wrong = [name for name, data in files.items() if not isinstance(data, Path) and not _reads_back(folder / name, data)]
    problem = f"{wrong[0]} is not what was written" if wrong else None
    if any(isinstance(data, Path) for data in files.values()):
        problem = problem or verify(folder)
    if problem:
        raise CheckpointError(
            f"{folder} was written and reads back otherwise: {problem}. Is the disk sound? Earlier checkpoints were kept.",
        )


def pieces_of(data: bytes | Pieces) -> Pieces:
    """The content of a file as pieces."""
    return [data] if isinstance(data, bytes) else data


def size_of(data: Content) -> int:
    """Bytes of a file that is to be, or of one that is there; 0 for one that is there no more."""
    if isinstance(data, Path):
        return data.stat().st_size if data.exists() else 0
    return sum(map(len, pieces_of(data)))


def size_and_sha256(data: Content) -> dict[str, Any]:
    """`size` in bytes and `sha256` of a file that is to be, or of one that is there: its entry in a manifest."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    digest = hashlib.sha256()
    for piece in pieces_of(data):
        digest.update(piece)
    return {"size": size_of(data), "sha256": digest.hexdigest()}


def _write(path: Path, data: Content) -> None:
    if isinstance(data, Path):
        data.rename(path)
    with path.open("ab" if isinstance(data, Path) else "xb") as file:
        if not isinstance(data, Path):
            file.writelines(pieces_of(data))
            file.flush()
        os.fsync(file.fileno())


def _reads_back(path: Path, data: bytes | Pieces) -> bool:
    """Whether a file holds just this; a comparison is five times as fast as a digest."""
    # Used again and again: new memory would take longer than reading.
    room, equal = memoryview(bytearray(READ_BYTES)), numpy.empty(READ_BYTES, bool)
    with contextlib.suppress(OSError), path.open("rb") as file:
        for piece in pieces_of(data):
            expected = numpy.frombuffer(piece, numpy.uint8)
            for start in range(0, len(expected), READ_BYTES):
                part = expected[start : start + READ_BYTES]
                found = room[: len(part)]
                if file.readinto(found) != len(part):
                    return False
                if not numpy.equal(numpy.frombuffer(found, numpy.uint8), part, out=equal[: len(part)]).all():
                    return False
        return not file.read(1)
    return False


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk; without it a rename may be forgotten when the power fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Clear what a process that died was writing, and put back what it was replacing; other names are left alone."""
    for path in sorted(folder.glob(".*.tmp")):
        replaced = path.with_name(path.name[1:].removesuffix(".old.tmp"))
        if not LEFTOVER_FILES.fullmatch(path.name):
            continue
        if path.name.endswith(".old.tmp") and not replaced.exists():
            path.rename(replaced)
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def cannot_write(path: Path, needed: int, error: OSError) -> UserError:
    """The error for a file or folder that could not be written, with the space it needs and finds."""
    parent = next(folder for folder in (path.parent, *path.parents) if folder.exists())
    space = f"It needs {needed:,} bytes, {shutil.disk_usage(parent).free:,} are free"
    advice = "Make room, or choose another --output-dir; earlier checkpoints were kept"
    return CheckpointError(f"{path} cannot be written: {error.strerror}. {space}. {advice}.")


def require_writable(path: Path, *read: str | Path | None) -> None:
    """Refuse to begin if a file or folder that is to be written at the end could not be; nothing is left of the attempt.

    Args:
        path: of the file.
        read: what the command reads, which it must not replace; None and names of the hub are no files.

    Raises:
        UserError: exit 4, or 2 if it is one of the files that are read.
    """
    if path.exists() and any(other is not None and Path(other).exists() and path.samefile(other) for other in read):
        raise ConfigError(
            f"{path} is read by this command, and would be replaced by what it writes.",
            hint="Name another file.",
        )
    if path.is_dir():
        raise CheckpointError(f"{path} cannot be written: it is a folder.", hint="Name a file.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}.", hint="Name another file.") from None


def require_space(folder: Path, needed: int, what: str = "checkpoints and adapter") -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        CheckpointError: with the bytes needed and free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free:,} bytes free, and {needed:,} are needed for {what}.",
            hint="Make room, or choose another --output-dir. Earlier checkpoints were kept.",
        )


# -- finding and verifying ---------------------------------------------------------------------------------------------


def verify(folder: Path) -> str | None:
    """What is wrong with a folder that write_folder made, naming the file; None if nothing is."""
    try:
        entries = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name, entry in entries.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST} names {name}, which is not inside"
            found = size_and_sha256(folder / name)
            if found["size"] != entry["size"]:
                return f"{name} has {found['size']:,} bytes, {MANIFEST} says {entry['size']:,}"
            if found["sha256"] != entry["sha256"]:
                return f"{name} is not what was written: its SHA-256 differs from that in {MANIFEST}"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    return None


def whole_rows(path: Path, keys: Set[str] = frozenset({"event", "step"})) -> list[dict[str, Any]]:
    """The rows of a JSONL file up to the first that is not whole, as the last is if the process died while writing it.

    Args:
        path: a file; where there is none, there are no rows.
        keys: that a row has at least.
    """
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            row = json.loads(line, object_hook=with_current_keys)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not keys <= row.keys():
            break
        rows.append(row)
    return rows
