"""The token cache: token ids of texts in memory-mapped files, found by a hash of the content.

A text is read once for its hash and, if it is not in the cache, again to tokenize it. The name of a
token file is a hash of the text, its division and its tokenizer, not of a path or time. Files that
are incomplete or whose hash is wrong are not used.
"""

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lmtrain import files
from lmtrain.data.division import Cuts, Division
from lmtrain.data.tokenizer import (
    Numbering,
    Pieces,
    Tokenizer,
    build_tokenizer,
    character_counts,
)
from lmtrain.data.vocabulary import tokenizer_of
from lmtrain.errors import CheckpointError
from lmtrain.schema import DataConfig

FORMAT = 2
_DAY = 86_400
# Ids that are checked at a time.
_BLOCK_IDS = 1 << 20


@dataclass(frozen=True)
class Tokens:
    """The token ids of a text.

    Args:
        ids: memory-mapped ids, (N,), uint16 or uint32.
        characters: number of characters in the text.
        key: the hash of text, division and tokenizer: its name in the cache.
        name: the name of the text in messages.
        unknown_characters: characters that are `<UNK>` at character level, with their counts.
    """

    ids: NDArray[np.unsignedinteger]
    characters: int
    key: str
    name: str
    unknown_characters: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


def read_tokens(division: Division, data: DataConfig) -> tuple[Tokenizer, dict[str, Tokens]]:
    """The tokenizer of a text and the tokens of its parts, from the cache or in one pass.

    The vocabulary is built from the first part, the training text.

    Args:
        division: the text and its parts.
        data: the settings of the tokenizer.

    Raises:
        TextError: the text cannot be read, or is too short to be divided.
        MachineError: the cache cannot be written.
    """
    if data.level == "byte":
        # The vocabulary of bytes does not depend on the text.
        tokenizer = build_tokenizer([], "byte", nfc=data.nfc)
        return tokenizer, tokenize(division, tokenizer)
    if data.vocabulary is not None:
        tokenizer = tokenizer_of(
            data.vocabulary, data.splitter, lowercase=data.lowercase, nfc=data.nfc
        )
        return tokenizer, tokenize(division, tokenizer)
    numbering = Numbering(data.level, data.splitter, lowercase=data.lowercase, nfc=data.nfc)
    # A tokenizer without words represents the rules for splitting.
    rules = [numbering.tokenizer(data.vocab_size, 1).to_json(), data.vocab_size, data.min_count]
    path = _cache() / f"{_hash([*rules, *_divided(division)])}.tokenizer.json"
    if known := _load_tokenizer(path):
        return known, tokenize(division, known)
    pieces = Pieces(data.level, nfc=data.nfc)
    with _numbered(division, pieces, numbering.encoder()) as (numbers, parts):
        for block in numbers.between(0, parts[0].stop):
            numbering.count(block)
        tokenizer = numbering.tokenizer(data.vocab_size, data.min_count)
        content = tokenizer.to_json().encode()
        files.write(path, content + b"\n" + files.sha256([content]).encode())
        return tokenizer, _store(division, tokenizer, numbers, parts, numbering.ids(tokenizer))


def tokenize(division: Division, tokenizer: Tokenizer) -> dict[str, Tokens]:
    """The tokens of the parts of a text, from the cache or in one pass.

    Raises:
        TextError: the text cannot be read, or is too short to be divided.
        MachineError: the cache cannot be written.
    """
    found = {}
    for part, key in token_keys(division, tokenizer).items():
        if tokens := load_tokens(key, tokenizer.vocab_size, division.text.name):
            found[part] = tokens
    if len(found) == len(division.names):
        return found
    is_char = tokenizer.level == "char"
    pieces = Pieces(tokenizer.level, nfc=tokenizer.nfc)
    with _numbered(division, pieces, tokenizer.codes if is_char else tokenizer.encoder()) as (
        numbers,
        parts,
    ):
        ids = tokenizer.character_ids if is_char else None
        return _store(division, tokenizer, numbers, parts, ids)


def token_keys(division: Division, tokenizer: Tokenizer) -> dict[str, str]:
    """The hash of each part of a text with its tokenizer: its name in the cache.

    Raises:
        TextError: the text cannot be read.
    """
    rules = files.sha256([tokenizer.to_json().encode()])
    return {
        name: _hash([rules, *_divided(division), part]) for part, name in enumerate(division.names)
    }


def _divided(division: Division) -> list[object]:
    """Everything that determines the parts of a text."""
    return [division.text.fingerprint, division.fractions, division.at_line_ends]


def _hash(named: list[object]) -> str:
    return files.sha256([json.dumps([FORMAT, *named]).encode()])


def _load_tokenizer(path: Path) -> Tokenizer | None:
    # Damaged files, and those of other versions, are rebuilt.
    with contextlib.suppress(OSError, CheckpointError):
        content, _, digest = path.read_bytes().rpartition(b"\n")
        if files.sha256([content]).encode() == digest:
            return Tokenizer.from_json(content.decode())
    return None


def load_tokens(key: str, vocab_size: int, name: str) -> Tokens | None:
    """The cached tokens under a key; None if they are missing or damaged.

    Args:
        key: the hash of text, division and tokenizer.
        vocab_size: all ids must be below it.
        name: the name of the text in messages.
    """
    array, note = _paths(key)
    try:
        known = dict(json.loads(note.read_bytes()))
        digest = known.pop("sha256")
        if _digest(array, known) != digest:
            return None
        ids = np.load(array, mmap_mode="r", allow_pickle=False)
        is_fitting = ids.ndim == 1 and ids.dtype == _dtype(vocab_size)
        if is_fitting and _largest(array, ids) < vocab_size:
            return Tokens(ids, known["characters"], key, name, known["unknown_characters"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return None


def _largest(array: Path, ids: "np.memmap[Any, np.dtype[Any]]") -> int:
    """The largest of the mapped ids, or 0; read from the file, since mapped pages take memory."""
    largest = 0
    with array.open("rb") as stream:
        stream.seek(ids.offset)
        for start in range(0, len(ids), _BLOCK_IDS):
            block = np.fromfile(stream, ids.dtype, min(_BLOCK_IDS, len(ids) - start))
            largest = max(largest, int(block.max()))
    return largest


@dataclass(frozen=True)
class _Part:
    """The range of tokens of a part of a text, and its number of characters."""

    start: int
    stop: int
    characters: int


class _NumberFile:
    """Token numbers in a temporary file, with as few bytes as each block needs."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._blocks: list[tuple[np.dtype[Any], int]] = []
        self.count = 0

    def add(self, numbers: NDArray[Any]) -> None:
        """Appends numbers."""
        small = numbers.astype(np.min_scalar_type(numbers.max(initial=0)))
        self._stream.write(small.tobytes())
        self._blocks.append((small.dtype, len(small)))
        self.count += len(small)

    def between(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """The numbers from `start` to `stop`, in blocks."""
        self._stream.seek(0)
        first = 0
        for dtype, count in self._blocks:
            block = np.frombuffer(self._stream.read(count * dtype.itemsize), dtype)
            yield block[max(0, start - first) : max(0, stop - first)]
            first += count


@contextlib.contextmanager
def _numbered(
    division: Division, pieces: Pieces, encode: Callable[[str], NDArray[Any]]
) -> Iterator[tuple[_NumberFile, list[_Part]]]:
    """The numbers of the tokens of a text, and the ranges of its parts."""
    cuts = Cuts(division)
    files.remove_leftovers(_cache(), seconds=_DAY)
    with files.open_scratch(_cache()) as stream:
        numbers = _NumberFile(stream)
        position, count_at = 0, {0: 0}
        for chunk in division.text.checked_chunks():
            for segment in cuts.segments(chunk):
                numbers.add(encode(pieces.add(segment)))
                position += len(segment)
                count_at[position] = numbers.count
        numbers.add(encode(pieces.end()))
        # The runs that it remembers take memory.
        del encode
        count_at[position] = numbers.count
        bounds = cuts.bounds()
        parts = [
            _Part(count_at[start], count_at[stop], stop - start)
            for start, stop in itertools.pairwise(bounds)
        ]
        yield numbers, parts


def _store(
    division: Division,
    tokenizer: Tokenizer,
    numbers: _NumberFile,
    parts: list[_Part],
    ids: NDArray[np.int64] | None = None,
) -> dict[str, Tokens]:
    """Writes the token files of the parts of a text.

    Args:
        division: the text and its parts.
        tokenizer: the tokenizer.
        numbers: the numbers of the tokens.
        parts: the range of each part.
        ids: the id of each number; None if the numbers are ids.

    Raises:
        CheckpointError: a file changed while it was written.
    """
    stored = {}
    for (name, key), part in zip(token_keys(division, tokenizer).items(), parts, strict=True):
        array, note = _paths(key)
        count, unknown = part.stop - part.start, Counter[str]()
        with files.open_atomic(array) as stream:
            _write_header(stream, _dtype(tokenizer.vocab_size), count)
            for block in numbers.between(part.start, part.stop):
                found = block if ids is None else ids[block]
                stream.write(found.astype(_dtype(tokenizer.vocab_size)).tobytes())
                if tokenizer.level == "char":
                    unknown.update(character_counts(block[found == tokenizer.unk_id]))
        known = {
            "characters": count if tokenizer.level == "char" else part.characters,
            "unknown_characters": dict(unknown.most_common()),
        }
        files.write(note, json.dumps({**known, "sha256": _digest(array, known)}).encode())
        tokens = load_tokens(key, tokenizer.vocab_size, division.text.name)
        if tokens is None:
            raise CheckpointError(f"the token cache {array} changed while it was written")
        stored[name] = tokens
    return stored


def _write_header(stream: BinaryIO, dtype: np.dtype[Any], count: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(stream, {**header, "shape": (count,)})


def _digest(array: Path, known: Mapping[str, Any]) -> str:
    note = json.dumps(known, sort_keys=True).encode()
    return files.sha256(itertools.chain(files.file_chunks(array), [note]))


def _dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _cache() -> Path:
    return files.make_folder(files.cache_folder() / "tokens")


def _paths(key: str) -> tuple[Path, Path]:
    return _cache() / f"{key}.npy", _cache() / f"{key}.json"
