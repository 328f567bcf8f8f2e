"""Durable files: a file or folder appears under its final name only when it is complete.

It is written under a temporary name, synced to the disk and renamed, all through `disk.py`.
"""

import atexit
import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

from lmtrain import disk
from lmtrain.errors import CheckpointError, MachineError, RunBusyError

_TEMPORARY = ".aside-"
_TRASH = ".trash-"


@contextlib.contextmanager
def map_os_errors(path: Path, action: str) -> Iterator[None]:
    """Raises MachineError for an OSError inside the block.

    Args:
        path: what the block works on, for the message.
        action: a verb for the message, such as "write".

    Raises:
        MachineError: the operation failed.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f"; {_free_bytes(path) // 1_000_000} MB free"
        raise MachineError(f"could not {action} {path}: {reason}") from error


def nearest_existing(path: Path) -> Path:
    """The path itself if it exists, otherwise the nearest of the folders above that does."""
    return next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(nearest_existing(path)).free


def require_space(path: Path, needed: int) -> None:
    """Checks that a disk has enough free space before a long training starts.

    Args:
        path: where the space is needed; need not exist yet.
        needed: bytes.

    Raises:
        MachineError: less is free.
    """
    with map_os_errors(path, "check the free space for"):
        free = _free_bytes(path)
    if free < needed:
        raise MachineError(
            f"not enough disk space for {path}: {free / 1e6:,.1f} MB free",
            f"two checkpoints need {needed / 1e6:,.1f} MB",
            "train elsewhere: --out DIR",
        )


@contextlib.contextmanager
def _synced(descriptor: int) -> Iterator[BinaryIO]:
    """A stream whose content is synced when the block ends without error."""
    with disk.File(descriptor) as stream:
        yield cast("BinaryIO", stream)
        disk.sync(descriptor)


def _temporary_path(path: Path) -> Path:
    # The name is cut so that it stays within the limit of every file system.
    return path.with_name(f"{_TEMPORARY}{_unique()}-{path.name[:40]}")


def _unique() -> str:
    # Not the process id: containers that share a disk can have the same one.
    return secrets.token_hex(8)


def make_folder(path: Path) -> Path:
    """Creates a folder and its missing parents durably; returns it.

    Raises:
        MachineError: the operating system refused.
    """
    with map_os_errors(path, "create the folder"):
        _make_folders(path)
    return path


def _make_folders(path: Path) -> None:
    if path.is_dir():
        return
    _make_folders(path.parent)
    try:
        disk.make_folder(path)
    except FileExistsError:
        # Another process may have created it; a file of that name is an error.
        if not path.is_dir():
            raise
    disk.sync_folder(path.parent)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A stream for a file that appears at `path` atomically when the block ends without error.

    Raises:
        MachineError: the file could not be written; nothing is left behind.
    """
    with map_os_errors(path, "write"):
        _make_folders(path.parent)
        temporary = _temporary_path(path)
        try:
            with _synced(disk.create(temporary)) as stream:
                yield stream
            disk.rename(temporary, path)
            disk.sync_folder(path.parent)
        except BaseException:
            _delete(temporary)
            raise


def write(path: Path, content: bytes) -> None:
    """Writes or replaces a file atomically.

    Raises:
        MachineError: the file could not be written; the old content is intact.
    """
    with open_atomic(path) as stream:
        stream.write(content)


def publish_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """Creates a folder with these files atomically, all of them durable.

    Args:
        path: the folder, which must not exist.
        contents: content of each file by name.

    Raises:
        MachineError: the folder could not be written; nothing is left behind.
    """
    with map_os_errors(path, "write"):
        _make_folders(path.parent)
        temporary = _temporary_path(path)
        try:
            disk.make_folder(temporary)
            for name, content in contents.items():
                with _synced(disk.create(temporary / name)) as stream:
                    stream.write(content)
            disk.sync_folder(temporary)
            disk.rename(temporary, path)
            disk.sync_folder(path.parent)
        except BaseException:
            _delete(temporary)
            raise


def remove_folder(path: Path) -> None:
    """Deletes a folder; it disappears under its name atomically, by a rename.

    Raises:
        MachineError: the operating system refused.
    """
    with map_os_errors(path, "remove"):
        trash = path.with_name(f"{_TRASH}{_unique()}-{path.name}")
        disk.rename(path, trash)
    _delete(trash)


def remove_file(path: Path) -> None:
    """Deletes a file.

    Raises:
        MachineError: the operating system refused.
    """
    with map_os_errors(path, "remove"):
        disk.remove_file(path)


def is_folder(path: str | Path) -> bool:
    """Whether a path is a folder; False for a name that is too long, where Path.is_dir raises."""
    return os.path.isdir(path)  # noqa: PTH112


def is_leftover(path: Path) -> bool:
    """Whether a path has the name of a half-written or half-deleted file or folder."""
    return path.name.startswith((_TEMPORARY, _TRASH))


def remove_leftovers(folder: Path, *, seconds: float = 0) -> None:
    """Deletes what a killed process left half-written or half-deleted in `folder`.

    Args:
        folder: the folder; nothing happens if it does not exist.
        seconds: the least age of what is deleted, where other processes may be writing.
    """
    for path in folder.glob(".*-*"):
        with contextlib.suppress(OSError):
            if is_leftover(path) and path.lstat().st_mtime <= time.time() - seconds:
                _delete(path)


def _delete(path: Path) -> None:
    """Deletes a file or folder, ignoring errors; symbolic links are not followed."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            disk.remove_file(path)
            return
        for entry in list(path.iterdir()):
            _delete(entry)
        disk.remove_folder(path)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file with a single write; on failure the file is unchanged.

    Raises:
        MachineError: the line could not be written.
    """
    content = line.encode() + b"\n"
    with map_os_errors(path, "append to"):
        descriptor = disk.open_to_append(path)
        try:
            size = os.fstat(descriptor).st_size
            written = disk.write(descriptor, content)
            if written != len(content):
                # The next line would otherwise continue half of this one.
                disk.truncate(descriptor, size)
        finally:
            os.close(descriptor)
    if written != len(content):
        raise MachineError(f"could not append to {path}: the disk is full")


def sync_file(path: Path) -> None:
    """Flushes the content of a file to the disk.

    Raises:
        MachineError: the disk refused.
    """
    with map_os_errors(path, "write"):
        descriptor = disk.open_to_append(path)
        try:
            disk.sync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def open_append(path: Path) -> Iterator[BinaryIO]:
    """A stream that appends to a file, such as a partial download; created if it is missing.

    Raises:
        MachineError: the file could not be written.
    """
    with map_os_errors(path, "write"):
        _make_folders(path.parent)
        with _synced(disk.open_to_append(path)) as stream:
            yield stream


def publish_file(source: Path, path: Path) -> None:
    """Renames a complete, synced file to its final name.

    Raises:
        MachineError: the operating system refused.
    """
    with map_os_errors(path, "write"):
        disk.rename(source, path)
        disk.sync_folder(path.parent)


def spool(pieces: Iterable[bytes]) -> Path:
    """Writes the pieces of a pipe to a temporary file that can be read twice; deleted at exit.

    Raises:
        MachineError: the file could not be written.
    """
    path = Path(tempfile.gettempdir()) / f"lmtrain-{_unique()}.txt"
    with open_atomic(path) as spooled:
        spooled.writelines(pieces)
    atexit.register(_delete, path)
    return path


@contextlib.contextmanager
def open_scratch(folder: Path) -> Iterator[BinaryIO]:
    """A stream for writing and reading; its file is deleted however the block or process ends.

    Args:
        folder: where the file is; created if it is missing.

    Raises:
        MachineError: the file could not be written.
    """
    with map_os_errors(folder, "write in"):
        _make_folders(folder)
        path = _temporary_path(folder / "scratch")
        with disk.File(disk.create(path)) as stream:
            _delete(path)
            yield cast("BinaryIO", stream)


@contextlib.contextmanager
def locked(
    path: Path, resource: str, advice: str = "wait for it to end, or train elsewhere: --out DIR"
) -> Iterator[None]:
    """Holds a lock during the block; it is released however the process ends.

    Args:
        path: the lock file; created if it is missing.
        resource: what is locked, for the message.
        advice: what to do while another process holds the lock.

    Raises:
        RunBusyError: another process holds the lock.
        MachineError: the file could not be opened or locked.
    """
    with map_os_errors(path, "lock"):
        _make_folders(path.parent)
        descriptor = disk.open_to_append(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 40, 0).decode("ascii", "replace").strip() or "unknown"
            raise RunBusyError(
                f"{resource} is in use by another process (pid {owner})", advice
            ) from None
        except OSError as error:
            # Some network file systems have no locks.
            raise MachineError(f"could not lock {path}: {error.strerror}") from error
        # The process id is only for messages; a full disk must not fail here.
        with contextlib.suppress(OSError):
            disk.truncate(descriptor, 0)
            disk.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Checks that none of these files in a folder is a symbolic link.

    Raises:
        CheckpointError: one is.
    """
    for name in names:
        if (folder / name).is_symlink():
            raise CheckpointError(
                f"{folder / name} is a symbolic link; a run contains regular files only"
            )


def sha256(chunks: Iterable[bytes]) -> str:
    """Hexadecimal SHA-256 of the concatenated chunks."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def file_chunks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """The content of a file in chunks of at most `size` bytes."""
    with path.open("rb") as stream:
        while chunk := stream.read(size):
            yield chunk


def cache_folder() -> Path:
    """The folder for tokens and downloads: LMTRAIN_CACHE, the user's cache, or a temporary folder.

    Raises:
        MachineError: LMTRAIN_CACHE could not be created, or the temporary folder belongs to another
            user.
    """
    if cache := os.environ.get("LMTRAIN_CACHE"):
        return make_folder(Path(cache))
    base = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(MachineError, RuntimeError):
        folder = make_folder((Path(base) if base else Path.home() / ".cache") / "lmtrain")
        if os.access(folder, os.W_OK):
            return folder
    folder = make_folder(Path(tempfile.gettempdir()) / f"lmtrain-{os.getuid()}")
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise MachineError(f"{folder} belongs to another user", "set LMTRAIN_CACHE to a folder")
    return folder
