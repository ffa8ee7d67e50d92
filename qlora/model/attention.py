"""Which attention runs, why, and what Phi-3's sliding window has to do with it.

Shapes: B rows, T positions, H heads, d of a head, S samples in all rows together.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from qlora.config import AttnImplementation, TrainConfig
from qlora.data.batch import Batch, collate, collate_packed
from qlora.data.template import TokenizedExample
from qlora.errors import ConfigError, EnvironmentProblem
from qlora.model.families import attention_use
from qlora.model.peft_config import virtual_tokens
from qlora.model.precision import autocast_dtype
from qlora.model.prompts import has_prompt

# -- the choice ------------------------------------------------------------------------------------------------------


class Attention(NamedTuple):
    """A value of `--attn-implementation`, and the reason for it, in words for the log."""

    implementation: AttnImplementation
    reason: str

    @property
    def loaded_as(self) -> str:
        """The name to load a model with, which it generates with: torch's varlen kernel has no cache, it only trains."""
        return "sdpa" if self.implementation == "varlen" else self.implementation


def choose_attention(config: TrainConfig, device: torch.device, meta_model: Any = None) -> Attention:
    """Resolve `--attn-implementation`: `auto` picks what can run, a name runs or fails, and nothing is downloaded.

    auto takes sdpa while it needs no mask, and with packing, or where the sliding window is active, a kernel that knows about
    samples and windows; benchmarks/README.md has what of this was measured.

    Args:
        config: attn_implementation, packing and max_length are read.
        device: where the model will be.
        meta_model: the model without weights; not every one has every backend (Gemma 2 has no sdpa, for its soft-capping).
            None, before it is known, to check the rest.

    Raises:
        EnvironmentProblem: if a backend was asked for by name and cannot run here.
    """
    against = unavailable_reasons(device, meta_model, config.packing)
    if virtual_tokens(config) and against["varlen"] is None:
        against["varlen"] = "virtual tokens require transformers' own attention functions"
    requested = config.attn_implementation
    if requested != "auto":
        if against[requested]:
            raise EnvironmentProblem(
                f"--attn-implementation {requested} cannot run here: {against[requested]}.",
                hint="Use auto to pick a backend that runs here.",
            )
        return Attention(requested, "as asked")
    window = None if meta_model is None else _active_window(meta_model, config.max_length)
    order: list[AttnImplementation] = ["sdpa", "flash_attention_2", "eager"]
    why = "it needs no mask here"
    if config.packing or window is not None:
        order = ["varlen", "flash_attention_2", "sdpa", "eager"]
        why = "rows are packed" if config.packing else f"a sliding window of {window} is active"
    chosen = next(name for name in order if not against[name])
    passed_over = [f"{name} cannot run: {against[name]}" for name in order[: order.index(chosen)]]
    return Attention(chosen, "; ".join(passed_over) or why)


def unavailable_reasons(device: torch.device, meta_model: Any = None, packing: bool = False) -> dict[str, str | None]:
    """Why a backend cannot run here, or None, for each value of `--attn-implementation` but auto.

    Args:
        device: where the model will be.
        meta_model: the model without weights; None to look at the machine alone.
        packing: whether rows are to be packed.
    """
    return {
        "flash_attention_2": _flash_unavailable_reason(device, meta_model, packing),
        "varlen": _varlen_unavailable_reason(device, meta_model, packing),
        "sdpa": None if getattr(meta_model, "_supports_sdpa", True) else f"{type(meta_model).__name__} does not support it",
        "eager": None,
    }


def _cuda_unavailable_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return None


def _flash_unavailable_reason(device: torch.device, meta_model: Any, packing: bool = False) -> str | None:
    # Asked of the package itself: transformers would fetch a replacement from the hub where `kernels` is installed.
    if unavailable_reason := _cuda_unavailable_reason(device):
        return unavailable_reason
    if not is_flash_attn_2_available():
        return "package flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        return f"package flash-attn does not fit this torch ({error})"
    if meta_model is None:
        return None
    if not getattr(meta_model, "_supports_flash_attn", True):
        return f"{type(meta_model).__name__} does not support it"
    use = attention_use(meta_model)
    if packing and not use.lengths:
        return _no_lengths(meta_model)
    if use.softcap and not _flash_has_softcap(device):
        return f"this build of flash-attn cannot cap scores as {type(meta_model).__name__} does"
    return None


def _no_lengths(meta_model: Any) -> str:
    return f"the layers of {type(meta_model).__name__} do not pass on the lengths of packed samples"


def _flash_has_softcap(device: torch.device) -> bool:
    """Whether flash-attn was built with soft-capping, which FLASHATTENTION_DISABLE_SOFTCAP leaves out."""
    import flash_attn

    query = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16, device=device)  # [B, T, H, d]
    try:
        flash_attn.flash_attn_func(query, query, query, causal=True, softcap=1.0)
    except (RuntimeError, TypeError):  # built without it; older than 2.6
        return False
    return True


def _varlen_unavailable_reason(device: torch.device, meta_model: Any, packing: bool = False) -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn

        known = "window_size" in inspect.signature(varlen_attn).parameters  # not yet in torch 2.10
    except ImportError:
        known = False
    if not known:
        return f"it needs torch 2.11 or newer, this is {torch.__version__}"
    if unavailable_reason := _cuda_unavailable_reason(device):
        return unavailable_reason
    if meta_model is None:
        return None
    if getattr(meta_model.config.get_text_config(), "attention_dropout", None):
        return "it has no dropout of attention weights"
    use = attention_use(meta_model)
    if use.problem:
        return f"it replaces transformers' attention functions, and in {type(meta_model).__name__} {use.problem}"
    if use.softcap:
        return f"it cannot cap scores as {type(meta_model).__name__} does"
    if packing and not use.lengths:
        return _no_lengths(meta_model)
    return None


# -- while training --------------------------------------------------------------------------------------------------


def training_window(config: Any, max_length: int) -> int | None:
    """The sliding window to train with: None where it changes nothing and costs the fast kernel.

    A position sees w positions, itself included. In a row of w + 1 tokens only the last position loses a key, and nothing
    is predicted from it: loss and gradients are the same without the window. With it, transformers gives sdpa a dense mask
    from w positions on, and the flash kernel is gone. Only models that read the window from their configuration at each
    forward, the same for all layers (Phi-3, Mistral), can be changed; the others keep theirs.
    """
    window = getattr(config, "sliding_window", None)
    per_layer = getattr(config, "layer_types", None) is not None
    return None if window is not None and not per_layer and max_length <= window + 1 else window


def _active_window(meta_model: Any, max_length: int) -> int | None:
    """The sliding window that hides something from a row of `max_length` tokens in some layer, or None."""
    window = training_window(meta_model.config.get_text_config(), max_length)
    return window if window is not None and max_length > window and attention_use(meta_model).window else None


@contextlib.contextmanager
def for_training(model: Any, config: TrainConfig) -> Iterator[None]:
    """Run a block with this file's attention functions and the window to train with, and put back what was there.

    transformers makes masks for the functions it knows, and waits for the GPU at each forward to see whether rows are packed.
    For a name that it has no mask function for it does neither; `decoder_inputs` gives the masks that are needed. Models in
    which these functions cannot replace transformers' (see attention_use), or that have virtual tokens, keep transformers'
    functions, masks and wait.

    Raises:
        ConfigError: if rows are to be packed and the model lets a sample see its neighbor.
    """
    if has_prompt(model):  # more keys than queries, or more rows than ids, which transformers' own functions know
        yield
        return
    settings, use = model.get_decoder().config, attention_use(model)
    before = settings._attn_implementation, getattr(settings, "sliding_window", None)
    try:
        if before[1] is not None and getattr(settings, "layer_types", None) is None:
            settings.sliding_window = training_window(settings, config.max_length) if use.window else None
        if use.problem is None:
            settings._attn_implementation = PREFIX + config.attn_implementation
        if config.packing:
            _check_packing(model)
        yield
    finally:
        settings._attn_implementation = before[0]
        if before[1] is not None:
            settings.sliding_window = before[1]


@torch.no_grad()
def _check_packing(model: Any) -> None:
    """Change a sample and look at the one behind it in the row: its hidden states must stay as they are, and as they are alone.

    Not every model keeps to position_ids and masks: ALiBi, convolutions and state spaces run on across samples, and some count
    positions themselves. Two rows, one of them padded, as transformers takes another way for a single one.
    """
    decoder, training = model.get_decoder(), model.training
    device = model.get_input_embeddings().weight.device
    behind, alone = [], [list(range(10, 15)), list(range(10, 13))]
    for first in ([5, 6, 7, 8], [9, 8, 6, 5], []):
        samples = [[TokenizedExample(ids, ids, 1) for ids in (first, sample) if ids] for sample in alone]
        batch = collate_packed(samples) if first else collate([sample for (sample,) in samples])
        inputs = decoder_inputs(batch.to(device), decoder.config)
        try:
            model.eval()
            with torch.autocast(device.type, autocast_dtype(decoder)):
                hidden = decoder(**inputs, use_cache=False).last_hidden_state.float()  # [2, 9 or 5, D]
        finally:
            model.train(training)
        behind.append(torch.cat([hidden[0, len(first) : len(first) + 5], hidden[1, len(first) : len(first) + 3]]))  # [8, D]
    norm, kind = behind[0].norm(), type(model.get_base_model()).__name__
    if not (behind[0] - behind[1]).norm() <= 1e-4 * norm:
        raise ConfigError(f"{kind} lets a sample see its neighbor in a packed row.", hint="Leave out --packing.")
    if not (behind[0] - behind[2]).norm() <= 0.05 * norm:  # rounding in bf16 is a tenth of it
        raise ConfigError(f"{kind} computes a sample in a packed row otherwise than alone.", hint="Leave out --packing.")


def decoder_inputs(batch: Batch, config: Any) -> dict[str, Any]:
    """The ids of a micro-batch, and with packing what keeps its samples apart, as the decoder's arguments.

    Args:
        batch: on the device of the model.
        config: the model's; which function attends, and the window.

    Returns:
        input_ids [B, T]; position_ids [B, T] and the four arguments of transformers' varlen kernels with packing; a mask
        [B or 1, 1, T, T] for the functions of this file that need one, or two by the kind of layer where layers differ.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if batch.cu_seqlens is not None:
        inputs |= {"position_ids": batch.position_ids, "cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
        inputs |= {"max_length_q": batch.max_seqlen, "max_length_k": batch.max_seqlen}
    name, kinds = config._attn_implementation, getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    mask: Any = None  # one for all layers, or one for each kind of layer
    if kinds is None:
        mask = _mask_for(name, batch, window)
    else:
        windows = {"full_attention": None, "sliding_attention": window}
        masks = {kind: _mask_for(name, batch, windows[kind]) if kind in kinds else None for kind in windows}
        if any(each is not None for each in masks.values()):
            mask = masks
    if mask is not None:
        inputs["attention_mask"] = mask
    return inputs


def _mask_for(name: str, batch: Batch, window: int | None) -> torch.Tensor | None:
    """The mask [B or 1, 1, T, T] that a function of this file needs; None if it needs none, or for others' functions."""
    beyond = window is not None and batch.input_ids.shape[1] > window
    if name == PREFIX + "eager":
        seen = causal_mask(batch, window)  # [B or 1, 1, T, T]
        dtype = torch.get_autocast_dtype(seen.device.type)
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)  # [B or 1, 1, T, T]
    if name == PREFIX + "sdpa" and (beyond or batch.cu_seqlens is not None):
        return causal_mask(batch, window)  # [B or 1, 1, T, T]
    return None


def causal_mask(batch: Batch, window: int | None) -> torch.Tensor:
    """[B or 1, 1, T, T] bool, True where position t (row) sees position s (column): in its sample, not ahead, in the window."""
    length, device = batch.input_ids.shape[1], batch.input_ids.device
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()  # [T, T]
    if window is not None and length > window:
        seen = seen.triu(1 - window)  # [T, T]
    if batch.position_ids is None:
        return seen[None, None]  # [1, 1, T, T]
    sample = (batch.position_ids == 0).cumsum(dim=-1)  # [B, T]
    return (seen & (sample[:, :, None] == sample[:, None, :]))[:, None]  # [B, 1, T, T]


# -- the functions: query [B, H, T, d], key and value [B, H of keys, T, d] -> [B, T, H, d] ------------------------------

PREFIX = "training_"  # of their names in transformers' AttentionInterface


def _eager(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as in the paper (Vaswani et al., 2017, section 3.2.1): all T x T scores at once."""
    key, value = (repeat_kv(tensor, query.shape[1] // key.shape[1]) for tensor in (key, value))  # [B, H, T, d] each
    scores = query @ key.transpose(2, 3) * scaling  # [B, H, T, T]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap  # [B, H, T, T]
    scores = scores + attention_mask  # [B, H, T, T]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)  # [B, H, T, T]
    weights = torch.dropout(weights, dropout, module.training)  # [B, H, T, T]
    return (weights @ value).transpose(1, 2).contiguous(), None  # [B, T, H, d]


def _kernel_dtype(value: torch.Tensor) -> torch.dtype:
    """What a kernel attends in: autocast does not know these kernels, and a layer behind a LayerNorm may give fp32."""
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


def _flash_attention_2(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Package flash-attn (Dao, 2023, arXiv 2307.08691): no scores in memory; samples and window are the kernel's business."""
    import flash_attn

    dtype = _kernel_dtype(value)
    query, key, value = (tensor.transpose(1, 2).to(dtype) for tensor in (query, key, value))  # [B, T, H, d] each
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "causal": True,
        "window_size": window,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if softcap is not None:
        options["softcap"] = softcap
    if cu_seq_lens_q is None:
        return flash_attn.flash_attn_func(query, key, value, **options), None  # [B, T, H, d]
    flat = (tensor.flatten(0, 1) for tensor in (query, key, value))  # [B * T, H, d] each
    ends, longest = (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q)
    return flash_attn.flash_attn_varlen_func(*flat, *ends, *longest, **options).view_as(query), None  # [B, T, H, d]


def _varlen(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """torch's own build of the same kernel, for samples of any length; it is in every torch for CUDA from 2.11 on."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn  # Any: its stub does not know that it returns one tensor here
    key, value = (repeat_kv(tensor, query.shape[1] // key.shape[1]) for tensor in (key, value))  # [B, H, T, d] each
    rows, length = query.shape[0], query.shape[2]
    if cu_seq_lens_q is None:  # one sample a row
        cu_seq_lens_q = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=query.device)  # [B + 1]
    longest = max_length_q or length
    dtype = _kernel_dtype(value)
    flat = (tensor.transpose(1, 2).flatten(0, 1).to(dtype) for tensor in (query, key, value))  # [B * T, H, d] each
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    output = attend(*flat, cu_seq_lens_q, cu_seq_lens_q, longest, longest, scale=scaling, window_size=window)
    return output.unflatten(0, (rows, length)), None  # [B, T, H, d]


for _name, _function in (("eager", _eager), ("sdpa", sdpa_attention_forward), ("flash_attention_2", _flash_attention_2),
                         ("varlen", _varlen)):  # fmt: skip
    transformers.AttentionInterface.register(PREFIX + _name, _function)
