"""A training state as one safetensors file: weights, moving average, optimizer, step.

One file that is renamed into place is there whole or not at all, and nothing in it is pickled.
The optimizer's tensors are kept by number, as PyTorch numbers parameters; its scalars, the
scaler's state and the counters travel as JSON in the file's metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastscarce.errors import ResultsError
from fastscarce.files import write_whole

__all__ = ["load_state", "load_weights", "save_state", "save_weights"]

FORMAT = "fastscarce-checkpoint-1"


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies that share no memory, as safetensors asks."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    header = {"format": FORMAT, "state": json.dumps(metadata)}
    content = save(_plain(tensors), metadata=header)
    write_whole(path, lambda place: place.write_bytes(content))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ResultsError(
            f"{path} can't be read as a checkpoint ({error}); delete it to train this stage anew."
        ) from error
    if metadata.get("format") != FORMAT:
        raise ResultsError(
            f"{path} has the format {metadata.get('format')!r} where this version reads "
            f"{FORMAT!r}; go on with the version that wrote it, or start anew with --overwrite."
        )
    return tensors, json.loads(metadata["state"])


def save_weights(path: Path, model: nn.Module, **facts: Any) -> None:
    """Write a model's weights and buffers, with ``facts`` (JSON) beside them."""
    _write(path, dict(model.state_dict()), facts)


def load_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """Fill ``model`` from :func:`save_weights`'s file. Returns its facts.

    Raises:
        ResultsError: The file can't be read, or holds another architecture.
    """
    tensors, facts = _read(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ResultsError(
            f"{path} holds the weights of another architecture; start anew with --overwrite."
        ) from error
    return facts


def save_state(
    path: Path,
    *,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: dict[str, Any] | None,
    facts: dict[str, Any],
) -> None:
    """Write all that a stage needs to go on as if it had not stopped.

    Args:
        path: The checkpoint's file.
        model: The bare model (no wrapper of a process group).
        average: The moving average of its weights.
        optimizer: Its state's tensors and scalars are kept, its groups' settings are not: they
            follow from the configuration.
        scaler: The gradient scaler's state, where float16 is in use.
        facts: Counters and whatever else is JSON.
    """
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average/{name}": value for name, value in average.state_dict().items()}
    scalars: dict[str, dict[str, Any]] = {}
    for number, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{number}/{name}"] = value
            else:
                scalars.setdefault(str(number), {})[name] = value
    _write(path, tensors, {"facts": facts, "scaler": scaler, "optimizer": scalars})


def load_state(
    path: Path,
    *,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Restore what :func:`save_state` wrote.

    Returns:
        The facts, and the scaler's state or None.

    Raises:
        ResultsError: The file can't be read, or belongs to another architecture.
    """
    tensors, metadata = _read(path)
    if metadata.keys() != {"facts", "scaler", "optimizer"}:
        raise ResultsError(
            f"{path} holds weights and no training state; delete it to train this stage anew."
        )
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    state: dict[int, dict[str, Any]] = {
        int(number): dict(entries) for number, entries in metadata["optimizer"].items()
    }
    for name, value in parts["optimizer"].items():
        number, _, entry = name.partition("/")
        state.setdefault(int(number), {})[entry] = value
    try:
        model.load_state_dict(parts["model"])
        average.load_state_dict(parts["average"])
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
    except (RuntimeError, ValueError) as error:
        raise ResultsError(
            f"{path} holds the state of another architecture; start anew with --overwrite."
        ) from error
    return metadata["facts"], metadata["scaler"]
