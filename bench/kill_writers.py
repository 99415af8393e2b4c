"""Kills writers of a teacher's table with SIGKILL at random instants, and looks at what is left.

    python bench/kill_writers.py --kills 50 --writers 2

After every kill: whatever a journal names is sound, rows that were there are there, and no more
rows than one shard has are lost a writer. In the end the table is completed, and equals one that
nothing disturbed, bit for bit.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import struct
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastscarce.cache import Samples, TeacherTable, build, gc, verify

# Whole batches: then each row that the teacher is asked about is one to be kept.
BATCH, SHARD, VIEWS, SAMPLES = 16, 128, 4, 704


class Counted(nn.Module):
    """Counts in shared memory how many rows it was asked about, where a kill does not reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 10)
        self.asked = mmap.mmap(-1, 8)

    def forward(self, images: Tensor) -> Tensor:
        (count,) = struct.unpack("q", self.asked[:8])
        self.asked[:8] = struct.pack("q", count + len(images))
        logits: Tensor = self.layer(images.flatten(1))
        return logits


def write(samples: Samples, teacher: Counted, folder: Path, rank: int, writers: int) -> None:
    build(
        teacher,
        samples,
        folder,
        policy="weak",
        views=VIEWS,
        seed=0,
        k=5,
        batch_size=BATCH,
        rows_per_shard=SHARD,
        rank=rank,
        world_size=writers,
    )


def start(samples: Samples, teacher: Counted, folder: Path, rank: int, writers: int) -> int:
    """A writer in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        write(samples, teacher, folder, rank, writers)
        code = 0
    finally:
        os._exit(code)


def held(folder: Path) -> int:
    """Rows that are there, all of them sound; half a line is what a kill may leave."""
    tables = list(folder.glob("*/manifest.json"))
    if not tables:
        return 0
    found = verify(tables[0].parent)
    odd = [text for text in found.problems if not text.endswith("half a line")]
    if odd:
        raise SystemExit(f"damaged after a kill: {odd}")
    # What the next `build` does first: a whole shard may lack its line.
    gc(tables[0].parent)
    left = verify(tables[0].parent)
    if left.problems or left.rows < found.rows:
        raise SystemExit(f"damaged after its repair: {left.problems}, {found.rows}, {left.rows}")
    return left.rows


def attempt(samples: Samples, folder: Path, writers: int, seconds: float) -> tuple[int, bool]:
    """Kill writers after some time; returns the rows that were lost, and whether all was done."""
    before = held(folder)
    teachers = [Counted() for _ in range(writers)]
    children = [start(samples, teachers[n], folder, n, writers) for n in range(writers)]
    time.sleep(seconds)
    done = True
    for child in children:
        # A writer that has ended is kept by the system until it is asked how.
        os.kill(child, signal.SIGKILL)
        done &= os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    after = held(folder)
    if after < before:
        raise SystemExit(f"{before - after} rows that were there are gone")
    asked = sum(struct.unpack("q", teacher.asked[:8])[0] for teacher in teachers)
    return max(0, asked - (after - before)), done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="instants")
    parser.add_argument("--writers", type=int, default=1, help="processes that write")
    parser.add_argument("--folder", type=Path, default=None, help="where the tables are made")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    arguments = parser.parse_args()
    instants = random.Random(arguments.seed)
    place = arguments.folder or Path(tempfile.mkdtemp())
    levels = np.random.default_rng(0).integers(0, 256, (SAMPLES, 8, 8, 1), dtype=np.uint8)
    numbers = np.arange(SAMPLES, dtype=np.int64)
    names = tuple(str(n) for n in range(10))
    samples = Samples(torch.from_numpy(levels), 7 * numbers, numbers, numbers % 10, names)

    # Once here, so that what is compiled is there before the writers are forked. The thread that
    # writes has ended then, and so has nothing to lose.
    torch.set_num_threads(1)
    write(samples, Counted(), place / "whole", 0, 1)
    began = time.monotonic()
    os.waitpid(start(samples, Counted(), place / "timed", 0, 1), 0)
    longest = (time.monotonic() - began) / arguments.writers

    writers = arguments.writers
    allowed = writers * SHARD
    worst, finished = 0, 0
    folder = place / "killed-0"
    for kill in range(arguments.kills):
        lost, done = attempt(samples, folder, writers, instants.uniform(0, longest))
        worst = max(worst, lost)
        if lost > allowed:
            raise SystemExit(f"{lost} rows lost, where at most {allowed} may be")
        if done and kill + 1 < arguments.kills:
            finished += 1
            folder = place / f"killed-{finished}"
    for rank in range(writers):
        child = start(samples, Counted(), folder, rank, writers)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise SystemExit("the table could not be completed")
    with TeacherTable.open(place / "whole") as whole, TeacherTable.open(folder) as killed:
        if killed.missing():
            raise SystemExit(f"{killed.missing()} rows are missing in the end")
        for view in range(VIEWS):
            if not torch.equal(
                whole.records(samples.ids, view)[0], killed.records(samples.ids, view)[0]
            ):
                raise SystemExit("the completed table is not that of an undisturbed build")
    print(
        f"{arguments.kills} kills of {writers} writer{'s' if writers > 1 else ''}: at most {worst} "
        f"rows lost (a shard has {SHARD}, {allowed} are allowed), the completed table is equal"
    )


if __name__ == "__main__":
    main()
