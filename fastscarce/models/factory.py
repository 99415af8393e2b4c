"""A model for a name: the small CNN, any of timm's, or a folder's."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastscarce.errors import ModelError
from fastscarce.models import small_cnn
from fastscarce.models.store import load, load_matching, read_config

__all__ = ["create"]

_LOCAL = "local-dir:"


def create(
    name: str,
    *,
    classes: int,
    channels: int,
    image_size: int,
    seed: int,
    pretrained: bool = False,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """Make a model; its weights depend on the seed alone, and torch's generator is left alone.

    Args:
        name: ``small_cnn``, ``small_cnn_gn`` (group norm), a timm name, or ``local-dir:FOLDER`` for
            weights saved by `save` or by timm: a head for other classes is made new.
        classes: How many logits.
        channels: Of the images, 1 or 3.
        image_size: Height and width in pixels.
        seed: Any integer.
        pretrained: Start a timm model from its published weights.
        drop_rate: Dropout before the head, 0 to below 1.
        drop_path_rate: Stochastic depth, 0 to below 1, where the model has it.

    Raises:
        ModelError: The model is unknown, can't be made for such images, or has no such weights.
    """
    for setting, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if not 0.0 <= rate < 1.0:
            raise ModelError(f"{setting} must be from 0 to below 1, got {rate}.")
    rates = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    sizes = {"classes": classes, "channels": channels, "image_size": image_size}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name.startswith(_LOCAL):
            return _from_folder(Path(name.removeprefix(_LOCAL)).expanduser(), sizes, rates)
        if name in small_cnn.NAMES:
            if pretrained:
                raise ModelError(
                    f"{name} has no published weights; set pretrained to false, or "
                    "name a folder of trained weights."
                )
            return _small(name, sizes, rates)
        return _timm(name, sizes, rates, pretrained=pretrained)


def _small(name: str, sizes: dict[str, int], rates: dict[str, float]) -> nn.Module:
    try:
        return small_cnn.SmallCNN(
            **sizes,
            group_norm=name == "small_cnn_gn",
            drop_rate=rates["drop_rate"],
            drop_path_rate=rates["drop_path_rate"],
        )
    except ValueError as error:
        raise ModelError(f"{name} can't be made: {error}") from error


def _from_folder(folder: Path, sizes: dict[str, int], rates: dict[str, float]) -> nn.Module:
    architecture = read_config(folder).get("architecture")
    if architecture not in small_cnn.NAMES:
        return _timm(f"{_LOCAL}{folder}", sizes, rates, pretrained=True)
    model = _small(str(architecture), sizes, rates)
    source, _ = load(folder)
    load_matching(model, source.state_dict(), folder)
    return model


def _timm(
    name: str, sizes: dict[str, int], rates: dict[str, float], *, pretrained: bool
) -> nn.Module:
    import timm

    if not name.startswith((_LOCAL, "hf-hub:", "hf_hub:")) and not timm.is_model(name):
        raise ModelError(_unknown(name))
    arguments: dict[str, Any] = {
        "num_classes": sizes["classes"],
        "in_chans": sizes["channels"],
        **{key: rate for key, rate in rates.items() if rate > 0.0},
    }
    if _has_fixed_size(name):
        arguments["img_size"] = sizes["image_size"]
    try:
        model = _create_timm(name, arguments, pretrained=pretrained)
        _try(model, sizes)
        return model
    except Exception as error:  # timm's builders and the hub's client raise what they like
        if pretrained:
            _timm(name, sizes, rates, pretrained=False)  # refuses what is no matter of weights
            cure = (
                "name a folder that timm or this tool wrote"
                if name.startswith(_LOCAL)
                else "get them once where there is a network, name a folder of weights by "
                "local-dir:PATH, or set pretrained to false"
            )
            raise ModelError(
                f"The weights of {name} can't be read ({type(error).__name__}: "
                f"{_first_line(error)}); {cure}."
            ) from error
        raise ModelError(
            f"{name} can't be made for {sizes['channels']} channels of {sizes['image_size']} pixels"
            f" ({type(error).__name__}: {_first_line(error)}); choose another model."
        ) from error


def _create_timm(name: str, arguments: dict[str, Any], *, pretrained: bool) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        # Some of timm's models have no stochastic depth; the rest of the recipe holds for them.
        if "drop_path_rate" not in arguments or "drop_path_rate" not in str(error):
            raise
        arguments = {key: value for key, value in arguments.items() if key != "drop_path_rate"}
        model = timm.create_model(name, pretrained=pretrained, **arguments)
    return model


def _try(model: nn.Module, sizes: dict[str, int]) -> None:
    """Run one black image, so that images too small for the model are refused at once."""
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", 1)
    if patches == 0:
        raise ValueError("the image is smaller than a patch")
    side = sizes["image_size"]
    with torch.no_grad():
        model.eval()(torch.zeros(1, sizes["channels"], side, side))
    model.train()


def _has_fixed_size(name: str) -> bool:
    if name.startswith(_LOCAL):
        config = read_config(Path(name.removeprefix(_LOCAL)))
        return bool(config.get("pretrained_cfg", config).get("fixed_input_size", False))
    if ":" in name:
        return False
    import timm.models

    return bool(timm.models.get_pretrained_cfg_value(name, "fixed_input_size"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")


def _unknown(name: str) -> str:
    import timm

    known = [*small_cnn.NAMES, *timm.list_models()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or list(small_cnn.NAMES)
    return f"The model {name!r} is unknown; near names are {', '.join(near)}."
