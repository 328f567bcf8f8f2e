"""The short form of scripts/faults.py."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "faults.py"


@pytest.mark.slow
def test_all_fault_checks_pass():
    ended = subprocess.run(
        [sys.executable, SCRIPT, "--short"],
        capture_output=True,
        encoding="utf-8",
        timeout=400,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [line.split("|")[2:4] for line in ended.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) > 25
    assert all(tried == held for tried, held in rows[1:])
