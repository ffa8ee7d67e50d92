"""Atomic checkpoints: folders written aside, with a manifest, and verified before older ones are removed.

A checkpoint holds all that the loop needs to resume as if it had not stopped: adapter, optimizer state, place in the data. It
holds no state of a generator, since order and dropout are functions of seed, epoch and micro-batch. Tensors as safetensors, the
rest as JSON; nothing in it is ever executed, and no path in it is ever opened.
"""

import contextlib
import copy
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError

from qlora.errors import CheckpointError, ConfigError
from qlora.model.optimizer import init_optimizer_state, loss_scaling
from qlora.run.files import MANIFEST, Content, Pieces, require_space, size_of, verify, write_folder
from qlora.run.schema import RunInfo, State, read_json
from qlora.validation import UNREADABLE, reason

ADAPTER, TRAINER_STATE, STATE = "adapter_model.safetensors", "trainer_state.safetensors", "state.json"
TRAINED = "trained."  # before the names of trained parameters that PEFT's file does not hold
PEFT = {"format": "pt"}  # what PEFT writes into the header
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
NAME = re.compile(r"step-(\d{6,})")


class TrainState(NamedTuple):
    """Where a run is. It stops between optimizer steps only, so this is all there is to know."""

    step: int = 0
    epoch: int = 1
    samples: int = 0  # of this epoch's order that have been trained on
    skipped: int = 0  # steps skipped so far, as not finite


def problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint: as `verify` says, or a file missing, or the folder of another step."""
    if problem := verify(folder):
        return problem
    entries = json.loads((folder / MANIFEST).read_bytes())["files"]
    if missing := sorted({ADAPTER, TRAINER_STATE, STATE} - entries.keys()):
        return f"{MANIFEST} does not list {missing[0]}"
    try:
        state = read_state(folder)
    except UNREADABLE as error:
        return f"{STATE} is damaged ({reason(error)})"
    return None if folder.name == f"step-{state.step:06d}" else f"{STATE} is that of step {state.step}"


def read_state(folder: Path) -> State:
    """The JSON part of a checkpoint; any of UNREADABLE if it is damaged."""
    return read_json(folder / STATE, State)


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
    """Remove old checkpoints: `keep` stay, the newest of them and the one with the lowest eval loss.

    Args:
        checkpoints: folder of all checkpoints of the run; the newest has just been verified.
        keep: 2 at least, so that a second one is there if the newest is damaged later.
        losses: step -> eval loss, as far as it is known.
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
    """The one of `steps` with the lowest finite eval loss, in a list; an empty list if none of them has one."""
    known = [step for step in steps if math.isfinite(losses.get(step, math.nan))]
    return [min(known, key=lambda step: losses[step])] if known else []


def _has_its_files(folder: Path) -> bool:
    try:
        entries = json.loads((folder / MANIFEST).read_bytes())["files"]
        return all((folder / name).stat().st_size == entry["size"] for name, entry in entries.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


# -- the state of a run ------------------------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    """All that a checkpoint holds, copied to the host, so that it can be written while training continues."""

    step: int
    files: dict[str, Content]
    copied: torch.cuda.Event | None  # when the copies are complete; None if they are


def snapshot(model: Any, optimizer: torch.optim.Optimizer, train_state: TrainState, info: RunInfo) -> Snapshot:
    """Copy the state of a run to the host. On a GPU the copies are queued behind the work so far; nothing waits for them.

    Args:
        model: with adapters; all that requires a gradient is saved, in the dtype it has.
        optimizer: over those parameters; its state is saved by their names.
        train_state: after a whole step.
        info: what a resumed run is compared with.
    """
    tensors, plain = trainer_state(model, optimizer)
    state = {**train_state._asdict(), "optimizer_class": type(optimizer).__name__, "optimizer": plain}
    state["loss_scaling"] = loss_scaling(optimizer)
    adapter = _adapter(model)
    tensors |= {TRAINED + name: parameter for name, parameter in _beside(adapter, model).items()}
    files: dict[str, Content] = {ADAPTER: serialized(adapter, PEFT), TRAINER_STATE: serialized(tensors)}
    files |= {**dict(config_files(model)), STATE: json.dumps(info.model_dump() | state, indent=1).encode()}
    copied = None
    if torch.cuda.is_initialized():
        copied = torch.cuda.Event()
        copied.record()
    return Snapshot(train_state.step, files, copied)


def reserve_host_memory(optimizer: torch.optim.Optimizer) -> None:
    """Have torch page-lock the memory of a snapshot and keep it: 0.6 s for 0.6 GB, for which the first save would wait."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.is_cuda]
    adapter = sum(parameter.numel() * parameter.element_size() for parameter in parameters)  # bytes
    # Two moments and a counter each; those in 8 bits are small, and reserved when they are first saved.
    moments = 2 * adapter + 4 * len(parameters) if isinstance(optimizer, torch.optim.AdamW) else 0
    kept = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in (adapter, moments) if size]
    del kept  # the allocator hands them out again


def write(checkpoints: Path, taken: Snapshot) -> Path:
    """Write `checkpoints`/step-000012.

    Args:
        checkpoints: folder of all checkpoints of the run.
        taken: what it holds.

    Raises:
        CheckpointError: if the disk is full, or what is read back is not what was written.
    """
    if taken.copied is not None:
        taken.copied.synchronize()
    folder = checkpoints / f"step-{taken.step:06d}"
    require_space(checkpoints, sum(map(size_of, taken.files.values())))
    write_folder(folder, taken.files)
    return folder


def serialized(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Pieces:
    """Tensors in safetensors' format: the header, then a block of the host's memory that the tensors are copied to.

    See https://github.com/huggingface/safetensors#format. One block, as the thread that hashes and writes it would wait for
    Python's lock after each piece. Copies from a GPU are queued, and the block is page-locked: synchronize before reading it.

    Args:
        tensors: on any device.
        metadata: text for the header.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    on_gpu = any(tensor.is_cuda for tensor in tensors.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    block = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)  # [bytes]
    end = 0
    # Those with the largest elements first, so that each is aligned to its own.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
        block[begin:end].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=on_gpu)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, memoryview(block.numpy())]  # type: ignore[arg-type]


def adapter_files(model: Any, tokenizer: Any = None) -> Iterator[tuple[str, Content]]:
    """Name and content of an adapter's files in PEFT's format, which `AutoPeftModelForCausalLM.from_pretrained` loads.

    By hand rather than `save_pretrained`, which asks the hub about the base model and adds a model card of blank fields.
    """
    content = serialized(_adapter(model), PEFT)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    yield ADAPTER, content
    yield from config_files(model, tokenizer)


def _adapter(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict  # here, as qlora.model.third_party must be the first to import it

    training = model.training
    model.eval()  # virtual tokens may come from a network with dropout
    with torch.no_grad():
        tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    model.train(training)
    return tensors


def config_files(model: Any, tokenizer: Any = None) -> Iterator[tuple[str, bytes]]:
    """Name and content of adapter_config.json and, with a tokenizer, of its files."""
    lora = model.peft_config["default"]
    with tempfile.TemporaryDirectory() as scratch:
        saved = copy.copy(lora)
        saved.inference_mode = True  # so that loading it freezes it, as PEFT's own save does
        for name, value in vars(lora).items():
            if isinstance(value, set):  # whose order changes from run to run
                setattr(saved, name, sorted(value))
        saved.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                yield str(path.relative_to(scratch)), path.read_bytes()


def trainer_state(model: Any, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimizer state as KIND.PARAMETER -> tensor, and the part that is no tensor."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, torch.Tensor) else plain)[f"{kind}.{name}"] = value
    return tensors, plain


def trained_tensors(model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Adapters and what the optimizer keeps for them, in the order of their names."""
    state = trainer_state(model, optimizer)[0]
    return [*_trained(model).values(), *(state[name] for name in sorted(state))]


def restore(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> TrainState:
    """Put adapter and optimizer back as they were, each tensor in its dtype.

    Args:
        folder: a checkpoint that has been verified.
        model: with adapters of the same names, shapes and dtypes.
        optimizer: over them, of the same kind as the one saved.

    Raises:
        UserError: exit 4 if a tensor is missing, surplus, or of another shape or dtype; 2 if the optimizer is another.
    """
    state = read_state(folder)
    if state.optimizer_class != type(optimizer).__name__:
        raise ConfigError(
            f"{folder} was saved with {state.optimizer_class}, this loop has {type(optimizer).__name__}. Their states "
            "differ: start a new run.",
        )
    tensors = {name: each for name, each in _tensors(folder / TRAINER_STATE).items() if not name.startswith(TRAINED)}
    load_adapter(folder, model)
    optimizer.param_groups[0] |= state.loss_scaling
    _restore_optimizer(folder, optimizer, _trained(model), {**tensors, **state.optimizer})
    return TrainState(state.step, state.epoch, state.samples, state.skipped)


def load_adapter(folder: Path, model: Any) -> None:
    """Copy the adapter of a checkpoint into the model, each tensor in its dtype.

    Args:
        folder: a checkpoint that has been verified.
        model: with adapters of the same names, shapes and dtypes.

    Raises:
        CheckpointError: if a tensor is missing, surplus, or of another shape or dtype.
    """
    adapter, saved = _adapter(model), _tensors(folder / ADAPTER)
    by_memory = {parameter.data_ptr(): parameter for parameter in _trained(model).values()}
    # By PEFT's own names. What is not trained, such as the projections of VeRA, is a function of the configuration.
    saved_as = {name: by_memory.get(tensor.data_ptr(), tensor) for name, tensor in adapter.items()}
    saved_as |= {TRAINED + name: parameter for name, parameter in _beside(adapter, model).items()}
    saved |= {name: each for name, each in _tensors(folder / TRAINER_STATE).items() if name.startswith(TRAINED)}
    found = {name: _shape_and_dtype(tensor) for name, tensor in saved.items()}
    wanted = {name: _shape_and_dtype(parameter) for name, parameter in saved_as.items()}
    if found != wanted:
        name = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise CheckpointError(f"{folder} does not fit the model: {name} is {found.get(name)} there, {wanted.get(name)} here.")
    with torch.no_grad():
        for name, parameter in saved_as.items():
            parameter.copy_(saved[name])


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except SafetensorError as error:
        raise CheckpointError(f"{path.parent} does not hold tensors as it should: {error}.") from None


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _beside(adapter: dict[str, torch.Tensor], model: Any) -> dict[str, torch.nn.Parameter]:
    """What is trained and not in PEFT's file: the network that makes virtual tokens, or what an edit of the loop trains."""
    held = {tensor.data_ptr() for tensor in adapter.values()}
    return {name: parameter for name, parameter in _trained(model).items() if parameter.data_ptr() not in held}


def _restore_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter], saved: dict[str, Any]
) -> None:
    """Put back KIND.PARAMETER -> value, as trainer_state gave them; `folder` is named in errors.

    Not by optimizer.load_state_dict: it casts to the parameter's dtype, and what was saved is to come back as it was. State
    that the optimizer has allocated is written in place, as it may be paged memory or shared.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in named}
    for key, value in saved.items():
        kind, _, name = key.partition(".")
        if name not in named:
            raise CheckpointError(f"{folder} has optimizer state for {name}, which is not trained here.")
        found[name][kind] = value
    optimizer.state.clear()
    init_optimizer_state(optimizer)
    first = next(iter(found.values()), {})
    for name, parameter in named.items():
        state = optimizer.state[parameter]
        if found[name].keys() != (state or first).keys():  # 8-bit moments have maps and scales, small tensors' have none
            raise CheckpointError(
                f"{folder} has optimizer state for some of the trained tensors only: {name} lacks it, or has other state.",
            )
        for kind, value in found[name].items():
            begun = state.get(kind, value)
            if _shape_and_dtype(value) != _shape_and_dtype(begun):
                there, here = _shape_and_dtype(value), _shape_and_dtype(begun)
                raise CheckpointError(f"{folder} does not fit the optimizer: {kind} of {name} is {there} there, {here} here.")
            if kind in state and isinstance(value, torch.Tensor):
                begun.copy_(value)
            else:
                state[kind] = value.to(parameter.device) if isinstance(value, torch.Tensor) else value


def _shape_and_dtype(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value)
