"""Vectors of words from the files of other programs."""

import gzip
import tracemalloc

import numpy as np
import pytest

from lmtrain.data.word_vectors import read_word_vectors
from lmtrain.errors import ConfigError, TextError

WORDS = ["<UNK>", "<EOS>", "the", "cat", ". . ."]
LINES = "the 1 2.5 -3e-2\ndog 0 0 0\ncat 4 5 6\n"


@pytest.fixture
def written(tmp_path):
    def write(content: str | bytes, name: str = "vectors.txt") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def found(place, words=WORDS, size=3) -> dict[str, list[float]]:
    indices, vectors = read_word_vectors(place, words, size)
    assert vectors.dtype == np.float32
    return {words[index]: row.tolist() for index, row in zip(indices, vectors, strict=True)}


THE, CAT = pytest.approx([1, 2.5, -0.03]), [4, 5, 6]


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        "3 3\n" + LINES,
        LINES.replace("\n", " \n"),
        LINES.replace("\n", "\r\n"),
        "\ufeff" + LINES,
        LINES.rstrip("\n"),
        LINES + "the 9 9 9\n",
        "417 0 0 0\n" + LINES,
    ],
    ids=["GloVe", "fastText", "word2vec", "CRLF", "BOM", "no end", "twice", "number"],
)
def test_every_form_is_read(written, content):
    assert found(written(content)) == {"the": THE, "cat": CAT}


def test_compressed_files_are_read(written):
    assert found(written(gzip.compress(LINES.encode()), "vectors.vec.gz")) == {
        "the": THE, "cat": CAT,
    }  # fmt: skip


def test_words_with_spaces_are_split_from_the_right(written):
    spaced = ". . . 7 8 9\nat name@domain.com 0 0 0\n"

    assert found(written(spaced + LINES))[". . ."] == [7, 8, 9]
    assert found(written(LINES + spaced))[". . ."] == [7, 8, 9]


def test_white_space_of_unicode_belongs_to_the_word(written):
    content = "a\u00a0b 1 2 3\nc\u2028d 4 5 6\ne\x85f 7 8 9\n"

    assert list(found(written(content), ["a\u00a0b", "c\u2028d", "e\x85f"])) == [
        "a\u00a0b", "c\u2028d", "e\x85f",
    ]  # fmt: skip


def test_the_names_that_other_programs_give_unknown_and_end(written):
    assert found(written("<unk> 1 2 3\n</s> 4 5 6\n")) == {"<UNK>": [1, 2, 3], "<EOS>": [4, 5, 6]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("the 1 2 3\ncat 4 5\n", "line 2 has 2 numbers after its word, not 3"),
        ("the 1 2 3\ndog 4 5\n", "line 2 has 2 numbers after its word, not 3"),
        ("the 1 2 3\ncat 4 5 6 7\n", "line 2 has 4 numbers after its word, not 3"),
        ("the 1 2 3\ncat\n", "line 2 has 0 numbers after its word, not 3"),
        ("the 1 2 3\ncat  4 5 6\n", ""),
        ("the 1 2 3\ncat 4 x 6\n", "line 2: 'x' is not a number"),
        ("the 1 2 3\ncat 4 nan 6\n", "line 2: nan is not a finite number"),
        ("the 1 2 3\ncat 4 5 -inf\n", "line 2: -inf is not a finite number"),
        ("the 1 2 3\ncat 4 1e39 6\n", "line 2: 1e39 is not a finite number"),
        ("4 3\n" + LINES, "has 3 vectors, and its header says 4"),
        ("2 3\n" + LINES, "has 3 vectors, and its header says 2"),
        ("the\n", "line 1 is not a word and its numbers"),
        ("once upon a time\n", "line 1 is not a word and its numbers"),
        ("the\t1\t2\t3\n", "line 1 is not a word and its numbers"),
        ("dog 1 2 3\n", "has no vector for any of the 5 words of the vocabulary"),
        ("1 3\n", "has 0 vectors, and its header says 1"),
        (b"the 1 2 3\ncaf\xe9 1 2 3\n", "is not UTF-8: line 2"),
        (b"1 3\nthe \0\0\0", "is binary: line 2"),
        ("", "is empty"),
    ],
)
def test_what_is_damaged_is_refused(written, content, told):
    if not told:
        assert list(found(written(content))) == ["the"]
        return
    with pytest.raises(TextError) as caught:
        found(written(content))

    assert told in str(caught.value)
    assert "vectors.txt" in str(caught.value)


def test_a_gzip_file_that_is_cut_short_is_refused(written):
    with pytest.raises(TextError, match="is not whole gzip data"):
        found(written(gzip.compress(LINES.encode() * 99)[:-9], "vectors.gz"))


@pytest.mark.parametrize("content", ["2 417\n", "the" + " 0" * 417 + "\n"])
def test_vectors_of_another_size_are_refused_with_both(written, content):
    with pytest.raises(ConfigError) as caught:
        found(written(content), size=418)

    told = str(caught.value)
    assert "vectors of 417 numbers, and model.embedding_size is 418" in told
    assert told.endswith("try: --set model.embedding_size=417")


def test_a_file_without_line_ends_is_refused_in_little_memory(written):
    place = written(b"a" * 30_000_000)
    tracemalloc.start()
    with pytest.raises(TextError, match="line 1 has more than"):
        found(place)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 3_000_000


def test_memory_does_not_grow_with_the_file(written):
    line = " ".join(["1.25"] * 100)
    place = written("".join(f"w{index} {line}\n" for index in range(20_000)))
    tracemalloc.start()
    assert len(found(place, ["w3", "w19999"], 100)) == 2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 3_000_000
