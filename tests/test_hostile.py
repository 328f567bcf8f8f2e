"""Malicious files are refused with a message, quickly and with little memory.

The manifests of checkpoints match their files, as those of an attacker would.
"""

import json
import math
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from corpora import TINY
from lmtrain import api, checkpoint, config, files
from lmtrain.data.vocabulary import read_vocabulary
from lmtrain.data.word_vectors import read_word_vectors
from lmtrain.errors import CheckpointError, LmtrainError
from lmtrain.training.run import run_training


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    (folder / "text.txt").write_text(TINY)
    chosen = config.load(
        overrides={
            "data.train": [str(folder / "text.txt")], "data.level": "char",
            "model.hidden_size": 8, "model.num_layers": 1, "train.batch_size": 4,
            "train.seq_len": 8, "train.max_steps": 4, "train.threads": 1,
        }
    )  # fmt: skip
    run_training(chosen, folder / "run", is_quiet=True)
    return checkpoint.folder(folder / "run", 4)


@pytest.fixture
def hostile(valid, tmp_path):
    """A copy of a checkpoint with other file contents and a matching manifest."""

    def change(**contents):
        path = shutil.copytree(valid, tmp_path / "run" / "checkpoints" / valid.name)
        manifest = json.loads((path / "MANIFEST.json").read_text())
        for name, content in contents.items():
            name = name.replace("__", ".")
            (path / name).write_bytes(content)
            manifest["files"][name] = {"bytes": len(content), "sha256": files.sha256([content])}
        (path / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
        return path

    return change


EMBEDDING = "encoder.embedding.weight"


def assert_refused(path, *words):
    """Loading is refused with one to three lines, within a second, in less than 50 MB."""
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        api.load(path)
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    for word in words:
        assert word in message


def changed_config(valid, old, new):
    text = (valid / "config.toml").read_text()
    assert old in text
    return text.replace(old, new).encode()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("hidden_size = 8", "hidden_size = 1000000000", ["model.hidden_size"]),
        ("hidden_size = 8", "hidden_size = 1000000", ["do not match its settings"]),
        ("hidden_size = 8", "hidden_size = -8", ["model.hidden_size"]),
        ("hidden_size = 8", 'hidden_size = "8"', ["model.hidden_size"]),
        ("hidden_size = 8", "hidden_size = nan", ["model.hidden_size"]),
        ("num_layers = 1", "num_layers = 1000000000", ["model.num_layers"]),
        ("num_layers = 1", "num_layers = 100", ["do not match its settings"]),
        ('cell = "lstm"', 'cell = "os.system"', ["'os.system'"]),
        ('cell = "lstm"', 'cell = "rnn"', ["do not match its settings"]),
        ("num_layers = 1", "num_layers = 1\nevil = 1", ["evil"]),
        ("[model]", "a = " + "[" * 10_000 + "]" * 10_000 + "\n[model]", ["config.toml"]),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_invalid_settings_are_refused(valid, hostile, old, new, words):
    assert_refused(hostile(config__toml=changed_config(valid, old, new)), *words)


def test_settings_above_the_size_limit_are_refused(valid, hostile):
    content = (valid / "config.toml").read_bytes() + b"#" * 2_000_000

    assert_refused(hostile(config__toml=content), "is too large", "the limit is 1,048,576")


def safetensors_file(length, header=b""):
    return length.to_bytes(8, "little") + header


def safetensors_entry(entry: bytes) -> bytes:
    header = b'{"encoder.embedding.weight":' + entry + b"}"
    return safetensors_file(len(header), header)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        safetensors_file(100 << 20) + b"{" * 100,
        safetensors_file((1 << 64) - 1, b"{}"),
        safetensors_file(2, b"{}"),
        safetensors_entry(b'{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}'),
        safetensors_entry(b'{"dtype":"F32","shape":[-1],"data_offsets":[-4,0]}'),
        safetensors_entry(b'{"dtype":"XYZ","shape":[1],"data_offsets":[0,4]}'),
        safetensors_file(4096, b"[" * 4096),
    ],
)
def test_weights_with_an_invalid_header_are_refused(hostile, content):
    assert_refused(hostile(model__safetensors=content + bytes(64)), "step-00000004")


@pytest.mark.parametrize("change", ["shape", "name", "missing", "dtype", "nan"])
def test_weights_that_do_not_match_the_settings_are_refused(valid, hostile, change):
    tensors = safetensors.torch.load((valid / "model.safetensors").read_bytes())
    if change == "shape":
        tensors[EMBEDDING] = tensors[EMBEDDING].T.contiguous()
    elif change == "name":
        tensors["\x1b]0;evil\x07"] = torch.zeros(1)
    elif change == "missing":
        del tensors[EMBEDDING]
    elif change == "dtype":
        tensors[EMBEDDING] = tensors[EMBEDDING].half()
    else:
        tensors[EMBEDDING][0, 0] = torch.nan

    path = hostile(model__safetensors=safetensors.torch.save(tensors))

    assert_refused(path, "step-00000004")
    with pytest.raises(CheckpointError) as caught:
        api.load(path)
    assert "\x1b" not in str(caught.value)


def test_a_file_larger_than_memory_is_not_read(hostile):
    path = hostile()
    size = 1 << 43
    with (path / "model.safetensors").open("r+b") as stream:
        stream.truncate(size)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["model.safetensors"]["bytes"] = size
    (path / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))

    assert_refused(path, "model.safetensors is too large: 8,796,093,022,208 bytes")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        (("data", "train", "key"), "../../../etc/passwd"),
        (("data", "../x"), {"name": "a", "key": "0" * 64}),
        (("data",), []),
        (("data",), {}),
        (("step",), -1),
        (("step",), "4"),
        (("parts", "progress"), "many"),
        (("parts",), None),
        (("format",), 2),
    ],
)
def test_invalid_training_states_are_refused(valid, hostile, entry, value):
    tree = json.loads((valid / "state.json").read_text())
    *parents, last = entry
    inner = tree
    for key in parents:
        inner = inner[key]
    inner[last] = value

    assert_refused(hostile(state__json=json.dumps(tree).encode()), "state.json")


@pytest.mark.parametrize("name", ["model.safetensors", "MANIFEST.json"])
@pytest.mark.parametrize("replacement", ["link", "folder", "pipe"])
def test_only_regular_files_are_opened(hostile, tmp_path, name, replacement):
    path = hostile()
    (path / name).rename(tmp_path / "elsewhere")
    if replacement == "link":
        (path / name).symlink_to(tmp_path / "elsewhere")
    elif replacement == "folder":
        (path / name).mkdir()
    else:
        os.mkfifo(path / name)

    assert_refused(path, f"{name} is not a regular file")


@pytest.mark.parametrize("replacement", [os.mkfifo, os.mkdir])
def test_a_run_whose_metrics_are_no_regular_file_is_not_resumed(valid, tmp_path, replacement):
    run = shutil.copytree(valid.parent.parent, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    replacement(run / "metrics.jsonl")

    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is not a regular file"):
        run_training(out=run, resume=True, is_quiet=True)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", ".lock", "config.toml", "events"])
def test_a_run_that_contains_a_symbolic_link_is_not_resumed(valid, tmp_path, name):
    run = shutil.copytree(valid.parent.parent, tmp_path / "run")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "step-00000001").mkdir()
    target = run / name
    if target.is_dir():
        target.rename(tmp_path / "moved")
    else:
        target.unlink(missing_ok=True)
    target.symlink_to(tmp_path / "precious")
    if name == "checkpoints":
        shutil.copytree(tmp_path / "moved" / valid.name, tmp_path / "precious" / valid.name)

    with pytest.raises(CheckpointError, match="is a symbolic link"):
        run_training(out=run, resume=True, is_quiet=True)

    assert (tmp_path / "precious" / "step-00000001").exists()


def test_a_symbolic_link_to_a_checkpoint_is_not_a_checkpoint_of_the_run(valid, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / valid.name).symlink_to(valid)

    assert checkpoint.steps(run) == []


@pytest.mark.parametrize("value", ["9" * 400, '"nan"', "[]"])
def test_a_best_value_that_is_not_a_number_is_ignored(valid, tmp_path, value):
    run = shutil.copytree(valid.parent.parent, tmp_path / "run")
    (run / "best.json").write_text(f'{{"step": 4, "metric": "perplexity", "value": {value}}}')

    assert checkpoint.best(run) is None
    assert checkpoint.find(run) == checkpoint.folder(run, 4)


def test_a_run_that_names_another_file_does_not_copy_it_to_the_cache(
    valid, hostile, tmp_path, monkeypatch
):
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.txt").write_text(TINY[::-1])
    paths = json.dumps([str(tmp_path / "mine.txt")])
    model = api.load(hostile(config__toml=changed_config(valid, "valid = []", f"valid = {paths}")))

    with pytest.raises(CheckpointError, match="is not the one this run was trained with"):
        model.own_data()

    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_a_state_of_another_shape_is_not_resumed(valid, tmp_path):
    run = shutil.copytree(valid.parent.parent, tmp_path / "run")
    path = checkpoint.folder(run, 4)
    for name in ("carried/0/0", f"optimizer/{EMBEDDING}/exp_avg", "generators/0"):
        tensors = safetensors.torch.load((valid / "state.safetensors").read_bytes())
        tensors[name] = torch.zeros(3, dtype=torch.int64)
        content = safetensors.torch.save(tensors)
        (path / "state.safetensors").write_bytes(content)
        manifest = json.loads((path / "MANIFEST.json").read_text())
        manifest["files"]["state.safetensors"] = {
            "bytes": len(content), "sha256": files.sha256([content]),
        }  # fmt: skip
        (path / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))

        with pytest.raises(CheckpointError, match=r"not (fit|match)"):
            run_training(out=run, resume=True, overrides={"train.max_steps": 5}, is_quiet=True)


@pytest.mark.parametrize(
    ("part", "entry", "value"),
    [
        ("progress", "train_seconds", math.inf),
        ("progress", "skipped", -1),
        ("limits", "seconds", math.nan),
        ("limits", "seconds", -1.0),
        ("optimizer", "step", -1),
    ],
)
def test_impossible_training_states_are_not_resumed(valid, hostile, tmp_path, part, entry, value):
    tree = json.loads((valid / "state.json").read_text())
    assert entry in tree["parts"][part]
    tree["parts"][part][entry] = value
    hostile(state__json=json.dumps(tree).encode())
    run = tmp_path / "run"
    shutil.copyfile(valid.parent.parent / "config.toml", run / "config.toml")

    with pytest.raises(CheckpointError, match=r"not match|damaged"):
        run_training(out=run, resume=True, overrides={"train.max_steps": 5}, is_quiet=True)


@pytest.mark.parametrize(
    "line",
    [
        f'"step": {-(10**20)}, "time": 1.0, "loss": 1.0',
        f'"step": 4, "time": 1.0, "loss": {10**400}',
    ],
)
def test_logged_numbers_that_events_cannot_hold_are_ignored(valid, tmp_path, line):
    run = shutil.copytree(valid.parent.parent, tmp_path / "run")
    (run / "metrics.jsonl").write_text(f'{{"kind": "train", {line}}}\n')

    summary = run_training(out=run, resume=True, overrides={"train.max_steps": 5}, is_quiet=True)

    assert summary.steps == 5
    assert line not in (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize("changes", [{"step": "4"}, {"step": -1}, {"metric": "\x1b]0;evil\x07"}])
def test_an_invalid_best_json_is_ignored(valid, tmp_path, changes):
    run = shutil.copytree(valid.parent.parent, tmp_path / "run")
    tree = json.loads((run / "best.json").read_text())
    assert checkpoint.best(run).step == 4
    (run / "best.json").write_text(json.dumps(tree | changes))

    assert checkpoint.best(run) is None
    assert checkpoint.find(run) == checkpoint.folder(run, 4)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"low"', "[1]"])
def test_a_logged_validation_that_is_not_finite_is_repeated(valid, tmp_path, value):
    run = shutil.copytree(valid.parent.parent, tmp_path / "run")
    line = f'{{"kind": "valid", "step": 4, "time": 1.0, "loss": 0.1, "perplexity": {value}}}'
    (run / "metrics.jsonl").write_text(line + "\n")

    run_training(out=run, resume=True, overrides={"train.max_steps": 4}, is_quiet=True)

    (line,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert line["loss"] > 1
    assert line["perplexity"] > 1


def test_a_logged_validation_without_metrics_is_worse_than_any_other(valid, tmp_path):
    run = shutil.copytree(valid.parent.parent, tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"kind": "valid", "step": 4, "time": 1.0}\n')

    summary = run_training(out=run, resume=True, overrides={"train.max_steps": 5}, is_quiet=True)

    assert summary.progress.best_step == 5


PIECES = [
    b"", b" ", b"\n", b"\r", b"\0", b"\xff", b"\xc3", b"\xc2\xa0", b"nan", b"-inf", b"1e999",
    b"0x1p3", b"1_0", b"9" * 400, b"\n\n", b"   ", b"the ", b". . .", b"<unk>",
    b"\xef\xbb\xbf", b"-", b"\t",
]  # fmt: skip


def damaged(content: bytes, generator: random.Random) -> bytes:
    """The content with pieces replaced at some places."""
    changed = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(changed) + 1)
        changed[at : at + generator.choice([0, 0, 1, 2, 9, 400])] = generator.choice(PIECES)
    return bytes(changed)


def outcomes(good: bytes, path: Path, read: Callable[[str], Any]) -> list[Any]:
    """What a reader makes of 2,000 damaged files; a refusal is its message."""
    generator, found = random.Random(1), []
    for _ in range(2000):
        path.write_bytes(damaged(good, generator))
        try:
            found.append(read(str(path)))
        except LmtrainError as error:
            found.append(str(error))
    messages = [each for each in found if isinstance(each, str)]
    assert all(len(message.splitlines()) <= 3 for message in messages)
    assert 200 < len(messages) < 1990
    return [each for each in found if not isinstance(each, str)]


@pytest.mark.parametrize("head", [b"", b"3 3\n"])
def test_damaged_word_vectors_are_read_or_refused(tmp_path, head):
    good = head + b"the 1 2.5 -3e-2\n. . . 0 0 0\ncat 4 5 6 \n"
    words = ["<UNK>", "the", "cat", "a"]

    for indices, vectors in outcomes(
        good, tmp_path / "vectors.txt", lambda place: read_word_vectors(place, words, 3)
    ):
        assert np.isfinite(vectors).all()
        assert 1 <= len(set(indices.tolist())) == len(vectors)


def test_damaged_vocabularies_are_read_or_refused(tmp_path):
    good = "the\ncat\n</s>\né\n".encode()

    for words in outcomes(good, tmp_path / "words.txt", read_vocabulary):
        assert len(set(words)) == len(words) > 2
        assert {"<UNK>", "<EOS>"} <= set(words)
        assert all(len(word.encode().split()) == 1 for word in words)
