"""Published models of several families by their shapes, to be written with random weights: speed depends on no value."""

from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROPE_OF_PHI4 = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                "short_factor": [1.0] * 48, "long_factor": [1.3] * 48}  # fmt: skip


def _shape(family: str, hidden: int, inner: int, heads: int, key_heads: int, depth: int, vocabulary: int, **more: Any) -> Row:
    return {
        "family": family, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "num_hidden_layers": depth, "vocab_size": vocabulary, **more,
    }  # fmt: skip


# Arguments of transformers' configuration class, which is named after the family; the values of each model's config.json.
SHAPES: dict[str, Row] = {
    "llama-3.1-8b": _shape("Llama", 4096, 14336, 32, 8, 32, 128256),
    "qwen3-8b": _shape("Qwen3", 4096, 12288, 32, 8, 36, 151936, head_dim=128),
    "gemma-3-12b": _shape("Gemma3Text", 3840, 15360, 16, 8, 48, 262208, head_dim=256, sliding_window=1024,
                          tie_word_embeddings=True),
    "mistral-7b": _shape("Mistral", 4096, 14336, 32, 8, 32, 32768, sliding_window=None),
    "ministral-8b": _shape("Ministral", 4096, 12288, 32, 8, 36, 131072, head_dim=128, sliding_window=32768),
    "qwen2.5-7b": _shape("Qwen2", 3584, 18944, 28, 4, 28, 152064),
    "gemma-7b": _shape("Gemma", 3072, 24576, 16, 16, 28, 256000, head_dim=256),
    "gemma-2-9b": _shape("Gemma2", 3584, 14336, 16, 8, 42, 256000, head_dim=256, sliding_window=4096),
    "phi-4-mini": _shape("Phi3", 3072, 8192, 24, 8, 32, 200064, rope_parameters=ROPE_OF_PHI4, tie_word_embeddings=True,
                         max_position_embeddings=131072, original_max_position_embeddings=4096),
    "smollm3-3b": _shape("SmolLM3", 2048, 11008, 16, 4, 36, 128256, tie_word_embeddings=True),
    "granite-3.3-8b": _shape("Granite", 4096, 12800, 32, 8, 40, 49159, logits_scaling=16.0, embedding_multiplier=12.0,
                             residual_multiplier=0.22, attention_multiplier=0.0078125, tie_word_embeddings=True),
    "olmo-2-7b": _shape("Olmo2", 4096, 11008, 32, 32, 32, 100352),
    "olmo-3-7b": _shape("Olmo3", 4096, 11008, 32, 32, 32, 100278, sliding_window=4096),
    "glm-4-9b": _shape("Glm4", 4096, 13696, 32, 2, 40, 151552, head_dim=128),
    "command-r7b": _shape("Cohere2", 4096, 14336, 32, 8, 32, 256000, sliding_window=4096, head_dim=128),
    "stablelm-3b": _shape("StableLm", 2560, 6912, 32, 32, 32, 50304),
    "starcoder2-7b": _shape("Starcoder2", 4608, 18432, 36, 4, 32, 49152, sliding_window=None),
}  # fmt: skip


def write_shape(name: str, folder: Path, **changes: Any) -> None:
    """A checkpoint in NF4, of a shape, with random weights and the tokenizer of the tests. Doubly quantized.

    Args:
        name: in SHAPES.
        folder: to be written.
        changes: of the shape, such as fewer layers.
    """
    import torch
    import transformers

    from benchmarks.harness import device
    from qlora.model.demo import tiny_random_model
    from qlora.model.load import quantization_of

    values: Row = {**SHAPES[name], **changes, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "dtype": torch.bfloat16}
    config = getattr(transformers, f"{values.pop('family')}Config")(**values)
    with device():
        torch.set_default_dtype(torch.bfloat16)
        random = transformers.AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model: Any = type(random).from_pretrained(
        None,
        config=config,
        state_dict=random.state_dict(),
        quantization_config=quantization_of("nf4"),
        dtype=torch.bfloat16,
        device_map={"": device()},
    )
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_random_model())
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(3)  # unsloth needs one that is not the end of a text
    tokenizer.save_pretrained(folder)
