"""Build backend: scikit-build-core, compiled against the PyTorch that is already installed.

pip builds in an isolated environment. Listing torch as a build requirement would download several
gigabytes a second time only for its headers, so torch is asked for where none is installed and
otherwise found in the environment that pip installs into.
"""

from __future__ import annotations

import importlib.util
import os
import site
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# The oldest release whose stable ABI has every function that csrc uses.
TORCH_REQUIREMENT = "torch>=2.11"

Settings = Mapping[str, Any] | None


def torch_root() -> Path | None:
    """Folder of the installed torch package, or None.

    In pip's isolated build the interpreter is the target environment's, but its site-packages are
    not on ``sys.path``: they are looked at by path.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    places += [Path(folder) / "torch" for folder in folders]
    for place in places:
        if (place / "include" / "torch" / "csrc" / "stable").is_dir():
            return place
    return None


def _requires() -> list[str]:
    return [] if torch_root() else [TORCH_REQUIREMENT]


def _announce() -> None:
    root = torch_root()
    if root is not None:
        os.environ["FASTSCARCE_TORCH_ROOT"] = str(root)
        print(f"fastscarce: compiling against the torch in {root}")


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Build requirements of a wheel: those of scikit-build-core, and torch where none is here."""
    return [*_build.get_requires_for_build_wheel(config_settings), *_requires()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Build requirements of an editable install: as for a wheel."""
    return [*_build.get_requires_for_build_editable(config_settings), *_requires()]


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    """Write the wheel's metadata. Returns its folder's name."""
    return str(_build.prepare_metadata_for_build_wheel(metadata_directory, config_settings))


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    """Write the editable wheel's metadata. Returns its folder's name."""
    return str(_build.prepare_metadata_for_build_editable(metadata_directory, config_settings))


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Compile and pack the wheel. Returns its file name."""
    _announce()
    return str(_build.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Compile and pack an editable wheel. Returns its file name."""
    _announce()
    return str(_build.build_editable(wheel_directory, config_settings, metadata_directory))
