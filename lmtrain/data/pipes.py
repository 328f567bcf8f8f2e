"""Reads pipes so that signals are handled while waiting for data."""

import io
import select
from collections.abc import Iterator

from lmtrain.errors import TextError

STANDARD_INPUT = 0
_PIECE_BYTES = 1 << 18
_POLL_MS = 500


def pieces(pipe: str | int, name: str) -> Iterator[bytes]:
    """The content of a pipe in pieces, as they arrive.

    Args:
        pipe: a path, or `STANDARD_INPUT`.
        name: its name in messages.

    Raises:
        TextError: it cannot be read.
    """
    try:
        with io.FileIO(pipe, closefd=pipe != STANDARD_INPUT) as stream:
            ready = select.poll()
            ready.register(stream, select.POLLIN)
            while True:
                # A signal that arrives just before poll does not interrupt it: poll again soon.
                while not ready.poll(_POLL_MS):
                    pass
                if not (piece := stream.read(_PIECE_BYTES)):
                    return
                yield piece
    except OSError as error:
        raise TextError(f"cannot read {name}: {error.strerror}") from None
