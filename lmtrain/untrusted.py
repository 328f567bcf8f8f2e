"""Files that may come from anyone: no links, and no larger than such a file can be."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmtrain.errors import CheckpointError, ConfigError, UnreadableError

_MOST_BYTES = {
    "MANIFEST.json": 1 << 16,
    "best.json": 1 << 16,
    "config.toml": 1 << 20,
    "run.json": 1 << 24,
    "state.json": 1 << 24,
    "labels.json": 1 << 24,
    "frames.json": 1 << 10,
    "vectors.json": 1 << 10,
    "tokenizer.json": 1 << 30,
    "target.json": 1 << 30,
    "characters.json": 1 << 30,
}
_SMALLER = {
    "config.toml": "try: a glob in quotes, which names many files at once",
    "labels.json": "try: fewer or shorter labels",
    "tokenizer.json": "try: a smaller --vocab-size",
}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Inside, what the system says against reading a path becomes a plain message.

    Raises:
        UnreadableError: it is there and cannot be read.
        CheckpointError: it is not there.
    """
    try:
        yield
    except OSError as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        kind = CheckpointError if is_missing else UnreadableError
        raise kind(f"cannot read {path}: {error.strerror}") from None


def is_there(path: Path) -> bool:
    """Whether there is anything of that name.

    Raises:
        UnreadableError: the system does not say.
    """
    # Not Path.exists, which from Python 3.14 on takes what it may not look into for missing.
    with explained(path):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def file_size(path: Path, expected: object = None) -> int:
    """The size in bytes of a file that may be read.

    Args:
        path: the file; its name decides how large it may be, else this machine's memory does.
        expected: what its size must be; None for any.

    Raises:
        CheckpointError: it is not there, no plain file, of another size, or too large.
    """
    with explained(path):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise CheckpointError(f"{path} is no plain file")
        found = path.stat().st_size
    if expected is not None and found != expected:
        raise CheckpointError(f"{path} is damaged: {found:,} bytes", f"saved were {expected!a}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if found > (most := _MOST_BYTES.get(path.name, memory)):
        raise CheckpointError(f"{path} has {found:,} bytes", f"at most {most:,} are read")
    return found


def require_readable(name: str, content: bytes) -> None:
    """Checks that what is about to be written is small enough to be read again; see `file_size`.

    Raises:
        ConfigError: it is too large.
    """
    most = _MOST_BYTES.get(name, len(content))
    if len(content) > most:
        raise ConfigError(
            f"{name} of this run would have {len(content):,} bytes",
            f"at most {most:,} are read again",
            *([_SMALLER[name]] if name in _SMALLER else []),
        )


def read(path: Path, expected: object = None) -> bytes:
    """The content of a file that may be read; see `file_size`.

    Raises:
        CheckpointError: it is not there, no plain file, of another size, or too large.
    """
    file_size(path, expected)
    with explained(path):
        return path.read_bytes()


def text(path: Path) -> str:
    """The content of a text file that may be read; see `file_size`.

    Raises:
        CheckpointError: as `read`, or it is not UTF-8.
    """
    try:
        return read(path).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is damaged: not UTF-8") from None


def json_object(path: Path, content: bytes, form: int) -> dict[str, Any]:
    """The JSON object of a file's content, of this format.

    Raises:
        CheckpointError: it is none, or of another format.
    """
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: not JSON") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is damaged: not a JSON object")
    if tree.get("format") != form:
        raise CheckpointError(
            f"{path} has format {tree.get('format')!a}", f"this lmtrain reads format {form}"
        )
    return tree
