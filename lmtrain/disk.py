"""The system calls that change files, one function each; `files.py` builds on them.

No other module changes a file. Tests replace these functions to make any of them fail, to kill the
process at any of them, or to simulate a power loss.
"""

import errno
import io
import os
from pathlib import Path
from typing import Any

# O_EXCL and O_NOFOLLOW refuse a symbolic link in place of the file.
_CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_APPEND_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


def create(path: Path) -> int:
    """Creates a file that must not exist yet; returns its descriptor."""
    return os.open(path, _CREATE_FLAGS, 0o666)


def open_to_append(path: Path) -> int:
    """Opens a file for appending, created if it is missing; returns its descriptor."""
    return os.open(path, _APPEND_FLAGS, 0o666)


def write(descriptor: int, content: bytes | memoryview) -> int:
    """Writes `content` or, on a short write, its beginning; returns the number of bytes written."""
    return os.write(descriptor, content)


def truncate(descriptor: int, size: int) -> None:
    """Truncates an open file to `size` bytes."""
    os.ftruncate(descriptor, size)


def sync(descriptor: int) -> None:
    """Flushes the content of an open file to the disk."""
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Flushes the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder atomically; an existing file `target` is replaced."""
    source.rename(target)


def make_folder(path: Path) -> None:
    """Creates a folder whose parent exists."""
    path.mkdir()


def remove_folder(path: Path) -> None:
    """Deletes an empty folder."""
    path.rmdir()


def remove_file(path: Path) -> None:
    """Deletes a file or a symbolic link."""
    path.unlink()


class File(io.RawIOBase):
    """Unbuffered stream over a descriptor; `write` repeats short writes until all is written."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def readable(self) -> bool:
        """Always true."""
        return True

    def writable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def fileno(self) -> int:
        """The file descriptor."""
        return self._descriptor

    def readinto(self, buffer: Any) -> int:
        """Reads into `buffer`; returns the number of bytes read."""
        return os.readv(self._descriptor, [buffer])

    def write(self, content: Any) -> int:
        """Writes all of `content`; returns the number of bytes written.

        Raises:
            OSError: a write failed, or wrote nothing because the disk is full.
        """
        view = memoryview(content).cast("B")
        done = 0
        while done < len(view):
            written = write(self._descriptor, view[done:])
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += written
        return done

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to an offset; returns the new position."""
        return os.lseek(self._descriptor, offset, whence)

    def close(self) -> None:
        """Closes the descriptor."""
        if not self.closed:
            super().close()
            os.close(self._descriptor)
