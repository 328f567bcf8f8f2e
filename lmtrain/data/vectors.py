"""Reads sequences of vectors from NumPy `.npz` files.

`inputs` (all steps, F) is the concatenation of the sequences, `lengths` (N,) the number of steps of
each, `labels` (N,), optional, are text or integers. Pickled objects are never loaded.
"""

import hashlib
import io
import lzma
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtrain import screen
from lmtrain.data import corpus
from lmtrain.data.labelled import cleaned
from lmtrain.errors import TextError

_TRY = "try: numpy.savez(FILE, inputs=vectors, lengths=steps_of_each)"
_TRY_LABELS = "try: numpy.savez(FILE, inputs=vectors, lengths=steps_of_each, labels=label_of_each)"
_SUFFIX = ".npz"
MOST_NUMBERS = 10**6
"""The most numbers that a vector may have, F."""
# Exceptions of zipfile and NumPy for damaged, encrypted or malicious files.
_DAMAGE = (
    ValueError, EOFError, SyntaxError, RuntimeError, MemoryError, TypeError, LookupError,
    OverflowError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


@dataclass(frozen=True)
class VectorSequence:
    """A sequence of vectors, (T, F), and its label; empty without labels."""

    vectors: NDArray[np.float32]
    label: str = ""


def is_vectors(path: str) -> bool:
    """Whether a path names an `.npz` file."""
    return path.endswith(_SUFFIX)


def read(paths: Sequence[str], *, labels: bool) -> Iterator[VectorSequence]:
    """Reads the sequences of files, globs and `-` in order.

    Args:
        paths: the files.
        labels: whether each sequence must have a label.

    Raises:
        TextError: missing, of another form, of different widths, or with values that are not
            finite.
    """
    width = 0
    for source in corpus.open_text(paths, parts=()).sources:
        for sequence in _file(source.path, source.name, labels=labels):
            own_width = sequence.vectors.shape[1]
            if width and own_width != width:
                raise TextError(
                    f"{source.name}: vectors of {own_width} numbers, others have {width}"
                )
            width = own_width
            yield sequence


def require_width(vectors: Any, width: int, name: str) -> NDArray[np.float32]:
    """Checks a sequence of vectors (T, F) and converts it to float32.

    Raises:
        TextError: another width, no steps, or values that are not finite.
    """
    try:
        array = np.asarray(vectors)
    except ValueError:  # lists of different lengths
        raise TextError(f"{name}: lists that are not vectors (steps, {width})") from None
    if array.ndim != 2 or array.dtype.kind not in "fiub" or not len(array):
        raise TextError(f"{name}: {array.shape} {array.dtype} are not vectors (steps, {width})")
    if array.shape[1] != width:
        raise TextError(f"{name}: vectors of {array.shape[1]} numbers, the model takes {width}")
    array = _float32(array)
    if not np.isfinite(array).all():
        raise TextError(f"{name}: a number is not finite")
    return array


def npz(vectors: NDArray[Any]) -> bytes:
    """The content of an `.npz` file with one sequence of vectors, (T, F)."""
    content = io.BytesIO()
    np.savez_compressed(content, inputs=vectors, lengths=np.array([len(vectors)]))
    return content.getvalue()


def fingerprint(sequences: Iterable[VectorSequence]) -> str:
    """SHA-256 over the vectors and labels in their order."""
    digest = hashlib.sha256()
    for each in sequences:
        digest.update(f"{each.vectors.shape} {each.label}\n".encode())
        digest.update(each.vectors.tobytes())
    return digest.hexdigest()


def _float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """Converts to float32; values that overflow become infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


def _file(path: Path, name: str, *, labels: bool) -> Iterator[VectorSequence]:
    arrays = _arrays(
        path, name, ("inputs", "lengths", "labels") if labels else ("inputs", "lengths")
    )
    inputs, lengths = arrays["inputs"], arrays["lengths"]
    if inputs.ndim != 2 or not inputs.shape[1] or inputs.dtype.kind not in "fiub":
        raise TextError(f"{name}: inputs {inputs.shape} {inputs.dtype} are not numbers (steps, F)")
    if inputs.shape[1] > MOST_NUMBERS:
        raise TextError(
            f"{name}: vectors of {inputs.shape[1]:,} numbers; at most {MOST_NUMBERS:,} are read"
        )
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths):
        raise TextError(f"{name}: lengths {lengths.shape} {lengths.dtype} are not integers (N,)")
    if lengths.min() < 1:
        raise TextError(f"{name}: sequence {int(lengths.argmin()) + 1} has no steps")
    # Python integers do not overflow.
    total = sum(lengths.tolist())
    if total != len(inputs):
        raise TextError(
            f"{name}: lengths add up to {total:,}, but inputs has {len(inputs):,} steps"
        )
    found = _labels(name, arrays["labels"], len(lengths)) if labels else [""] * len(lengths)
    vectors = _float32(inputs)
    if not np.isfinite(vectors).all():
        step = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
        sequence = int(np.searchsorted(np.cumsum(lengths), step, side="right"))
        raise TextError(f"{name}: sequence {sequence + 1} has a number that is not finite")
    pieces = np.split(vectors, np.cumsum(lengths)[:-1])
    for piece, label in zip(pieces, found, strict=True):
        yield VectorSequence(piece, label)


def _labels(name: str, labels: NDArray[Any], count: int) -> list[str]:
    if labels.shape != (count,) or labels.dtype.kind not in "Uiu":
        raise TextError(
            f"{name}: labels {labels.shape} {labels.dtype} are not texts or integers ({count},)"
        )
    try:
        names = [cleaned(str(label)) for label in labels.tolist()]
        "".join(names).encode()
    except (ValueError, SystemError):  # SystemError: a code point out of range
        raise TextError(f"{name}: a label is not valid Unicode") from None
    if "" in names:
        raise TextError(f"{name}: the label of sequence {names.index('') + 1} is empty")
    return names


def _arrays(path: Path, name: str, keys: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Loads arrays of a file that fits into the memory of this machine.

    Raises:
        TextError: missing, damaged, too large, or with pickled objects.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(each.file_size for each in archive.infolist())
        if size > memory:
            raise TextError(f"{name} holds {size:,} bytes; this machine has {memory:,}")
        with np.load(path, allow_pickle=False) as file:
            if missing := [each for each in keys if each not in file.files]:
                found = screen.join_names(file.files)
                raise TextError(
                    f"{name} has no array {missing[0]}; it has: {found}",
                    _TRY_LABELS if "labels" in keys else _TRY,
                )
            arrays = {each: file[each] for each in keys}
    except OSError as error:
        raise TextError(f"cannot read {name}: {error.strerror or error}") from None
    except _DAMAGE as error:
        if str(error).startswith("Object arrays"):
            raise TextError(
                f"{name} has an array of Python objects, which are not loaded"
            ) from None
        raise TextError(
            f"{name} is not a {_SUFFIX} file of NumPy: {_reason(error)}", _TRY
        ) from None
    for each, array in arrays.items():
        # NumPy returns the bytes of members that are not arrays.
        if not isinstance(array, np.ndarray):
            raise TextError(
                f"{name} is not a {_SUFFIX} file of NumPy: {each} is not an array", _TRY
            )
    return arrays


def _reason(error: Exception) -> str:
    """The first line of a message, shortened."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
