"""The layers that get an adapter: names matched against the model before PEFT does, which skips those without a match."""

from typing import Any, NamedTuple

import torch

from qlora.config import TrainConfig
from qlora.errors import ConfigError
from qlora.model.coverage import ROUTER, linear_classes, linear_layers


class Target(NamedTuple):
    """The linear layers that one name of `target_modules` matches, and that no earlier name did."""

    name: str
    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]  # distinct (out, in)
    adapter_parameters: int


def audit_targets(model: Any, config: TrainConfig) -> list[Target]:
    """Match every target name against the model before PEFT does: it skips names without a match and says nothing.

    Phi-3 fuses its projections, so of the usual seven Llama names two match, which trains 35 % of what was meant.

    Args:
        model: the base model or the meta model, without adapters.
        config: target_modules, matched as PEFT does (the whole name or its end after a dot), None for all linear layers;
            and the rank, as a layer gets r * (in + out) parameters.

    Raises:
        ConfigError: if a name matches nothing; the text lists the names that exist.
    """
    layers = linear_layers(model)
    if not layers:
        own = ", ".join(linear_classes(model))
        text = f"{type(model).__name__} has no torch.nn.Linear layer in its decoder, so there is nothing to adapt in NF4."
        raise ConfigError(text, hint=f"It has {own}, which this loop cannot adapt." if own else "")
    available = sorted({name.rsplit(".", 1)[-1] for name in layers})
    targets: list[Target] = []
    seen: set[str] = set()
    for target in config.target_modules or available:
        matched = {name: layer for name, layer in layers.items() if matches(name, target)}
        if not matched:
            where = f"--init-adapter {config.init_adapter}: target" if config.init_adapter else "--target-modules"
            text = f"{where} {target} matches no linear layer of {type(model).__name__}{_why_not(model, target)}. It has "
            advice = "leave the flag out to adapt them all. (The head cannot have one.)"
            raise ConfigError(f"{text}{', '.join(available)}; {advice}")
        fresh = {name: layer for name, layer in matched.items() if name not in seen}
        if fresh:
            shapes = tuple(sorted({(layer.out_features, layer.in_features) for layer in fresh.values()}))
            parameters = sum(config.lora_r * (layer.in_features + layer.out_features) for layer in fresh.values())
            targets.append(Target(target, tuple(fresh), shapes, parameters))
        seen |= fresh.keys()
    return targets


def _why_not(model: Any, target: str) -> str:
    """For a name that only matches layers that cannot have an adapter: which kind they are."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and matches(n, target)]
    if any(ROUTER.search(name) for name, _ in found):
        return " but a router of experts, which is never adapted"
    classes = sorted({type(module).__name__ for _, module in found if type(module) is not torch.nn.Linear})
    return f" that is loaded in NF4, but {', '.join(classes)}, which bitsandbytes does not quantize" if classes else ""


def matches(name: str, target: str) -> bool:
    """PEFT's rule for a list of target modules."""
    return name == target or name.endswith(f".{target}")
