"""``python -m fastscarce``: the same commands as the ``fastscarce`` script."""

from __future__ import annotations

from fastscarce.cli import console

if __name__ == "__main__":
    console()
