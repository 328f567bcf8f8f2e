import gzip

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtrain.data.conll import Sentence, read, read_tokens
from lmtrain.errors import TextError

SENTENCES = [Sentence(("EU", "rejects", "Köln"), ("B-ORG", "O", "B-LOC")), Sentence(("a",), ("O",))]
FUZZED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# White space, tabs and newlines come up often enough to make columns.
ANY_BYTES = st.binary(max_size=60) | st.lists(
    st.sampled_from(
        ["a", "O", "B-X", "é", "\t", " ", "\n", "\n\n", "\r\n", "\u2028", "\xa0", "\0"]
    ),
    max_size=20,
).map(lambda parts: "".join(parts).encode())


@pytest.mark.parametrize(
    "text",
    [
        "EU\tB-ORG\nrejects\tO\nKöln\tB-LOC\n\na\tO\n",
        "EU NNP B-NP B-ORG\nrejects VBZ B-VP O\nKöln NNP B-NP B-LOC\n\n\n\na X X O",
        "-DOCSTART- -X- -X- O\n\nEU\tB-ORG\r\nrejects\tO\r\nKöln\tB-LOC\r\n \t\r\n\na O\r\n",
        "EU  B-ORG\nrejects \t O \nKöln\t\tB-LOC\n".replace("\t\t", "\t") + "-DOCSTART- O\na O\n",
    ],
)
def test_tokens_are_in_the_first_column_and_tags_in_the_last(write, text):
    assert list(read([write(text)])) == SENTENCES


def test_lines_are_read_again(write):
    text = "\n".join(each.lines() for each in SENTENCES)

    assert list(read([write(text)])) == SENTENCES


def test_a_file_ends_a_sentence_and_may_be_compressed(write):
    places = [write("a\tO", "1.conll"), write(gzip.compress(b"b\tO"), "2.conll.gz")]

    assert [each.tokens for each in read(places)] == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a\tO\nb\n", "line 2: expected a token and a tag"),
        ("a\tO\n\n\tO\n", "line 3: expected a token and a tag"),
        ("a\tO\nb\t\t\n", "line 2: expected a token and a tag"),
        ("a X O\nb O\n", "line 2: 2 columns, but 3 in the line before it"),
        ("-DOCSTART- O\n\n \n", "my.txt has no sentences"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(write, text, told):
    with pytest.raises(TextError) as caught:
        list(read([write(text)]))

    first, advice = str(caught.value).splitlines()
    assert first.endswith(told)
    assert advice.startswith("  try: one token per line")


def test_an_empty_file_is_refused(write):
    with pytest.raises(TextError, match=r"my\.txt is empty$"):
        list(read([write("")]))


def test_a_cell_between_tabs_is_one_line_with_white_space_in_it(write):
    place = write("New\xa0 York\tX\tB-\u2028LOC\x0b\n")

    assert list(read([place])) == [Sentence(("New York",), ("B- LOC",))]


def test_sentences_may_have_different_numbers_of_columns(write):
    assert len(list(read([write("a O\n\nb X O\n")]))) == 2


def test_a_missing_file_is_not_taken_for_a_corpus():
    for name in ("nothing.conll", "ptb", "python-docs"):
        with pytest.raises(TextError, match=f"^no text file {name}$"):
            list(read([name]))


def test_tokens_are_read_of_columns_without_tags_or_of_lines(write):
    columns, lines = write("a\nb\n\nc\n", "new.conll"), write("a b\n\nc\n", "new.txt")

    assert list(read_tokens(columns)) == [("a", "b"), ("c",)]
    assert list(read_tokens(lines)) == [("a", "b"), (), ("c",)]


@FUZZED
@given(ANY_BYTES)
def test_any_bytes_are_sentences_or_refused_in_plain_words(write, content):
    place = write(content)
    try:
        found = list(read([place]))
    except TextError as error:
        assert 1 <= len(str(error).splitlines()) <= 3  # noqa: PT017
        return
    for each in found:
        assert len(each.tokens) == len(each.tags) >= 1
        assert all(len(cell.splitlines()) == 1 for cell in each.tokens + each.tags)
    assert list(read([write("\n".join(each.lines() for each in found))])) == found
