"""The operations that change a disk, each one call of the system: the ground `files.py` stands on.

No other place changes a file. A test that takes the place of these functions can let any one of
them fail, end the process there, or write down what a loss of power would leave.
"""

import errno
import io
import os
from pathlib import Path
from typing import Any

# A link that someone put in the place of a file is refused, not followed.
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_KEPT = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


def create(path: Path) -> int:
    """The descriptor of a new file; the name must be free."""
    return os.open(path, _NEW, 0o666)


def open_to_append(path: Path) -> int:
    """The descriptor of a file, made if it is missing, that grows at its end."""
    return os.open(path, _KEPT, 0o666)


def write(descriptor: int, content: bytes | memoryview) -> int:
    """Writes the beginning of `content`, all of it if the disk lets it; returns how many bytes."""
    return os.write(descriptor, content)


def truncate(descriptor: int, size: int) -> None:
    """Cuts an open file off after `size` bytes."""
    os.ftruncate(descriptor, size)


def sync(descriptor: int) -> None:
    """Makes the content of an open file durable."""
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Makes the names inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Gives a file or folder another name in one step; a file of that name is replaced."""
    source.rename(target)


def make_folder(path: Path) -> None:
    """Makes one folder."""
    path.mkdir()


def remove_folder(path: Path) -> None:
    """Takes an empty folder away."""
    path.rmdir()


def remove_file(path: Path) -> None:
    """Takes a file or a link away."""
    path.unlink()


class File(io.RawIOBase):
    """A stream over a descriptor that writes all it is given."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def readable(self) -> bool:
        """It is."""
        return True

    def writable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def readinto(self, buffer: Any) -> int:
        """Fills the beginning of `buffer`; returns how many bytes."""
        return os.readv(self._descriptor, [buffer])

    def write(self, content: Any) -> int:
        """Writes all of `content`; returns its bytes.

        Raises:
            OSError: the disk does not take it.
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
        """Moves to another place; returns it."""
        return os.lseek(self._descriptor, offset, whence)

    def close(self) -> None:
        """Gives the descriptor back."""
        if not self.closed:
            super().close()
            os.close(self._descriptor)
