import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data import corpus
from lmtrain.data.corpus import open_text
from lmtrain.data.division import Cuts, Division, open_parts
from lmtrain.errors import ConfigError, LmtrainError, TextError

NAMES = ("train", "valid", "test")


def cut(division: Division) -> list[str]:
    """The parts of a text; what is read ends at each cut once."""
    cuts, text, ends = Cuts(division), "", {0}
    for chunk in division.text.chunks():
        for segment in cuts.segments(chunk):
            text += segment
            ends.add(len(text))
    bounds = cuts.bounds()
    assert set(bounds) <= ends
    return [text[start:stop] for start, stop in itertools.pairwise(bounds)]


def divided(text, fractions, *, at_line_ends):
    return cut(Division(text, NAMES[: len(fractions) + 1], tuple(fractions), at_line_ends))


@settings(deadline=None)
@given(
    text=st.text(st.sampled_from("ab\n é🙂"), min_size=1, max_size=60),
    fractions=st.lists(st.sampled_from([0.1, 0.25, 0.3]), min_size=1, max_size=2),
    at_line_ends=st.booleans(),
    size=st.integers(1, 70),
)
def test_parts_are_consecutive_and_lose_nothing(
    tmp_path_factory, text, fractions, at_line_ends, size
):
    path = tmp_path_factory.getbasetemp() / "parts.txt"
    path.write_bytes(text.encode())
    found = []

    for chunk_bytes in (size, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(corpus, "_CHUNK_BYTES", chunk_bytes)
            try:
                found.append(divided(open_text([str(path)]), fractions, at_line_ends=at_line_ends))
            except TextError:
                found.append([])
    parts, in_one_piece = found

    assert parts == in_one_piece
    assert parts or at_line_ends or len(text) < 11
    assert "".join(parts) in ("", text)
    assert all(parts)


def test_characters_are_split_exactly(write):
    text = open_text([write("0123456789\n\né" * 100)])

    parts = divided(text, [0.2, 0.1], at_line_ends=False)

    assert [len(part) for part in parts] == [910, 260, 130]


def test_words_are_split_at_the_next_line_end(write, monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK_BYTES", 4)
    text = open_text([write("one two\nthree four\nfive six\nseven\n")])

    parts = divided(text, [0.4, 0.2], at_line_ends=True)

    assert parts == ["one two\nthree four\n", "five six\n", "seven\n"]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_single_line_is_split_at_a_space(write, end):
    text = open_text([write("one two three four five six seven" + end)])

    train, valid = divided(text, [0.4], at_line_ends=True)

    assert train == "one two three four five "
    assert valid == "six seven" + end


def test_a_text_that_cannot_be_split_is_refused(write):
    for content, at_line_ends in (("a", False), ("a", True), ("word" * 9, True), ("a\n", True)):
        text = open_text([write(content)])
        with pytest.raises(TextError, match=rf"too short to be split: {len(content)} char") as told:
            divided(text, [0.1], at_line_ends=at_line_ends)
        assert "--valid FILE" in str(told.value)


def test_tiny_shakespeare_is_split_as_is_customary(shakespeare):
    [division] = open_parts(
        [str(shakespeare)], (), (), valid_fraction=0.1, test_fraction=0.0, at_line_ends=False
    )

    assert division.names == ("train", "valid")
    assert [len(part) for part in cut(division)] == [1_003_854, 111_540]


def parts_of(train, valid=(), test=(), valid_fraction=0.25, test_fraction=0.0):
    divisions = open_parts(
        train,
        valid,
        test,
        valid_fraction=valid_fraction,
        test_fraction=test_fraction,
        at_line_ends=False,
    )
    return {
        name: part
        for division in divisions
        for name, part in zip(division.names, cut(division), strict=True)
    }


def test_what_is_not_given_is_cut_from_the_tail(write):
    text, other = write("01234567"), write("other", "2.txt")

    assert parts_of([text]) == {"train": "012345", "valid": "67"}
    assert parts_of([text], test_fraction=0.25) == {"train": "0123", "valid": "45", "test": "67"}
    assert parts_of([text], [other]) == {"train": "01234567", "valid": "other"}
    assert parts_of([text], [other], [other]) == {
        "train": "01234567",
        "valid": "other",
        "test": "other",
    }
    assert parts_of([text], test=[other]) == {"train": "012345", "valid": "67", "test": "other"}
    assert parts_of([text], valid_fraction=0.0) == {"train": "01234567"}


def test_a_given_part_that_is_empty_is_named(write):
    with pytest.raises(LmtrainError, match=r"2\.txt is empty"):
        parts_of([write("01234567")], [write("", "2.txt")])


def test_a_fetched_corpus_brings_its_parts_along(fetched):
    assert parts_of(["three-parts"]) == {
        part: f"three-parts {part}\n" * 9 for part in ("train", "valid", "test")
    }
    assert open_text(["three-parts"]).name == "three-parts (train)"


def test_a_fetched_corpus_of_one_part_is_split(fetched):
    whole = "one-part train\n" * 9

    assert parts_of(["one-part"]) == {"train": whole[:101], "valid": whole[101:]}


def test_a_fetched_corpus_may_have_customary_fractions(fetched):
    whole = "fractions train\n" * 9

    assert parts_of(["fractions"], valid_fraction=None, test_fraction=None) == {
        "train": whole[:36],
        "valid": whole[36:72],
        "test": whole[72:],
    }


@pytest.mark.parametrize("valid", [(), ("valid",)])
def test_fractions_that_leave_no_training_text_are_refused(write, valid):
    places = [write("0123456789\n" * 9, "train.txt")], [write(each) for each in valid]
    if valid:
        assert len(parts_of(*places, valid_fraction=None, test_fraction=0.9)["train"]) == 9
        return
    with pytest.raises(ConfigError, match="1 of the training data, leave none to train on"):
        parts_of(*places, valid_fraction=None, test_fraction=0.9)


def test_a_given_part_goes_before_the_customary_one(fetched, write):
    parts = parts_of(["three-parts"], [write("mine\n")])

    assert parts["valid"] == "mine\n"
    assert parts["test"] == "three-parts test\n" * 9


def test_a_part_of_a_fetched_corpus_can_be_named_for_other_text(fetched, write):
    parts = parts_of([write("mine\n")], ["three-parts"], ["three-parts"])

    assert parts == {
        "train": "mine\n",
        "valid": "three-parts valid\n" * 9,
        "test": "three-parts test\n" * 9,
    }


def test_a_part_that_a_corpus_does_not_have_is_refused(fetched, write):
    with pytest.raises(TextError, match="one-part"):
        parts_of([write("mine\n")], ["one-part"])


def test_a_file_goes_before_the_corpus_of_the_same_name(fetched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "three-parts").write_text("01234567")

    assert parts_of(["three-parts"]) == {"train": "012345", "valid": "67"}
