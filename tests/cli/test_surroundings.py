"""Machines without a home or a locale, strange names, texts at the edge of what is one."""

import contextlib
import json
import os
import pty
import resource
import subprocess
import sys

import pytest

from lmtrain import checkpoint


@pytest.mark.parametrize(
    "surroundings",
    [
        {"HOME": "/dev/null/home", "LMTRAIN_CACHE": ""},
        {
            "LANG": "C",
            "LC_ALL": "C",
            "TERM": "dumb",
            "NO_COLOR": "1",
            "COLUMNS": "20",
            "LINES": "5",
            "PYTHONHASHSEED": "7",
        },
    ],
    ids=["no home", "a poor terminal"],
)
def test_the_surroundings_do_not_matter(
    fresh_lmtrain, small, word_model, tmp_path, parsed, surroundings
):
    straight = parsed(word_model.outcome.stdout)

    outcome = fresh_lmtrain(
        "train", word_model.corpus, *small, "--out", "run", "--json", **surroundings
    )

    assert outcome.returncode == 0, outcome.stderr
    assert parsed(outcome.stdout)["valid"]["loss"] == straight["valid"]["loss"]


def test_strange_names_are_names(fresh_lmtrain, small, word_model, tmp_path):
    names = {
        "é 你好 🙂.txt": "alpha", "a b.txt": "beta", "-dash.txt": "gamma", "[1].txt": "delta",
        "~x.txt": "epsilon",
    }  # fmt: skip
    for name, word in names.items():
        (tmp_path / name).write_text(f"{word}\n{word_model.corpus.read_text()}")
    run = "-- é 你好 🙂 [1] ~x"

    trained = fresh_lmtrain("train", *small, f"--out={run}", "--", *names)
    sampled = fresh_lmtrain("sample", "--", run)

    assert [trained.returncode, sampled.returncode] == [0, 0], trained.stderr
    assert sampled.stdout
    known = (tmp_path / run / "tokenizer.json").read_text()
    assert all(f'"{word}"' in known for word in names.values())


def test_a_name_too_long_is_told(lmtrain, small, word_model, assert_refused):
    outcome = lmtrain("train", word_model.corpus, *small, "--out", "x" * 300)

    assert outcome.returncode == 5
    assert "File name too long" in outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", [500, 5_000])
def test_a_disk_that_takes_no_more_is_told(small, word_model, tmp_path, size):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    ended = subprocess.run(
        [sys.executable, "-m", "lmtrain", "train", word_model.corpus, *small, "--out", "run"],
        cwd=tmp_path, capture_output=True, encoding="utf-8", preexec_fn=limit, timeout=60,
        check=False,
    )  # fmt: skip

    assert ended.returncode == 5
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: could not write ")
    assert "File too large" in ended.stderr.splitlines()[-1]
    assert checkpoint.steps(tmp_path / "run") == []
    assert not list(tmp_path.rglob(".aside-*"))


@pytest.mark.parametrize(
    ("text", "words", "code", "part"),
    [
        (" \t " * 5000, (), 3, "tokens"),
        ("one", (), 3, "too short to be split"),
        ("one two three\n" * 400, ("--vocab-size", "2"), 2, "data.vocab_size = 2"),
        ("one two three\n" * 400, ("--seq-len", "99999999999999"), 2, "train.seq_len"),
        ("one two three\n" * 400, ("--set", "train.max_steps=1e3"), 2, "train.max_steps"),
    ],
)
def test_texts_and_sizes_beyond_the_edge_are_refused(
    lmtrain, small, assert_refused, tmp_path, text, words, code, part
):
    (tmp_path / "text.txt").write_text(text)

    outcome = lmtrain("train", "text.txt", *small, *words, "--out", "run")

    assert_refused(outcome, code, part)
    assert not (tmp_path / "run").exists()


def test_a_text_of_unknown_words_alone_is_judged(word_model, lmtrain, tmp_path, parsed):
    (tmp_path / "other.txt").write_text("zzz yyy\n" * 20)

    outcome = lmtrain("evaluate", word_model.run, "other.txt", "--json")

    (result,) = parsed(outcome.stdout)["results"]
    assert result["oov"] == 40
    assert result["count"] == 60


@pytest.mark.slow
def test_prompts_of_any_kind(char_model, word_model, lmtrain):
    for prompt in ("", "zzz " + "the cat " * 12_000):
        assert lmtrain("sample", word_model.run, "--prompt", prompt).returncode == 0
    ended = subprocess.run(
        [sys.executable, "-m", "lmtrain", "sample", str(word_model.run), "--prompt", b"a\xff"],
        capture_output=True, timeout=60, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert ended.returncode in (0, 2, 3)
    assert b"Traceback" not in ended.stderr
    assert b"a bug" not in ended.stderr


RAW = ("\x1b", "\x07", "\u202e", "\x9b")


def on_a_terminal(folder, *words):
    """What lmtrain shows on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lmtrain", *words],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    # The other end is closed when the process has ended.
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 1 << 16):
            shown += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown
    return shown.decode()


@pytest.mark.slow
def test_what_a_text_says_to_a_terminal_never_reaches_it_raw(lmtrain, small, tmp_path):
    (tmp_path / "text.txt").write_text("\x1b]0;evil\x07 [red]x[/red] \u202eabc \x9b31m\n" * 400)
    (tmp_path / "lines.txt").write_text("\x1b]0;evil\x07 \u202eabc\n")
    words = ("train", "text.txt", *small, "--out", "run", "--set", "data.splitter=whitespace")
    trained = lmtrain(*words)
    assert trained.returncode == 0
    shown = [
        trained.stderr,
        on_a_terminal(tmp_path, "sample", "run", "--num", "9"),
        on_a_terminal(tmp_path, "score", "run", "lines.txt", "--per-token"),
        on_a_terminal(tmp_path, "tokenize", "run", "\x1b]0;evil\x07 \u202eabc"),
        on_a_terminal(tmp_path, "tokenize", "text.txt"),
        on_a_terminal(tmp_path, "info", "run"),
    ]

    for text in shown:
        for raw in RAW:
            assert raw not in text
    assert "[red]x[/red]" in shown[1]
    assert "evil" in shown[1]


@pytest.mark.slow
def test_what_a_name_says_to_a_terminal_never_reaches_it_raw(lmtrain, small, tmp_path):
    name = "\x1b]0;evil\x07 \u202eabc \x9b31m"
    (tmp_path / name).write_text("one two three four\n" * 400)
    (tmp_path / "settings.toml").write_text(f"[data]\ntrain = [{json.dumps(name)}]\n")
    words = (*small, "--config", "settings.toml")
    shown = [
        on_a_terminal(tmp_path, "train", *words, "--out", "run"),
        on_a_terminal(tmp_path, "info", "run"),
        on_a_terminal(tmp_path, "info", "run", "--json"),
        on_a_terminal(tmp_path, "evaluate", "run"),
        on_a_terminal(tmp_path, "evaluate", "run", name, "--json"),
    ]

    for text in shown:
        assert "evil" in text
        for raw in RAW:
            assert raw not in text


@pytest.mark.slow
@pytest.mark.parametrize("words", [("sample", "RUN"), ("score", "RUN", "-"), ("info", "RUN")])
def test_nobody_need_read_the_results(words, word_model):
    typed = [str(word_model.run) if word == "RUN" else word for word in words]

    ended = subprocess.run(
        [sys.executable, "-m", "lmtrain", *typed],
        input="the cat\n", stderr=subprocess.PIPE, encoding="utf-8", timeout=60,
        preexec_fn=lambda: os.close(1), check=False,
    )  # fmt: skip

    assert [ended.returncode, ended.stderr] == [0, ""]
