"""TrainConfig: one frozen dataclass that becomes flat flags, YAML and --help. Imports no torch, so a typo answers at once.

Each group below is one screen of --help; the docstring under a field is its help text. Names are transformers' and PEFT's.
"""

import dataclasses
import difflib
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from qlora.errors import ConfigError, UserError
from qlora.terminal import echo, redact, redacted_stderr

AttnImplementation = Literal["auto", "flash_attention_2", "varlen", "sdpa", "eager"]
PromptFormat = Literal["plain", "chat"]
LossOn = Literal["response", "all", "last"]
GradientCheckpointing = Literal["auto", "none", "selective", "full"]
Compile = Literal["auto", "none", "layers", "graphs"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"]
Quantization = Literal["nf4", "fp4", "int8", "none"]
Precision = Literal["auto", "bf16", "fp16"]
Overridable = Literal["learning_rate", "warmup_ratio", "num_train_epochs", "max_steps", "weight_decay", "max_grad_norm",
                      "lora_dropout", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
                      "early_stopping_patience",
                      "attn_implementation", "compile", "cache_dequantized", "offload_checkpoints",
                      "shard_base", "deterministic", "eval_file", "model"]  # fmt: skip
EMBEDDED = ("demo", "tiny-random")
REPLACED_BY_PEFT_CONFIG = ("lora_r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules")
PHI3_MINI = "microsoft/Phi-3-mini-4k-instruct"
DEMO_LEARNING_RATE = 4e-4
BUNDLED_TRAIN = Path(__file__).parent / "demo_data" / "dataset_minimal.jsonl"
BUNDLED_EVAL = BUNDLED_TRAIN.with_name("heldout.jsonl")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What is loaded, and how it attends."""

    model: str | None = None
    """Hub id, folder, `demo` or `tiny-random`. Unset: microsoft/Phi-3-mini-4k-instruct on a CUDA GPU, `demo` on a CPU."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. Unset: its default branch; the commit found is kept with the adapter."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Phi-3 needs none: transformers has it built in."""
    quantization: Quantization = "nf4"
    """How the frozen base stores its linear layers. nf4 and fp4: 4 bits per weight, with double quantization. int8: 8 bits
    (LLM.int8), by bitsandbytes' kernels, which compute in fp16. none: in bf16 (or fp16), which is plain LoRA."""
    precision: Precision = "auto"
    """Type of matrix products and of the base's other weights. auto: bf16; fp16 on GPUs without bf16 (before compute
    capability 8.0). With fp16 the loss is scaled, so that small gradients do not vanish."""
    attn_implementation: AttnImplementation = "auto"
    """auto: sdpa; with --packing or beyond the sliding window torch's varlen, or flash_attention_2 where that is missing."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What is read, and which tokens carry the loss."""

    train_file: tuple[str, ...] | None = None
    """Files (JSONL, JSON, CSV, TSV, Parquet, Arrow, text; also .gz and .zst), patterns, folders, or hub data sets (NAME,
    NAME:SPLIT or NAME:CONFIG:SPLIT), in order. Unset: the 22 bundled AVRO examples. The form of the rows (Alpaca, messages,
    ShareGPT, prompt/completion, ...) is recognized by their columns."""
    eval_file: tuple[str, ...] | None = None
    """Held-out data to evaluate on, likewise. Unset: the 8 bundled ones with the bundled training file, else none."""
    prompt_format: PromptFormat = "plain"
    """plain: `### Instruction:` / `### Response:`. chat: the model's own template."""
    columns: tuple[str, ...] = ()
    """Names of columns in the file, as OUR_NAME=ITS_NAME: instruction=question response=answer. The README lists ours."""
    ignore_columns: tuple[str, ...] = ()
    """Columns to leave out although they look like part of a prompt, and keys of messages (messages.KEY)."""
    loss_on: LossOn = "response"
    """response: all answers and their stop tokens. last: only the last answer of a conversation. all: prompts too."""
    max_length: int = 2048
    """Longest sample, in tokens, stop token included."""
    on_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to longer samples. truncate cuts the end, and with it the stop token."""
    packing: bool = False
    """Fill rows of up to --max-length tokens with several samples each; attention and labels stay inside a sample."""
    allow_drop: bool = False
    """Continue even if more than a fifth of the examples has to be dropped."""


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """The adapter: W x + alpha/r B A dropout(x), trained in fp32 and computed in bf16."""

    lora_r: int = 32
    """Rank."""
    lora_alpha: int = 64
    """Scale; the update is multiplied by alpha/r."""
    use_rslora: bool = False
    """Multiply by alpha/sqrt(r) instead, so that a higher rank does not shrink the update (rsLoRA, arXiv 2312.03732)."""
    lora_dropout: float = 0.1
    """Share of the input of A that is zeroed in training."""
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter. Unset: all but the head. A name that matches nothing is an error."""
    peft_config: Path | None = None
    """JSON file of a configuration of PEFT, which replaces the flags above: LoRA, DoRA, IA3, prefix tuning, ..."""
    init_adapter: Path | None = None
    """Folder of a PEFT LoRA adapter to start from; its rank, alpha, scaling, dropout and targets replace the flags above."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """The loop."""

    per_device_train_batch_size: int = 2
    """Samples in one forward and backward."""
    gradient_accumulation_steps: int = 2
    """Micro-batches in one optimizer step; the last step of an epoch may have fewer."""
    learning_rate: float | None = None
    """Peak of warmup-cosine. Unset: 5e-5, and 4e-4 for the demo model (benchmarks/README.md has the sweep)."""
    warmup_ratio: float = 0.1
    """Share of all steps in which the rate rises from 0 to its peak."""
    num_train_epochs: int = 20
    """Passes over the training data."""
    max_steps: int | None = None
    """Optimizer steps in all; replaces num_train_epochs."""
    early_stopping_patience: int | None = None
    """Stop after this many consecutive evaluations (one per epoch) without a lower eval loss. Unset: never."""
    optimizer: Optimizer = "adamw"
    """adamw_8bit: moments in 8 bits, quantized blockwise (arXiv 2110.02861). Saves 6 bytes per trained parameter; results
    differ slightly. paged_adamw_8bit: the same in pages that move to host memory when the GPU is full; needs a CUDA GPU.
    lion_8bit: Lion (arXiv 2302.06675), one moment in 8 bits; use a learning rate 3 to 10 times lower."""
    weight_decay: float = 0.01
    """Decoupled decay, on adapters only."""
    lora_plus_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354, which suggests 16). 1: the same for both."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm. None: never."""
    seed: int = 42
    """Order of samples, start of adapters, dropout."""
    skip_nonfinite: int = 0
    """Steps after the first with a NaN or infinite loss or gradient that are skipped before the run ends; 0 ends it at once."""


@dataclasses.dataclass(frozen=True)
class SpeedOptions:
    """Trade speed for memory. Results change only by rounding; --compile also draws other dropout masks."""

    gradient_checkpointing: GradientCheckpointing = "auto"
    """Matrix products to recompute in backward: none; selective: those after attention; full: all; auto: as few as fit."""
    compile: Compile = "auto"
    """layers: each decoder layer is compiled by torch.compile. graphs: and all of them are replayed as CUDA graphs, rows padded
    to a multiple of 128. none: they run as written. auto: graphs on a CUDA GPU."""
    compile_cache: bool = True
    """Keep compiled kernels in ~/.cache/qlora-train for later runs, unless others may write there: they are code."""
    offload_checkpoints: bool = False
    """Keep the inputs of layers in host memory until the backward pass; needs a CUDA GPU and compiled layers."""
    cache_dequantized: bool = False
    """Also keep the base weights dequantized in bf16. Faster, but needs 2 more bytes per parameter."""
    shard_base: bool = False
    """On several GPUs, keep a part of the base weights on each and gather a layer when it runs: for models beyond one GPU."""
    deterministic: bool = False
    """Reproduce results bit for bit on a GPU, at some cost in speed. CPU runs always do."""


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """What is written, and how often."""

    output_dir: Path | None = None
    """Run folder. Unset: runs/MODEL-DATA."""
    logging_steps: int = 5
    """Steps between two reads of the device; each step still has its row in metrics.jsonl."""
    explain: bool = False
    """Show what is trained and in which dtype it lies, one sample token by token, and the tokens of a step; and at log steps
    gradient norms by module, in TensorBoard."""
    save_steps: int | None = None
    """Steps between checkpoints, beside the one at the end of each epoch. Unset: only those."""
    save_total_limit: int = 3
    """Checkpoints kept, 2 at least: the newest, and the one with the lowest eval loss."""
    resume: str = "auto"
    """auto: from the newest sound checkpoint in the run folder, if it has one. never. Or a checkpoint or run folder."""
    override: tuple[Overridable, ...] = ()
    """Flags that may differ from those of the run that is resumed; each change is recorded."""
    debug: bool = False
    """Show tracebacks."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(OutputOptions, SpeedOptions, TrainingOptions, LoraOptions, DataOptions, ModelOptions):
    """All options, flat: what the program reads. None and auto stand for what depends on the model or the machine."""

    def check(self) -> None:
        """Refuse values that no run could use.

        Raises:
            ConfigError: naming the flag and the value seen.
        """
        at_least_one = ("max_length", "lora_r", "lora_alpha", "per_device_train_batch_size", "gradient_accumulation_steps",
                        "num_train_epochs", "max_steps", "logging_steps", "save_steps",
                        "early_stopping_patience")  # fmt: skip
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _refused(name, value, "at least 1")
        for name in ("learning_rate", "max_grad_norm", "lora_plus_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise _refused(name, value, "a finite number above 0")
        for name, upper in (("lora_dropout", 1.0), ("warmup_ratio", 1.0), ("weight_decay", float("inf"))):
            value = getattr(self, name)
            if not 0 <= value < upper:
                raise _refused(name, value, f"at least 0 and below {upper}")
        if self.save_total_limit < 2:  # the newest may turn out to be broken
            raise _refused("save_total_limit", self.save_total_limit, "at least 2")
        if self.skip_nonfinite < 0:
            raise _refused("skip_nonfinite", self.skip_nonfinite, "at least 0")
        if not 0 <= self.seed < 2**63:
            raise _refused("seed", self.seed, "at least 0 and below 2**63")
        for name in ("train_file", "eval_file"):
            if getattr(self, name) == ():
                raise _refused(name, "()", "one name or more")
        if self.target_modules == ():
            raise _refused("target_modules", "()", "one name or more; leave it out for all linear layers")
        if self.init_adapter is not None and not (self.init_adapter / "adapter_config.json").is_file():
            raise _refused("init_adapter", self.init_adapter, "a folder with adapter_config.json")
        if self.peft_config is not None:
            if not self.peft_config.is_file():
                raise _refused("peft_config", self.peft_config, "a file")
            usual = TrainConfig()
            both = [name for name in REPLACED_BY_PEFT_CONFIG if getattr(self, name) != getattr(usual, name)]
            if both or self.init_adapter is not None:
                other = both[0] if both else "init_adapter"
                raise _refused(other, getattr(self, other), "left out with --peft-config")
        if self.revision is not None and (self.model in (None, *EMBEDDED) or Path(str(self.model)).is_dir()):
            raise _refused("revision", self.revision, "given together with a hub id as --model")

    @property
    def length_multiple(self) -> int:
        """What T of a training batch is a multiple of: a graph is recorded for a shape, so shapes shall come again."""
        return 128 if self.compile == "graphs" else 1

    def resolved(self, on_gpu: bool) -> tuple["TrainConfig", str]:
        """Fill in what depends on the machine and on the model.

        Args:
            on_gpu: whether there is a CUDA GPU.

        Returns:
            A configuration in which only what is off is None, and a line that says which model was chosen and why.
            What else is auto needs more than flags: attention.py and layers.py resolve it.

        Raises:
            ConfigError: for what this machine cannot do.
        """
        if self.optimizer == "paged_adamw_8bit" and not on_gpu:
            raise _refused("optimizer", self.optimizer, "adamw, adamw_8bit or lion_8bit, as there is no CUDA GPU to page for")
        if self.offload_checkpoints and (not on_gpu or self.compile not in ("auto", "layers")):
            raise _refused("offload_checkpoints", True, "given on a CUDA GPU, and without --compile or with --compile layers")
        if self.shard_base and (self.cache_dequantized or self.compile == "graphs"):
            raise _refused("shard_base", True, "given without --cache-dequantized and without --compile graphs")
        if self.shard_base and self.quantization != "nf4":
            raise _refused("shard_base", True, "given with --quantization nf4")
        if self.cache_dequantized and self.quantization not in ("nf4", "fp4"):
            raise _refused("cache_dequantized", True, "given with --quantization nf4 or fp4")
        if self.early_stopping_patience is not None and self.eval_file is None and self.train_file is not None:
            raise _refused("early_stopping_patience", self.early_stopping_patience, "given together with --eval-file")
        model = self.model or (PHI3_MINI if on_gpu else "demo")
        where = "there is a CUDA GPU" if on_gpu else "there is no CUDA GPU"
        bundled = self.train_file is None
        data = _data_slug(self.train_file) if self.train_file else "avro"
        chosen = dataclasses.replace(
            self,
            model=model,
            learning_rate=self.learning_rate or (DEMO_LEARNING_RATE if model == "demo" else 5e-5),
            train_file=(str(BUNDLED_TRAIN),) if bundled else self.train_file,
            eval_file=(str(BUNDLED_EVAL),) if bundled and self.eval_file is None else self.eval_file,
            output_dir=self.output_dir or self._resumed_folder() or Path("runs") / f"{_slug(model)}-{data}",
        )
        return chosen, f"Model: {model} ({'as asked' if self.model else where}; --model takes another)"

    def _resumed_folder(self) -> Path | None:
        """The run folder that `--resume PATH` points into."""
        if self.resume in ("auto", "never"):
            return None
        path = Path(self.resume)
        return path.parent.parent if path.parent.name == "checkpoints" else path

    def plain(self) -> dict[str, Any]:
        """The fields as JSON and YAML know them, secrets masked."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    def to_yaml(self) -> str:
        """The configuration as YAML that `--config` reads back."""
        import yaml

        return yaml.safe_dump(self.plain(), sort_keys=False)


@dataclasses.dataclass(frozen=True)
class _Screens:
    """Fine-tune a causal language model with QLoRA in a plain PyTorch loop.

    Without a flag it trains on the bundled AVRO examples. Flags take dashes or underscores, and lists are separated by
    spaces. --config run.yaml reads the same names from a file; flags win over the file.
    """

    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    adapter: LoraOptions = LoraOptions()
    training: TrainingOptions = TrainingOptions()
    speed: SpeedOptions = SpeedOptions()
    output: OutputOptions = OutputOptions()
    config: Annotated[Path | None, "handled before the flags"] = None
    """YAML file with the same names; flags win over it."""


def parse(argv: list[str]) -> TrainConfig:
    """Turn the command line into a configuration: flags over YAML over defaults.

    Args:
        argv: arguments without the program's name.

    Raises:
        SystemExit: by tyro, with 0 after --help and 2 after a wrong flag (it suggests the nearest).
        ConfigError: for a value out of range or a YAML file that is missing, broken or has an unknown key.
    """
    import tyro

    def screens(arguments: list[str], default: _Screens) -> _Screens:
        with redacted_stderr():
            return tyro.cli(_Screens, args=arguments, default=default, config=(tyro.conf.OmitArgPrefixes,))

    parsed = screens(argv, _Screens())
    if parsed.config is not None:
        from_file = _yaml_arguments(parsed.config)
        try:
            default = screens(from_file, _Screens())
        except SystemExit:
            echo(f"The values above were read from {parsed.config}.", file=sys.stderr)
            raise
        parsed = screens(argv, default)
    flat: dict[str, Any] = {}
    for group in (parsed.model, parsed.data, parsed.adapter, parsed.training, parsed.speed, parsed.output):
        flat |= {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    config = TrainConfig(**flat)
    config.check()
    return config


def _yaml_arguments(path: Path) -> list[str]:
    """The YAML file as command-line arguments, so that tyro checks types: YAML itself reads 1e-4 as a string."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold `name: value` lines, not {type(values).__name__}.")
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    arguments = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"Perhaps you meant {near[0]}." if near else f"It knows {', '.join(known)}."
            raise ConfigError(f"{path}: unknown key {key!r}. {advice}")
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words = value if isinstance(value, list) else [value]
            arguments += [f"--{flag}", *(str(word) for word in words)]
    return arguments


def _slug(name: str) -> str:
    """The last part of a path or hub id, fit for a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).stem if Path(name).is_file() else Path(name).name).strip("-.") or "run"


def _data_slug(names: tuple[str, ...] | str) -> str:
    """The first name of a data source as part of a folder's name, and how many follow."""
    names = (names,) if isinstance(names, str) else names  # as callers in Python may give one alone
    return _slug(names[0]) + (f"-and-{len(names) - 1}-more" if len(names) > 1 else "")


def _plain(value: object) -> object:
    if isinstance(value, str | Path):
        return redact(str(value))
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _refused(name: str, value: object, wanted: str) -> UserError:
    return ConfigError(f"--{name.replace('_', '-')} {value} cannot be used: it must be {wanted}.")
