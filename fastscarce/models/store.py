"""A trained model as a folder: ``student.safetensors`` and ``config.json``.

A timm model's folder is one that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastscarce.errors import ModelError
from fastscarce.files import write_whole

__all__ = ["ModelInfo", "load", "load_matching", "read_config", "save"]

WEIGHTS = "student.safetensors"
CONFIG = "config.json"

_SOURCE_KEYS = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "tag")


@dataclass(frozen=True)
class ModelInfo:
    """What a saved model is for.

    Attributes:
        name: Of the architecture.
        classes: How many logits.
        channels: Of the images.
        image_size: Height and width in pixels.
        class_names: In the order of the logits.
        mean: Subtracted from levels scaled to 0..1, one a channel.
        std: What the difference is divided by, one a channel.
    """

    name: str
    classes: int
    channels: int
    image_size: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str,
    classes: int,
    channels: int,
    image_size: int,
    class_names: Sequence[str],
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
) -> None:
    """Write the model's weights and configuration, each whole or not at all.

    Args:
        model: Made by `create`.
        folder: Made where it is missing.
        name: The name given to `create`.
        classes: How many logits.
        channels: Of the images.
        image_size: Height and width in pixels.
        class_names: In the order of the logits.
        mean: Of the normalisation, one number or one a channel.
        std: Of the normalisation, one number or one a channel.

    Raises:
        ResultsError: A file can't be written.
        ValueError: There is not one name a class.
    """
    if len(class_names) != classes:
        raise ValueError(f"save needs {classes} class names, got {len(class_names)}.")
    source = getattr(model, "pretrained_cfg", None) or {}
    source = dict(source) if isinstance(source, dict) else source.to_dict()
    architecture = getattr(model, "name", None) or source.get("architecture") or name
    pretrained = {key: value for key, value in source.items() if _keep(key, value)}
    pretrained.update(
        num_classes=classes,
        input_size=[channels, image_size, image_size],
        mean=_per_channel(mean, channels),
        std=_per_channel(std, channels),
    )
    if pretrained.get("custom_load"):
        pretrained["custom_load"] = False
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": classes,
        "label_names": list(class_names),
        "pretrained_cfg": pretrained,
    }
    place = Path(folder)
    # The configuration comes last: a folder that has one has the weights that go with it.
    write_whole(place / WEIGHTS, lambda path: _write_weights(model, path))
    text = json.dumps(config, indent=2) + "\n"
    write_whole(place / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def load(folder: str | Path) -> tuple[nn.Module, ModelInfo]:
    """Read a model that `save` wrote, in evaluation mode.

    Raises:
        ModelError: The folder has no such model, or its files don't fit together.
    """
    place = Path(folder)
    config = read_config(place)
    try:
        inside = config["pretrained_cfg"]
        channels, image_size, _ = inside["input_size"]
        info = ModelInfo(
            name=str(config["architecture"]),
            classes=int(config["num_classes"]),
            channels=int(channels),
            image_size=int(image_size),
            class_names=tuple(str(item) for item in config["label_names"]),
            mean=tuple(float(value) for value in inside["mean"]),
            std=tuple(float(value) for value in inside["std"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{place / CONFIG} was not written by fastscarce ({type(error).__name__}: {error});"
            " name a folder of results."
        ) from error
    weights = _read_weights(place / WEIGHTS)
    from fastscarce.models.factory import create

    model = create(
        info.name, classes=info.classes, channels=info.channels, image_size=info.image_size, seed=0
    )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(
            f"{place / WEIGHTS} does not hold the weights of {info.name}; train the model again."
        ) from error
    return model.eval(), info


def load_matching(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Load weights, but leave a head for other classes as it was made.

    Raises:
        ModelError: A tensor outside the head is missing or of another shape.
    """
    own = model.state_dict()
    fitting = {
        key: value for key, value in weights.items() if key in own and own[key].shape == value.shape
    }
    odd = [key for key in own if key not in fitting and not key.startswith("head.")]
    if odd:
        raise ModelError(
            f"{folder} holds weights for other images ({odd[0]} does not fit);"
            " give images with as many channels, or another model."
        )
    model.load_state_dict(fitting, strict=False)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        ModelError: It is missing or is no JSON object.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The model folder {folder} needs a readable {CONFIG} ({error}); check the path."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} needs a JSON object, got {type(config).__name__}.")
    return config


def _write_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save

    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    # Bytes, not save_file: a full disk is then the system's own error, which the caller words.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} can't be read ({error}); train the model again.") from error
    return weights


def _keep(key: str, value: object) -> bool:
    """Whether an entry of timm's configuration describes the model, not where it came from."""
    plain = isinstance(value, (bool, int, float, str, list, tuple))
    return plain and key not in (*_SOURCE_KEYS, "architecture", "label_offset", "test_input_size")


def _per_channel(value: float | Sequence[float], channels: int) -> list[float]:
    numbers = [float(value)] if isinstance(value, (int, float)) else [float(v) for v in value]
    return numbers * channels if len(numbers) == 1 else numbers
