"""Safe reading of untrusted files: no symbolic links, and a size limit for each file."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmtrain.errors import CheckpointError, ConfigError, UnreadableError

_MAX_BYTES = {
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
_SIZE_ADVICE = {
    "config.toml": "try: a glob in quotes, which names many files at once",
    "labels.json": "try: fewer or shorter labels",
    "tokenizer.json": "try: a smaller --vocab-size",
}


@contextlib.contextmanager
def map_os_errors(path: Path) -> Iterator[None]:
    """Raises CheckpointError for an OSError while `path` is read inside the block.

    Raises:
        UnreadableError: the path exists but could not be read.
        CheckpointError: the path does not exist.
    """
    try:
        yield
    except OSError as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        error_class = CheckpointError if is_missing else UnreadableError
        raise error_class(f"cannot read {path}: {error.strerror}") from None


def exists(path: Path) -> bool:
    """Whether a path exists.

    Raises:
        UnreadableError: the operating system does not say.
    """
    # Not Path.exists: since Python 3.14 it is false for paths without permission.
    with map_os_errors(path):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def require_regular_file(path: Path, size: object = None) -> None:
    """Checks that a path is a regular file that is small enough to be read.

    Args:
        path: the file. Its name determines the size limit; other names have this machine's memory
            as their limit.
        size: the size that the file must have, in bytes; None for any.

    Raises:
        CheckpointError: the file is missing, not a regular file, of another size, or too large.
    """
    with map_os_errors(path):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise CheckpointError(f"{path} is not a regular file")
        actual = path.stat().st_size
    if size is not None and actual != size:
        raise CheckpointError(
            f"{path} is damaged: {actual:,} bytes", f"the manifest says {size!a} bytes"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if actual > (limit := _MAX_BYTES.get(path.name, memory)):
        raise CheckpointError(f"{path} is too large: {actual:,} bytes", f"the limit is {limit:,}")


def require_within_limit(name: str, content: bytes) -> None:
    """Checks before a file is written that it stays within the size limit for reading.

    Args:
        name: name of the file.
        content: what is to be written.

    Raises:
        ConfigError: the content is too large.
    """
    limit = _MAX_BYTES.get(name, len(content))
    if len(content) > limit:
        raise ConfigError(
            f"{name} of this run is too large: {len(content):,} bytes",
            f"the limit is {limit:,}",
            *([_SIZE_ADVICE[name]] if name in _SIZE_ADVICE else []),
        )


def read(path: Path, size: object = None) -> bytes:
    """The content of a file, after the checks of `require_regular_file`.

    Raises:
        CheckpointError: the file is missing, not a regular file, of another size, or too large.
    """
    require_regular_file(path, size)
    with map_os_errors(path):
        return path.read_bytes()


def text(path: Path) -> str:
    """The content of a text file, after the checks of `require_regular_file`.

    Raises:
        CheckpointError: as for `read`, or the file is not UTF-8.
    """
    try:
        return read(path).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is damaged: not UTF-8") from None


def json_object(path: Path, content: bytes, version: int) -> dict[str, Any]:
    """The JSON object that the content of a file holds.

    Args:
        path: the file, for the message.
        content: its content.
        version: the version of the format that its entry `format` must have.

    Raises:
        CheckpointError: not a JSON object, or of another format version.
    """
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: not JSON") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is damaged: not a JSON object")
    if tree.get("format") != version:
        raise CheckpointError(
            f"{path} has format {tree.get('format')!a}",
            f"this version of lmtrain reads format {version}",
        )
    return tree
