"""What a run leaves on disk: a checkpoint per epoch, and the final adapter. Tensors as safetensors, the rest as JSON."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qlora.config import ExitCode, UserError


def prepare_run_folder(folder: Path) -> None:
    """Make the run folder and check that it can be written, before anything costly happens. Nothing is ever cleared away.

    Raises:
        UserError: exit 4 if it holds anything, or cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            text = f"{folder} is not empty: it may hold a run. Choose another --output-dir, or remove that folder."
            raise UserError(ExitCode.CHECKPOINT, text)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        text = f"Run folder {folder} cannot be written: {error.strerror}. Choose another --output-dir."
        raise UserError(ExitCode.CHECKPOINT, text) from None


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter in PEFT's format, which `AutoPeftModelForCausalLM.from_pretrained(folder)` loads.

    By hand rather than `save_pretrained`, which asks the hub about the base model and adds a model card of blank fields.
    """
    from peft import get_peft_model_state_dict  # here, as qlora.model must be the first to import it

    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    lora = model.peft_config["default"]
    training = lora.inference_mode
    lora.inference_mode = True  # so that loading it freezes it, as PEFT's own save does
    lora.save_pretrained(str(folder))
    lora.inference_mode = training


def save(checkpoints: Path, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int) -> Path:
    """Write `checkpoints`/step-000012: adapter, moments by parameter name, and `state` as JSON; then prune to `keep`.

    Args:
        checkpoints: folder of all checkpoints of the run.
        model: with adapters; all that requires a gradient is saved.
        optimizer: AdamW over those parameters.
        state: JSON values; "step" names the folder.
        keep: how many of the newest stay.
    """
    folder = checkpoints / f"step-{state['step']:06d}"
    aside = checkpoints / f".{folder.name}"
    shutil.rmtree(aside, ignore_errors=True)
    save_adapter(model, aside)
    moments = {
        f"{kind}.{name}": value
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for kind, value in optimizer.state[parameter].items()
    }
    save_file(moments, aside / "trainer_state.safetensors")
    (aside / "state.json").write_text(json.dumps(state, indent=2))
    aside.rename(folder)  # whole or not at all
    for old in sorted(checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))[:-keep]:
        shutil.rmtree(old)
    return folder
