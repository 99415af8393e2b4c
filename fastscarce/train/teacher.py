"""Teachers by name: result folders, timm's models, ensembles, and classes that are others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import nn

from fastscarce.cache import Teacher
from fastscarce.config import TeacherConfig
from fastscarce.errors import ConfigError, DataError
from fastscarce.models import create, load
from fastscarce.models.store import read_config

__all__ = ["load_teacher"]

_LOCAL = "local-dir:"


def load_teacher(
    config: TeacherConfig, *, classes: Sequence[str], channels: int, device: torch.device
) -> Teacher:
    """The networks of ``config.teacher`` on a device, in evaluation mode.

    Args:
        config: Names, precision, resolution and class map.
        classes: Names of the data's classes.
        channels: Of the data's images.
        device: Where the networks go.

    Raises:
        ConfigError: No teacher is named.
        DataError: A teacher knows other classes and there is no class map, or the map is no map.
        ModelError: A teacher is unknown or can't be read.
    """
    names = [name.strip() for name in config.teacher.split(",") if name.strip()]
    if not names:
        raise ConfigError("teacher needs a result folder, a timm name or local-dir:PATH, got none.")
    models: list[nn.Module] = []
    sizes: list[int | None] = []
    maps: list[NDArray[np.int64] | None] = []
    for name in names:
        model, own_size, class_map = _network(name, channels, tuple(classes), config)
        model = model.to(device).to(memory_format=torch.channels_last)
        models.append(model.eval().requires_grad_(False))
        sizes.append(config.teacher_image_size or own_size)
        maps.append(class_map)
    if any(not np.array_equal(_as_list(one), _as_list(maps[0])) for one in maps):
        raise DataError(
            f"The teachers {', '.join(names)} know different classes; an ensemble needs the same."
        )
    return Teacher(
        tuple(models),
        config.teacher_precision,
        image_size=tuple(sizes),
        class_map=maps[0],
        classes=None if maps[0] is None else len(classes),
    )


def _network(
    name: str, channels: int, classes: tuple[str, ...], config: TeacherConfig
) -> tuple[nn.Module, int | None, NDArray[np.int64] | None]:
    """A network, the side of the images it was trained at, and its class map.

    Its classes are compared with the data's before weights are fetched from anywhere.
    """
    folder = Path(name.removeprefix(_LOCAL)).expanduser()
    if (folder / "student.safetensors").is_file():
        model, info = load(folder)
        if info.channels != channels:
            raise DataError(
                f"The teacher in {folder} looks at images of {info.channels} channels, but the data"
                f" has {channels}; name a teacher of such images."
            )
        known = _class_map(name, info.class_names, classes, config.class_map)
        return model, info.image_size, known
    facts = _facts(name, folder)
    size = config.teacher_image_size or int(facts.get("input_size", (3, 224, 224))[-1])
    count, labels = int(facts["num_classes"]), facts.get("label_names")
    class_map = None
    if _is_known(name):
        of = tuple(map(str, labels)) if labels else count
        class_map = _class_map(name, of, classes, config.class_map)
    # Refuses a name that is not known, with near ones.
    model = create(name, classes=count, channels=channels, image_size=size, seed=0, pretrained=True)
    return model, size, class_map


def _facts(name: str, folder: Path) -> dict[str, Any]:
    """What timm's configuration of a model says of it."""
    if name.startswith(_LOCAL):
        config = read_config(folder)
        inside = config.get("pretrained_cfg", config)
        return {"num_classes": config.get("num_classes", 1000), **inside,
                **{key: config[key] for key in ("label_names",) if key in config}}  # fmt: skip
    import timm.models

    if timm.models.is_model(name):
        found = timm.models.get_pretrained_cfg(name)
        if found is not None:
            return dict(found.to_dict())
    return {"num_classes": 1000}


def _is_known(name: str) -> bool:
    import timm.models

    return name.startswith(_LOCAL) or ":" in name or bool(timm.models.is_model(name))


def _class_map(
    name: str, known: tuple[str, ...] | int, classes: tuple[str, ...], path: str | None
) -> NDArray[np.int64] | None:
    count = known if isinstance(known, int) else len(known)
    if path is None:
        if known == classes or (isinstance(known, int) and count == len(classes)):
            return None
        theirs = f"{count} classes" if isinstance(known, int) else ", ".join(known[:10])
        raise DataError(
            f"The teacher {name} knows other classes ({theirs}) than the data "
            f"({', '.join(classes[:10])}); name a teacher of this data, or give --class-map FILE."
        )
    content = _read_map(path)
    numbers = {} if isinstance(known, int) else {label: n for n, label in enumerate(known)}
    result = np.full(count, -1, dtype=np.int64)
    for place, label in enumerate(classes):
        theirs_of = content.get(label)
        if theirs_of is None or theirs_of == []:
            raise DataError(f"The class map {path} needs an entry for the class {label!r}.")
        for entry in theirs_of if isinstance(theirs_of, list) else [theirs_of]:
            number = numbers.get(str(entry), entry)
            # YAML reads yes, no, on and off as true and false, which Python takes for numbers.
            if type(number) is not int or not 0 <= number < count:
                raise DataError(
                    f"The class map {path} names {entry!r} for {label!r}, which is no class of the "
                    f"teacher {name}; give a name it has, or a number from 0 to {count - 1}."
                )
            if result[number] not in (-1, place):
                raise DataError(
                    f"The class map {path} gives the teacher's class {entry!r} to both"
                    f" {classes[result[number]]!r} and {label!r}; give it to one."
                )
            result[number] = place
    return result


def _read_map(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no YAML or JSON"
        raise DataError(f"The class map {path} can't be read ({reason}).") from error
    if not isinstance(content, dict):
        raise DataError(
            f"The class map {path} needs a mapping from the data's classes to the teacher's."
        )
    return {str(key): value for key, value in content.items()}


def _as_list(value: NDArray[np.int64] | None) -> list[int]:
    return [] if value is None else value.tolist()
