"""What a table was made of, by content and never by path, and what of it differs from another.

A fingerprint is nested plain data: ``teacher`` (architecture, a digest a tensor, normalisation,
resolution, precision), ``transform`` (policy, seed, version of the drawing, image size, and who is
mixed with whom), ``data`` (ids, pixels, class names) and ``cache`` (k, codec, views). Keys are
written with dots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from xxhash import xxh3_128

from fastscarce.augment import MAPPING_VERSION, Policy
from fastscarce.cache.checksum import checksum
from fastscarce.data.order import DEALING_VERSION
from fastscarce.errors import CacheError

__all__ = ["differing", "digest", "of_data", "of_module", "of_transform", "require_same"]

_PIECE = 4096  # images a gather
_SHOWN = 6  # keys in an error

Content = dict[str, Any]
Ids = npt.NDArray[np.int64]


def digest(content: Content) -> str:
    """32 hexadecimal digits of a fingerprint."""
    return checksum(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def of_module(model: nn.Module) -> Content:
    """Architecture, and every parameter and buffer by name: dtype, shape and bytes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "architecture": f"{type(model).__name__} {checksum(_layers(model).encode())}",
        "tensors": {name: _of_tensor(value) for name, value in sorted(tensors.items())},
    }


def of_transform(policy: Policy, seed: int, image_size: tuple[int, int], ids: Ids) -> Content:
    """What a view of an image is. Views of another mapping version are other views.

    Partners follow from all ids together, sorted int64 ``(rows,)``: with others, each is another.
    """
    content = {
        "policy": policy.to_dict(),
        "seed": seed,
        "mapping_version": MAPPING_VERSION,
        "image_size": list(image_size),
    }
    if policy.mixes:
        content["pairs"] = f"{DEALING_VERSION} {_of_ids(ids)}"
    return content


def of_data(ids: Ids, images: Tensor, positions: Ids, class_names: Sequence[str]) -> Content:
    """Which samples, and what they show.

    Args:
        ids: Of the samples, sorted, int64 ``(rows,)``.
        images: The pool they are in, uint8.
        positions: Place of each sample in the pool, int64 ``(rows,)``.
        class_names: In the order of the classes.
    """
    pixels = xxh3_128(str((tuple(images.shape[1:]),)).encode())
    for start in range(0, len(positions), _PIECE):
        places = torch.from_numpy(positions[start : start + _PIECE]).to(images.device)
        pixels.update(np.ascontiguousarray(images[places].cpu().numpy()).data)
    return {
        "rows": len(ids),
        "ids": _of_ids(ids),
        "pixels": pixels.hexdigest(),
        "class_names": list(class_names),
    }


def differing(left: Content, right: Content, prefix: str = "") -> list[str]:
    """Dotted names of what differs, in order; a part that one side lacks is named as a whole."""
    names: list[str] = []
    for key in sorted({*left, *right}):
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differing(dict(a), dict(b), f"{prefix}{key}.")
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            names += differing(
                {str(n): value for n, value in enumerate(a)},
                {str(n): value for n, value in enumerate(b)},
                f"{prefix}{key}.",
            )
        elif a != b:
            names.append(f"{prefix}{key}")
    return names


def unexpected(expected: Content, found: Content) -> list[str]:
    """Dotted names of what in ``expected`` is not so in ``found``; other keys don't matter."""
    return differing(expected, _part_of(found, expected))


def not_allowed(keys: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Those of ``keys`` that neither they nor a part above them are among ``allowed``."""
    return [
        key
        for key in keys
        if not any(key == name or key.startswith(f"{name}.") for name in allowed)
    ]


def require_same(
    expected: Content, found: Content, *, where: str, allow: Sequence[str] = ()
) -> None:
    """Refuse a table that was made of something else.

    Args:
        expected: A fingerprint or parts of one; keys that are not given are not compared.
        found: The table's.
        where: The table, for the error.
        allow: Keys that may differ, or parts with all that is in them.

    Raises:
        CacheError: Names the keys that differ.
    """
    keys = not_allowed(unexpected(expected, found), allow)
    if keys:
        raise CacheError(
            f"{where} was made of something else: {listed(keys)} differ"
            f"{'s' if len(keys) == 1 else ''}; build a table of what you have, or pass "
            f"--allow-mismatch {','.join(keys[:_SHOWN])} where you know that it does not matter."
        )


def _part_of(content: Any, shape: Any) -> Any:
    """``content`` without the keys that ``shape`` has not; lists as they are."""
    if not isinstance(content, Mapping) or not isinstance(shape, Mapping):
        return content
    return {key: _part_of(content[key], shape[key]) for key in shape if key in content}


def listed(keys: Sequence[str]) -> str:
    """The first few of some keys as text."""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _of_ids(ids: Ids) -> str:
    return checksum(np.ascontiguousarray(ids).data)


def _layers(model: nn.Module) -> str:
    """What torch prints of a model, less the addresses of functions in it."""
    return re.sub(r"0x[0-9a-f]+", "", repr(model))


def _of_tensor(value: Tensor) -> str:
    content = value.detach().cpu().contiguous()
    head = f"{content.dtype} {tuple(content.shape)}"
    flat = content.reshape(-1).view(torch.uint8).numpy() if content.numel() else b""
    return f"{head} {checksum(flat)}"
