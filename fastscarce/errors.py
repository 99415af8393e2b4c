"""The errors a user meets, each one sentence: what is needed, what was got, and the cure."""

from __future__ import annotations

__all__ = [
    "CacheError",
    "ConfigError",
    "DataError",
    "FastscarceError",
    "Interrupted",
    "ModelError",
    "ResultsError",
    "TrainingError",
]


class FastscarceError(Exception):
    """Base of every error that a user can mend; a command prints it and exits with 2."""


class CacheError(FastscarceError):
    """A teacher's table is missing, damaged, in use, incomplete or was made of something else."""


class ConfigError(FastscarceError):
    """A setting is unknown, of the wrong type or out of its range."""


class DataError(FastscarceError):
    """Images, labels or a file of pseudo-labels are missing, unreadable or too few."""


class ModelError(FastscarceError):
    """A model's name is unknown, or its folder can't be read."""


class TrainingError(FastscarceError):
    """Training can't go on: a loss that is not finite, say."""


class ResultsError(FastscarceError):
    """The results folder exists, belongs to another run, or can't be written."""


class Interrupted(FastscarceError):
    """A signal asked the run to stop; it saved its state and can be resumed.

    Attributes:
        signal: The signal's number; the process exits with 128 more, as shells do.
    """

    signal: int = 15
