"""What the tests of the operators share: each instruction set that this machine runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastscarce import _ops


def _runs(name: str) -> bool:
    try:
        return _ops.set_isa(name) == name
    except ValueError:
        return False
    finally:
        _ops.set_isa("")


ISAS = [name for name in ("scalar", "avx2", "avx512", "avx512-emulated") if _runs(name)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the instruction set that the test runs with."""
    yield _ops.set_isa(request.param)
    _ops.set_isa("")
