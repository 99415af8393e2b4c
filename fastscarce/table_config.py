"""What the commands about a teacher's table read; see config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastscarce.config import DataConfig, TeacherConfig

__all__ = [
    "CacheBuildConfig",
    "CacheCompactConfig",
    "CacheDiffConfig",
    "CacheExportConfig",
    "CacheGcConfig",
    "CacheInfoConfig",
    "CacheVerifyConfig",
    "TableConfig",
]


@dataclass
class TableConfig(DataConfig, TeacherConfig):
    """What a teacher's table is of.

    Attributes:
        seed: Of the data's split and of the views, as of the runs that will read the table.
        allow_mismatch: Keys, joined by commas, that a table may differ in from what it is to be of.
        cpu: Use the CPU even where there is a GPU.
        threads: CPU threads of a process. `null` leaves PyTorch's choice.
    """

    seed: int = 0
    allow_mismatch: str = ""
    cpu: bool = False
    threads: int | None = None


@dataclass
class CacheBuildConfig(TableConfig):
    """Ask a teacher about views of the training images, and keep what it says.

    Attributes:
        out: Folder of tables; this one's is named by its fingerprint.
        policy: Of the views: its name, such as `standard`, or a YAML file. Of one with `+cutmix` or
            `+mixup` the teacher sees mixed images, and students mix them alike; of one without, a
            student mixes the rows of two views.
        views: Of each image. Students that train for more epochs go round.
        k: Classes kept a row; all where there are fewer.
        codec: Of the log-probabilities.
        tagged: Keep four bytes with each row, a hash of the plan that drew its view.
        teacher_batch_size: Rows of a forward pass.
        rows_per_shard: Rows that a process which dies loses at most; a file is closed an eighth
            before.
    """

    out: str = "runs/table"
    policy: str = "standard"
    views: int = 10
    k: int = 16
    codec: Literal["float16", "uint8"] = "float16"
    tagged: bool = False
    teacher_batch_size: int = 256
    rows_per_shard: int = 65536


@dataclass
class CacheVerifyConfig(TableConfig):
    """Compare every byte of a table with its checksum.

    Attributes:
        path: Of the table.
        deep: Rows that the teacher is asked about again.
    """

    path: str = "runs/table"
    deep: int = 0


@dataclass
class CacheInfoConfig:
    """Print what a table is of, and how much of it is there.

    Attributes:
        path: Of the table.
    """

    path: str = "runs/table"


@dataclass
class CacheGcConfig:
    """Drop what a kill left half, and damaged shards, whose rows `cache build` makes again.

    Attributes:
        path: Of the table.
    """

    path: str = "runs/table"


@dataclass
class CacheCompactConfig:
    """Join small shards into full ones.

    Attributes:
        path: Of the table.
        rows_per_shard: Rows of a full shard.
    """

    path: str = "runs/table"
    rows_per_shard: int = 65536


@dataclass
class CacheExportConfig:
    """Write a table's rows for other programs.

    Attributes:
        path: Of the table.
        to: The format.
        out: The file.
    """

    path: str = "runs/table"
    to: Literal["parquet"] = "parquet"
    out: str = "table.parquet"


@dataclass
class CacheDiffConfig:
    """Say what two tables differ in, and by how much the rows that both have.

    Attributes:
        path: Of the first table.
        other: Of the second.
    """

    path: str = "runs/table"
    other: str = "runs/other-table"
