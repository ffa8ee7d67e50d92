"""Methods that train virtual tokens in front of the input: prompt tuning, P-tuning, and prefix tuning (P-tuning v2).

They act in `PeftModel.forward`, not in the layers of the decoder, so a decoder that is called directly would leave them out.
"""

import warnings
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from qlora.model.third_party import peft

# Prompt tuning (Lester et al., 2021, arXiv 2104.08691) and P-tuning (Liu et al., 2021, arXiv 2103.10385) put embeddings before
# those of the input. Prefix tuning puts keys and values before those of each layer (Li and Liang, 2021, arXiv 2101.00190; as
# P-tuning v2: Liu et al., 2021, arXiv 2110.07602).
PROMPT_METHODS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
# PEFT passes prefixes under a name that transformers 5.24 replaces.
warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)


def base_of(model: Any) -> Any:
    """The causal LM itself; adapters within its layers stay in it."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def has_prompt(model: Any) -> bool:
    """Whether a model has virtual tokens, and they are switched on."""
    return isinstance(model, peft.PeftModel) and model.active_peft_config.is_prompt_learning and not model._adapters_disabled


def decoder_of(model: Any) -> Any:
    """What maps ids [B, T] to `last_hidden_state` [B, T, D]: the decoder or, with virtual tokens, a PromptedDecoder."""
    return PromptedDecoder(model) if has_prompt(model) else model.get_decoder()


class PromptedDecoder:
    """A decoder behind virtual tokens: PeftModel.forward, of which only the hidden states of the input are returned.

    Attributes:
        config: of the decoder.
    """

    def __init__(self, model: Any) -> None:
        """Wrap a model.

        Args:
            model: a PeftModel with virtual tokens.
        """
        self.model, self.config = model, model.get_decoder().config

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> BaseModelOutputWithPast:
        """Run the model.

        Args:
            input_ids: [B, T].
            use_cache: False; prefix tuning has a cache of its own.

        Returns:
            last_hidden_state [B, T, D].
        """
        outputs = []
        handle = self.model.get_decoder().register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            self.model(input_ids=input_ids, use_cache=use_cache, logits_to_keep=1)
        finally:
            handle.remove()
        # Virtual tokens have hidden states, except in prefix tuning.
        hidden = outputs[0].last_hidden_state[:, -input_ids.shape[1] :]  # [B, T, D]
        return BaseModelOutputWithPast(last_hidden_state=hidden)
