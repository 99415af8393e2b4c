"""Imports run one way, and a package that is heavy or optional is imported where it belongs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastscarce

ROOT = Path(fastscarce.__file__).parent
ORDER = ["_ops", "ops", "augment", "data", "cache", "pseudo", "train", "cli", "__main__"]
EVERYWHERE = {"errors", "config", "files"}
# Beside the order: what each may import, and who may import it.
SIDE = {
    "models": ({"_ops", "ops", "augment", "data"}, {"train", "cli"}),
    "report": ({"ops", "augment", "data"}, {"train", "cli"}),
    "doctor": ({"_ops"}, {"cli"}),
    "table_config": (set(), {"train", "cli"}),
}
# Package: the modules or rooms that may import it at all.
PLACES = {
    "kornia": {"augment"},
    "nvidia": {"augment.dali", "data.dali", "data.loader"},
    "timm": {"models", "train"},
    "accelerate": {"train"},
    "tensorboard": {"train"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "pyarrow": {"cache", "data", "pseudo"},
    "sklearn": {"data"},
    "torchvision": {"augment", "data", "models"},
    "rich": {"cli", "doctor", "train.progress"},
    "jsonargparse": {"cli", "config"},
    "numba": {"augment", "data", "pseudo"},
    "safetensors": {"cache", "models", "pseudo", "train"},
    "xxhash": {"cache"},
}
# Only ever inside a function: costly to import, or absent on some machines.
LAZY = {"kornia", "nvidia", "timm", "accelerate", "tensorboard", "sklearn", "rich", "torchvision"}


def modules() -> list[str]:
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")
    )


def is_typing(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(source: str, module: str) -> Iterator[tuple[str, bool]]:
    """Each imported module's full name, and whether importing this one imports it at once."""
    package = ["fastscarce", *module.split(".")[:-1]]

    def walk(nodes: list[ast.stmt], eager: bool) -> Iterator[tuple[str, bool]]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name, eager) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else []
                name = ".".join([*base, *([node.module] if node.module else [])])
                if name == "fastscarce":
                    yield from ((f"{name}.{alias.name}", eager) for alias in node.names)
                else:
                    yield name, eager
            else:
                inside = eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                inside = inside and not is_typing(node)
                for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                    yield from walk(getattr(node, field, []), inside)
                if isinstance(node, ast.Expr | ast.Assign | ast.Return):
                    yield from dynamic(node, inside)

    def dynamic(node: ast.AST, eager: bool) -> Iterator[tuple[str, bool]]:
        """``importlib.import_module("name")`` of a name that is written out."""
        for call in ast.walk(node):
            if (
                isinstance(call, ast.Call)
                and ast.unparse(call.func).endswith("import_module")
                and call.args
                and isinstance(call.args[0], ast.Constant)
            ):
                yield str(call.args[0].value), eager

    yield from walk(ast.parse(source).body, True)


def complaints(source: str, module: str) -> list[str]:
    """What is wrong with the imports of one module."""
    room = module.split(".")[0]
    found = []
    for name, eager in imports(source, module):
        top, _, rest = name.partition(".")
        if top == "fastscarce":
            other = rest.split(".")[0]
            if other and not may_import(room, other):
                found.append(f"{module} imports {name}")
        elif top in PLACES:
            allowed = any(
                module == place or module.startswith(f"{place}.") for place in PLACES[top]
            )
            if not allowed:
                found.append(f"{module} imports {name}")
            elif eager and top in LAZY:
                found.append(f"{module} imports {name} outside a function")
    return found


def may_import(room: str, other: str) -> bool:
    if room == other or room == "__init__" or other in EVERYWHERE or other.startswith("__"):
        return True
    if room in EVERYWHERE:
        return False
    if other in SIDE:
        return room in SIDE[other][1]
    if room in SIDE:
        return other in SIDE[room][0]
    return room in ORDER and other in ORDER and ORDER.index(other) < ORDER.index(room)


@pytest.mark.parametrize("module", modules())
def test_imports_run_one_way(module: str) -> None:
    source = ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    assert complaints(source, module) == []


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {module.split(".")[0] for module in modules()} - {"__init__"}
    assert rooms <= set(ORDER) | EVERYWHERE | set(SIDE)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops.kd", "from fastscarce.data import load"),
        ("ops.kd", "def late():\n    from fastscarce import train"),
        ("augment.policy", "from ..pseudo.label import PseudoLabels"),
        ("pseudo.label", "import fastscarce.report.page"),
        ("data.loader", "if TYPE_CHECKING:\n    from fastscarce.models import create"),
        ("errors", "from fastscarce.ops import kd"),
        ("report.page", "from fastscarce.train import loop"),
        ("train.loop", "from fastscarce.cli import main"),
        ("pseudo.label", "try:\n    import matplotlib\nexcept ImportError:\n    pass"),
        ("ops.kd", "def late():\n    x = importlib.import_module('fastscarce.train')"),
        ("models.factory", "import timm"),
        ("train.run", "class A:\n    from accelerate import Accelerator"),
    ],
)
def test_sees_an_arrow_that_points_back(module: str, source: str) -> None:
    assert complaints(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "train.loop",
            "from fastscarce.ops import kd_loss\nfrom fastscarce.errors import DataError",
        ),
        ("models.factory", "def create():\n    import timm"),
        ("models.factory", "if TYPE_CHECKING:\n    import timm"),
        ("cli", "def doctor():\n    from fastscarce import doctor, report"),
        ("pseudo.select", "from .label import PseudoLabels"),
    ],
)
def test_lets_the_right_way_pass(module: str, source: str) -> None:
    assert complaints(source, module) == []
