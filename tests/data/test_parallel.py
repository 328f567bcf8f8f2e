import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtrain.data import pipes
from lmtrain.data.parallel import Pair, read, read_sentences
from lmtrain.errors import TextError

PAIRS = [Pair("ein Haus", "a house"), Pair("Öl", "oil .")]
FUZZED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ANY_BYTES = st.binary(max_size=60) | st.lists(
    st.sampled_from(["a", "b c", "é", "\t", " ", "\n", "\r\n", "\u2028", "\xa0", "\0"]), max_size=20
).map(lambda parts: "".join(parts).encode())


def test_two_files_are_aligned_line_by_line(write):
    source, target = write("ein Haus\nÖl\r\n", "a.de"), write(" a house\noil . ", "a.en")

    assert list(read([source], [target])) == PAIRS


def test_lines_of_several_files_follow_each_other(write):
    sources = [write("ein Haus", "1.de"), write("Öl\n", "2.de")]

    assert list(read(sources, [write("a house\noil .\n", "all.en")])) == PAIRS


def test_one_file_has_source_tab_and_target(write):
    assert list(read([write("ein Haus\ta house\n\nÖl \t oil .\r\n")], ())) == PAIRS


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        ("a\nb\n", "A\n", "a.de has 2 lines, {}a.en has 1"),
        ("a\n", "A\nB\nC\n", "a.de has 1 lines, {}a.en has 3"),
        ("a\n\nb\n", "A\nB\nC\n", "a.de, line 2: the sentence is empty"),
        ("a\nb\n", "A\n \n", "a.en, line 2: the sentence is empty"),
        ("", "", "a.de is empty"),
        ("a\tA\n\nb A\n", None, "a.de, line 3: expected source, tab and target"),
        ("\tA\n", None, "a.de, line 1: expected source, tab and target"),
        ("a\tA\nb\t \n", None, "a.de, line 2: expected source, tab and target"),
        ("a\tA\nb\tB\tCC-BY\n", None, "a.de, line 2: more columns than source and target"),
        ("\n\n", None, "a.de has no sentences"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(write, tmp_path, source, target, told):
    targets = [] if target is None else [write(target, "a.en")]

    with pytest.raises(TextError) as caught:
        list(read([write(source, "a.de")], targets))

    first, *others = str(caught.value).splitlines()
    assert first == f"{tmp_path}/{told.format(f'{tmp_path}/')}"
    assert len(others) <= 1


def test_lines_of_a_pipe_are_counted_though_it_gives_them_once(write, monkeypatch):
    given = iter([[b"a\nb\nc\n"]])
    monkeypatch.setattr(pipes, "pieces", lambda pipe, name: next(given, []))

    with pytest.raises(TextError, match=r"^- has 3 lines, .*a\.en has 1\n"):
        list(read(["-"], [write("A\n", "a.en")]))


def test_sentences_of_a_file_are_its_lines(write):
    assert list(read_sentences(write("a b\n\n c\n"))) == ["a b", "", "c"]


def test_a_missing_file_is_not_taken_for_a_corpus():
    with pytest.raises(TextError, match=r"^no text file ptb$"):
        list(read(["ptb"], ()))


@FUZZED
@given(ANY_BYTES, st.none() | ANY_BYTES)
def test_any_bytes_are_pairs_or_refused_in_plain_words(write, source, target):
    places = [write(source, "source")], [] if target is None else [write(target, "target")]
    try:
        found = list(read(*places))
    except TextError as error:
        assert 1 <= len(str(error).splitlines()) <= 3  # noqa: PT017
        return
    assert found
    for pair in found:
        for side in (pair.source, pair.target):
            assert side
            assert side.strip() == side
            assert "\n" not in side
