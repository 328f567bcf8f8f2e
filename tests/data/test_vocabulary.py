"""Vocabularies from files."""

import re

import pytest

from lmtrain.data.vocabulary import read_vocabulary, tokenizer_of
from lmtrain.errors import TextError


@pytest.fixture
def written(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "words.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b\na\n", ["<UNK>", "<EOS>", "b", "a"]),
        ("b\n<EOS>\na", ["<UNK>", "b", "<EOS>", "a"]),
        ("<unk>\n</s>\nb\n", ["<UNK>", "<EOS>", "b"]),
        ("<eos>\nb\n<UNK>\n", ["<EOS>", "b", "<UNK>"]),
        ("\n  b \r\n\n\ta\n\n", ["<UNK>", "<EOS>", "b", "a"]),
        ("\ufeffé\n<s>\n", ["<UNK>", "<EOS>", "é", "<s>"]),
        ("new\u00a0york\n", ["<UNK>", "<EOS>", "new\u00a0york"]),
    ],
)
def test_words_keep_the_order_of_the_file(written, text, expected):
    assert read_vocabulary(written(text)) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a\n\nb\na\n", "line 4: 'a' is also on line 1"),
        ("</s>\na\n<EOS>\n", "line 3: '<EOS>' is also on line 1"),
        ("a\nb 417\n", "line 2: 'b 417' is more than one word"),
        ("a\nb\t417\n", "line 2: 'b 417' is more than one word"),
        ("\n \n", "has no word"),
        ("<UNK>\n</s>\n", "has no word"),
        ("", "is empty"),
        (b"a\ncaf\xe9\n", "is not UTF-8: line 2"),
        (b"a\n\0\n", "is binary: line 2"),
    ],
)
def test_what_is_no_vocabulary_is_refused(written, text, told):
    with pytest.raises(TextError) as caught:
        read_vocabulary(written(text))

    assert told in str(caught.value)
    assert "words.txt" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(TextError, match=r"no text file .*words\.txt"):
        read_vocabulary(str(tmp_path / "words.txt"))


def test_ids_are_the_lines_and_other_words_are_unknown(written):
    tokenizer = tokenizer_of(written("cat\n<unk>\n</s>\nThe\n"), "words", lowercase=False)

    assert tokenizer.encode("The cat sat\n").tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize(
    ("text", "splitter", "lowercase", "absent"),
    [
        ("a\nmr.\nb\n", "words", False, "1 words, such as mr., never occur with data.splitter"),
        ("a\nmr.\nb\n", "whitespace", False, ""),
        ("The\nA\nb\n", "words", True, "2 words, such as The, never occur with .* data.lowercase"),
        ("it\n's\n.\n", "words", False, ""),
    ],
)
def test_words_that_no_text_can_have_are_noted(written, capsys, text, splitter, lowercase, absent):
    tokenizer_of(written(text), splitter, lowercase=lowercase)

    told = capsys.readouterr().err
    assert re.search(absent, told) if absent else not told
