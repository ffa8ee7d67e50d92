"""Answers on a GPU: the forward of one token per row, recorded once as a CUDA graph and replayed for every token.

Launched one by one, the kernels of one token of Phi-3-mini take 55 to 124 ms on an H200, depending on the CPU, for which the
GPU waits; a replay takes 7 ms. Shapes: B rows, T positions, V vocabulary.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticLayer

from qlora.model.prompts import base_of, has_prompt
from qlora.model.third_party import bitsandbytes, peft
from qlora.speed.graphs import graphs_unavailable_reason


def decode_unavailable_reason(model: Any) -> str | None:
    """Why the forward of one token cannot be recorded, or None."""
    if model.device.type != "cuda":
        return "no CUDA GPU"
    if any(isinstance(module, bitsandbytes.nn.Linear8bitLt) for module in model.modules()):
        return "layers in 8 bits wait for the device"
    if has_prompt(model) or getattr(getattr(model, "active_peft_config", None), "is_adaption_prompt", False):
        return "virtual tokens are put before the prompt, or in attention"
    if any(isinstance(module, peft.utils.other.TrainableTokensWrapper) for module in model.modules()):
        return "rows of the embedding are put together anew for each token"
    return graphs_unavailable_reason(base_of(model))


class TokenGraph:
    """The forward of one token per row behind a KV cache of fixed size.

    On a GPU it is a CUDA graph, recorded here; elsewhere it runs as written, which serves tests.

    Args:
        model: a causal LM in evaluation mode. What is switched on or off now (adapters, autocast) stays so.
        rows: B.
        length: most tokens that a row may have, prompt, padding and answer together.
    """

    def __init__(self, model: Any, rows: int, length: int):
        base = base_of(model)
        self._forward = base.forward
        self._cache_name = _cache_name(base)
        layers = base.config.get_text_config(decoder=True).num_hidden_layers
        # A layer with a sliding window keeps all positions too: the mask leaves out what is too far away.
        self._cache = Cache(layers=[StaticLayer(length) for _ in range(layers)])
        self._ids, self._positions = torch.zeros(2, rows, 1, dtype=torch.long, device=model.device)  # [B, 1] each
        self._seen = torch.zeros(rows, length, dtype=torch.long, device=model.device)  # [B, length]
        self._column = torch.zeros(1, dtype=torch.long, device=model.device)  # [1], where the next token goes
        self._graph: torch.cuda.CUDAGraph | None = None
        if model.device.type == "cuda":
            self._record()

    def _record(self) -> None:
        # What autocast has cast must not be remembered: a replay would read memory that is gone.
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a first call allocates workspaces and the cache
                self._next_scores()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._scores = self._next_scores()

    def _next_scores(self) -> torch.Tensor:
        self._seen.index_fill_(1, self._column, 1)
        scores = self._scores_of(self._ids, self._positions)
        self._column += 1
        self._positions += 1
        return scores

    def _scores_of(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        arguments = {"attention_mask": self._seen, "position_ids": positions, self._cache_name: self._cache}
        output = self._forward(input_ids=ids, use_cache=True, logits_to_keep=1, **arguments)
        scores: torch.Tensor = output.logits[:, -1].float()  # [B, V]
        return scores

    def prefill(self, ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Begin with prompts.

        Args:
            ids: [B, T], padded on the left.
            seen: [B, T], 0 at padding, else 1.

        Returns:
            [B, V] fp32 logits of the next token.
        """
        self._cache.reset()
        self._seen.zero_()
        self._seen[:, : ids.shape[1]] = seen
        positions = (seen.cumsum(1) - 1).clamp(min=0)  # [B, T]
        scores = self._scores_of(ids, positions)
        self._column.fill_(ids.shape[1])
        self._positions.copy_(positions[:, -1:] + 1)
        return scores

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Go on with a token per row.

        Args:
            ids: [B].

        Returns:
            [B, V] fp32 logits of the next token; the next call overwrites them.
        """
        self._ids.copy_(ids[:, None])
        if self._graph is None:
            return self._next_scores()
        self._graph.replay()
        return self._scores


def _cache_name(base: Any) -> str:
    """The argument that has another name from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


class PromptedTokens:
    """The forward of one token per row behind virtual tokens, for rows of one length.

    PEFT's `generate` leaves prefixes out with transformers 5.24, and puts the padding of short rows behind virtual tokens,
    where windows and ALiBi count it as distance.

    Args:
        model: with virtual tokens, in evaluation mode.
    """

    def __init__(self, model: Any):
        self._model, self._base = model, base_of(model)
        self._cache_name = _cache_name(self._base)

    def prefill(self, ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """As TokenGraph.prefill, but that no row has padding."""
        if not seen.all():
            raise ValueError("rows behind virtual tokens cannot be padded")
        prompt = self._model.get_prompt(len(ids))  # [B, n, D], or a cache of keys and values
        if not isinstance(prompt, torch.Tensor):
            self._cache = prompt
            return self.step(ids)
        self._cache = DynamicCache()
        embeddings = self._base.get_input_embeddings()(ids)  # [B, T, D]
        return self._scores_of(None, torch.cat([prompt.to(embeddings.dtype), embeddings], dim=1))

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """As TokenGraph.step; [B, T] are several tokens per row."""
        return self._scores_of(ids if ids.dim() == 2 else ids[:, None], None)

    def _scores_of(self, ids: torch.Tensor | None, embeddings: torch.Tensor | None) -> torch.Tensor:
        cache = {self._cache_name: self._cache}
        output = self._base.forward(input_ids=ids, inputs_embeds=embeddings, use_cache=True, logits_to_keep=1, **cache)
        scores: torch.Tensor = output.logits[:, -1].float()  # [B, V]
        return scores


@torch.no_grad()
def decode(model: Any, input_ids: torch.Tensor, graph: TokenGraph | PromptedTokens, show: Any, **prepared: Any) -> torch.Tensor:
    """The decoding loop of transformers' `generate(custom_generate=...)`.

    Args:
        model: unused; the graph has it.
        input_ids: [B, T] prompts, padded on the left.
        graph: for B rows of at least T + new tokens.
        show: a streamer of transformers, which gets each token; or None.
        prepared: by transformers: logits_processor, stopping_criteria, generation_config, and inputs of the model, of which
            `attention_mask` [B, T] is 0 at padding, else 1, or None without padding.

    Returns:
        [B, T + new] prompts with their answers.
    """
    settings, seen = prepared["generation_config"], prepared.get("attention_mask")
    scores = graph.prefill(input_ids, torch.ones_like(input_ids) if seen is None else seen)  # [B, V]
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)  # [B]
    while True:
        scores = prepared["logits_processor"](input_ids, scores)  # [B, V]
        drawn = settings.do_sample
        chosen = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0] if drawn else scores.argmax(-1)  # [B]
        chosen = torch.where(unfinished, chosen, settings.pad_token_id)
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=1)  # [B, T + 1]
        if show is not None:
            show.put(chosen.cpu())  # sync
        unfinished &= ~prepared["stopping_criteria"](input_ids, scores)
        if not unfinished.any():  # sync
            break
        scores = graph.step(chosen)
    if show is not None:
        show.end()
    return input_ids


def adapts_by_row(model: Any) -> bool:
    """Whether some rows of a batch can do without the adapter: it is LoRA, and not DoRA, which scales the base's output."""
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]
    if any(isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper) for module in model.modules()):
        return False  # modules that are trained whole, or in single rows
    return bool(layers) and all(isinstance(layer, peft.tuners.lora.LoraLayer) and not layer.lora_variant for layer in layers)


@contextlib.contextmanager
def adapters_by_row(model: Any, on: torch.Tensor) -> Iterator[None]:
    """A block in which only some rows of a batch have the adapter; for the others its update is exactly 0.

    Args:
        model: with adapters on [B, T, D] inputs.
        on: [B] bool.
    """
    keep = on[:, None, None].float()  # [B, 1, 1]
    layers: list[Any] = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.rows = keep  # read by LoRALinear, which does not call lora_A
    handles = [
        lora_a.register_forward_pre_hook(lambda _, inputs: (inputs[0] * keep.to(inputs[0].dtype),))
        for layer in layers
        for lora_a in layer.lora_A.values()
    ]
    try:
        yield
    finally:
        for layer in layers:
            layer.rows = None
        for handle in handles:
            handle.remove()
