"""A trained adapter and its base, from whatever folder: found and checked without weights, then loaded.

What evaluates, generates or merges opens it here. `open_adapter` reads small files only, so that a mistake costs no time;
`load_adapted` loads the weights, as often and in whatever precision they are wanted.
"""

import contextlib
import copy
import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from qlora.commands.options import EvalDataOptions, GenerateOptions
from qlora.config import EMBEDDED, PromptFormat, Quantization, TrainConfig
from qlora.data.dataset import column_options
from qlora.data.formats import ColumnOptions, Prompt
from qlora.data.template import CannotRender, PromptTemplate, encode_prompt, load_template
from qlora.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem, UserError, user_error_on_oom
from qlora.model import attention
from qlora.model.adapter_config import ADAPTER_CONFIG, read_adapter_config
from qlora.model.demo import model_source
from qlora.model.load import fingerprint, load_base_model, load_meta_model, load_tokenizer, stored_quantization
from qlora.model.lora import keep_whole_in_fp32
from qlora.model.peft_config import check_rows_of_head
from qlora.model.supported import quantization_values
from qlora.model.third_party import peft
from qlora.run import checkpoint
from qlora.run.files import MANIFEST, verify
from qlora.run.folder import FINISHED, LOCK, RUN, is_going
from qlora.run.schema import RunInfo, read_json
from qlora.validation import UNREADABLE, reason

OF_THE_RUN = ("model", "revision", "prompt_format", "loss_on", "max_length", "on_long", "allow_drop", "train_file",
              "eval_file")  # fmt: skip
OF_THE_BASE = {"quantization": "nf4", "precision": "bf16"}  # what runs of older versions had, which did not store them
OF_THE_COLUMNS = ("columns", "ignore_columns")  # runs of older versions did not have them
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"


class Adapter(NamedTuple):
    """An adapter on disk that fits its base, of which no weight has been read."""

    folder: Path  # with adapter_config.json and adapter_model.safetensors
    lora: Any  # peft.LoraConfig
    config: TrainConfig  # OF_THE_RUN as the run had them, defaults where there is no run; model, revision and format resolved
    source: str  # of the base, as transformers takes it
    meta_model: Any  # the base on the meta device
    template: PromptTemplate
    device: torch.device
    run_info: RunInfo | None  # of the run or of the checkpoint
    notes: tuple[str, ...]  # lines for the log

    @property
    def is_stored_quantized(self) -> bool:
        """Whether the base is, so that it cannot be loaded otherwise."""
        return quantization_values(self.meta_model.config) is not None


def open_adapter(
    path: Path,
    model: str | None = None,
    prompt_format: PromptFormat | None = None,
    trust_remote_code: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Adapter:
    """Find an adapter, its base and its prompt format, and check that they fit; no weight is read.

    Args:
        path: a run folder, its adapter/ or one of its checkpoints, or any folder with a LoRA adapter in PEFT's format.
        model: base to use in place of the one that the adapter names: hub id, folder, demo or tiny-random.
        prompt_format: None takes the run's; an adapter of another program does not tell, so there it must be given.
        trust_remote_code: as in training; never taken from a file.
        device: where the model will be; auto takes the GPU if there is one.

    Raises:
        UserError: exit 4 if there is no sound adapter, or its run is not complete or still going; 2 if it is of a kind that is
            not supported (see Settings), does not fit the base, or does not tell its base or prompt format; 7 if the base or
            the GPU is not there.
    """
    place = _device(device)
    folder, run_info = _find(path)
    lora = read_adapter_config(folder)
    known: dict[str, Any] = {**run_info.config} if run_info else {}
    kept = {name: known[name] for name in OF_THE_RUN if name in known}
    kept |= {name: tuple(known[name]) for name in (*OF_THE_COLUMNS, "train_file", "eval_file") if known.get(name) is not None}
    notes: list[str] = []
    base, revision = _base(folder, lora, kept.get("model"), model, notes)
    format_name = prompt_format or kept.get("prompt_format")
    if format_name is None:
        raise ConfigError(
            f"{folder} does not record its prompt format.",
            hint="Pass --prompt-format chat (the model's own template) or --prompt-format plain.",
        )
    changed = {"model": base, "revision": revision, "prompt_format": format_name, "trust_remote_code": trust_remote_code}
    config = TrainConfig(**{**kept, **changed})
    source = model_source(base)
    if run_info:
        of_the_base: dict[str, Any] = {name: known.get(name, usual) for name, usual in OF_THE_BASE.items()}
    else:
        of_the_base = {"quantization": stored_quantization(source, config) or "nf4"}
    config = dataclasses.replace(config, **of_the_base)
    meta_model = load_meta_model(source, dataclasses.replace(config, max_length=1))
    config = dataclasses.replace(config, max_length=min(config.max_length, _positions(meta_model, lora) or config.max_length))
    _check_fit(folder, lora, source, copy.deepcopy(meta_model))
    attn = attention.choose_attention(config, place, meta_model)
    config = dataclasses.replace(config, attn_implementation=attn.implementation)
    own_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder) if own_tokenizer else source, meta_model, config)
    date = run_info.date if run_info else None  # prompts are those of training
    template = load_template(tokenizer, config.prompt_format, date)
    return Adapter(folder, lora, config, source, meta_model, template, place, run_info, tuple(notes))


def load_adapted(adapter: Adapter, quantization: Quantization | None = None) -> Any:
    """The base with the adapter on it, in eval mode, all frozen; `model.disable_adapter()` is the base alone.

    Args:
        adapter: from open_adapter.
        quantization: of the base's linear layers; None is that of training. The adapter is in fp32, for autocast to cast.

    Raises:
        UserError: exit 7 if the weights are not there or are broken, 2 if the base does not exist in that form, or if it
            is not the one that the run trained against (compared by its bytes, only on the same kind of device).
    """
    trained_in = adapter.config.quantization
    chosen = quantization or trained_in
    if chosen != trained_in and adapter.is_stored_quantized:
        raise ConfigError(
            f"{adapter.source} is stored in {trained_in.upper()}, so it cannot be loaded with quantization {chosen}.",
            hint="Name the same model in bf16 with --model.",
        )
    attn = attention.choose_attention(adapter.config, adapter.device, adapter.meta_model)
    base = load_base_model(adapter.source, adapter.config, attn.loaded_as, adapter.device, chosen)
    model = put_on(base, adapter)
    info = adapter.run_info if chosen == trained_in else None
    if info and info.weights and info.device == adapter.device.type and fingerprint(model) != info.weights:
        raise ConfigError(
            f"{adapter.source} is not the base that {adapter.folder} was trained against: weights or config.json differ.",
            hint="Name that base with --model.",
        )
    return model.eval()


def put_on(base: Any, adapter: Adapter) -> Any:
    """A base as a PeftModel with the adapter on it; what PEFT warns of, open_adapter has compared or refused."""
    with warnings.catch_warnings(action="ignore"):
        model = peft.PeftModel.from_pretrained(base, str(adapter.folder))
        if any(isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper) for module in model.modules()):
            keep_whole_in_fp32(model)  # PEFT has read them in the dtype of the base
            peft.set_peft_model_state_dict(model, load_file(adapter.folder / checkpoint.ADAPTER))
        return model


def positions_of(adapter: Adapter) -> int | None:
    """How many positions the base has for ids, beside those of virtual tokens; None if it does not tell."""
    return _positions(adapter.meta_model, adapter.lora)


def _positions(meta_model: Any, method: Any) -> int | None:
    positions = getattr(meta_model.config.get_text_config(), "max_position_embeddings", None)
    before = method.num_virtual_tokens if method.is_prompt_learning else 0
    return None if positions is None else positions - before


def prompt_ids(prompt: Prompt, adapter: Adapter, max_new_tokens: int) -> list[int]:
    """Ids of a prompt that leaves room for its answer.

    Raises:
        DataError: naming where the prompt stands, if it does not, or if the chat template refuses it.
    """
    try:
        ids = encode_prompt(prompt.messages, adapter.template, prompt.tools)
    except CannotRender as error:
        raise DataError(f"{prompt.where}: {error}.", hint=error.hint) from None
    positions = positions_of(adapter)
    if positions is not None and len(ids) + max_new_tokens > positions:
        raise DataError(
            f"{prompt.where}: {len(ids)} tokens and --max-new-tokens {max_new_tokens} are more than the model's positions, "
            f"{positions}.",
            hint="Shorten the prompt or lower --max-new-tokens.",
        )
    return ids


def columns_of(options: EvalDataOptions | GenerateOptions, adapter: Adapter) -> ColumnOptions:
    """Names of columns, and those that are ignored: as the command was told, else as in the run.

    Raises:
        ConfigError: if they cannot be used.
    """
    flags = {name: getattr(options, name) for name in OF_THE_COLUMNS if getattr(options, name) is not None}
    return column_options(dataclasses.replace(adapter.config, **flags))


def oom_as_user_error_with(advice: str) -> contextlib.AbstractContextManager[None]:
    """A block in which running out of memory is an error that tells what to do.

    Raises:
        OutOfMemory.
    """
    more = "A quantized base on a GPU with more memory, or --device cpu, may help too."
    return user_error_on_oom(lambda reason: f"Memory ran out ({reason}). {advice} {more}")


def _device(name: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise EnvironmentProblem("--device cuda: torch sees no CUDA GPU here.", hint="Leave it out to use the CPU.")
    return torch.device("cuda", 0) if has_gpu and name != "cpu" else torch.device("cpu")


# -- where it is -----------------------------------------------------------------------------------------------------


def _find(path: Path) -> tuple[Path, RunInfo | None]:
    """The folder with the adapter, and what its run or checkpoint tells, if it is of one."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        text = f"{path} {what}. Give a run folder, its adapter/, one of its checkpoints, or a folder with {ADAPTER_CONFIG}."
        if re.fullmatch(HUB_ID, str(path)) and not path.parent.exists():
            text += f" If it is an adapter on the hub, download it first: hf download {path} --local-dir {path.name}"
        raise CheckpointError(text)
    is_run = (path / LOCK).exists() or (path / RUN).exists()
    folder = path / "adapter" if is_run else path
    run = path if is_run else path.absolute().parent
    is_checkpoint = checkpoint.NAME.fullmatch(path.absolute().name) is not None and (path / checkpoint.STATE).exists()
    if not is_checkpoint and is_going(run):
        raise CheckpointError(
            f"{run} is still being trained.",
            hint=f"Wait for it, or name one of its checkpoints: {run / 'checkpoints'}/step-...",
        )
    if is_run:
        _check_complete(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        whole = "It holds a whole model: merged already?" if (path / "config.json").exists() else "Is it another folder?"
        raise CheckpointError(
            f"{path} holds no adapter: there is no {ADAPTER_CONFIG} in it. {whole} A run folder, its adapter/, or one of its "
            "checkpoints will do, or any adapter in PEFT's format.",
        )
    if (folder / MANIFEST).exists() and (problem := verify(folder)):
        raise CheckpointError(f"{folder} is damaged: {problem}.", hint="Take another checkpoint, or get it again.")
    return folder, _read_run_info(folder / checkpoint.STATE if is_checkpoint else run / RUN)


def _check_complete(run: Path) -> None:
    if (run / FINISHED).exists():
        return
    found = list(checkpoint.by_step(run / "checkpoints").values())
    advice = f"name its newest checkpoint, {found[-1]}" if found else "train it first: it has no checkpoint"
    raise CheckpointError(
        f"{run} holds a run that is not complete.",
        hint=f"Resume it with the command that started it, or {advice}.",
    )


def _read_run_info(path: Path) -> RunInfo | None:
    """run.json or a checkpoint's state.json; None where the folder is of no run of this program."""
    if not path.is_file():
        return None
    try:
        run_info = read_json(path, RunInfo)
        if missing := [*(set(OF_THE_RUN) - run_info.config.keys()), *(() if run_info.weights else ("weights",))]:
            raise KeyError(min(missing))
        TrainConfig(max_length=run_info.config["max_length"]).check()
    except (*UNREADABLE, UserError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({reason(error)}).",
            hint="Move the adapter's folder elsewhere to do without it.",
        ) from None
    return run_info


# -- what it is ------------------------------------------------------------------------------------------------------


def _base(folder: Path, lora: Any, of_the_run: str | None, asked: str | None, notes: list[str]) -> tuple[str, str | None]:
    """Name and revision of the base: the one asked for, the run's embedded one, or adapter_config.json's."""
    named = of_the_run if of_the_run in EMBEDDED else lora.base_model_name_or_path
    if asked is not None:
        if named is not None and asked != named and model_source(asked) != model_source(named):
            notes.append(f"The adapter names the base {named}; {asked} is used, as asked.")
        return asked, lora.revision if asked == named else None
    if not named:
        raise ConfigError(f"{folder / ADAPTER_CONFIG} names no base model.", hint="Name it with --model.")
    if Path(named).is_absolute() and not Path(named).is_dir():
        raise ConfigError(
            f"{folder / ADAPTER_CONFIG} names the base {named}, and there is no such folder here.",
            hint="Say with --model where it is.",
        )
    return named, None if Path(named).is_dir() or named in EMBEDDED else lora.revision


def _check_fit(folder: Path, lora: Any, source: str, meta_model: Any) -> None:
    """Compare names and shapes: PEFT loads what fits, leaves the rest at its start, and warns.

    Args:
        folder: with adapter_model.safetensors.
        lora: its configuration.
        source: of the base, for the message.
        meta_model: the base on the meta device; adapters are hung on it.
    """
    path = folder / checkpoint.ADAPTER
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder} has its weights as adapter_model.bin, which may run code when it is read.",
            hint="Save it as safetensors.",
        )
    try:
        with safe_open(path, "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None
    if getattr(lora, "bias", "none") != "none" and any(name.endswith(".bias") and "lora_" not in name for name in stored):
        raise ConfigError(
            f"{folder} has biases of the base itself (bias {lora.bias}), which stay when the adapter is switched off, so "
            "that there is no base to compare it with. Only bias none is supported here.",
        )
    own = copy.deepcopy(lora)
    own.base_model_name_or_path = None  # PEFT puts in the model's, and warns where there was another
    of_the_base = {f"base_model.model.{name}": tuple(tensor.shape) for name, tensor in meta_model.state_dict().items()}
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # what it warns of is compared, or refused, below
            adapted = peft.get_peft_model(meta_model, own)
            state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except ValueError as error:
        why = " ".join(str(error).split())[:300]
        raise ConfigError(f"{folder} does not fit {source}: {why} Is that its base?", hint="--model names another.") from None
    except (re.error, TypeError, KeyError, AttributeError, RuntimeError) as error:  # a pattern, for the most part
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} cannot be read ({reason(error)}).") from None
    _check_ends(folder, adapted)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if surplus := [name for name in differing if name in of_the_base and name not in wanted]:
        name = surplus[0]
        text = f"{path} holds weights of the base itself, {name} first, which is not supported"
        if stored[name] != of_the_base[name]:
            tokens, rows = stored[name][0], of_the_base[name][0]
            advice = "Merge it with PEFT itself."
            raise ConfigError(f"{text}: its vocabulary was resized to {tokens} tokens, {source} has {rows}.", hint=advice)
        advice = "If they were not trained, save the adapter again with PEFT's save_embedding_layers=False."
        raise ConfigError(f"{text}.", hint=advice)
    if differing:
        name = differing[0]
        here, there = (f"of shape {shapes[name]}" if name in shapes else "not" for shapes in (stored, wanted))
        raise ConfigError(
            f"{folder} does not fit {source}: {len(differing)} tensors differ. {name} is {here} in the file, and would be "
            f"{there} there{f' with rank {lora.r}' if hasattr(lora, 'r') else ''}.",
            hint="Either the base is another (--model names it), or adapter_config.json and the weights do not belong "
            "together.",
        )


def _check_ends(folder: Path, adapted: Any) -> None:
    """Refuse low-rank updates of the embedding and the head; whole ones (modules_to_save) and rows are fine.

    A loss is had of the head's weight (loss.Head), and not of LoRA beside it. Where embedding and head are one tied weight,
    PEFT merges into both what was trained into one.
    """
    head = adapted.get_output_embeddings()
    ends = {"embedding": adapted.get_input_embeddings(), "head": head}
    if found := [name for name, layer in ends.items() if isinstance(layer, peft.tuners.lora.LoraLayer)]:
        text = f"{folder} has LoRA on the {' and the '.join(found)} of its base. That is not supported: losses and merges could"
        advice = "Train them whole, with modules_to_save, or only the layers between them; PEFT itself can load it."
        raise ConfigError(f"{text} be wrong. {advice}")
    check_rows_of_head(adapted, str(folder))
