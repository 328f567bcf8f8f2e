"""Token files: a text cut into ids once, stored as one memory-mapped array, reused by content.

The name of a token file is a hash of the text and the tokenizer, never a path or a time; an entry
is used only if it is whole and its own hash is right. Knows ids and hashes, never models.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lmtrain import files
from lmtrain.data.corpus import Text
from lmtrain.data.detokenizer import Level, Splitter
from lmtrain.data.tokenizer import Tokenizer, build_tokenizer
from lmtrain.errors import CheckpointError, TextError

FORMAT = 1
_DAY = 86_400


@dataclass(frozen=True)
class Tokens:
    """The ids of a text.

    Args:
        ids: memory-mapped, (N,), uint16 or uint32.
        characters: characters of the text they stand for.
        key: the hash of text and tokenizer, under which they are cached.
        name: what messages call the text.
    """

    ids: NDArray[np.unsignedinteger]
    characters: int
    key: str
    name: str

    def __len__(self) -> int:
        return len(self.ids)


def cached_tokenizer(
    text: Text,
    alphabet: Text,
    level: Level,
    splitter: Splitter,
    *,
    vocab_size: int,
    min_count: int,
    lowercase: bool,
) -> Tokenizer:
    """The tokenizer of a text, from the cache where the same text was counted before.

    Args:
        text: the training text, whose words are counted.
        alphabet: the corpus it was cut from, whose characters are the character level's vocabulary.
        level: what a token is.
        splitter: how words are found.
        vocab_size: most words.
        min_count: least occurrences.
        lowercase: whether words are put in lower case first.

    Raises:
        TextError: the text cannot be read.
        MachineError: the cache cannot be written.
    """
    counted = alphabet if level == "char" else text
    options: dict[str, Any] = {
        "vocab_size": vocab_size, "min_count": min_count, "lowercase": lowercase,
    }  # fmt: skip
    # The bytes are a vocabulary without a text.
    fingerprint = "" if level == "byte" else counted.fingerprint
    named = json.dumps([FORMAT, level, splitter, options, fingerprint])
    path = _cache() / f"{files.sha256([named.encode()])}.tokenizer.json"
    if path.exists():
        content, _, digest = path.read_bytes().rpartition(b"\n")
        # What another version wrote in its own way is counted anew.
        with contextlib.suppress(CheckpointError):
            if files.sha256([content]).encode() == digest:
                return Tokenizer.from_json(content.decode())
    tokenizer = build_tokenizer(counted.chunks(), level, splitter, **options)
    content = tokenizer.to_json().encode()
    files.write(path, content + b"\n" + files.sha256([content]).encode())
    return tokenizer


def tokenize(text: Text, tokenizer: Tokenizer) -> Tokens:
    """The ids of a text, from the cache where the same text was cut the same way before.

    Raises:
        TextError: the text cannot be read, or has a character the vocabulary lacks.
        MachineError: the cache cannot be written.
    """
    key = token_key(text, tokenizer)
    return load_tokens(key, tokenizer.vocab_size, text.name) or _store(text, tokenizer, key)


def token_key(text: Text, tokenizer: Tokenizer) -> str:
    """The hash of text and tokenizer, under which the text's tokens are cached.

    Raises:
        TextError: the text cannot be read.
    """
    rules = files.sha256([tokenizer.to_json().encode()])
    return files.sha256([f"{FORMAT} {rules} {text.fingerprint}".encode()])


def load_tokens(key: str, vocab_size: int, name: str) -> Tokens | None:
    """The cached tokens named `key`, or None if there are none that are whole.

    Args:
        key: the hash of text and tokenizer.
        vocab_size: every id is below it.
        name: what messages call the text.
    """
    array, note = _paths(key)
    try:
        known = json.loads(note.read_bytes())
        if _digest(array, known["characters"]) != known["sha256"]:
            return None
        ids = np.load(array, mmap_mode="r", allow_pickle=False)
        is_fitting = ids.ndim == 1 and ids.dtype == _dtype(vocab_size)
        if is_fitting and ids.max(initial=0) < vocab_size:
            return Tokens(ids, known["characters"], key, name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return None


def _store(text: Text, tokenizer: Tokenizer, key: str) -> Tokens:
    array, note = _paths(key)
    files.remove_leftovers(array.parent, seconds=_DAY)
    with files.writing(array) as stream:
        _write_array(stream, text, tokenizer)
    known = {"characters": text.characters, "sha256": _digest(array, text.characters)}
    files.write(note, json.dumps(known).encode())
    tokens = load_tokens(key, tokenizer.vocab_size, text.name)
    if tokens is None:
        raise CheckpointError(f"the token cache {array} changed while it was written")
    return tokens


def _write_array(stream: BinaryIO, text: Text, tokenizer: Tokenizer) -> None:
    dtype = _dtype(tokenizer.vocab_size)
    # The header is as long for every count, so that it can be written last.
    _write_header(stream, dtype, 0)
    count = 0
    digest = hashlib.sha256()
    for ids in tokenizer.encode_chunks(_hashed(text.chunks(), digest)):
        stream.write(ids.astype(dtype).tobytes())
        count += len(ids)
    if digest.hexdigest() != text.fingerprint:
        raise TextError(f"{text.name} changed while it was read")
    stream.seek(0)
    _write_header(stream, dtype, count)


def _hashed(chunks: Iterator[str], digest: "hashlib._Hash") -> Iterator[str]:
    for chunk in chunks:
        digest.update(chunk.encode())
        yield chunk


def _write_header(stream: BinaryIO, dtype: np.dtype[Any], count: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(stream, {**header, "shape": (count,)})


def _digest(array: Path, characters: int) -> str:
    return files.sha256(itertools.chain(files.file_chunks(array), [str(characters).encode()]))


def _dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _cache() -> Path:
    return files.make_folder(files.cache_folder() / "tokens")


def _paths(key: str) -> tuple[Path, Path]:
    return _cache() / f"{key}.npy", _cache() / f"{key}.json"
