"""Pipes, read so that a signal is obeyed while they are silent."""

import io
import select
from collections.abc import Iterator

from lmtrain.errors import TextError

STANDARD_INPUT = 0
_PIECE_BYTES = 1 << 18
_PATIENCE_MS = 500


def pieces(pipe: str | int, name: str) -> Iterator[bytes]:
    """What comes out of a pipe, as it comes.

    Args:
        pipe: a path, or `STANDARD_INPUT`.
        name: what messages call it.

    Raises:
        TextError: it cannot be read.
    """
    try:
        with io.FileIO(pipe, closefd=pipe != STANDARD_INPUT) as stream:
            ready = select.poll()
            ready.register(stream, select.POLLIN)
            while True:
                # The signal that comes just before a wait does not end it, and is obeyed after it.
                while not ready.poll(_PATIENCE_MS):
                    pass
                if not (piece := stream.read(_PIECE_BYTES)):
                    return
                yield piece
    except OSError as error:
        raise TextError(f"cannot read {name}: {error.strerror}") from None
