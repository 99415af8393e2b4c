"""Which parameters train, at which rates, and what stays still meanwhile."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fastscarce.errors import ModelError

__all__ = ["freeze", "groups", "train_mode"]


def groups(
    model: nn.Module,
    *,
    head_rate: float,
    backbone_rate: float | None,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer; frozen parameters are in none.

    The head trains at ``head_rate``; a layer ``k`` layers below it at ``backbone_rate *
    layer_decay**k``. Parameters of one dimension (biases, norms) and those that the model names
    have no weight decay.

    Args:
        model: Made by `create`.
        head_rate: The head's learning rate.
        backbone_rate: The other layers' learning rate, before layer-wise decay; None: the head's.
        weight_decay: For parameters of two dimensions or more.
        layer_decay: Above 0, at most 1; 1 gives all layers one rate.

    Returns:
        Dicts of ``params``, ``lr`` and ``weight_decay``, from the lowest layer up.

    Raises:
        ModelError: A number is out of its range, or no parameter is left to train.

    Source: layer-wise decay after Clark et al., "ELECTRA" (2020); Bao et al., "BEiT" (2021).
    """
    if backbone_rate is None:
        backbone_rate = head_rate
    if min(head_rate, backbone_rate, weight_decay) < 0.0 or not 0.0 < layer_decay <= 1.0:
        raise ModelError(
            "Rates and weight decay must be 0 or more and layer_decay above 0 and at most 1, got"
            f" {head_rate}, {backbone_rate}, {weight_decay} and {layer_decay}."
        )
    head = {id(parameter) for parameter in _head(model).parameters()}
    layers = _layers(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ModelError("The model has no parameter left to train; freeze less of it.")
    top = 1 + max(
        (layers.get(name, 0) for name, p in model.named_parameters() if id(p) not in head),
        default=0,
    )
    undecayed = _undecayed(model)
    result: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        layer = top if id(parameter) in head else layers.get(name, 0)
        decayed = parameter.ndim > 1 and name not in undecayed
        rate = head_rate if layer == top else backbone_rate * layer_decay ** (top - layer)
        group = {"params": [], "lr": rate, "weight_decay": weight_decay if decayed else 0.0}
        result.setdefault((layer, decayed), group)["params"].append(parameter)
    return [result[key] for key in sorted(result)]


def freeze(model: nn.Module, part: str) -> None:
    """Stop the gradients of a part; the rest trains.

    Args:
        model: Made by `create`.
        part: ``none``, or ``backbone``: all but the head.

    Raises:
        ModelError: ``part`` is neither.
    """
    if part not in ("none", "backbone"):
        raise ModelError(f"freeze must be none or backbone, got {part!r}.")
    model.requires_grad_(part == "none")
    _head(model).requires_grad_(True)


def train_mode(model: nn.Module, *, freeze_batch_norm: bool = False) -> nn.Module:
    """``model.train()``, but what is frozen stays in evaluation mode, statistics and dropout.

    Args:
        model: Any model.
        freeze_batch_norm: Keep the statistics of every batch norm, frozen or not.

    Returns:
        The model.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if frozen or (freeze_batch_norm and isinstance(module, nn.modules.batchnorm._BatchNorm)):
            module.eval()
    return model


def _head(model: nn.Module) -> nn.Module:
    get: Any = getattr(model, "get_classifier", None)
    head = get() if get is not None else None
    if isinstance(head, tuple):  # distilled transformers have two
        head = nn.ModuleList(head)
    if not isinstance(head, nn.Module):
        raise ModelError(
            f"{type(model).__name__} does not say which layer is its head; choose another model."
        )
    return head


def _layers(model: nn.Module) -> dict[str, int]:
    """Each parameter's layer, 0 at the bottom; by timm's own matcher where the model has one."""
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        return {
            str(name): int(layer)
            for name, layer in group_parameters(model, matcher(coarse=False), reverse=True).items()
        }
    layers = {}
    for name, _ in model.named_parameters():
        stage = re.match(r"stages\.(\d+)\.", name)
        layers[name] = int(stage.group(1)) if stage else 0
    return layers


def _undecayed(model: nn.Module) -> set[str]:
    names: Any = getattr(model, "no_weight_decay", None)
    return set(names()) if names is not None else set()
