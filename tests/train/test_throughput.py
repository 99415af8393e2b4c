from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastscarce.cli import main
from fastscarce.config import BenchDataConfig, ModelConfig
from fastscarce.errors import ConfigError
from fastscarce.train.throughput import measure_data

SMALL: dict[str, Any] = {"seconds": 0.05, "batch_size": 8, "workers": 0, "threads": 1, "cpu": True}


def test_stages_and_the_bottleneck() -> None:
    model = ModelConfig(name="small_cnn")
    found = measure_data(BenchDataConfig(model=model, **SMALL))
    rates = [found.read, found.decode, found.load, found.augment, found.model, found.together]
    assert all(rate > 0 for rate in rates)
    assert found.transfer is None
    assert found.together <= 1.5 * min(found.load, found.augment, found.model)
    assert found.bottleneck in ("read", "decode", "augment", "model")


def test_a_large_model_is_the_bottleneck(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{name}={str(value).lower()}" for name, value in SMALL.items()]
    assert main(["bench", "data", "--model.name=resnet18", *flags]) == 0
    *stages, bottleneck = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in stages] == [
        "read", "decode", "read and decode", "augment", "transfer", "model", "together",
    ]  # fmt: skip
    assert all(line.split("images/s")[0].split()[-1] != "0" for line in stages)
    assert bottleneck == "bottleneck: model"


def test_broken_images_and_odd_names_of_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["picture,kind"]
    for number in range(12):
        Image.new("RGB", (12, 12), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{'ab'[number % 2]}")
    (tmp_path / "7.png").write_bytes(b"nothing")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    flags = [f"--{name}={str(value).lower()}" for name, value in SMALL.items()]
    keys = [f"--data=table:{tmp_path / 't.csv'}", "--image-key=picture", "--label-key=kind"]
    assert main(["bench", "data", *keys, "--model.name=small_cnn", "--image_size=12", *flags]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == "7.png was left out (it is no image of a known format)"
    assert main(["show-augment", *keys, f"--out={tmp_path / 'sheet.png'}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == ["7.png is left out (it is no image of a known format)",
                    str(tmp_path / "sheet.png")]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seconds": 0.0}, "bench data needs seconds above 0"),
        ({"batch_size": 1}, "a batch_size of at least 2, got 0.05 and 1"),
        ({"image_size": 0}, "image_size must be 1 or more and at most 32767, got 0"),
        ({"image_size": 100_000}, "at most 32767, got 100000"),
        ({"workers": -2}, "workers must be 0 or more, got -2"),
    ],
)
def test_refusals(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_data(BenchDataConfig(**{**SMALL, **setting}))
    with pytest.raises(ConfigError, match="policy"):
        measure_data(BenchDataConfig(**SMALL, policy="nothing"))
