"""All claims, by group, in the order of the tables."""

import re
from collections.abc import Callable

from benchmarks.guide_claims import attention, libraries, training, weights

GROUPS = {
    "Adapters": [weights.targets, weights.adapter_3mb],
    "NF4": [weights.nf4_levels, weights.bits_4_5, weights.double_quantization, weights._97_5_percent, weights.model_3_8gb,
            weights.quality_nf4],
    "Memory": [weights.total_2gb, weights._96_7_percent, weights.peft_checkpointing, weights.checkpointing_stores,
               weights._6gb],
    "Attention": [attention.flash_kernel, attention.flash_training, attention.flash_memory],
    "Precision": [libraries.fp16_with_bf16],
    "Schedule, steps and batches": [libraries.default_scheduler, libraries.configuration_runs, libraries._110_steps,
                                    libraries.accumulation],
    "Tokens and data": [libraries.pad_eos],
    "Loading, merging, generating": [training.merge],
    "Training": [training.target_modules, training.dropout, training.learning_rate, training.knowledge],
}  # fmt: skip


def id_of(claim: Callable) -> str:
    """Its function's name with dashes: `_97_5_percent` is 97.5-percent, as a name has no point and begins with no digit."""
    return re.sub(r"(\d)_(\d)", r"\1.\2", claim.__name__).strip("_").replace("_", "-")


CLAIMS = {id_of(claim): claim for group in GROUPS.values() for claim in group}
