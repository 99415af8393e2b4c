"""What a teacher's table is worth: 1,000 labelled images of Fashion-MNIST, 59,000 without.

Run ``python bench/worth_of_a_table.py --seeds 0 1 2``. By the public commands, for each seed: two
teachers learn from the labels (`finetune`); `cache build` keeps what both say of three views of
each image, with k = 10 and with k = 5 of the 10 classes; a student learns from each table, and one
beside the living teachers. Half of the views that these students see are mixed by CutMix, and rows
with them; in a further table (k = 10) the teachers see the mixed images themselves. The first
teacher is the same network as the students, trained on the labels alone as long as they are: what
they have to beat. Printed are accuracies on the 10,000 test images of the last weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from fastscarce.augment import CutMix, get_policy

POLICY = "standard"
MIXED = 0.5  # of the views
NETWORKS = ("small_cnn", "small_cnn_gn")


def fastscarce(*words: str) -> None:
    """Run a command, or stop with what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "fastscarce", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"fastscarce {' '.join(words)}: {done.stderr}")


def accuracy(folder: Path) -> float:
    """In per cent, on the test images."""
    result: float = json.loads((folder / "result.json").read_text())["accuracy"]
    return 100 * result


def of_seed(seed: int, data: str, place: Path, steps: int, threads: int) -> dict[str, float]:
    """Accuracies of all students of one seed."""
    # A hundred labels a class train; the others of a run judge, which decides nothing here.
    shared = [
        f"--data={data}", "--labels-per-class=125", "--holdout-per-class=25", f"--seed={seed}",
        f"--threads={threads}",
    ]  # fmt: skip
    run = ["--tensorboard=false", "--checkpoint-every=100000", "--log-every=50"]
    for network in NETWORKS:
        fastscarce(
            "finetune", *shared, *run, f"--model.name={network}", f"--training.steps={steps}",
            f"--out={place / network}",
        )  # fmt: skip
    teacher = "--teacher=" + ",".join(str(place / network) for network in NETWORKS)
    student = [
        *shared, *run, f"--student.steps={steps}", f"--student.cutmix-probability={MIXED}"
    ]  # fmt: skip
    mixed = place / "mixed.yaml"
    policy = get_policy(POLICY).followed_by(CutMix(probability=MIXED))
    mixed.write_text(yaml.safe_dump(policy.to_dict()))
    for name, views, k in (("10", POLICY, 10), ("5", POLICY, 5), ("mixed", mixed, 10)):
        fastscarce(
            "cache", "build", *shared, teacher, f"--policy={views}", "--views=3", f"--k={k}",
            f"--out={place / f'table-{name}'}",
        )  # fmt: skip
        fastscarce(
            "distill", *student, f"--cache={place / f'table-{name}'}",
            f"--out={place / f'cached-{name}'}",
        )  # fmt: skip
    fastscarce(
        "distill", *student, teacher, f"--policy={POLICY}", "--views=3", f"--out={place / 'live'}"
    )
    return {
        "labels alone": accuracy(place / NETWORKS[0]),
        "table, k = 10": accuracy(place / "cached-10"),
        "table, k = 5": accuracy(place / "cached-5"),
        "table of mixed images": accuracy(place / "cached-mixed"),
        "living teachers": accuracy(place / "live"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="idx:/usr/share/datasets/fashion-mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000, help="of every training")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    arguments = parser.parse_args()
    found: list[dict[str, float]] = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as name:
            found.append(
                of_seed(seed, arguments.data, Path(name), arguments.steps, arguments.threads)
            )
        print(f"seed {seed}: " + ", ".join(f"{k} {v:.2f} %" for k, v in found[-1].items()))
    for key in found[0]:
        values = [one[key] for one in found]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        print(f"{key}: {statistics.mean(values):.2f} %, standard error {error:.2f}")


if __name__ == "__main__":
    main()
