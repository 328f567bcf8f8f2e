"""Every durable file operation of lmtrain: no other place opens a file for writing.

What appears under its final name is complete: it was written aside, synced to the disk and renamed.
"""

import atexit
import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from lmtrain.errors import MachineError, RunBusyError

_ASIDE = ".aside-"
_TRASH = ".trash-"
_serial = itertools.count()


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
            reason += f"; {_free_megabytes(path)} MB free"
        raise MachineError(f"could not {doing} {path}: {reason}") from error


def _free_megabytes(path: Path) -> int:
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    return shutil.disk_usage(existing).free // 1_000_000


def _aside(path: Path) -> Path:
    # Half of the name is enough to be told apart, and stays short enough for every file system.
    return path.with_name(f"{_ASIDE}{os.getpid()}-{next(_serial)}-{path.name[:40]}")


def sync_folder(path: Path) -> None:
    """Makes the names inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Makes a folder and its parents where they are missing.

    Raises:
        MachineError: the system refused.
    """
    with explained(path, "make the folder"):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content appears at `path` in one rename once the block ends without error.

    Raises:
        MachineError: the disk or the permissions refused; nothing is left behind.
    """
    with explained(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        try:
            with aside.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(path)
            sync_folder(path.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
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
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        try:
            aside.mkdir()
            for name, content in contents.items():
                with (aside / name).open("xb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
            sync_folder(aside)
            aside.rename(path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Takes a folder away in one rename, then deletes it.

    Raises:
        MachineError: the system refused.
    """
    with explained(path, "remove"):
        trash = path.with_name(f"{_TRASH}{os.getpid()}-{next(_serial)}-{path.name}")
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def remove_file(path: Path) -> None:
    """Takes a file away.

    Raises:
        MachineError: the system refused.
    """
    with explained(path, "remove"):
        path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed process left half-written or half-removed in `folder`."""
    for pattern in (f"{_ASIDE}*", f"{_TRASH}*"):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Adds one line to a file by a single write.

    Raises:
        MachineError: the disk or the permissions refused.
    """
    content = line.encode() + b"\n"
    with explained(path, "append to"):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            written = os.write(descriptor, content)
        finally:
            os.close(descriptor)
    if written != len(content):
        raise MachineError(f"could not append to {path}: the disk is full")


@contextlib.contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """A stream that adds to the end of a file, for a download that goes on where it broke off.

    Raises:
        MachineError: the disk or the permissions refused.
    """
    with explained(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())


def publish_file(source: Path, path: Path) -> None:
    """Moves a complete, synced file to its final name.

    Raises:
        MachineError: the system refused.
    """
    with explained(path, "write"):
        source.replace(path)
        sync_folder(path.parent)


def spool(stream: BinaryIO) -> Path:
    """A file of all that `stream` holds, so that a pipe can be read twice; gone at exit.

    Raises:
        MachineError: the temporary folder refused.
    """
    path = Path(tempfile.gettempdir()) / f"lmtrain-{os.getpid()}-{next(_serial)}.txt"
    with writing(path) as spooled:
        shutil.copyfileobj(stream, spooled, 1 << 20)
    atexit.register(path.unlink, missing_ok=True)
    return path


@contextlib.contextmanager
def locked(path: Path, holder: str) -> Iterator[None]:
    """Holds the lock file at `path`; the system frees it when the process ends, however it ends.

    Args:
        path: the lock file, made if missing.
        holder: what is locked, for the message.

    Raises:
        RunBusyError: another process holds the lock.
        MachineError: the file cannot be opened.
    """
    with explained(path, "lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read(40).strip() or "unknown"
            raise RunBusyError(
                f"{holder} is in use by another process (pid {owner})",
                "wait for it to end, or train elsewhere: --out DIR",
            ) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


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
        MachineError: LMTRAIN_CACHE names a place that cannot be made.
    """
    if named := os.environ.get("LMTRAIN_CACHE"):
        return make_folder(Path(named))
    base = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(MachineError, RuntimeError):
        folder = make_folder((Path(base) if base else Path.home() / ".cache") / "lmtrain")
        if os.access(folder, os.W_OK):
            return folder
    return make_folder(Path(tempfile.gettempdir()) / f"lmtrain-{os.getuid()}")
