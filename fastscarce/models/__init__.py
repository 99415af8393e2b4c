"""Models: made for a name, saved, loaded, and prepared for fine-tuning."""

from __future__ import annotations

from fastscarce.models.factory import create
from fastscarce.models.store import ModelInfo, load, save
from fastscarce.models.tuning import freeze, groups, train_mode

__all__ = ["ModelInfo", "create", "freeze", "groups", "load", "save", "train_mode"]
