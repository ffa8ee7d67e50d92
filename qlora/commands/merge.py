"""`python -m qlora merge`: adapter and base as one model, what that changes, and how to serve it.

The adapter was trained beside NF4 weights. Added to these weights in bf16, it gives the same function up to one rounding.
Added to the base in bf16, it meets weights that it has never seen: better ones, as a rule, but others. Which of the two is
closer, and which predicts eval data better, is measured.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table

from qlora import terminal
from qlora.commands import export_onnx
from qlora.commands.adapter import Adapter, load_adapted, oom_as_user_error_with, open_adapter, put_on
from qlora.commands.evaluate import read_eval_data
from qlora.commands.options import MergeOptions, refuse_below, require_packages
from qlora.data.batch import Batch, iter_batches
from qlora.data.dataset import TokenizedDataset
from qlora.errors import CheckpointError, ConfigError, NonFiniteError
from qlora.eval.generate import stop_ids
from qlora.model.adapter_config import LINEAR_METHODS
from qlora.model.loss import CHUNK_TOKENS, read_head
from qlora.model.precision import autocast_dtype
from qlora.report.model_card import NOT_FOR_VLLM, VLLM_RANKS
from qlora.run import environment
from qlora.run.files import cannot_write, require_space, require_writable, write_folder

Route = Literal["bf16", "dequantized"]
LABELS = {"bf16": "merged into the base in bf16", "dequantized": "merged into the base's quantized weights, turned to bf16"}
ROUNDING = 1e-3  # nats of KL that weights rounded to bf16 may cost; 2e-4 on the demo model
SUMMARY = "merge.json"  # in the saved folder: what it was made of, and what was measured
LLAMA_CPP = "https://github.com/ggml-org/llama.cpp"
# transformers tells of the dtype that it dequantizes to, which is the one that was asked for.
logging.getLogger("transformers.integrations.bitsandbytes").addFilter(lambda r: "modules are dequantized" not in str(r.msg))


class Difference(NamedTuple):
    """How a model differs from the unmerged adapter: means over the trained tokens of eval data."""

    kl: float  # nats: of its next-token distribution from the unmerged one's, KL(unmerged || this)
    agreement: float  # share of tokens where both find the same one likeliest
    loss: float  # its own, in nats

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


# -- merging and measuring -------------------------------------------------------------------------------------------


def merged_model(adapter: Adapter, route: Route) -> Any:
    """The model with the adapter in its weights: a transformers model in bf16 that knows of no adapter.

    Args:
        adapter: from open_adapter.
        route: bf16 or dequantized; see the top of this file.

    Raises:
        NonFiniteError: if a merged weight is not finite; else as load_adapted.
    """
    if route == "bf16":
        config = dataclasses.replace(adapter.config, precision="bf16")
        info = adapter.run_info if config == adapter.config else None  # another base than that of training in fp16
        adapted = load_adapted(adapter._replace(config=config, run_info=info), "none")
    else:
        adapted = load_adapted(adapter)
        inside = adapted.get_base_model()
        inside.is_loaded_in_4bit = inside.is_loaded_in_8bit = False  # soon; PEFT would refuse to take IA3 off
        base = adapted.unload().dequantize(torch.bfloat16)
        for parameter in base.parameters():  # the others too, after training in fp16; not buffers, such as those of rotations
            parameter.data = parameter.data.to(torch.bfloat16)
        adapted = put_on(base, adapter)
    # Not PEFT's safe_merge: it rounds the adapter's product to bf16 before the sum, which is then rounded again.
    with warnings.catch_warnings():
        # Of a base that ties the two, where one was trained whole: config.json tells it from then on.
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied", category=UserWarning)
        merged = adapted.merge_and_unload(progressbar=False)
    broken = [name for name, parameter in merged.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        raise NonFiniteError(
            f"{adapter.folder}: merged, {len(broken)} tensors are not finite, {broken[0]} first. Is the adapter sound?",
        )
    return merged.eval()


@torch.no_grad()
def difference(reference: Any, other: Any, samples: TokenizedDataset, alone: bool = False) -> Difference:
    """Compare next-token distributions at the trained tokens, a sample at a time.

    Args:
        reference: the base as it was trained, with the adapter beside it.
        other: a model of the same vocabulary, on the same device.
        samples: at least one.
        alone: switch the adapter of `other` off.
    """
    without = other.disable_adapter if alone else contextlib.nullcontext
    head = read_head(reference)
    with without():  # the head may have been trained too
        heads = head, read_head(other)
    sums = torch.zeros(3, dtype=torch.float64)  # [3]
    num_tokens = 0
    for cpu_batch in iter_batches(samples, range(len(samples)), 1):
        batch = cpu_batch.to(reference.device)
        wanted = batch.labels.flatten()[batch.positions + 1]  # [N]
        rows = [_hidden(reference, batch)]  # [N, D] each
        with without():
            rows.append(_hidden(other, batch))
        for start in range(0, len(wanted), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            first, second = (
                head.logits(hidden[chunk].to(head.weight.dtype)).float().log_softmax(dim=-1)
                for head, hidden in zip(heads, rows, strict=True)
            )  # [C, V] each
            kl = (first.exp() * (first - second)).sum()  # []
            agreed = (first.argmax(dim=-1) == second.argmax(dim=-1)).sum()  # []
            losses = torch.nn.functional.nll_loss(second, wanted[chunk], reduction="sum")  # []
            sums += torch.stack([kl.double(), agreed.double(), losses.double()]).cpu()  # [3]
        num_tokens += batch.num_tokens
    return Difference(*(sums / num_tokens).tolist())


def _hidden(model: Any, batch: Batch) -> torch.Tensor:
    """[N, D]: last hidden states that predict trained tokens."""
    with torch.autocast(batch.input_ids.device.type, autocast_dtype(model)):
        hidden = model.get_decoder()(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # [B, T, D]
    supervised: torch.Tensor = hidden.flatten(0, 1)[batch.positions]  # [N, D]
    return supervised


def measured(adapter: Adapter, routes: list[Route], samples: TokenizedDataset) -> dict[str, Difference]:
    """The unmerged adapter, its base alone, and each way to merge, by name, against the first."""
    reference = load_adapted(adapter)
    found = {"unmerged": difference(reference, reference, samples)}
    found["base"] = difference(reference, reference, samples, alone=True)
    for route in routes:  # one at a time: memory holds one model in bf16 beside the one that was trained
        found[route] = difference(reference, merged_model(adapter, route), samples)
    return found


def recommendation(found: dict[str, Difference]) -> tuple[Route, str]:
    """The way to merge that changes least, and a line that says why."""
    if "bf16" not in found:
        return "dequantized", "Recommended: dequantized, the only one, as the base is stored in 4 bits."
    if "dequantized" not in found:
        return "bf16", "Recommended: bf16, the only one, as the base was trained without quantization."
    names: tuple[Route, Route] = ("dequantized", "bf16")
    best, other = sorted(names, key=lambda route: found[route].kl)
    text = f"Recommended: {best}, the closest to what was trained: KL {found[best].kl:.2g}, {other} {found[other].kl:.2g}."
    gain = found[best].loss - found[other].loss
    if gain > 0:
        text += f" (Eval loss is lower with {other}, by {gain:.2g}.)"
    return best, text


def check_merges(found: dict[str, Difference], route: Route) -> None:
    """Refuse to merge if that loses, or spoils, what the adapter does.

    Merging itself is checked where it is the same function up to rounding: into the dequantized base. Into the base in bf16
    an adapter of little effect may well come out further from the unmerged one than no adapter, as the base's own rounding to
    NF4 is undone too; that is refused only where eval data are predicted worse than without.

    Raises:
        NonFiniteError.
    """
    base, merged = found["base"], found[route]
    same_function = found.get("dequantized", merged)
    lost = not same_function.kl <= max(base.kl / 2, ROUNDING)  # NaN is lost, too
    near, good = merged.kl <= max(base.kl, ROUNDING), merged.loss <= max(base.loss, found["unmerged"].loss)
    if lost or not (near or good):
        seen = same_function if lost else merged
        raise NonFiniteError(
            f"Merged, the model is off by KL {seen.kl:.2g} from the unmerged adapter, and without any adapter by "
            f"{base.kl:.2g}; eval losses are {seen.loss:.4f} and {base.loss:.4f}. The merged model does not reproduce the "
            "adapter, so nothing was saved.",
            hint="Use it unmerged: python -m qlora generate, or PEFT.",
        )


# -- saving ----------------------------------------------------------------------------------------------------------


def save(model: Any, adapter: Adapter, folder: Path, summary: dict[str, Any], rows: list[list[int]] | None) -> str | None:
    """Write a merged model, its tokenizer and `merge.json` into a folder that is there whole or not at all.

    Args:
        model: from merged_model; with `rows` it is in fp32 afterward.
        adapter: its tokenizer is saved too.
        folder: to be made.
        summary: for merge.json.
        rows: token ids to compare an ONNX export on; None exports nothing.

    Returns:
        A line about the export.

    Raises:
        UserError: exit 4 if the folder cannot be written; 7 if onnxruntime computes something else.
    """
    line = None
    with _scratch(folder) as scratch:
        model.generation_config.eos_token_id = stop_ids(model, adapter.template)
        model.save_pretrained(scratch, max_shard_size="2GB")
        adapter.template.tokenizer.save_pretrained(scratch)
        if (original := _sentencepiece(adapter)) is not None:
            shutil.copyfile(original, scratch / original.name)
        if rows is not None:
            (scratch / "onnx").mkdir()
            error = export_onnx.export(model, scratch / "onnx", rows)
            summary = {**summary, "onnx_relative_error": error}
            line = f"ONNX: {folder / 'onnx' / export_onnx.MODEL}, logits within {error:.1e} (relative) of torch's in fp32"
        files: dict[str, Any] = {str(path.relative_to(scratch)): path for path in scratch.rglob("*") if path.is_file()}
        for path in files.values():
            path.chmod(0o644)  # safetensors lets nobody else read, as a server may have to
        _require_new(folder)  # still: another merge may have been faster
        write_folder(folder, {**files, SUMMARY: json.dumps(summary, indent=1).encode()})
    return line


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder beside the one that is to be made, on the same disk."""
    name = {"prefix": f".{folder.name}.", "suffix": ".tmp"}  # and what no other process has in between
    try:
        with tempfile.TemporaryDirectory(**name, dir=folder.parent, ignore_cleanup_errors=True) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise cannot_write(folder, 0, error) from None


def _sentencepiece(adapter: Adapter) -> Path | None:
    """The base's tokenizer.model, which transformers no longer saves and the GGUF converter of Phi-3 reads; None without."""
    try:
        found = transformers.utils.cached_file(adapter.source, "tokenizer.model", revision=adapter.config.revision)
    except OSError:  # it has none, or the hub cannot be reached
        return None
    return None if found is None else Path(found)


# -- the command -----------------------------------------------------------------------------------------------------


def run(options: MergeOptions) -> int:
    """Measure, recommend, and save the requested merge; see MergeOptions.

    Returns:
        0.

    Raises:
        UserError: exit 2, 3, 4 or 7 before the weights are loaded; 5 or 6 afterward.
    """
    console = Console()
    say = functools.partial(terminal.say, console)
    refuse_below(1, options, "limit", "max_length")
    if options.into is None and (options.onnx or options.output_dir is not None):
        flag = "--onnx" if options.onnx else "--output-dir"
        raise ConfigError(f"{flag} goes with --into: say which model to save, --into bf16, dequantized or recommended.")
    if options.onnx:
        require_packages("--onnx", export_onnx.PACKAGES, extra="onnx")
    adapter = open_adapter(options.adapter, options.model, options.prompt_format, options.trust_remote_code, options.device)
    for note in adapter.notes:
        say(note)
    if getattr(adapter.lora, "lora_bias", False):
        raise ConfigError(
            f"{adapter.folder} trains LoRA biases (lora_bias), which layers without a bias cannot store.",
            hint="Use it unmerged: python -m qlora generate, or PEFT.",
        )
    if adapter.lora.peft_type not in LINEAR_METHODS:
        raise ConfigError(
            f"{adapter.folder} trains virtual tokens ({adapter.lora.peft_type.value}), which no weight of the base can store.",
            hint="Use it unmerged: python -m qlora generate, or PEFT.",
        )
    routes = _routes(adapter, options)
    for place in [_folder(adapter, options, route) for route in routes] if options.into else []:
        _check_place(place, adapter, options.onnx)
    source, samples, _, notes = read_eval_data(options, adapter)
    say(f"{notes}; {source}")
    with oom_as_user_error_with("Merging needs the base in bf16 and as it was trained at once, about 3 bytes per parameter."):
        found = measured(adapter, routes, samples)
        console.print(differences_table(found))
        best, line = recommendation(found)
        route: Route = options.into if options.into in ("bf16", "dequantized") else best
        check_merges(found, route)
        say(line)
        if options.into is not None:
            folder = _folder(adapter, options, route)
            summary: dict[str, Any] = {"adapter": str(adapter.folder), "base": adapter.source, "into": route}
            summary["eval_file"] = str(source)
            summary["differences"] = {name: {**row._asdict(), "perplexity": row.perplexity} for name, row in found.items()}
            summary["environment"] = environment.environment(adapter.device)
            rows = [sample.input_ids for sample in samples[: export_onnx.ROWS]] if options.onnx else None
            exported = save(merged_model(adapter, route), adapter, folder, summary, rows)
            say(f"Saved: {folder}, {LABELS[route]}")
            if exported is not None:
                say(exported)
            say(folder_lines(folder, adapter))
    say(adapter_lines(adapter))
    return 0


def _routes(adapter: Adapter, options: MergeOptions) -> list[Route]:
    """bf16 too, where the base is available in bf16."""
    if adapter.config.quantization == "none":
        if options.into == "dequantized":
            raise ConfigError("--into dequantized: the base was trained without quantization.", hint="Leave it out.")
        return ["bf16"]
    if not adapter.is_stored_quantized:
        return ["bf16", "dequantized"]
    if options.into == "bf16":
        raise ConfigError(
            f"--into bf16: {adapter.source} is stored in {adapter.config.quantization.upper()}.",
            hint="Name the same model in bf16 with --model, or merge into dequantized.",
        )
    return ["dequantized"]


def _folder(adapter: Adapter, options: MergeOptions, route: Route) -> Path:
    folder = adapter.folder.resolve()
    return options.output_dir or folder.with_name(f"{folder.name}-merged-{route}")


def _require_new(folder: Path) -> None:
    if folder.exists():
        raise CheckpointError(
            f"{folder} is there already, and nothing is replaced.",
            hint="Remove it, or choose another --output-dir.",
        )


def _check_place(folder: Path, adapter: Adapter, onnx: bool) -> None:
    _require_new(folder)
    require_writable(folder)
    needed = adapter.meta_model.num_parameters() * (2 + 4 * onnx)
    require_space(folder.absolute().parent, needed, "the merged model")


def differences_table(found: dict[str, Difference]) -> Table:
    """The models, with their differences from the first."""
    table = Table(title="Differences from the adapter beside its base, as it was trained")
    table.add_column("")
    for header in ("KL", "same choice", "eval loss", "perplexity"):
        table.add_column(header, justify="right")
    labels = {"unmerged": "unmerged", "base": "no adapter", "bf16": "into bf16", "dequantized": "into dequantized"}
    for name, row in found.items():
        kl, agreement = ("", "") if name == "unmerged" else (f"{row.kl:.2e}", f"{100 * row.agreement:.1f} %")
        table.add_row(labels[name], kl, agreement, f"{row.loss:.4f}", f"{row.perplexity:.3f}")
    table.caption = "KL in nats per token; same choice: of the likeliest token. No adapter: what the adapter does."
    return table


def folder_lines(folder: Path, adapter: Adapter) -> str:
    """How to use a saved folder: transformers, vLLM, and llama.cpp's converter with what it needs."""
    quoted, gguf = shlex.quote(str(folder)), shlex.quote(f"{folder}.gguf")
    text = f"""
transformers:  AutoModelForCausalLM.from_pretrained("{folder}", dtype="bfloat16")
vLLM:          vllm serve {quoted}
GGUF:          git clone {LLAMA_CPP}
               pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt
               python llama.cpp/convert_hf_to_gguf.py {quoted} --outfile {gguf} --outtype bf16"""
    # Phi-4's tokenizer, which the converter reads without a tokenizer.model.
    is_gpt2 = type(adapter.template.tokenizer).__name__.startswith("GPT2Tokenizer")
    if adapter.meta_model.config.model_type == "phi3" and not is_gpt2 and not (folder / "tokenizer.model").exists():
        text += """
               It will refuse this folder: for Phi-3 it needs tokenizer.model, which was not found with the base."""
    return text


def adapter_lines(adapter: Adapter) -> str:
    """How to serve the adapter without merging."""
    lora = adapter.lora
    if lora.peft_type != "LORA":
        return f"\nUnmerged:      vLLM serves LoRA only, and this adapter is {lora.peft_type.value}: serve the merged folder."
    fitting = next((most for most in VLLM_RANKS if most >= lora.r), None)
    reasons = [name for name in NOT_FOR_VLLM if getattr(lora, name, None)] + (["bias"] if lora.bias != "none" else [])
    if reasons or fitting is None:
        reason = f"sets {', '.join(reasons)}" if reasons else f"has rank {lora.r}"
        return (
            f"\nUnmerged:      vLLM serves plain LoRA up to rank 512 only, and this adapter {reason}: serve the merged folder."
        )
    folder, base = shlex.quote(str(adapter.folder)), shlex.quote(adapter.source)
    form = adapter.config.quantization
    as_trained = f"{'bf16' if form == 'none' else form.upper()}, as it was trained"
    beside = as_trained if adapter.is_stored_quantized or form == "none" else "bf16: the numbers of merging into bf16"
    return f"""
Unmerged:      vllm serve {base} --enable-lora --max-lora-rank {fitting} --lora-modules tuned={folder}
               (beside the base in {beside})"""
