import itertools
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data import runs
from lmtrain.data.characters import SPACE, in_class
from lmtrain.data.tokenizer import (
    EOS,
    UNK,
    Numbering,
    Pieces,
    Tokenizer,
    _pattern,
    build_tokenizer,
    split_words,
)

HOSTILE = st.lists(
    st.text(max_size=5)
    | st.sampled_from(
        " \n\r\n\t\f\v\x00\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u202f\u3000\u200b\ufeff\u200d"
    )
    | st.sampled_from(
        ["\r\n", "'s", "n't", "’LL", "a.b", "1,000", "Σ", "ΑΣ", "İ", "e\u0301", "\u0301",
         "\u1100\u1161\u11a8", "\u2000", "🇩🇪", "👩\u200d🚀", "\ud800", EOS, UNK, f"a{EOS}b", "ab",
         "don't stop.", "x" * 4095, "x" * 4097, "İ" * 4097, "a'" * 5000]
    ),
    max_size=24,
).map("".join)  # fmt: skip


def plain_words(text, splitter, *, lowercase, nfc):
    """The words of a whole text by one regular expression."""
    space = in_class(SPACE)
    text = re.sub(f"[^{space}]+", lambda run: cut(run[0]), text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if nfc:
        text = unicodedata.normalize("NFC", text)
    if lowercase:
        text = text.replace("Σ", "σ").lower()
    return re.findall(_pattern(splitter), text.replace("\n", f" {EOS} "))


def cut(run):
    return " ".join(run[first : first + 4096] for first in range(0, len(run), 4096))


def pieces_of(text, places, *, nfc):
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    pieces = Pieces("word", nfc=nfc)
    added = [pieces.add(text[start:stop]) for start, stop in itertools.pairwise(bounds)]
    return [*added, pieces.end()]


@pytest.mark.parametrize("most_runs", [0, 2, 1 << 19])
@pytest.mark.parametrize("splitter", ["words", "whitespace"])
@settings(deadline=None, max_examples=60)
@given(
    text=HOSTILE, lowercase=st.booleans(), nfc=st.booleans(),
    places=st.lists(st.integers(0, 50_000), max_size=8),
)  # fmt: skip
def test_words_are_those_of_one_regular_expression(
    most_runs, splitter, text, lowercase, nfc, places
):
    options = {"lowercase": lowercase, "nfc": nfc}
    expected = plain_words(text + "\n", splitter, **options)
    numbering = Numbering("word", splitter, **options)
    known = dict.fromkeys([UNK, EOS, *expected[::2]])
    tokenizer = Tokenizer([*known][:9], "word", splitter, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_MOST_RUNS", most_runs)
        number, encode = numbering.encoder(), tokenizer.encoder()
        pieces = pieces_of(text, places, nfc=nfc)
        numbers = [n for piece in pieces for n in number(piece).tolist()]
        ids = [i for piece in pieces for i in encode(piece).tolist()]

    ends = [EOS] if text and not text.endswith(("\n", "\r")) else []
    words = plain_words(text, splitter, **options) + ends
    first = {word: index for index, word in enumerate(dict.fromkeys([EOS, *words]))}
    assert numbers == [first[word] for word in words]
    assert ids == tokenizer.word_ids(words).tolist()
    assert split_words(text, splitter, **options) == plain_words(text, splitter, **options)


@pytest.mark.parametrize("limit", ["_MOST_RUNS", "_MOST_BYTES"])
def test_runs_are_forgotten_above_a_limit(monkeypatch, limit):
    monkeypatch.setattr(runs, limit, 40)
    split = []

    def split_lines(lines):
        split.append(lines)
        return lines.replace("\n", " \n ").split(" ")[:-1]

    numbers = {"a": 0, "b": 1, "END": 2} | {f"word{n}": 3 for n in range(60)}
    known = runs.RunNumbers(numbers, split_lines, "END")

    assert known.encode("a b a\n").tolist() == [0, 1, 0, 2]
    assert known.encode("b a\n").tolist() == [1, 0, 2]
    assert split == ["a\nb\n", ""]
    known.encode(" ".join(f"word{n}" for n in range(60)))
    assert known.encode("a b").tolist() == [0, 1]
    assert split[3] == "a\nb\n"


def test_a_run_that_occurs_again_is_not_split_again(monkeypatch):
    text = "Don't stop.\n" * 3
    numbering = Numbering("word", "words", lowercase=False, nfc=False)
    encode = numbering.encoder()
    first = encode(text)
    monkeypatch.setattr("lmtrain.data.tokenizer._find_words", lambda lines, splitter: [*lines])

    assert encode(text).tolist() == first.tolist()


def test_counts_are_exact_when_words_are_added_later():
    numbering = Numbering("word", "words", lowercase=False, nfc=False)
    encode = numbering.encoder()
    for text in ["c a ", "a b b b ", "", "d d d d d a a a "]:
        numbering.count(encode(text))

    expected = build_tokenizer(["c a a b b b d d d d d a a a "], "word").vocabulary
    assert numbering.tokenizer(10, 1).vocabulary == expected[:10]
    assert numbering.tokenizer(10, 3).vocabulary == [UNK, EOS, "a", "d", "b"]
