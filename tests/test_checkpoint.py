import errno
import json
from pathlib import Path

import pytest
import torch
from networks import language_model

from lmtrain import checkpoint, files
from lmtrain.errors import CheckpointError, UnreadableError
from lmtrain.model.language_model import LanguageModel


def network(hidden_size: int = 5) -> LanguageModel:
    return language_model(7, embedding_size=5, hidden_size=hidden_size, num_layers=1)


def save(run, step=3, weights=None):
    run.mkdir(exist_ok=True)
    return checkpoint.save(
        run,
        step,
        texts={"config.toml": "format = 1\n", "tokenizer.json": "{}"},
        weights=network().state_dict() if weights is None else weights,
        state_tensors={"generator": torch.arange(5)},
        state={
            "step": step, "parts": {"progress": {}},
            "data": {"train": {"name": "text", "key": "0" * 64}},
        },
    )  # fmt: skip


def test_a_saved_checkpoint_is_loaded(tmp_path):
    path = save(tmp_path)

    saved = checkpoint.read(path)
    other = network()
    with torch.no_grad():
        other.encoder.embedding.weight.zero_()
    saved.load_weights(other)

    assert path.name == "step-00000003"
    assert saved.state["step"] == 3
    assert saved.tensors("state.safetensors")["generator"].tolist() == [0, 1, 2, 3, 4]
    weights = [model.encoder.embedding.weight for model in (other, network())]
    assert torch.equal(*weights)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["step-00000003"]


def test_the_same_state_gives_the_same_files(tmp_path):
    first, second = save(tmp_path / "a"), save(tmp_path / "b")

    for name in [entry.name for entry in first.iterdir()]:
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json",
                                  "config.toml", "tokenizer.json", "MANIFEST.json"])  # fmt: skip
def test_every_flipped_bit_is_detected(tmp_path, name):
    path = save(tmp_path)
    content = (path / name).read_bytes()

    for position in range(0, len(content), max(1, len(content) // 25)):
        damaged = bytearray(content)
        damaged[position] ^= 0x40
        (path / name).write_bytes(damaged)
        words = "damaged|format" if name == "MANIFEST.json" else f"{name} is damaged"
        with pytest.raises(CheckpointError, match=words):
            checkpoint.read(path).require_intact()


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("keep", [0, 1, 8, 0.5, -1])
def test_every_truncated_file_is_detected(tmp_path, name, keep):
    path = save(tmp_path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: int(len(content) * keep) if keep == 0.5 else keep])

    with pytest.raises(CheckpointError, match=name):
        checkpoint.read(path)


def test_missing_extra_linked_and_swapped_files_are_detected(tmp_path):
    missing, extra, linked, swapped = (save(tmp_path / n) for n in ("a", "b", "c", "d"))
    (missing / "state.json").unlink()
    (extra / "pickle.pkl").write_bytes(b"")
    (linked / "state.json").rename(tmp_path / "elsewhere")
    (linked / "state.json").symlink_to(tmp_path / "elsewhere")
    other = save(tmp_path / "e", weights={"embedding": torch.zeros(3)})
    (other / "model.safetensors").replace(swapped / "model.safetensors")

    for path, words in (
        (missing, "state.json"),
        (extra, "pickle.pkl"),
        (linked, "state.json is not a regular file"),
        (swapped, "model.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.read(path).require_intact()


def test_a_manifest_of_another_step_is_detected(tmp_path):
    path = save(tmp_path)
    path.rename(path.with_name("step-00000004"))

    with pytest.raises(CheckpointError, match="another step"):
        checkpoint.read(checkpoint.folder(tmp_path, 4))


def test_another_format_version_is_refused_with_the_supported_one(tmp_path):
    path = save(tmp_path)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (path / "MANIFEST.json").write_text(json.dumps({**manifest, "format": 2}, indent=1))

    with pytest.raises(CheckpointError, match="format 2\n  this version of lmtrain reads format 1"):
        checkpoint.read(path)


def test_weights_of_another_shape_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="do not match"):
        checkpoint.read(save(tmp_path)).load_weights(network(hidden_size=6))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = network().state_dict()
    weights["head.bias"][3] = float("nan")

    with pytest.raises(CheckpointError, match=r"head\.bias"):
        checkpoint.read(save(tmp_path, weights=weights)).load_weights(network())


def test_the_checkpoint_of_a_run_is_its_best_or_else_its_newest(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)

    newest = checkpoint.find(tmp_path)
    checkpoint.write_best(tmp_path, 2, "perplexity", 1.5)

    assert newest.name == "step-00000003"
    assert checkpoint.find(tmp_path).name == "step-00000002"
    assert checkpoint.find(checkpoint.folder(tmp_path, 1)).name == "step-00000001"
    assert json.loads((tmp_path / "best.json").read_text())["metric"] == "perplexity"


def test_old_checkpoints_are_deleted_except_the_best(tmp_path):
    for step in (1, 2, 3, 4, 10):
        save(tmp_path, step)
    checkpoint.write_best(tmp_path, 2, "perplexity", 1.5)

    checkpoint.rotate(tmp_path, 2)

    assert checkpoint.steps(tmp_path) == [2, 4, 10]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_the_newest_intact_checkpoint_is_found_if_a_newer_one_is_damaged(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.json").write_bytes(b"{}")

    intact, problems = checkpoint.newest_intact(tmp_path)

    assert intact.state["step"] == 1
    assert len(problems) == 1
    assert "state.json is damaged" in problems[0]


def test_an_unreadable_checkpoint_is_an_error_and_not_skipped(tmp_path, monkeypatch):
    paths = [save(tmp_path, step) for step in (1, 2)]
    real = Path.read_bytes

    def stale(path):
        if path == paths[1] / "model.safetensors":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(UnreadableError, match=r"step-00000002.*: Stale file handle$"):
        checkpoint.newest_intact(tmp_path)


def test_no_checkpoint_is_deleted_while_best_json_is_unreadable(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)
    checkpoint.write_best(tmp_path, 1, "perplexity", 1.0)
    real = Path.read_bytes

    def stale(path):
        if path.name == "best.json":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    checkpoint.rotate(tmp_path, 2)
    with pytest.raises(UnreadableError):
        checkpoint.find(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", real)

    assert checkpoint.steps(tmp_path) == [1, 2, 3]
    checkpoint.rotate(tmp_path, 1)
    assert checkpoint.steps(tmp_path) == [1, 3]


def test_a_checkpoint_that_is_deleted_during_verification_is_skipped(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)

    results = []
    for path, problem in checkpoint.verify(tmp_path):
        results.append((path.name, problem))
        if len(results) == 1:
            files.remove_folder(checkpoint.folder(tmp_path, 2))

    assert results == [("step-00000001", None), ("step-00000003", None)]


def test_a_path_that_cannot_be_read_is_an_error(tmp_path):
    for function in (checkpoint.find, checkpoint.steps, checkpoint.is_checkpoint):
        with pytest.raises(CheckpointError, match=r"cannot read .*: File name too long"):
            function(tmp_path / ("x" * 300))


def test_without_an_intact_checkpoint_the_error_gives_the_reason(tmp_path):
    (save(tmp_path, 2) / "state.json").write_bytes(b"{}")

    with pytest.raises(CheckpointError, match=r"no intact checkpoint\n.*state.json is damaged"):
        checkpoint.newest_intact(tmp_path)


def test_verify_reports_damaged_checkpoints(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "config.toml").write_bytes(b"")

    results = dict(checkpoint.verify(tmp_path))

    assert results[checkpoint.folder(tmp_path, 1)] is None
    assert "config.toml" in (results[checkpoint.folder(tmp_path, 2)] or "")


def test_a_pickle_in_place_of_weights_is_not_loaded(tmp_path):
    path = save(tmp_path)
    canary = tmp_path / "canary"
    hostile = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    (path / "model.safetensors").write_bytes(hostile)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["model.safetensors"] = {
        "bytes": len(hostile),
        "sha256": files.sha256([hostile]),
    }
    (path / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))

    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        checkpoint.read(path).load_weights(network())

    assert not canary.exists()
