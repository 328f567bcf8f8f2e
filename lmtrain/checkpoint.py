"""Run folders and the checkpoints in them: each checkpoint is one complete, self-contained model.

    RUN/checkpoints/step-00012000/
      model.safetensors  state.safetensors  state.json  config.toml  tokenizer.json  MANIFEST.json

A checkpoint appears by one rename and never changes. Its manifest, written last, holds the size and
SHA-256 of every file; nothing is used before it agrees with it, and nothing is ever unpickled.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lmtrain import files
from lmtrain.errors import CheckpointError, LmtrainError

FORMAT = 1
_NAMES = ("model.safetensors", "state.safetensors", "state.json", "config.toml", "tokenizer.json")
_MANIFEST = "MANIFEST.json"
_FOLDER = re.compile(r"step-(\d{8,})")
_MOST_MANIFEST_BYTES = 1 << 16


@dataclass(frozen=True)
class Checkpoint:
    """The verified content of a checkpoint folder.

    Args:
        path: the folder.
        contents: the bytes of its files by name.
    """

    path: Path
    contents: Mapping[str, bytes]

    def text(self, name: str) -> str:
        """The content of a text file.

        Raises:
            CheckpointError: it is not UTF-8.
        """
        try:
            return self.contents[name].decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path / name} is damaged: not UTF-8") from None

    @property
    def state(self) -> dict[str, Any]:
        """The training state that is not tensors.

        Raises:
            CheckpointError: it is no JSON object, or of a newer format.
        """
        return _json_object(self.path / "state.json", self.contents["state.json"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of its files.

        Raises:
            CheckpointError: they cannot be read.
        """
        try:
            return safetensors.torch.load(self.contents[name])
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path / name} is damaged: {error}") from None

    def load_weights(self, model: nn.Module) -> None:
        """Puts the weights into a model of the same shape.

        Raises:
            CheckpointError: names, shapes or types differ, or a weight is not finite.
        """
        tensors = self.tensors("model.safetensors")
        expected = model.state_dict()
        for name in expected.keys() | tensors.keys():
            ours, theirs = expected.get(name), tensors.get(name)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                shapes = [None if t is None else tuple(t.shape) for t in (theirs, ours)]
                raise CheckpointError(
                    f"{self.path} does not fit its own settings: {name} is {shapes[0]}",
                    f"the settings make it {shapes[1]}",
                )
            if ours.dtype != theirs.dtype or not theirs.isfinite().all():
                raise CheckpointError(
                    f"{self.path}: {name} is {theirs.dtype} or not finite; {ours.dtype} is needed"
                )
        model.load_state_dict(tensors)


def save(
    run: Path,
    step: int,
    *,
    config: str,
    tokenizer: str,
    weights: Mapping[str, Tensor],
    state_tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Writes the checkpoint of a step and returns its folder; one that is there already stays.

    Args:
        run: the run folder.
        step: updates done.
        config: the content of config.toml.
        tokenizer: the content of tokenizer.json.
        weights: the model's tensors by name.
        state_tensors: the other tensors that training goes on from.
        state: the rest of what training goes on from, as JSON.

    Raises:
        MachineError: the disk or the permissions refused; nothing is left behind.
    """
    path = run / "checkpoints" / f"step-{step:08d}"
    if path.exists():
        return path
    contents = {
        "model.safetensors": _tensor_bytes(weights),
        "state.safetensors": _tensor_bytes(state_tensors),
        "state.json": _json_bytes({"format": FORMAT, **state}),
        "config.toml": config.encode(),
        "tokenizer.json": tokenizer.encode(),
    }
    manifest = {
        name: {"bytes": len(content), "sha256": files.sha256([content])}
        for name, content in contents.items()
    }
    contents[_MANIFEST] = _json_bytes({"format": FORMAT, "step": step, "files": manifest})
    files.publish_folder(path, contents)
    return path


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def _json_bytes(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, allow_nan=False, indent=1).encode()


def read(path: Path) -> Checkpoint:
    """The content of a checkpoint folder, every byte compared with the manifest.

    Raises:
        CheckpointError: missing, damaged, or of a newer format.
    """
    manifest = _manifest(path)
    contents = {}
    for name in _NAMES:
        entry = manifest.get(name)
        if not isinstance(entry, dict):
            raise CheckpointError(f"{path} is damaged: the manifest lacks {name}")
        content = _read_file(path / name, entry.get("bytes"))
        if files.sha256([content]) != entry.get("sha256"):
            raise CheckpointError(f"{path / name} is damaged: its content is not what was saved")
        contents[name] = content
    return Checkpoint(path, contents)


def _manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {path}")
    tree = _json_object(path / _MANIFEST, _read_file(path / _MANIFEST, None))
    listed = tree.get("files")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path / _MANIFEST} is damaged")
    if (named := _FOLDER.fullmatch(path.name)) and int(named[1]) != tree.get("step"):
        raise CheckpointError(f"{path} is damaged: its manifest is that of another step")
    present = {entry.name for entry in path.iterdir()}
    if extra := present - {*_NAMES, _MANIFEST}:
        raise CheckpointError(f"{path} is damaged: {sorted(extra)[0]!a} does not belong there")
    return listed


def _read_file(path: Path, size: object) -> bytes:
    try:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link; a checkpoint holds plain files")
        found = path.stat().st_size
        if size is None and found > _MOST_MANIFEST_BYTES:
            raise CheckpointError(f"{path} is damaged: {found:,} bytes")
        if size is not None and found != size:
            raise CheckpointError(f"{path} is damaged: {found:,} bytes", f"saved were {size!a}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def _json_object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: not JSON") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is damaged: not a JSON object")
    if tree.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {tree.get('format')!a}", f"this lmtrain reads format {FORMAT}"
        )
    return tree


def steps(run: Path) -> list[int]:
    """The steps of the checkpoints in a run, rising."""
    folder = run / "checkpoints"
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _FOLDER.fullmatch(name)))


def folder(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


def find(path: Path) -> Path:
    """The checkpoint meant by a run (its best, else its newest) or a checkpoint folder.

    Raises:
        CheckpointError: there is none.
    """
    if (path / _MANIFEST).exists():
        return path
    known = steps(path)
    if not known:
        raise CheckpointError(
            f"no run or checkpoint {path}" if not path.exists() else f"{path} has no checkpoint"
        )
    best = best_step(path)
    return folder(path, best if best in known else known[-1])


def newest_intact(run: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint of a run that is whole, and what was wrong with any newer one.

    Raises:
        CheckpointError: there is none.
    """
    problems: list[str] = []
    for step in reversed(steps(run)):
        try:
            return read(folder(run, step)), problems
        except CheckpointError as error:
            problems.append(str(error).splitlines()[0])
    raise CheckpointError(f"{run} has no intact checkpoint", *problems[:2])


def best_step(run: Path) -> int | None:
    """The step that best.json names; None if there is none."""
    try:
        tree = json.loads((run / "best.json").read_bytes())
        return int(tree["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_best(run: Path, step: int, metric: str, value: float) -> None:
    """Notes which checkpoint is the best so far.

    Raises:
        MachineError: the disk or the permissions refused.
    """
    files.write(run / "best.json", _json_bytes({"step": step, "metric": metric, "value": value}))


def rotate(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the best; call it after a save is durable.

    Raises:
        MachineError: the system refused.
    """
    best = best_step(run)
    for step in steps(run)[:-keep]:
        if step != best:
            files.remove_folder(folder(run, step))


def remove_after(run: Path, step: int) -> None:
    """Removes the checkpoints of later steps.

    Raises:
        MachineError: the system refused.
    """
    for later in steps(run):
        if later > step:
            files.remove_folder(folder(run, later))


def verify(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Every checkpoint of a run, or the one at `path`, with what is wrong with it, if anything.

    Raises:
        CheckpointError: there is none.
    """
    known = [path] if (path / _MANIFEST).exists() else [folder(path, s) for s in steps(path)]
    if not known:
        raise CheckpointError(f"no run or checkpoint {path}")
    for each in known:
        try:
            found = read(each)
            found.tensors("model.safetensors")
            found.tensors("state.safetensors")
            yield each, None
        except LmtrainError as error:
            yield each, str(error)


def run_starts(path: Path) -> list[dict[str, Any]]:
    """The starts that a run.json lists: versions, arguments, device, threads, time."""
    try:
        starts = json.loads(path.read_bytes())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [start for start in starts if isinstance(start, dict)]


def write_run_starts(path: Path, starts: list[dict[str, Any]]) -> None:
    """Writes a run.json.

    Raises:
        MachineError: the disk or the permissions refused.
    """
    files.write(path, _json_bytes({"format": FORMAT, "starts": starts}))
