"""scripts/check_cuda.py without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmtrain.kernels.triton import engine

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_cuda.py"

pytestmark = [
    pytest.mark.skipif(bool(engine.unavailable_reason()), reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it runs all sizes there"),
]


def check(*arguments: str, interpreted: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "TRITON_INTERPRET": interpreted}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], env=variables, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_interpreted_scans_equal_the_reference():
    process = check("--only=simple-gru H 9 B 17 T 4 float32", interpreted="1")

    assert process.returncode == 0, process.stderr
    _, *lines, summary = process.stdout.splitlines()
    # Both schedules, also reversed, with lengths, and both; and repetitions.
    assert len(lines) == 7
    assert all(line.startswith("ok ") for line in lines)
    assert summary.endswith(": 0 failed, 0 not run")


@pytest.mark.slow
def test_a_check_that_was_not_run_is_a_failure():
    process = check("--only=simple-gru H 9 B 17 T 4", "--max-seconds=0", interpreted="1")

    assert process.returncode == 1
    assert process.stdout.splitlines()[-1].endswith(": 0 failed, 14 not run")


def test_without_a_gpu_it_says_how_to_run():
    process = check(interpreted="0")

    assert process.returncode == 1
    assert process.stderr == (
        "no CUDA device on this machine; TRITON_INTERPRET=1 runs small sizes without one\n"
    )
