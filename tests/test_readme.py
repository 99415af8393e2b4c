"""The README's Python runs as it stands, and its policy is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastscarce.augment import draw, read_policy

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
POLICIES = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``photos``: two classes of images."""
    root = tmp_path_factory.mktemp("readme")
    numbers = np.random.default_rng(0)
    for place in range(70):
        path = root / "photos" / ("cat", "dog")[place % 2] / f"{place}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return root


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_a_block_runs(folder: Path, block: int) -> None:
    code = BLOCKS[block]
    # A block that makes nothing of its own goes on with what the first made.
    before = "" if "import torch\n" in code or "Sampler" in code else BLOCKS[0]
    program = f"import torch\ntorch.set_num_threads(1)\n{before}\n{code}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTSCARCE_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_policy_is_read(tmp_path: Path) -> None:
    (written,) = POLICIES
    (tmp_path / "steps.yaml").write_text(written, encoding="utf-8")
    policy = read_policy(str(tmp_path / "steps.yaml"))
    assert [type(step).__name__ for step in policy.steps] == [
        "ResizedCrop", "Flip", "RandAugment", "CutMix",
    ]  # fmt: skip
    assert (policy.sampling, policy.fill, policy.mixes) == ("nearest", "reflect", True)
    assert 0 < int((draw(policy, range(100), view=0, seed=0, image_size=32).lam < 1.0).sum()) < 100


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 6
