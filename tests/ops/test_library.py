from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastscarce import _ops


def _isa_of_new_process(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from fastscarce import _ops; print(_ops.isa())"],
        env={**os.environ, "FASTSCARCE_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )


def test_isa_by_environment() -> None:
    assert _isa_of_new_process("scalar").stdout.strip() == "scalar"
    refused = _isa_of_new_process("sse9")
    assert refused.returncode != 0
    assert "needs scalar, avx2, avx512 or avx512-emulated, got sse9" in refused.stderr


def test_set_isa() -> None:
    best = _ops.set_isa("")
    assert _ops.set_isa("scalar") == _ops.isa() == "scalar"
    with pytest.raises(ValueError, match="got mmx"):
        _ops.set_isa("mmx")
    assert _ops.set_isa("") == best


def test_cuda_library() -> None:
    status = _ops.cuda_status()
    if torch.version.cuda is None or status.startswith("not built"):
        pytest.skip(status)
    assert status == "loaded"
    for name in (
        "kd_loss",
        "kd_loss_topk",
        "kd_loss_backward",
        "kd_loss_backward_",
        "kd_loss_out",
        "kd_loss_topk_out",
        "kd_statistics",
        "topk",
        "pack_topk",
        "unpack_topk",
        "confidence",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastscarce::{name}", "CUDA")
