"""A source distribution, a wheel built from it, and lmtrain installed from the wheel."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import ROOT

from corpora import TINY

SOURCES = ("LICENSE", "README.md", "configs", "corpora", "lmtrain", "pyproject.toml", "setup.py")


def run(*words, folder):
    return subprocess.run(
        [*map(str, words)], cwd=folder, check=True, capture_output=True, text=True, timeout=300
    ).stdout


def built_wheel(folder: Path) -> Path:
    """The wheel from a source distribution from a clean copy of the sources."""
    source = folder / "source"
    for name in SOURCES:
        path, copy = ROOT / name, source / name
        if path.is_dir():
            shutil.copytree(path, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
    # Compiled without optimization in a tenth of the time.
    settings = source / "pyproject.toml"
    settings.write_text(settings.read_text("utf-8").replace('"-O3"', '"-O0"'), "utf-8")
    code = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder, folder=source)
    (archive,) = folder.glob("*.tar.gz")
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *offline, archive, folder=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_a_wheel_trains_with_the_native_kernels(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    wheel = built_wheel(tmp_path)
    # An environment of its own, to which those of this one are added after it.
    run(sys.executable, "-m", "venv", "--without-pip", "new", folder=tmp_path)
    python = tmp_path / "new" / "bin" / "python"
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site,) = (tmp_path / "new").glob("lib/python*/site-packages")
    (site / "others.pth").write_text("\n".join(packages))
    offline = ("--no-deps", "--no-index")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel, folder=tmp_path
    )
    (tmp_path / "corpus.txt").write_text(TINY)
    small = ("--config", "ptb-small", "--num-layers", "1", "--hidden-size", "8",
             "--batch-size", "4", "--seq-len", "8")  # fmt: skip
    lmtrain = tmp_path / "new" / "bin" / "lmtrain"

    run(lmtrain, "train", "corpus.txt", *small, "--set", "train.max_steps=3", "--out", "run",
        folder=tmp_path)  # fmt: skip
    facts = json.loads(run(lmtrain, "info", "run", "--json", folder=tmp_path))
    place = run(python, "-c", "import lmtrain; print(lmtrain.__file__)", folder=tmp_path)

    assert place.startswith(str(site))
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert facts["step"] == 3
    assert set(facts["engines"]) == {"native"}
