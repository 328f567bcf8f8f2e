"""Bad input: one to three plain lines, the right exit code, nothing half-written."""

import codecs
import fcntl
import gzip
import os
import shutil

import pytest

from corpora import TINY
from lmtrain import checkpoint

BROKEN = {
    "empty": (b"", ["text.txt is empty"]),
    "binary": (b"one\ntwo\0\n", ["text.txt is binary: line 2 has a NUL byte"]),
    "invalid": (
        b"one\ntwo\n" + "é".encode("latin1") + b"t\xc3\xa9\n",
        ["text.txt is not UTF-8: line 3, byte offset 8, byte 0xe9", "try: iconv"],
    ),
    "cut short": (
        "one\ntwo é".encode()[:-1],
        ["text.txt is not UTF-8", "line 2", "byte offset 8"],
    ),
    "far down": (
        b"word and\n" * 60_000 + b"\xff\n",
        ["text.txt is not UTF-8: line 60001, byte offset 540,000, byte 0xff"],
    ),
    "utf-16": (
        codecs.BOM_UTF16_LE + "text".encode("utf-16-le"),
        ["text.txt is UTF-16 text, not UTF-8", "try: iconv -f utf-16 -t utf-8 text.txt"],
    ),
}


@pytest.fixture
def untouched(tmp_path):
    """Checks that the test's folder holds what the test put there, and nothing else."""

    def check(*names):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)

    return check


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_text_is_refused_before_any_count(kind, lmtrain, assert_refused, tmp_path):
    content, parts = BROKEN[kind]
    (tmp_path / "text.txt").write_bytes(content)

    outcome = lmtrain("tokenize", "text.txt", "--json")

    assert_refused(outcome, 3, *parts)


@pytest.mark.parametrize("kind", ["empty", "invalid"])
def test_broken_text_starts_no_training(kind, lmtrain, assert_refused, tmp_path, untouched):
    content, parts = BROKEN[kind]
    (tmp_path / "text.txt").write_bytes(content)

    outcome = lmtrain("train", "text.txt", "--out", "run")

    assert_refused(outcome, 3, *parts)
    untouched("text.txt")


def test_broken_gzip_is_refused(lmtrain, assert_refused, tmp_path):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(TINY.encode())[:-20])
    (tmp_path / "plain.gz").write_text(TINY)

    for name in ("cut.gz", "plain.gz"):
        assert_refused(lmtrain("tokenize", name), 3, f"{name} is not whole gzip data")


def test_a_broken_text_leaves_the_cache_clean(lmtrain, tmp_path):
    (tmp_path / "text.txt").write_bytes(BROKEN["far down"][0])

    lmtrain("tokenize", "text.txt", LMTRAIN_CACHE=str(tmp_path / "cache"))

    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_missing_text_starts_no_training(lmtrain, assert_refused, untouched):
    outcome = lmtrain("train", "nothing.txt")

    assert_refused(outcome, 3, "no text file nothing.txt", "named corpora: python-docs")
    untouched()


def test_a_folder_is_no_text(lmtrain, assert_refused, tmp_path, untouched):
    (tmp_path / "texts").mkdir()

    outcome = lmtrain("train", "texts")

    assert_refused(outcome, 3, "texts is a folder", "try: 'texts/*.txt'")
    untouched("texts")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--set", "train.seqlen=3"), ["'train.seqlen'", "did you mean 'train.seq_len'?"]),
        (("--set", "hidden_size=3"), ["'hidden_size'", "did you mean 'model.hidden_size'?"]),
        (("--set", "train.seq_len"), ["--set train.seq_len: no value", "section.key=value"]),
        (("--hidden-size", "0"), ["model.hidden_size = 0", "greater than or equal to 1"]),
        (("--set", "model.dropout=1.5"), ["model.dropout = 1.5", "less than 1"]),
        (("--lr", "nan"), ["optimizer.learning_rate = nan", "finite"]),
        (("--set", "train.batch_size=many"), ["train.batch_size = 'many'", "integer"]),
        (("--level", "sentence"), ["data.level = 'sentence'", "'word', 'char' or 'byte'"]),
        (("--config", "zzz.toml"), ["zzz.toml", "No such file", "recipes: "]),
        (("--config", "ptb-smal"), ["ptb-smal", "did you mean ptb-small?"]),
        (("--config", "snips"), ["snips: No such file", "did you mean snips-slots?"]),
        (("--config", "wrong.toml"), ["wrong.toml is not valid TOML", "line 1"]),
        (("--resume", "--config", "ptb-small"), ["--config cannot be combined with --resume"]),
        (("--resume", "--out", "run"), ["lmtrain train --resume RUN"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_settings_are_named(words, parts, lmtrain, assert_refused, tmp_path, untouched):
    (tmp_path / "text.txt").write_text(TINY)
    (tmp_path / "wrong.toml").write_text("[train\n")

    outcome = lmtrain("train", "text.txt", *words)

    assert_refused(outcome, 2, *parts)
    untouched("text.txt", "wrong.toml")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("train", "text.txt", "--hidden-size", "many"), "--hidden-size"),
        (("train", "text.txt", "--set"), "--set"),
        (("train", "text.txt", "--hiden-size", "20"), "--hidden-size"),
        (("sample",), "'run'"),
        (("score", "run", "--base", "3"), "--base"),
        (("trian",), "trian"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_answered_as_any_other_error(words, part, lmtrain, assert_refused):
    outcome = lmtrain(*words)

    assert_refused(outcome, 2, part)


def test_a_cell_that_is_not_there_is_refused(lmtrain, assert_refused, tmp_path, untouched):
    (tmp_path / "text.txt").write_text(TINY)

    outcome = lmtrain("train", "text.txt", "--cell", "ltsm", "--set", "train.threads=1")

    assert_refused(outcome, 2, "'ltsm'", "lstm")
    untouched("text.txt")


def test_a_used_folder_is_not_trained_in(word_model, lmtrain, assert_refused):
    before = {path: path.stat().st_mtime_ns for path in word_model.run.rglob("*")}

    outcome = lmtrain("train", word_model.corpus, "--out", word_model.run)

    assert_refused(
        outcome, 7, f"{word_model.run} already exists and is not empty", "lmtrain train --resume"
    )
    assert {path: path.stat().st_mtime_ns for path in word_model.run.rglob("*")} == before


@pytest.mark.parametrize("out", ["text.txt", "text.txt/runs/new"])
def test_a_file_is_no_folder_to_train_in(lmtrain, small, assert_refused, tmp_path, out):
    (tmp_path / "text.txt").write_text(TINY)

    outcome = lmtrain("train", "text.txt", *small, "--out", out)

    assert_refused(outcome, 7, "text.txt is not a folder", "--out DIR")
    assert (tmp_path / "text.txt").read_text() == TINY


def test_a_run_that_another_process_trains_is_busy(word_model, lmtrain, assert_refused, tmp_path):
    run = shutil.copytree(word_model.run, tmp_path / "run")

    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        outcome = lmtrain("train", "--resume", run)

    assert_refused(outcome, 7, f"in use by another process (pid {os.getpid()})")


def flip_a_byte(run, step):
    path = run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_a_damaged_model_writes_nothing(word_model, lmtrain, assert_refused, tmp_path):
    run = shutil.copytree(word_model.run, tmp_path / "run")
    damaged = [flip_a_byte(run, step) for step in (20, 40)][1]

    sampled = lmtrain("sample", run / "checkpoints" / "step-00000040")
    resumed = lmtrain("train", "--resume", run)

    assert_refused(sampled, 4, f"{damaged} is damaged")
    assert_refused(resumed, 4, "no intact checkpoint", str(damaged))


def test_resume_falls_back_to_the_older_checkpoint_and_says_so(
    word_model, lmtrain, parsed, tmp_path
):
    run = shutil.copytree(word_model.run, tmp_path / "run")
    whole = (run / "checkpoints" / "step-00000040" / "model.safetensors").read_bytes()
    damaged = flip_a_byte(run, 40)

    outcome = lmtrain("train", "--resume", run, "--json")

    assert outcome.returncode == 0
    assert parsed(outcome.stdout)["steps"] == 40
    assert f"checkpoint skipped: {damaged} is damaged" in outcome.stderr
    assert damaged.read_bytes() == whole
    assert [problem for _, problem in checkpoint.verify(run)] == [None, None]


def test_what_is_no_run_is_not_resumed(lmtrain, assert_refused, tmp_path, untouched):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")

    outcome = lmtrain("train", "--resume", "notes")

    assert_refused(outcome, 4, "cannot resume notes: it is not a run folder")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    untouched("notes")


def test_a_checkpoint_is_no_run_to_go_on_with(word_model, lmtrain, assert_refused, tmp_path):
    run = shutil.copytree(word_model.run, tmp_path / "run")
    saved = run / "checkpoints" / "step-00000040"

    resumed = lmtrain("train", "--resume", saved)
    begun = lmtrain("train", word_model.corpus, "--out", saved)

    assert_refused(resumed, 4, f"{saved} is a checkpoint, not a run", "checkpoints/")
    assert_refused(begun, 7, "already exists and is not empty")
    assert "--resume" not in begun.stderr
    assert list(checkpoint.verify(saved)) == [(saved, None)]


@pytest.mark.parametrize("command", ["sample", "evaluate", "score", "tune"])
def test_a_device_that_is_none_is_refused(command, word_model, lmtrain, assert_refused):
    outcome = lmtrain(command, word_model.run, "--device", "gpu")

    assert_refused(outcome, 2, "device 'gpu': must be auto, cpu or cuda")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("tokenize", "x" * 300), 3),
        (("score", "RUN", "x" * 300), 3),
        (("train", "x" * 300), 3),
        (("gradients", "RUN", "x" * 300), 3),
        (("info", "x" * 300), 4),
        (("verify", "x" * 300), 4),
        (("train", "--resume", "x" * 300), 4),
    ],
    ids=lambda value: " ".join(value)[:16] if isinstance(value, tuple) else "",
)
def test_names_too_long_are_told(words, code, word_model, lmtrain, assert_refused, untouched):
    outcome = lmtrain(*(word_model.run if word == "RUN" else word for word in words))

    assert_refused(outcome, code, "cannot read ", "File name too long")
    untouched()


@pytest.mark.parametrize("picture", [".", "..", ""])
def test_a_picture_is_not_written_to_a_folder(
    picture, word_model, lmtrain, assert_refused, untouched
):
    outcome = lmtrain("find-lr", word_model.corpus, "--plot", picture)

    assert_refused(outcome, 2, "--plot ", " is a folder")
    untouched()


@pytest.mark.parametrize(
    ("words", "part"),
    [(("",), "no file can be called ''"), (("--set", "data.train=[]"), "data.train = []")],
)
def test_no_text_at_all_is_told(words, part, lmtrain, assert_refused, untouched):
    outcome = lmtrain("train", *words)

    assert_refused(outcome, 2, part)
    untouched()


@pytest.mark.parametrize("source", ["RUN", "text.txt"])
def test_bytes_that_are_no_text_have_no_ids(source, fresh_lmtrain, small, assert_refused, tmp_path):
    (tmp_path / "text.txt").write_text(TINY)
    words = ("--level", "byte")
    if source == "RUN":
        assert fresh_lmtrain("train", "text.txt", *words, *small, "--out", "run").returncode == 0
        source, words = "run", ()

    outcome = fresh_lmtrain("tokenize", source, os.fsdecode(b"a\xff"), *words)

    assert_refused(outcome, 3, "the text is not valid UTF-8")


@pytest.mark.parametrize("saving", ["1", "none"])
def test_divergence_stops_training_and_is_never_saved(saving, word_model, lmtrain, small, tmp_path):
    run = tmp_path / "run"

    outcome = lmtrain(
        "train", word_model.corpus, *small, "--lr", "1e30", "--out", run, "--json",
        "--set", f"train.save_every={saving}",
    )  # fmt: skip

    assert outcome.returncode == 6
    assert not outcome.stdout
    assert "Traceback" not in outcome.stderr
    message = outcome.stderr[outcome.stderr.index("\nerror: ") :].strip().splitlines()
    assert message[0].startswith("error: training diverged at step ")
    assert len(message) <= 3
    saved = checkpoint.steps(run)
    assert ("the last checkpoint is intact" in outcome.stderr) == bool(saved)
    assert bool(saved) == (saving == "1")
    for step in saved:
        tensors = checkpoint.read(checkpoint.folder(run, step)).tensors("model.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values())
