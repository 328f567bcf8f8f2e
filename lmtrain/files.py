"""Durable files: what appears under its final name is complete.

It was written aside, synced to the disk and renamed, all through `disk.py`.
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

_ASIDE = ".aside-"
_TRASH = ".trash-"


@contextlib.contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turns an OSError while `doing` something to `path` into a plain message.

    Raises:
        MachineError: the operation failed.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f"; {_free_bytes(path) // 1_000_000} MB free"
        raise MachineError(f"could not {doing} {path}: {reason}") from error


def _free_bytes(path: Path) -> int:
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def require_space(path: Path, needed: int) -> None:
    """Checks that a disk has room before hours of work count on it.

    Args:
        path: where the room is needed; need not exist yet.
        needed: bytes.

    Raises:
        MachineError: there is less.
    """
    with explained(path, "look for room at"):
        free = _free_bytes(path)
    if free < needed:
        raise MachineError(
            f"too little room at {path}: {free / 1e6:,.1f} MB free",
            f"two checkpoints need {needed / 1e6:,.1f} MB",
            "train elsewhere: --out DIR",
        )


@contextlib.contextmanager
def _synced(descriptor: int) -> Iterator[BinaryIO]:
    """A stream whose content is durable once the block ends without error."""
    with disk.File(descriptor) as stream:
        yield cast("BinaryIO", stream)
        disk.sync(descriptor)


def _aside(path: Path) -> Path:
    # A part of the name is enough to be told apart, and stays short enough for every file system.
    return path.with_name(f"{_ASIDE}{_unique()}-{path.name[:40]}")


def _unique() -> str:
    # Process numbers would not do: containers that share a disk have the same ones.
    return secrets.token_hex(8)


def make_folder(path: Path) -> Path:
    """Makes a folder and its parents where they are missing, durably.

    Raises:
        MachineError: the system refused.
    """
    with explained(path, "make the folder"):
        _make_folders(path)
    return path


def _make_folders(path: Path) -> None:
    if path.is_dir():
        return
    _make_folders(path.parent)
    try:
        disk.make_folder(path)
    except FileExistsError:
        # Another process was faster, or a file is in the way.
        if not path.is_dir():
            raise
    disk.sync_folder(path.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content appears at `path` in one rename once the block ends without error.

    Raises:
        MachineError: the disk or the permissions refused; nothing is left behind.
    """
    with explained(path, "write"):
        _make_folders(path.parent)
        aside = _aside(path)
        try:
            with _synced(disk.create(aside)) as stream:
                yield stream
            disk.rename(aside, path)
            disk.sync_folder(path.parent)
        except BaseException:
            _clear(aside)
            raise


def write(path: Path, content: bytes) -> None:
    """Puts `content` at `path` in one step: before, the old content; after, the new.

    Raises:
        MachineError: the disk or the permissions refused; the old content is intact.
    """
    with writing(path) as stream:
        stream.write(content)


def publish_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """Makes a folder of the named files appear at `path` by one rename, each file durable before.

    Raises:
        MachineError: the disk or the permissions refused; nothing is left behind.
    """
    with explained(path, "write"):
        _make_folders(path.parent)
        aside = _aside(path)
        try:
            disk.make_folder(aside)
            for name, content in contents.items():
                with _synced(disk.create(aside / name)) as stream:
                    stream.write(content)
            disk.sync_folder(aside)
            disk.rename(aside, path)
            disk.sync_folder(path.parent)
        except BaseException:
            _clear(aside)
            raise


def remove_folder(path: Path) -> None:
    """Takes a folder away in one rename, then deletes it.

    Raises:
        MachineError: the system refused.
    """
    with explained(path, "remove"):
        trash = path.with_name(f"{_TRASH}{_unique()}-{path.name}")
        disk.rename(path, trash)
    _clear(trash)


def remove_file(path: Path) -> None:
    """Takes a file away.

    Raises:
        MachineError: the system refused.
    """
    with explained(path, "remove"):
        disk.remove_file(path)


def is_leftover(path: Path) -> bool:
    """Whether a name is one of what is half-written or half-removed."""
    return path.name.startswith((_ASIDE, _TRASH))


def remove_leftovers(folder: Path, *, seconds: float = 0) -> None:
    """Deletes what a killed process left half-written or half-removed in `folder`.

    Args:
        folder: the folder; nothing happens if it is not there.
        seconds: how old it must be, where others may be writing.
    """
    for path in folder.glob(".*-*"):
        with contextlib.suppress(OSError):
            if is_leftover(path) and path.lstat().st_mtime <= time.time() - seconds:
                _clear(path)


def _clear(path: Path) -> None:
    """Deletes a file or a folder, as far as the system lets it; links are not followed."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            disk.remove_file(path)
            return
        for entry in list(path.iterdir()):
            _clear(entry)
        disk.remove_folder(path)


def append_line(path: Path, line: str) -> None:
    """Adds one line to a file by a single write, or nothing.

    Raises:
        MachineError: the disk or the permissions refused.
    """
    content = line.encode() + b"\n"
    with explained(path, "append to"):
        descriptor = disk.open_to_append(path)
        try:
            size = os.fstat(descriptor).st_size
            written = disk.write(descriptor, content)
            if written != len(content):
                # Half a line would spoil the next one.
                disk.truncate(descriptor, size)
        finally:
            os.close(descriptor)
    if written != len(content):
        raise MachineError(f"could not append to {path}: the disk is full")


def sync_file(path: Path) -> None:
    """Makes durable what was appended to a file.

    Raises:
        MachineError: the disk refused.
    """
    with explained(path, "write"):
        descriptor = disk.open_to_append(path)
        try:
            disk.sync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """A stream that adds to the end of a file, for a download that goes on where it broke off.

    Raises:
        MachineError: the disk or the permissions refused.
    """
    with explained(path, "write"):
        _make_folders(path.parent)
        with _synced(disk.open_to_append(path)) as stream:
            yield stream


def publish_file(source: Path, path: Path) -> None:
    """Moves a complete, synced file to its final name.

    Raises:
        MachineError: the system refused.
    """
    with explained(path, "write"):
        disk.rename(source, path)
        disk.sync_folder(path.parent)


def spool(pieces: Iterable[bytes]) -> Path:
    """A file of all that comes out of a pipe, so that it can be read twice; gone at exit.

    Raises:
        MachineError: the temporary folder refused.
    """
    path = Path(tempfile.gettempdir()) / f"lmtrain-{_unique()}.txt"
    with writing(path) as spooled:
        spooled.writelines(pieces)
    atexit.register(_clear, path)
    return path


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[BinaryIO]:
    """A stream to write and to read again; its file is gone however the block or process ends.

    Raises:
        MachineError: the disk or the permissions refused.
    """
    with explained(folder, "write in"):
        _make_folders(folder)
        path = _aside(folder / "scratch")
        with disk.File(disk.create(path)) as stream:
            _clear(path)
            yield cast("BinaryIO", stream)


@contextlib.contextmanager
def locked(
    path: Path, holder: str, advice: str = "wait for it to end, or train elsewhere: --out DIR"
) -> Iterator[None]:
    """Holds the lock file at `path`; the system frees it when the process ends, however it ends.

    Args:
        path: the lock file, made if missing.
        holder: what is locked, for the message.
        advice: what to do while another process holds it.

    Raises:
        RunBusyError: another process holds the lock.
        MachineError: the file cannot be opened or locked.
    """
    with explained(path, "lock"):
        _make_folders(path.parent)
        descriptor = disk.open_to_append(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 40, 0).decode("ascii", "replace").strip() or "unknown"
            raise RunBusyError(
                f"{holder} is in use by another process (pid {owner})", advice
            ) from None
        except OSError as error:
            # Some network file systems have no locks.
            raise MachineError(f"could not lock {path}: {error.strerror}") from error
        # The number only serves messages; a full disk must not stop here.
        with contextlib.suppress(OSError):
            disk.truncate(descriptor, 0)
            disk.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Checks that none of the names inside a folder is a symbolic link, which may lead anywhere.

    Raises:
        CheckpointError: one is.
    """
    for name in names:
        if (folder / name).is_symlink():
            raise CheckpointError(f"{folder / name} is a symbolic link; a run holds plain files")


def sha256(chunks: Iterable[bytes]) -> str:
    """Hexadecimal SHA-256 of the chunks one after the other."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def file_chunks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """The content of a file in pieces of `size` bytes."""
    with path.open("rb") as stream:
        while chunk := stream.read(size):
            yield chunk


def cache_folder() -> Path:
    """Where tokens and downloads are kept: LMTRAIN_CACHE, the user's cache, or a temporary folder.

    Raises:
        MachineError: LMTRAIN_CACHE names a place that cannot be made, or there is none that is
            the user's own.
    """
    if named := os.environ.get("LMTRAIN_CACHE"):
        return make_folder(Path(named))
    base = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(MachineError, RuntimeError):
        folder = make_folder((Path(base) if base else Path.home() / ".cache") / "lmtrain")
        if os.access(folder, os.W_OK):
            return folder
    folder = make_folder(Path(tempfile.gettempdir()) / f"lmtrain-{os.getuid()}")
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise MachineError(f"{folder} belongs to someone else", "set LMTRAIN_CACHE to a folder")
    return folder
