"""Reads word vectors from text files of word2vec, GloVe or fastText.

Each line is a word and its numbers, separated by spaces; an optional header has the number of words
and the size of the vectors. Files are read line by line in bounded memory.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain import screen
from lmtrain.data.corpus import Text, open_text
from lmtrain.data.vocabulary import named
from lmtrain.errors import ConfigError, TextError

# Maximum number of characters of a word, and of each number.
_LONGEST_WORD, _LONGEST_NUMBER = 1 << 16, 64


class WordVectors(NamedTuple):
    """Word vectors of a file for some of the words of a vocabulary."""

    indices: NDArray[np.int64]
    """Indices of the words in the vocabulary, (N,)."""
    vectors: NDArray[np.float32]
    """The vectors of these words, (N, E)."""


def read_word_vectors(path: str, words: Sequence[str], size: int) -> WordVectors:
    """Reads the vectors of some words; of duplicates, the first.

    `<unk>` is read as `<UNK>`, `</s>` and `<eos>` as `<EOS>`. Numbers of other words are counted,
    not parsed.

    Args:
        path: the file; gzip if its name ends in .gz.
        words: the words.
        size: E, size of a vector.

    Raises:
        ConfigError: the file has vectors of another size.
        TextError: the file cannot be read, a line has another number of values or one that is not
            finite, the header has another number of vectors, or no word has a vector.
    """
    text = open_text([path], parts=())
    missing = {word: index for index, word in enumerate(words)}
    vectors = np.zeros((len(words), size), np.float32)
    indices: list[int] = []
    declared, count = None, 0
    for number, line in _lines(text, _LONGEST_WORD + _LONGEST_NUMBER * size):
        where = f"{text.name}, line {number}"
        # word2vec ends lines with a space.
        line = line.rstrip(" ")
        if number == 1:
            declared, found = _header(line)
            if not found:
                raise TextError(f"{where} is not a word and its numbers, separated by spaces")
            if found != size:
                raise ConfigError(
                    f"model.embeddings: {text.name} has vectors of {found:,} numbers, and "
                    f"model.embedding_size is {size:,}",
                    f"try: --set model.embedding_size={found}",
                )
            if declared is not None:
                continue
        if not line:
            continue
        count += 1
        word, numbers = _divided(line, size, where)
        if (index := missing.pop(named(word), None)) is not None:
            vectors[len(indices)] = _vector(numbers, where)
            indices.append(index)
    if declared not in (None, count):
        raise TextError(
            f"{text.name} has {count:,} vectors, and its header says {declared:,}",
            "it is truncated, or the header is wrong: correct or remove that line",
        )
    if not indices:
        raise TextError(
            f"{text.name} has no vector for any of the {len(words):,} words of the vocabulary"
        )
    return WordVectors(np.array(indices, np.int64), vectors[: len(indices)])


def _lines(text: Text, longest: int) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers, from 1.

    Raises:
        TextError: the text cannot be read, or a line has more than `longest` characters.
    """
    number, rest = 1, ""
    for chunk in text.chunks():
        *lines, rest = (rest + chunk).split("\n")
        yield from enumerate(lines, start=number)
        number += len(lines)
        if len(rest) > longest:
            raise TextError(f"{text.name}, line {number} has more than {longest:,} characters")
    if rest:
        yield number, rest


def _header(line: str) -> tuple[int | None, int]:
    """The number of vectors, None without a header, and their size, from the first line."""
    fields = line.split(" ")
    if len(fields) == 2 and all(field.isascii() and field.isdigit() for field in fields):
        # Python refuses to read numbers of thousands of digits.
        count, size = (int(field[:18]) for field in fields)
        return count, size
    # The word may itself be a number.
    return None, min(_count_numbers(fields), len(fields) - 1)


def _divided(line: str, size: int, where: str) -> tuple[str, str]:
    """The word of a line, which may contain spaces as in GloVe's, and its numbers.

    Raises:
        TextError: there are more or fewer numbers.
    """
    word, _, numbers = line.partition(" ")
    is_whole = numbers.count(" ") == size - 1
    if not is_whole:
        word, *fields = line.rsplit(" ", size)
        is_whole = len(fields) == size and not _is_number(word.rpartition(" ")[2])
        numbers = " ".join(fields)
    if not is_whole or not _is_number(numbers.partition(" ")[0]):
        found = min(_count_numbers(fields := line.split(" ")), len(fields) - 1)
        raise TextError(f"{where} has {found:,} numbers after its word, not {size:,}")
    return word, numbers


def _vector(text: str, where: str) -> NDArray[np.float32]:
    """The numbers of a vector.

    Raises:
        TextError: one is not a number or not finite.
    """
    numbers = text.split(" ")
    for number in numbers:
        if not _is_number(number):
            raise TextError(f"{where}: {screen.shorten(number)!r} is not a number")
    with np.errstate(over="ignore"):
        vector = np.array([float(number) for number in numbers]).astype(np.float32)
    if not np.isfinite(vector).all():
        wrong = numbers[int(np.isfinite(vector).argmin())]
        raise TextError(f"{where}: {screen.shorten(wrong)} is not a finite number")
    return vector


def _count_numbers(fields: list[str]) -> int:
    """Number of consecutive numbers at the end of the fields."""
    count = 0
    while count < len(fields) and _is_number(fields[-1 - count]):
        count += 1
    return count


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
