"""Checksums of bytes, and text that carries its own: XXH3, 128 bits, at the speed of memory."""

from __future__ import annotations

import json
from typing import Any

import xxhash
from xxhash import xxh3_128

__all__ = ["checksum", "seal", "short_hash", "unseal"]

_KEY = "seal"  # not a name that sealed content uses


def checksum(content: Any) -> str:
    """32 hexadecimal digits, of anything with a buffer."""
    return xxh3_128(content).hexdigest()


def short_hash(content: Any) -> str:
    """16 hexadecimal digits."""
    return xxhash.xxh3_64(content).hexdigest()


def seal(content: dict[str, Any], *, indent: int | None = None) -> str:
    """JSON of ``content`` with the checksum of the rest as its last entry."""
    return json.dumps({**content, _KEY: checksum(_canonical(content))}, indent=indent)


def unseal(text: str) -> dict[str, Any]:
    """What `seal` was given.

    Raises:
        ValueError: The text is not what `seal` wrote, to the last character of a value.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or _KEY not in content:
        raise ValueError("no checksum in it")
    expected = content.pop(_KEY)
    if checksum(_canonical(content)) != expected:
        raise ValueError("its checksum does not match")
    return content


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
