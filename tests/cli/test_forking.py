"""Forks in place of new processes: a test cannot tell them apart, or is refused one."""

import signal

import pytest

import lmtrain as package


@pytest.mark.parametrize(
    "words", [("score", "RUN", "--json"), ("sample", "RUN", "--top-p", "2"), ("--version",), ("x",)]
)
def test_a_fork_gives_what_a_new_process_gives(words, word_model, lmtrain, fresh_lmtrain):
    words = [word_model.run if word == "RUN" else word for word in words]

    ours, theirs = (run(*words, stdin="the cat\n") for run in (lmtrain, fresh_lmtrain))

    assert (ours.returncode, ours.stdout, ours.stderr) == (
        theirs.returncode, theirs.stdout, theirs.stderr,
    )  # fmt: skip


def test_what_one_fork_changes_no_other_sees(lmtrain, tmp_path):
    (tmp_path / "cells.py").write_text(
        "import os, lmtrain; lmtrain.__version__ = 'x'; os.chdir('/')"
    )

    changed = lmtrain("--cells", "cells.py", "info")
    other = lmtrain("--version")

    assert "cells.py registers no cell" in changed.stderr
    assert other.stdout == f"lmtrain {package.__version__}\n"


def test_a_fork_ends_by_signals(lmtrain, tmp_path):
    (tmp_path / "cells.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")

    assert lmtrain("--cells", "cells.py", "info").returncode == -signal.SIGKILL


def test_a_fork_has_no_variables_that_are_read_at_the_start(lmtrain):
    with pytest.raises(AssertionError, match="use a new process"):
        lmtrain("--version", OMP_NUM_THREADS="2")
