"""Run folders and the checkpoints in them: each checkpoint is one complete, self-contained model.

    RUN/checkpoints/step-00012000/
      model.safetensors  state.safetensors  state.json  config.toml  MANIFEST.json
      tokenizer.json and other vocabularies of its task

A checkpoint appears by one rename and never changes. Its manifest, written last, holds the size and
SHA-256 of every file; nothing is used before it agrees with it, and nothing is ever unpickled. A
folder may come from anyone: what is read is small, or as large as its settings make it.
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
_NAMES = ("model.safetensors", "state.safetensors", "state.json", "config.toml")
_VOCABULARY = re.compile(r"[a-z]{1,40}\.json")
_MANIFEST = "MANIFEST.json"
_FOLDER = re.compile(r"step-([0-9]{8,18})")
_ATTEMPTS = 20
_Result = TypeVar("_Result")


class _Reference(BaseModel):
    name: str
    key: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _State(BaseModel):
    """What every state.json holds; each part of a training checks its own."""

    step: Annotated[int, Field(ge=0, strict=True)]
    data: dict[Literal["train", "valid", "test"], _Reference]
    parts: dict[str, dict[str, Any]]

    @field_validator("data")
    @classmethod
    def _was_trained(cls, data: dict[str, _Reference]) -> dict[str, _Reference]:
        if "train" not in data:
            raise ValueError
        return data


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder; whatever of it is used was compared with its manifest.

    Args:
        path: the folder.
        manifest: what it says of each file.
    """

    path: Path
    manifest: Mapping[str, Mapping[str, Any]]

    def content(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            CheckpointError: missing, damaged, or larger than any such file.
        """
        entry = self.manifest.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} has no {name}")
        content = untrusted.read(self.path / name, entry["bytes"])
        if files.sha256([content]) != entry["sha256"]:
            raise CheckpointError(f"{self.path / name} is damaged: it is not what was saved")
        return content

    def text(self, name: str) -> str:
        """The content of a text file.

        Raises:
            CheckpointError: damaged, or not UTF-8.
        """
        try:
            return self.content(name).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path / name} is damaged: not UTF-8") from None

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """The training state that is not tensors.

        Raises:
            CheckpointError: damaged, of a newer format, or without what it must hold.
        """
        path = self.path / "state.json"
        tree = untrusted.json_object(path, self.content(path.name), FORMAT)
        try:
            _State.model_validate(tree)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise CheckpointError(f"{path} is damaged: {where}") from None
        return tree

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of its files.

        Raises:
            CheckpointError: they cannot be read.
        """
        try:
            return safetensors.torch.load(self.content(name))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path / name} is damaged: {error}") from None

    def require_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that the weights have these names and shapes, before memory is taken for them.

        Raises:
            CheckpointError: they have not.
        """
        path = self.path / "model.safetensors"
        untrusted.file_size(path, self.manifest[path.name]["bytes"])
        try:
            with safetensors.safe_open(path, framework="pt") as header:
                found = {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise CheckpointError(
                    f"{self.path} does not fit its own settings: {name!a} is {found.get(name)}",
                    f"the settings make it {expected.get(name)}",
                )

    def require_whole(self) -> "Checkpoint":
        """Compares every byte with the manifest; returns itself.

        Raises:
            CheckpointError: something is missing or damaged.
        """
        for name in self.manifest:
            self.content(name)
        return self

    def load_weights(self, model: nn.Module) -> None:
        """Puts the weights into a model of the same shape.

        Raises:
            CheckpointError: names, shapes or types differ, or a weight is not finite.
        """
        expected = weights(model)
        self.require_shapes({name: tuple(ours.shape) for name, ours in expected.items()})
        tensors = self.tensors("model.safetensors")
        for name, ours in expected.items():
            theirs = tensors[name]
            if ours.dtype != theirs.dtype or not theirs.isfinite().all():
                raise CheckpointError(
                    f"{self.path}: {name} is {theirs.dtype} or not finite; {ours.dtype} is needed"
                )
        # A weight that two modules share is stored once.
        model.load_state_dict(tensors, strict=False)


def save(
    run: Path,
    step: int,
    *,
    texts: Mapping[str, str],
    weights: Mapping[str, Tensor],
    state_tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Writes the checkpoint of a step and returns its folder; one that is there already stays.

    Args:
        run: the run folder.
        step: updates done.
        texts: the content of config.toml and of each vocabulary, by the name of the file.
        weights: the model's tensors by name.
        state_tensors: the other tensors that training goes on from.
        state: the rest of what training goes on from, as JSON.

    Raises:
        MachineError: the disk or the permissions refused; nothing is left behind.
    """
    path = folder(run, step)
    if path.exists():
        return path
    if not run.is_dir():
        raise MachineError(f"could not write {path}: the run folder is gone")
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
    """The weights of a model as a checkpoint stores them: those that modules share, once."""
    found: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, weight in state.items():
        found.setdefault(id(weight), name)
    return {name: state[name].detach() for name in found.values()}


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def _json_bytes(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, allow_nan=False, indent=1).encode()


def read(path: Path) -> Checkpoint:
    """A checkpoint folder whose manifest is in order; its files are compared when they are read.

    Raises:
        CheckpointError: missing, damaged, or of a newer format.
    """
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {path}")
    where = path / _MANIFEST
    content = untrusted.read(where)
    tree = untrusted.json_object(where, content, FORMAT)
    listed = tree.get("files")
    # Nothing vouches for the manifest but its own form: not even a space may differ.
    if not isinstance(listed, dict) or json.dumps(tree, indent=1).encode() != content:
        raise CheckpointError(f"{where} is damaged")
    if (named := _FOLDER.fullmatch(path.name)) and int(named[1]) != tree.get("step"):
        raise CheckpointError(f"{path} is damaged: its manifest is that of another step")
    with untrusted.explained(path):
        present = {entry.name for entry in path.iterdir()}
    unknown = [name for name in listed if name not in _NAMES and not _VOCABULARY.fullmatch(name)]
    if extra := {*unknown, *present} - {*(listed.keys() - unknown), _MANIFEST}:
        raise CheckpointError(f"{path} is damaged: {sorted(extra)[0]!a} does not belong there")
    for name in {**dict.fromkeys(_NAMES), **listed}:
        entry = listed.get(name)
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise CheckpointError(f"{path} is damaged: the manifest lacks {name}")
        untrusted.file_size(path / name, entry["bytes"])
    return Checkpoint(path, listed)


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint's folder, not a run's; an UnreadableError if nobody can tell."""
    return untrusted.is_there(path / _MANIFEST)


def steps(run: Path) -> list[int]:
    """The steps of the checkpoints in a run, rising.

    Raises:
        CheckpointError: the run cannot be looked into.
    """
    folder = run / "checkpoints"
    if not untrusted.is_there(folder):
        return []
    with untrusted.explained(folder), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return sorted(int(match[1]) for name in names if (match := _FOLDER.fullmatch(name)))


def folder(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


def find(path: Path) -> Path:
    """The checkpoint meant by a run (its best, else its newest) or a checkpoint folder.

    Raises:
        CheckpointError: there is none.
    """
    if is_checkpoint(path):
        return path
    known = steps(path)
    if not known:
        raise CheckpointError(
            f"no run or checkpoint {path}" if not path.exists() else f"{path} has no checkpoint"
        )
    named = best(path)
    return folder(path, named.step if named and named.step in known else known[-1])


def newest_intact(run: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint of a run that is whole, and what was wrong with any newer one.

    Raises:
        UnreadableError: one is there that the system lets nobody read now: it may be whole.
        CheckpointError: there is none.
    """
    problems: list[str] = []
    for step in reversed(steps(run)):
        try:
            return read(folder(run, step)).require_whole(), problems
        except UnreadableError:
            raise
        except CheckpointError as error:
            problems.append(str(error).splitlines()[0])
    raise CheckpointError(f"{run} has no intact checkpoint", *problems[:2])


def use(path: Path, action: Callable[[Checkpoint], _Result]) -> _Result:
    """What `action` makes of the checkpoint that `find` finds, or of another if it goes meanwhile.

    A run that is being trained removes checkpoints while others read them.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    for _ in range(_ATTEMPTS):
        chosen = find(path)
        try:
            return action(read(chosen))
        except CheckpointError as error:
            if isinstance(error, UnreadableError) or chosen.is_dir():
                raise
    raise CheckpointError(f"{path} changes faster than it can be read")


class Best(BaseModel, frozen=True, strict=True, allow_inf_nan=False):
    """The best checkpoint of a run."""

    step: Annotated[int, Field(ge=0)]
    metric: Annotated[str, Field(pattern="^[a-z0-9_]{1,40}$")]
    """The name of the headline figure of its validation."""
    value: float | None
    """That figure; None if it is not finite."""


def best(run: Path) -> Best | None:
    """The best checkpoint, as best.json names it; None if there is none.

    Raises:
        UnreadableError: it is there and cannot be read.
    """
    try:
        return Best.model_validate_json(untrusted.read(run / "best.json"))
    except UnreadableError:
        raise
    except (CheckpointError, ValidationError):
        return None


def write_best(run: Path, step: int, metric: str, value: float | None) -> None:
    """Notes which checkpoint is the best so far.

    Raises:
        MachineError: the disk or the permissions refused.
    """
    files.write(run / "best.json", _json_bytes({"step": step, "metric": metric, "value": value}))


def rotate(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the best, when a save is durable.

    Where it cannot be read now which one is the best, all stay.

    Raises:
        MachineError: the system refused.
    """
    with contextlib.suppress(UnreadableError):
        named = best(run)
        for step in steps(run)[:-keep]:
            if not named or step != named.step:
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
    known = [path] if is_checkpoint(path) else [folder(path, s) for s in steps(path)]
    if not known:
        raise CheckpointError(f"no run or checkpoint {path}")
    for each in known:
        try:
            found = read(each).require_whole()
            found.tensors("model.safetensors")
            found.tensors("state.safetensors")
            yield each, None
        except LmtrainError as error:
            # A run that is being trained removes checkpoints meanwhile.
            if isinstance(error, UnreadableError) or each == path or each.is_dir():
                yield each, str(error)
