"""Checkpoints that are whole or not there: folders written aside, with a manifest, and verified before older ones go.

A checkpoint holds all that the loop needs to go on as if it had not stopped: adapter, optimizer state, generators, place in
the data. Tensors as safetensors, the rest as JSON; nothing in it is ever executed, and no path in it is ever opened.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pydantic
import safetensors.torch
import torch
from safetensors import SafetensorError
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on alone

from qlora.config import ExitCode, UserError
from qlora.optimizer import begin_state

MANIFEST = "MANIFEST.json"
ADAPTER, TRAINER_STATE, STATE = "adapter_model.safetensors", "trainer_state.safetensors", "state.json"
NAME = re.compile(r"step-(\d{6,})")
OURS = r"step-\d{6,}|adapter|plots|(config|env|run|finished|metrics|samples|report|README)\.\w+"
LEFTOVER = re.compile(rf"\.({OURS})(\.old)?\.tmp")


# What an unreadable file raises when it is read: not there, no text, no JSON, of wrong types, out of range, nested without end.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)


class Environment(TypedDict):
    """Of tracking.environment, what a resumed run is compared with."""

    packages: dict[str, str | None]
    python: str
    device: str
    cuda: str | None
    commit: str | None


class State(TypedDict):
    """What state.json tells that going on from a checkpoint needs."""

    step: int
    epoch: int
    samples: int
    skipped: int
    optimizer_class: str
    optimizer: dict
    environment: Environment
    weights: str


class Progress(NamedTuple):
    """Where a run is. It stops between optimizer steps only, so this is all there is to know."""

    step: int = 0
    epoch: int = 1
    samples: int = 0  # of this epoch's order that have been trained on
    skipped: int = 0  # windows left out so far, as not finite


# -- files and folders, whole or not at all ----------------------------------------------------------------------------


def write_file(path: Path, data: bytes) -> None:
    """Replace a file: its old content stays until the new one is safe on disk.

    Raises:
        UserError: exit 4 if it cannot be written.
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


def write_folder(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    """Write a folder so that it is seen whole or not at all, whenever the process dies; one of that name is replaced.

    Files, then the manifest with their sizes and SHA-256, each flushed to disk, in a folder beside; then that takes the name.
    What was written is read again and compared.

    Args:
        folder: to be made; its parent is there.
        files: content by name, or a file on the same disk, too large for memory, that is moved; names may have folders in them.

    Raises:
        UserError: exit 4 if it cannot be written, or reads back otherwise than it was written.
    """
    aside, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old.tmp")
    manifest: dict[str, dict[str, Any]] = {}
    try:
        manifest |= {name: size_and_sha256(data) for name, data in files.items()}
        for leftover in (aside, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        aside.mkdir()
        for name, data in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            _write(aside / name, data)
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
        raise cannot_write(folder, sum(entry["size"] for entry in manifest.values()), error) from None
    if problem := verify(folder):
        text = f"{folder} was written and reads back otherwise: {problem}. Is the disk sound? Earlier checkpoints were kept."
        raise UserError(ExitCode.CHECKPOINT, text)


def size_and_sha256(data: bytes | Path) -> dict[str, Any]:
    """`size` in bytes and `sha256` of a file that is to be, or of one that is there: its entry in a manifest."""
    if isinstance(data, bytes):
        return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with data.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write(path: Path, data: bytes | Path) -> None:
    if isinstance(data, Path):
        data.rename(path)
    with path.open("ab" if isinstance(data, Path) else "xb") as file:
        if isinstance(data, bytes):
            file.write(data)
            file.flush()
        os.fsync(file.fileno())


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
        if not LEFTOVER.fullmatch(path.name):
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
    return UserError(ExitCode.CHECKPOINT, f"{path} cannot be written: {error.strerror}. {space}. {advice}.")


def require_writable(path: Path, *read: str | Path | None) -> None:
    """Refuse to begin if a file or folder that is to be written at the end could not be; nothing is left of the attempt.

    Args:
        path: of the file.
        read: what the command reads, which it must not replace; None and names of the hub are no files.

    Raises:
        UserError: exit 4, or 2 if it is one of the files that are read.
    """
    if path.exists() and any(other is not None and Path(other).exists() and path.samefile(other) for other in read):
        text = f"{path} is read by this command, and would be replaced by what it writes. Name another file."
        raise UserError(ExitCode.CONFIGURATION, text)
    if path.is_dir():
        raise UserError(ExitCode.CHECKPOINT, f"{path} cannot be written: it is a folder. Name a file.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(ExitCode.CHECKPOINT, f"{path} cannot be written: {error.strerror}. Name another file.") from None


def require_space(folder: Path, needed: int, what: str = "checkpoints and adapter") -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        UserError: exit 4, with the bytes needed and free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        text = f"{folder} has {free:,} bytes free, and {needed:,} are needed for {what}. "
        raise UserError(ExitCode.CHECKPOINT, text + "Make room, or choose another --output-dir. Earlier checkpoints were kept.")


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


def problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint: as `verify` says, or a file missing, or the folder of another step."""
    if problem := verify(folder):
        return problem
    entries = json.loads((folder / MANIFEST).read_bytes())["files"]
    if missing := sorted({ADAPTER, TRAINER_STATE, STATE} - entries.keys()):
        return f"{MANIFEST} does not list {missing[0]}"
    try:
        state = read_state(folder)
        check_types(State, state)
    except UNREADABLE as error:
        return f"{STATE} is damaged ({reason(error)})"
    return None if folder.name == f"step-{state['step']:06d}" else f"{STATE} is that of step {state['step']}"


checker = functools.cache(pydantic.TypeAdapter)


def check_types(schema: Any, values: object) -> None:
    """Refuse values, as JSON has them, of other types than a TypedDict names, or that lack one; the rest may be anything.

    Raises:
        ValueError: naming the first that is wrong, and its value.
    """
    try:
        checker(schema).validate_python(values, strict=True)
    except pydantic.ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in wrong["loc"]) or "the whole"
        value = "" if wrong["type"] == "missing" else f" ({place}: {repr(wrong['input'])[:60]})"
        raise ValueError(f"{place}: {wrong['msg']}{value}") from None


def reason(error: BaseException) -> str:
    """An error in some words, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return json.loads((folder / STATE).read_bytes())


def by_step(checkpoints: Path) -> dict[int, Path]:
    """Step -> folder of each checkpoint, sound or not, oldest first; other names are none of ours."""
    found = ((NAME.fullmatch(path.name), path) for path in checkpoints.glob("step-*") if path.is_dir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def newest(checkpoints: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is sound, and what is wrong with those after it, newest first."""
    skipped: dict[Path, str] = {}
    for folder in reversed(by_step(checkpoints).values()):
        problem = problem_of(folder)
        if problem is None:
            return folder, skipped
        skipped[folder] = problem
    return None, skipped


def prune(checkpoints: Path, keep: int, losses: dict[int, float]) -> None:
    """Remove old checkpoints: `keep` stay, the newest of them and the one with the lowest held-out loss.

    Args:
        checkpoints: folder of all checkpoints of the run; the newest has just been verified.
        keep: 2 at least, so that a second one is there if the newest is damaged later.
        losses: step -> held-out loss, as far as it is known.
    """
    folders = by_step(checkpoints)
    # Older ones count only if their files are there in full size; to hash them again at each save would take seconds.
    whole = [step for step, folder in folders.items() if _has_its_files(folder)]
    best = lowest(losses, whole)
    kept = set(best + [step for step in reversed(whole) if step not in best][: keep - len(best)])
    for step in set(whole) - kept:
        aside = checkpoints / f".{folders[step].name}.tmp"
        with contextlib.suppress(OSError):  # a folder that cannot be removed is no reason to stop; the next time may do
            folders[step].rename(aside)  # out of sight first, so that nobody ever sees half of it
            shutil.rmtree(aside)


def lowest(losses: dict[int, float], steps: Iterable[int]) -> list[int]:
    """The one of `steps` with the lowest finite held-out loss, in a list; an empty list if none of them has one."""
    known = [step for step in steps if math.isfinite(losses.get(step, math.nan))]
    return [min(known, key=lambda step: losses[step])] if known else []


def _has_its_files(folder: Path) -> bool:
    try:
        entries = json.loads((folder / MANIFEST).read_bytes())["files"]
        return all((folder / name).stat().st_size == entry["size"] for name, entry in entries.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


# -- the state of a run ------------------------------------------------------------------------------------------------


def save(
    checkpoints: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    facts: dict[str, Any],
) -> Path:
    """Write `checkpoints`/step-000012.

    Args:
        checkpoints: folder of all checkpoints of the run.
        model: with adapters; all that requires a gradient is saved, in the dtype it has.
        optimizer: over those parameters; its state is saved by their names.
        progress: after a whole step.
        facts: JSON values that a resumed run is compared with.

    Raises:
        UserError: exit 4 if the disk is full, or what is read back is not what was written.
    """
    folder = checkpoints / f"step-{progress.step:06d}"
    tensors, plain = trainer_state(model, optimizer)
    state = {**progress._asdict(), "optimizer_class": type(optimizer).__name__, "optimizer": plain, **facts}
    files = dict(adapter_files(model))
    files |= {TRAINER_STATE: safetensors.torch.save(tensors), STATE: json.dumps(state, indent=1).encode()}
    require_space(checkpoints, sum(map(len, files.values())))
    write_folder(folder, files)
    return folder


def adapter_files(model: Any, tokenizer: Any = None) -> Iterator[tuple[str, bytes]]:
    """Name and content of an adapter's files in PEFT's format, which `AutoPeftModelForCausalLM.from_pretrained` loads.

    By hand rather than `save_pretrained`, which asks the hub about the base model and adds a model card of blank fields.
    """
    from peft import get_peft_model_state_dict  # here, as qlora.model must be the first to import it

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    yield ADAPTER, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    lora = model.peft_config["default"]
    with tempfile.TemporaryDirectory() as scratch:
        training = lora.inference_mode
        lora.inference_mode = True  # so that loading it freezes it, as PEFT's own save does
        lora.save_pretrained(scratch)
        lora.inference_mode = training
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                yield str(path.relative_to(scratch)), path.read_bytes()


def trainer_state(model: Any, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimizer state as KIND.PARAMETER -> tensor, with the generators' as rng.NAME; and the part that is no tensor."""
    tensors = {f"rng.{name}": value for name, value in random_state().items()}
    plain, storages = {}, set()
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                plain[f"{kind}.{name}"] = value
                continue
            storage = value.untyped_storage().data_ptr()  # safetensors refuses one tensor by two names: bitsandbytes' maps
            tensors[f"{kind}.{name}"] = value.clone() if storage in storages else value.contiguous()
            storages.add(storage)
    return tensors, plain


def restore(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> Progress:
    """Put adapter, optimizer and generators back as they were, each tensor in its dtype.

    Args:
        folder: a checkpoint that has been verified.
        model: with adapters of the same names, shapes and dtypes.
        optimizer: over them, of the same kind as the one saved.

    Raises:
        UserError: exit 4 if a tensor is missing, surplus, or of another shape or dtype; 2 if the optimizer is another.
    """
    state = read_state(folder)
    if state["optimizer_class"] != type(optimizer).__name__:
        text = f"{folder} was saved with {state['optimizer_class']}, this loop has {type(optimizer).__name__}."
        raise UserError(ExitCode.CONFIGURATION, f"{text} Their states differ: start a new run, with --init-adapter.")
    tensors = _tensors(folder / TRAINER_STATE)
    load_adapter(folder, model)
    set_random_state({name[4:]: tensors.pop(name) for name in list(tensors) if name.startswith("rng.")})
    _restore_optimizer(folder, optimizer, _trained(model), {**tensors, **state["optimizer"]})
    return Progress(*(state[field] for field in Progress._fields))


def load_adapter(folder: Path, model: Any) -> None:
    """Copy the adapter of a checkpoint into the model, each tensor in its dtype.

    Args:
        folder: a checkpoint that has been verified.
        model: with adapters of the same names, shapes and dtypes.

    Raises:
        UserError: exit 4 if a tensor is missing, surplus, or of another shape or dtype.
    """
    adapter = _tensors(folder / ADAPTER)
    saved_as = {name.replace(".default.", "."): parameter for name, parameter in _trained(model).items()}
    form = {name: _form(tensor) for name, tensor in adapter.items()}
    wanted = {name: _form(parameter) for name, parameter in saved_as.items()}
    if form != wanted:
        name = min(name for name in form.keys() | wanted.keys() if form.get(name) != wanted.get(name))
        text = f"{folder} does not fit the model: {name} is {form.get(name)} there, {wanted.get(name)} here."
        raise UserError(ExitCode.CHECKPOINT, text)
    with torch.no_grad():
        for name, parameter in saved_as.items():
            parameter.copy_(adapter[name])


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except SafetensorError as error:
        raise UserError(ExitCode.CHECKPOINT, f"{path.parent} does not hold tensors as it should: {error}.") from None


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _restore_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter], saved: dict[str, Any]
) -> None:
    """Put back KIND.PARAMETER -> value, as trainer_state gave them; `folder` is named in errors.

    Not by optimizer.load_state_dict: it casts to the parameter's dtype, and what was saved is to come back as it was. State
    that the optimizer makes by itself is written into, as it may lie in pages of managed memory or be shared.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in named}
    for key, value in saved.items():
        kind, _, name = key.partition(".")
        if name not in named:
            raise UserError(ExitCode.CHECKPOINT, f"{folder} has optimizer state for {name}, which is not trained here.")
        found[name][kind] = value
    optimizer.state.clear()
    begin_state(optimizer)
    first = next(iter(found.values()), {})
    for name, parameter in named.items():
        state = optimizer.state[parameter]
        if found[name].keys() != (state or first).keys():  # 8-bit moments have maps and scales, small tensors' have none
            text = f"{folder} has optimizer state for some of the trained tensors only: {name} lacks it, or has other state."
            raise UserError(ExitCode.CHECKPOINT, text)
        for kind, value in found[name].items():
            begun = state.get(kind, value)
            if _form(value) != _form(begun):
                text = f"{folder} does not fit the optimizer: {kind} of {name} is {_form(value)} there, {_form(begun)} here."
                raise UserError(ExitCode.CHECKPOINT, text)
            if kind in state and isinstance(value, torch.Tensor):
                begun.copy_(value)
            else:
                state[kind] = value.to(parameter.device) if isinstance(value, torch.Tensor) else value


def _form(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value)


def seed_generators(seed: int) -> None:
    """Start every generator that a training loop might draw from at `seed`."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of the CPU and of every GPU


def random_state() -> dict[str, torch.Tensor]:
    """The state of every generator that a training loop might draw from, as tensors: torch's, CUDA's, Python's, NumPy's."""
    _, words, gauss = random.getstate()
    bits: dict[str, Any] = numpy.random.get_state(legacy=False)
    state = {
        "torch": torch.get_rng_state(),  # [5056] uint8
        "python": torch.tensor(words, dtype=torch.int64),  # [625]
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),  # [0] or [1]
        "numpy": torch.tensor([*bits["state"]["key"].tolist(), bits["state"]["pos"], bits["has_gauss"]]),  # [626] int64
        "numpy_gauss": torch.tensor([bits["gauss"]], dtype=torch.float64),  # [1]
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()  # [16] uint8
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *key, position, has_gauss = state["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(key, numpy.uint32), position, has_gauss, state["numpy_gauss"].item()))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
