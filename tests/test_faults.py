"""The suites that try what lmtrain promises about faults, in their short form."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "faults.py"


@pytest.mark.slow
def test_every_promise_holds():
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
