"""Run folders and the checkpoints in them: each checkpoint is one complete, self-contained model.

    RUN/checkpoints/step-00012000/
      model.safetensors  state.safetensors  state.json  config.toml  MANIFEST.json
      tokenizer.json and other vocabularies of its task

A checkpoint is written atomically and never changes. Its manifest holds the size and SHA-256 of
every other file; a file is compared with it before it is used. Nothing is unpickled. Folders are
untrusted: each file has a size limit, and weights must have the shapes that the settings give.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import safetensors
import safetensors.torch
from pydantic import BaseModel, Field, ValidationError, field_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from lmtrain import files, untrusted
from lmtrain.errors import CheckpointError, LmtrainError, MachineError, UnreadableError

FORMAT = 1
_REQUIRED_FILES = ("model.safetensors", "state.safetensors", "state.json", "config.toml")
_VOCABULARY_FILE = re.compile(r"[a-z]{1,40}\.json")
_MANIFEST = "MANIFEST.json"
_STEP_FOLDER = re.compile(r"step-([0-9]{8,18})")
_MAX_ATTEMPTS = 20
_Result = TypeVar("_Result")


class _Reference(BaseModel):
    name: str
    key: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _State(BaseModel):
    """The entries of every state.json; each part of the training state checks its own."""

    step: Annotated[int, Field(ge=0, strict=True)]
    data: dict[Literal["train", "valid", "test"], _Reference]
    parts: dict[str, dict[str, Any]]

    @field_validator("data")
    @classmethod
    def _require_train(cls, data: dict[str, _Reference]) -> dict[str, _Reference]:
        if "train" not in data:
            raise ValueError
        return data


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder; its files are compared with the manifest when they are read.

    Args:
        path: the folder.
        manifest: `bytes` and `sha256` of each file, by name.
    """

    path: Path
    manifest: Mapping[str, Mapping[str, Any]]

    def content(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            CheckpointError: the file is missing, damaged or too large.
        """
        entry = self.manifest.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} has no {name}")
        content = untrusted.read(self.path / name, entry["bytes"])
        if files.sha256([content]) != entry["sha256"]:
            raise CheckpointError(
                f"{self.path / name} is damaged: its SHA-256 is not the one in the manifest"
            )
        return content

    def text(self, name: str) -> str:
        """The content of a text file.

        Raises:
            CheckpointError: the file is missing, damaged, too large or not UTF-8.
        """
        try:
            return self.content(name).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path / name} is damaged: not UTF-8") from None

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """The content of state.json: the training state except its tensors.

        Raises:
            CheckpointError: the file is damaged, or of another format version.
        """
        path = self.path / "state.json"
        tree = untrusted.json_object(path, self.content(path.name), FORMAT)
        try:
            _State.model_validate(tree)
        except ValidationError as error:
            entry = ".".join(map(str, error.errors()[0]["loc"]))
            raise CheckpointError(f"{path} is damaged: invalid {entry}") from None
        return tree

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file, by name.

        Raises:
            CheckpointError: the file is missing, damaged or too large.
        """
        try:
            return safetensors.torch.load(self.content(name))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path / name} is damaged: {error}") from None

    def require_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Checks names and shapes of the weights without loading them.

        Args:
            expected: shapes by name.

        Raises:
            CheckpointError: a weight is missing, unexpected or of another shape.
        """
        path = self.path / "model.safetensors"
        untrusted.require_regular_file(path, self.manifest[path.name]["bytes"])
        try:
            with safetensors.safe_open(path, framework="pt") as header:
                stored = {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        for name in sorted(expected.keys() | stored.keys()):
            if expected.get(name) != stored.get(name):
                raise CheckpointError(
                    f"the weights of {self.path} do not match its settings",
                    f"shape of {name!a}: {stored.get(name, 'missing')}",
                    f"by the settings: {expected.get(name, 'no such weight')}",
                )

    def require_intact(self) -> "Checkpoint":
        """Compares all files with the manifest; returns the checkpoint itself.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        for name in self.manifest:
            self.content(name)
        return self

    def load_weights(self, model: nn.Module) -> None:
        """Loads the weights into a model.

        Raises:
            CheckpointError: names, shapes or types differ, or a weight is not finite.
        """
        expected = weights(model)
        self.require_shapes({name: tuple(weight.shape) for name, weight in expected.items()})
        stored = self.tensors("model.safetensors")
        for name, weight in expected.items():
            if stored[name].dtype != weight.dtype:
                raise CheckpointError(
                    f"{self.path}: {name} is {stored[name].dtype}, must be {weight.dtype}"
                )
            if not stored[name].isfinite().all():
                raise CheckpointError(f"{self.path}: {name} is not finite")
        # A weight that two modules share is stored once.
        model.load_state_dict(stored, strict=False)


def save(
    run: Path,
    step: int,
    *,
    texts: Mapping[str, str],
    weights: Mapping[str, Tensor],
    state_tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Writes the checkpoint of a step, unless it exists; returns its folder.

    Args:
        run: the run folder.
        step: updates done.
        texts: content of config.toml and of each vocabulary, by file name.
        weights: weights of the model, by name.
        state_tensors: tensors of the training state, by name.
        state: the rest of the training state, as JSON.

    Raises:
        MachineError: the checkpoint could not be written; nothing is left behind.
    """
    path = folder(run, step)
    if path.exists():
        return path
    if not run.is_dir():
        raise MachineError(f"could not write {path}: the run folder was deleted")
    contents = {
        "model.safetensors": _tensor_bytes(weights),
        "state.safetensors": _tensor_bytes(state_tensors),
        "state.json": _json_bytes({"format": FORMAT, **state}),
        **{name: text.encode() for name, text in texts.items()},
    }
    manifest = {
        name: {"bytes": len(content), "sha256": files.sha256([content])}
        for name, content in contents.items()
    }
    contents[_MANIFEST] = _json_bytes({"format": FORMAT, "step": step, "files": manifest})
    files.publish_folder(path, contents)
    return path


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model as a checkpoint stores them: a shared weight is stored once."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, weight in state.items():
        names.setdefault(id(weight), name)
    return {name: state[name].detach() for name in names.values()}


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def _json_bytes(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, allow_nan=False, indent=1).encode()


def read(path: Path) -> Checkpoint:
    """A checkpoint with a valid manifest; its other files are compared when they are read.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another format version.
    """
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {path}")
    manifest = path / _MANIFEST
    content = untrusted.read(manifest)
    tree = untrusted.json_object(manifest, content, FORMAT)
    listed = tree.get("files")
    # The manifest has no checksum, so that it must be byte for byte as `save` formats it.
    try:
        as_saved = json.dumps(tree, indent=1).encode()
    except RecursionError:
        as_saved = b""
    if not isinstance(listed, dict) or as_saved != content:
        raise CheckpointError(f"{manifest} is damaged")
    if (match := _STEP_FOLDER.fullmatch(path.name)) and int(match[1]) != tree.get("step"):
        raise CheckpointError(f"{path} is damaged: its manifest is for another step")
    with untrusted.map_os_errors(path):
        present = {entry.name for entry in path.iterdir()}
    unknown = [
        name
        for name in listed
        if name not in _REQUIRED_FILES and not _VOCABULARY_FILE.fullmatch(name)
    ]
    if extra := {*unknown, *present} - {*(listed.keys() - unknown), _MANIFEST}:
        raise CheckpointError(f"{path} is damaged: unexpected file {sorted(extra)[0]!a}")
    for name in {**dict.fromkeys(_REQUIRED_FILES), **listed}:
        entry = listed.get(name)
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise CheckpointError(f"{path} is damaged: the manifest has no valid entry for {name}")
        untrusted.require_regular_file(path / name, entry["bytes"])
    return Checkpoint(path, listed)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint folder, not a run folder.

    Raises:
        UnreadableError: the operating system does not say.
    """
    return untrusted.exists(path / _MANIFEST)


def steps(run: Path) -> list[int]:
    """The steps of the checkpoints of a run, in ascending order.

    Raises:
        CheckpointError: the folder could not be read.
    """
    folder = run / "checkpoints"
    if not untrusted.exists(folder):
        return []
    with untrusted.map_os_errors(folder), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return sorted(int(match[1]) for name in names if (match := _STEP_FOLDER.fullmatch(name)))


def folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def find(path: Path) -> Path:
    """The checkpoint folder of a run (its best, else its newest), or `path` if it is one itself.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if is_checkpoint(path):
        return path
    saved_steps = steps(path)
    if not saved_steps:
        raise CheckpointError(
            f"no run or checkpoint {path}" if not path.exists() else f"{path} has no checkpoint"
        )
    best_checkpoint = best(path)
    if best_checkpoint and best_checkpoint.step in saved_steps:
        return folder(path, best_checkpoint.step)
    return folder(path, saved_steps[-1])


def newest_intact(run: Path) -> tuple[Checkpoint, list[str]]:
    """The newest intact checkpoint of a run, and what is wrong with the newer ones.

    Raises:
        UnreadableError: a newer checkpoint could not be read; it may be intact.
        CheckpointError: there is no intact checkpoint.
    """
    problems: list[str] = []
    for step in reversed(steps(run)):
        try:
            return read(folder(run, step)).require_intact(), problems
        except UnreadableError:
            raise
        except CheckpointError as error:
            problems.append(str(error).splitlines()[0])
    raise CheckpointError(f"{run} has no intact checkpoint", *problems[:2])


def load_with(path: Path, loader: Callable[[Checkpoint], _Result]) -> _Result:
    """The result of `loader` for the checkpoint of a run or checkpoint folder, see `find`.

    A training in progress may delete the checkpoint meanwhile; then the next one is tried.

    Args:
        path: the run or checkpoint folder.
        loader: reads the checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    for _ in range(_MAX_ATTEMPTS):
        chosen = find(path)
        try:
            return loader(read(chosen))
        except CheckpointError as error:
            if isinstance(error, UnreadableError) or chosen.is_dir():
                raise
    raise CheckpointError(f"{path}: checkpoints are deleted faster than they can be read")


class Best(BaseModel, frozen=True, strict=True, allow_inf_nan=False):
    """The best checkpoint of a run."""

    step: Annotated[int, Field(ge=0)]
    metric: Annotated[str, Field(pattern="^[a-z0-9_]{1,40}$")]
    """Name of the headline metric of its validation."""
    value: float | None
    """Value of that metric; None if it is not finite."""


def best(run: Path) -> Best | None:
    """The content of best.json; None if it is missing or damaged.

    Raises:
        UnreadableError: the file exists but could not be read.
    """
    try:
        return Best.model_validate_json(untrusted.read(run / "best.json"))
    except UnreadableError:
        raise
    except (CheckpointError, ValidationError):
        return None


def write_best(run: Path, step: int, metric: str, value: float | None) -> None:
    """Writes best.json, which names the best checkpoint so far.

    Args:
        run: the run folder.
        step: updates done at the checkpoint.
        metric: name of the headline metric of its validation.
        value: value of that metric; None if it is not finite.

    Raises:
        MachineError: the file could not be written.
    """
    files.write(run / "best.json", _json_bytes({"step": step, "metric": metric, "value": value}))


def rotate(run: Path, keep: int) -> None:
    """Deletes all checkpoints except the newest `keep` and the best.

    If the best is unknown because best.json could not be read, nothing is deleted.

    Raises:
        MachineError: the operating system refused.
    """
    with contextlib.suppress(UnreadableError):
        best_checkpoint = best(run)
        for step in steps(run)[:-keep]:
            if not best_checkpoint or step != best_checkpoint.step:
                files.remove_folder(folder(run, step))


def remove_after(run: Path, step: int) -> None:
    """Deletes the checkpoints of later steps.

    Raises:
        MachineError: the operating system refused.
    """
    for later in steps(run):
        if later > step:
            files.remove_folder(folder(run, later))


def verify(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Checks every checkpoint of a run, or a single one.

    Args:
        path: the run or checkpoint folder.

    Yields:
        The folder of each checkpoint and what is wrong with it; None if it is intact.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    folders = [path] if is_checkpoint(path) else [folder(path, step) for step in steps(path)]
    if not folders:
        raise CheckpointError(f"no run or checkpoint {path}")
    for saved in folders:
        try:
            intact = read(saved).require_intact()
            intact.tensors("model.safetensors")
            intact.tensors("state.safetensors")
            yield saved, None
        except LmtrainError as error:
            # A training in progress may have deleted it meanwhile.
            if isinstance(error, UnreadableError) or saved == path or saved.is_dir():
                yield saved, str(error)
