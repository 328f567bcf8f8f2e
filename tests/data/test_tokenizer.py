import contextlib
import copy
import json
import random
import re
import time
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import SENTENCES, TINY, UNICODE
from lmtrain.data.characters import HAN, MARK, PUNCTUATION, SPACE
from lmtrain.data.tokenizer import EOS, UNK, Pieces, Tokenizer, build_tokenizer, split_words
from lmtrain.errors import CheckpointError, TextError

UNHURRIED = settings(deadline=None)
KINDS = {
    "whitespace": ("word", "whitespace", False),
    "whitespace in lower case": ("word", "whitespace", True),
    "words": ("word", "words", False),
    "words in lower case": ("word", "words", True),
    "characters": ("char", "words", False),
    "bytes": ("byte", "words", False),
}

TRICKY = {
    "contractions": "Don't stop, I'M here: we'd've, it's O'Neill's, y'all'll see 'tis'nt 's.",
    "curly contractions": "Don’t stop, I’M here: we’d’ve, it’s O’Neill’s ’s.",
    "quotes": "\"a\" 'b' “c” ‘d’ «e» `f` ''g'' „h“ ‹i›",
    "devanagari": "नमस्ते दुनिया। यह हिन्दी है॥",
    "chinese": "你好，世界！「引」。 ｆｕｌｌ　width",
    "thai": "สวัสดีชาวโลก",
    "arabic": "السلام عليكم، كيف حالك؟",
    "emoji": "🙂👩‍🚀🇩🇪 👍🏽 ☺️",
    "combining": "e\u0301 é Å Å \u0301",
    "specials": "<unk> <UNK> <EOS> a<EOS>b <UNK>s <unk>'s <eos> < EOS > <<EOS>>",
    "carriage returns": "a\r\nb\rc\r\r\nd",
    "form feeds": "a\fb \f c\vd\f",
    "next line": "a\u0085b \u0085 c",
    "line separators": "a\u2028b\u2029c \u2028 d",
    "information separators": "a\x1cb \x1d c\x1e\x1fd",
    "other spaces": "a\u00a0b\u2003c\u3000d\u200be\ufefff",
    "final sigma": "ΟΔΥΣΣΕΥΣ Σ ΑΣ. ΑΣ' ς σ",
    "dotted i": "İstanbul IŞIK ı i̇ DİYARBAKIR",
    "sharp s and ligatures": "STRASSE Straße ẞ ﬁ ǅ Ǆ",
    "nul and controls": "a\0b \x01 \x7f \x9b",
    "numbers": "1,000 3.14 -5 10:30 50% $3 1/2 ½ ²",
    "underscores and dashes": "a_b __init__ well-known — x–y e-\nmail",
    "addresses": "http://example.com/a?b=c&d=e#f me@example.com C++ #1 @x",
    "blank lines": "\n\n a \n\n\nb\n",
    "spaces at the ends": "  a  \t b \t",
    "backslashes": "\\n \\ [^a] (?:x) a|b ^$ {1,2} .*",
    "nothing but space": " \t ",
}
# White space, quotes and clitics come up often enough to meet one another.
ANY_TEXT = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    | st.sampled_from(
        [
            " ",
            "\n",
            "\t",
            "\r\n",
            "\r",
            "\f",
            "'",
            "’",
            "'s",
            "n't",
            "'LL",
            ".",
            "-",
            "_",
            EOS,
            UNK,
            "ab",
        ]
    ),
    max_size=20,
).map("".join)
# Letters with their marks apart, emoji and the punctuation of other scripts.
ANY_SCRIPT = st.lists(
    st.text(st.characters().filter(lambda c: is_known(c)), max_size=4)
    | st.sampled_from(
        [
            " ",
            "\n",
            "\r",
            "\u00a0",
            "e\u0301",
            "\u0301",
            "\u1100\u1161\u11a8",
            "\u0915\u093c",
            "\u212b",
        ]
    ),
    max_size=20,
).map("".join)
# The lower case of characters that one's Unicode has and the other's has not differs.
OLD_TEXT = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=6)
    | st.sampled_from([" ", "\n", "'S", "Σ", "ΑΣ", "İ", "ẞ", "AB", "’D", EOS]),
    max_size=20,
).map("".join)


def built(text: str, kind: str, **options) -> Tokenizer:
    level, splitter, lowercase = KINDS[kind]
    return build_tokenizer([text], level, splitter, lowercase=lowercase, **options)


def library_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode(text).ids


def with_newlines(text: str) -> str:
    return re.sub("\r\n?", "\n", text)


def cut(text: str, places: list[int]) -> list[str]:
    """The text cut at places taken modulo its length; some pieces may be empty."""
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


def flat(tokenizer: Tokenizer, chunks: list[str]) -> list[int]:
    pieces = Pieces(tokenizer.level, nfc=tokenizer.nfc)
    whole = [*map(pieces.add, chunks), pieces.end()]
    return [index for piece in whole for index in tokenizer.encode(piece).tolist()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRICKY)
def test_the_tokenizers_library_gives_the_same_ids_for_tricky_text(kind, name):
    text = TRICKY[name] + "\n"
    tokenizer = built(text, kind)
    other = built(TINY + UNICODE + TRICKY["quotes"], kind, vocab_size=12)

    ids = tokenizer.encode(text).tolist()

    assert ids == library_ids(tokenizer, text)
    if other.level == "word":
        assert other.encode(text).tolist() == library_ids(other, text)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "lower" not in kind])
@UNHURRIED
@given(text=ANY_TEXT, size=st.integers(3, 40))
def test_the_tokenizers_library_gives_the_same_ids(kind, text, size):
    tokenizer = built(text, kind, vocab_size=size)

    assert tokenizer.encode(text + "\n" * (tokenizer.level == "word")).tolist() == library_ids(
        tokenizer, text + "\n" * (tokenizer.level == "word")
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "lower" in kind])
@UNHURRIED
@given(text=OLD_TEXT, size=st.integers(3, 40))
def test_the_tokenizers_library_gives_the_same_ids_in_lower_case(kind, text, size):
    tokenizer = built(text, kind, vocab_size=size)

    assert tokenizer.encode(text + "\n").tolist() == library_ids(tokenizer, text + "\n")


@pytest.mark.parametrize("kind", KINDS)
@UNHURRIED
@given(text=ANY_SCRIPT, size=st.integers(3, 40))
def test_the_tokenizers_library_gives_the_same_ids_of_composed_text(kind, text, size):
    tokenizer = built(text, kind, vocab_size=size, nfc=True)

    ids = tokenizer.encode(text + "\n").tolist()

    assert ids == library_ids(tokenizer, text + "\n")
    assert ids == tokenizer.encode(unicodedata.normalize("NFC", text + "\n")).tolist()
    if "lower" not in kind:
        assert ids == tokenizer.encode(unicodedata.normalize("NFD", text + "\n")).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["words", "whitespace"])
def test_the_tokenizers_library_splits_at_every_code_point_as_python_does(kind):
    tokenizer = built("a\n", kind)
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    characters = [chr(code) for code in range(0x110000) if not is_surrogate(code)]
    edges = [code + d for ranges in (SPACE, PUNCTUATION, MARK, HAN) for pair in ranges
             for code in pair for d in (-1, 0, 1)]  # fmt: skip
    lines = ["a".join(characters[first : first + 1000]) for first in range(0, 0x110000, 1000)]
    around = "{} a.{} ({}. 1,{}2 '{} a'{}s {}\u0301 .\u200d{} 1.2{} <UNK>'s{}"
    lines += [around.replace("{}", chr(code)) for code in edges]

    for first in range(0, len(lines), 500):
        text = "\n".join(lines[first : first + 500])
        words = [text[a:b] for _, (a, b) in library.pre_tokenizer.pre_tokenize_str(text)]
        assert words == [word for word in tokenizer.words(text) if word != EOS]


def is_known(character: str) -> bool:
    """Whether the library knows a character; its order of marks is that of an older Unicode."""
    is_new_mark = unicodedata.combining(character) and not unicodedata.ucd_3_2_0.combining(
        character
    )
    return unicodedata.category(character) not in ("Cs", "Cn") and not is_new_mark


def is_surrogate(code: int) -> bool:
    return 0xD800 <= code < 0xE000


def test_every_code_point_is_composed_as_the_tokenizers_library_composes_it():
    tokenizer = build_tokenizer(["a"], "char", nfc=True)
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    known = [c for c in map(chr, range(0x110000)) if is_known(c) and c != "\r"]

    for around in ("a{}", "\u1100{}\u11a8", "{}\u0323\u0301"):
        text = "\n".join(around.replace("{}", each) for each in known)
        expected = unicodedata.normalize("NFC", text)
        assert library.normalizer.normalize_str(text) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_library_gives_the_same_ids_for_real_text(kind, shakespeare):
    text = shakespeare.read_text("utf-8")[:200_000]
    tokenizer = built(text, kind, vocab_size=2000)

    assert tokenizer.encode(text).tolist() == library_ids(tokenizer, text)


def test_the_tokenizers_library_takes_a_rare_character_for_unk():
    tokenizer = build_tokenizer(["aab\n\n"], "char", min_count=2)

    assert tokenizer.vocabulary == [UNK, "\n", "a"]
    assert tokenizer.encode("a?b\n").tolist() == [2, 0, 0, 1] == library_ids(tokenizer, "a?b\n")


def test_the_tokenizers_library_reads_bytes_and_writes_them_back():
    library = tokenizers.Tokenizer.from_str(build_tokenizer([], "byte").to_json())

    assert library.decode(library.encode(UNICODE).ids) == UNICODE.replace("\r\n", "\n")


def test_a_run_without_white_space_is_cut_only_past_4096_characters():
    for length in (4095, 4096):
        text = "x" * length + "\n"
        tokenizer = built(text, "words")
        assert tokenizer.encode(text).tolist() == [2, 1] == library_ids(tokenizer, text)

    longer = built("x" * 8193 + "\n", "words")

    assert longer.vocabulary == [UNK, EOS, "x" * 4096, "x"]
    assert longer.encode("x" * 8193 + "\n").tolist() == [2, 2, 3, 1]


@UNHURRIED
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_characters_and_bytes_come_back(text):
    for tokenizer in (build_tokenizer([text], "char"), build_tokenizer([text], "byte")):
        assert tokenizer.decode(tokenizer.encode(text)) == with_newlines(text)


def test_characters_and_bytes_of_tricky_text_come_back():
    text = "\n".join(TRICKY.values())

    for tokenizer in (build_tokenizer([text], "char"), build_tokenizer([text], "byte")):
        assert tokenizer.decode(tokenizer.encode(text)) == with_newlines(text)


def test_words_come_by_count():
    tokenizer = build_tokenizer(["c b a\nb a\na\n"], "word")

    assert tokenizer.vocabulary == [UNK, EOS, "a", "b", "c"]


def test_ties_go_by_first_appearance():
    tokenizer = build_tokenizer(["z y x\nx y z\nonce\n"], "word")

    assert tokenizer.vocabulary == [UNK, EOS, "z", "y", "x", "once"]


@UNHURRIED
@given(st.lists(st.sampled_from(list("abcdefgh")), max_size=60), st.integers(3, 12))
def test_the_vocabulary_is_that_of_a_plain_count(words, size):
    first = {word: -index for index, word in reversed(list(enumerate(words)))}
    ranked = sorted(first, key=lambda word: (words.count(word), first[word]), reverse=True)

    tokenizer = build_tokenizer([" ".join(words)], "word", vocab_size=size)

    assert tokenizer.vocabulary == [UNK, EOS, *ranked][:size]


def test_the_size_includes_the_two_specials():
    words = [f"w{n}" for n in range(20_000)]

    small = build_tokenizer([" ".join(words)], "word", vocab_size=7)
    customary = build_tokenizer([" ".join(words)], "word")

    assert small.vocabulary == [UNK, EOS, "w0", "w1", "w2", "w3", "w4"]
    assert small.vocab_size == 7
    assert customary.vocab_size == 10_000


@pytest.mark.parametrize(("least", "kept"), [(1, ["a", "b", "c"]), (2, ["a", "b"]), (4, [])])
def test_words_below_the_least_count_are_unknown(least, kept):
    tokenizer = build_tokenizer(["a a a b b c\n"], "word", min_count=least)

    assert tokenizer.vocabulary == [UNK, EOS, *kept]
    assert tokenizer.encode("c zebra\n").tolist() == [4 if "c" in kept else 0, 0, 1]


def test_the_specials_of_the_text_are_ours_and_take_no_place():
    tokenizer = build_tokenizer(["<unk> <unk> a <UNK> <EOS>\n"], "word", "whitespace")

    assert tokenizer.vocabulary == [UNK, EOS, "a"]
    assert tokenizer.encode("a <unk> <UNK>\n").tolist() == [2, 0, 0, 1]
    assert (tokenizer.unk_id, tokenizer.eos_id, tokenizer.start_id) == (0, 1, 1)


@pytest.mark.slow
def test_the_penn_treebank_has_its_10_000_words(ptb):
    text = (ptb / "train.txt").read_text("utf-8")

    tokenizer = build_tokenizer([text], "word", "whitespace")

    assert tokenizer.vocab_size == 10_000
    assert tokenizer.vocabulary[:3] == [UNK, EOS, "the"]
    assert len(tokenizer.encode(text)) == 929_589
    assert build_tokenizer([text], "word", "whitespace", vocab_size=20_000).vocab_size == 10_000


def test_every_line_ends_once_whether_or_not_the_text_ends_with_a_newline():
    tokenizer = build_tokenizer(["a b\n"], "word")

    assert flat(tokenizer, ["a\nb"]) == flat(tokenizer, ["a\nb\n"]) == [2, 1, 3, 1]
    assert flat(tokenizer, ["a\n\n "]) == [2, 1, 1, 1]
    assert flat(tokenizer, [""]) == []


def test_a_text_that_is_no_corpus_gets_no_end_of_its_own():
    tokenizer = build_tokenizer(["a b\n"], "word")

    assert tokenizer.encode("a\nb").tolist() == [2, 1, 3]
    assert tokenizer.encode("").tolist() == []


def test_characters_stand_in_the_order_of_unicode_newline_included():
    tokenizer = build_tokenizer(["bé\na", "🙂b"], "char", vocab_size=3)

    assert tokenizer.vocabulary == [UNK, "\n", "a", "b", "é", "🙂"]
    assert (tokenizer.unk_id, tokenizer.eos_id, tokenizer.line_end_id) == (0, None, 1)


def test_a_character_that_the_text_lacks_is_unk_and_named_with_its_count():
    tokenizer = build_tokenizer(["abc"], "char")

    assert tokenizer.encode("ab\u20ac🙂\u20acc").tolist() == [1, 2, 0, 0, 0, 3]
    assert tokenizer.decode([1, 0, 3]) == "a\ufffdc"
    assert tokenizer.unknown_characters(["a\u20ac", "🙂\u20ac"]) == {"\u20ac": 2, "🙂": 1}
    assert tokenizer.unknown_characters(["abc", ""]) == {}
    assert build_tokenizer(["a"], "word").unknown_characters(["\u20ac"]) == {}


def test_bytes_are_all_256_whatever_the_text():
    tokenizer = build_tokenizer(["abc"], "byte", vocab_size=7, min_count=9)

    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 10]
    assert (tokenizer.unk_id, tokenizer.eos_id, tokenizer.line_end_id) == (None, None, 10)


@pytest.mark.parametrize("kind", KINDS)
@UNHURRIED
@given(
    nfc=st.booleans(),
    text=ANY_TEXT | ANY_SCRIPT,
    places=st.lists(st.integers(0, 10_000), max_size=12),
)
def test_how_the_text_is_cut_does_not_matter(kind, nfc, text, places):
    level, splitter, lowercase = KINDS[kind]
    whole = built(text, kind, nfc=nfc)

    pieces = build_tokenizer(cut(text, places), level, splitter, lowercase=lowercase, nfc=nfc)

    assert pieces.vocabulary == whole.vocabulary
    assert flat(whole, cut(text, places)) == flat(whole, [text])
    if level != "word":
        assert flat(whole, cut(text, places)) == whole.encode(text).tolist()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][0] == "word"])
@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(4000, 4200) | st.integers(1, 9000), min_size=1, max_size=4),
    letters=st.sampled_from(["x", "İ", "xİ'", "Σ.", "é"]),
    between=st.sampled_from([" ", "\n", ""]),
    places=st.lists(st.integers(0, 40_000), max_size=6),
)
def test_how_overlong_runs_are_cut_does_not_matter(kind, lengths, letters, between, places):
    text = between.join((letters * n)[:n] for n in lengths) + "\n"
    whole = built(text, kind)

    assert flat(whole, cut(text, places)) == whole.encode(text).tolist()


def test_long_runs_take_little_longer_than_short_ones():
    def seconds(length):
        text = ("x" * length + " ") * (400_000 // length)
        start = time.process_time()
        split_words(text, "whitespace")
        return time.process_time() - start

    assert min(seconds(4000) for _ in range(3)) < 10 * min(seconds(8) for _ in range(3))


def test_a_dotted_i_in_an_overlong_run_is_cut_where_the_text_is():
    text = "İ" + "a" * 4999 + "\n"
    whole = built(text, "words in lower case")

    assert flat(whole, [text[:4500], text[4500:]]) == whole.encode(text).tolist()


def test_words_of_prose_are_words_clitics_and_single_marks():
    words = split_words("Don't say \"it's\" (so), we'd go... café-bar a_b!\n", "words")

    assert words == [
        *("Don", "'t", "say", '"', "it", "'s", '"', "(", "so", ")", ",", "we", "'d", "go"),
        *(".", ".", ".", "café", "-", "bar", "a_b", "!", EOS),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("l'été\u00a0: «\u202foui\u202f»", ["l'été", ":", "«", "oui", "»"]),
        ("السلام عليكم، كيف حالك؟", ["السلام", "عليكم", "،", "كيف", "حالك", "؟"]),
        ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया", "।"]),
        ("你好，世界。「引」", ["你好", "，", "世界", "。", "「", "引", "」"]),
        ("東京\u3000大阪・京都", ["東京", "大阪", "・", "京都"]),
        ("ສະບາຍ\u200bດີ", ["ສະບາຍ", "ດີ"]),
        ("Բարեւ՜ ձեզ։", ["Բարեւ", "՜", "ձեզ", "։"]),
        ("ሰላም፡ለዓለም።", ["ሰላም", "፡", "ለዓለም", "።"]),
        ("¿Qué? ¡Sí!", ["¿", "Qué", "?", "¡", "Sí", "!"]),
        ("צה״ל ג׳ירפה", ["צה״ל", "ג׳ירפה"]),
        ("a\u2028b\u2029c\u0085d\ufeffe", list("abcde")),
        ("5€ ≤ x→y nice🙂🙂", ["5", "€", "≤", "x", "→", "y", "nice", "🙂", "🙂"]),
        ("👩‍🚀👍🏽☺️ 🇩🇪🇫🇷 1️⃣", ["👩‍🚀", "👍🏽", "☺️", "🇩🇪", "🇫🇷", "1️⃣"]),
        ("co\u00adoperate می\u200cخواهم", ["co\u00adoperate", "می\u200cخواهم"]),
    ],
)
def test_white_space_and_punctuation_of_every_script_part_words(text, words):
    assert split_words(text, "words") == words


def test_white_space_of_every_script_parts_words_of_text_tokenized_before():
    text = "la\u00a0fin ,\u3000x\u202fy\u200bz."

    assert split_words(text, "whitespace") == ["la", "fin", ",", "x", "y", "z."]


@pytest.mark.parametrize("kind", KINDS)
def test_lines_end_with_a_newline_a_carriage_return_or_both(kind):
    tokenizer = built("a b\nc\n\n", kind)

    for text in ("a b\r\nc\r\n\r\n", "a b\rc\r\r", "a b\rc\n\r\n"):
        assert tokenizer.encode(text).tolist() == tokenizer.encode("a b\nc\n\n").tolist()
        assert built(text, kind).vocabulary == tokenizer.vocabulary


def test_words_between_white_space_are_left_alone():
    words = split_words("Don't, N <unk> $ 1.5\tx\n", "whitespace")

    assert words == ["Don't,", "N", "<unk>", "$", "1.5", "x", EOS]


@pytest.mark.parametrize(
    "prose",
    [
        "Don't stop. I'm here, aren't I?",
        "Don’t stop; we’ve seen it.",
        'He said "yes" (twice), then left: we\'d seen it.',
        "“Curly,” he said, ‘quotes’ and «more».",
        "She said 'no' and \"never\".",
        "Use `code` and *stress* here.",
        "A well-known fact: 50% of $100 is $50!",
        "Wait… what?",
        "'Tis the season.",
        "See [1] and {x}; a/b, a_b, x–y—z.",
    ],
)
def test_prose_is_joined_as_it_was_written(prose):
    text = f"{prose}\nAnd the next line.\n"
    tokenizer = build_tokenizer([text], "word")

    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "prose",
    [
        "السلام عليكم، كيف حالك؟ نعم؛ لا.",
        "नमस्ते दुनिया। यह हिन्दी है॥",
        "你好，世界！「引」他说“你好”了（中文）和 English。",
        "東京・京都、(英語)の話。",
        "¿Qué? ¡Sí! Él dijo: «no».",
        "Er sagte: „Ja“, dann ‚nein‘ und ging.",
        "Bonjour! Une «belle» journée; l’été.",
        "Բարեւ՜ ձեզ։",
        "ሰላም፡ለዓለም።",
        "El col·legi.",
        "צה״ל אמר: שלום־רב.",
        "བོད་སྐད་ཡིན།",
        "สวัสดี ครับ (ไทย).",
        "¥5, £6, 7 €, ‹x› ☺️ 🇩🇪 👍🏽",
    ],
)
def test_prose_of_every_script_is_joined_as_it_was_written(prose):
    tokenizer = build_tokenizer([f"{prose}\n"], "word")

    assert tokenizer.decode(tokenizer.encode(f"{prose}\n")) == f"{prose}\n"


SIGNS = [chr(code) for start, stop in PUNCTUATION for code in range(start, stop + 1)
         if unicodedata.category(chr(code))[0] in "PS"]  # fmt: skip
PROSE = st.lists(
    st.sampled_from(
        [*"   \na5_.,'’“”„‘中🇩🏽🙂", "it", "1.5", "です", "مرحبا", "ไทย", "한국", "\u0301",
         "\u200d", "\ufe0f", "'s", "’t", "EOS", "<UNK>"]
    )
    | st.sampled_from(SIGNS)
    | st.characters(exclude_categories=["Cs", "Cn"]),
    max_size=20,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("kind", ["words", "whitespace", "characters", "bytes"])
@settings(deadline=None, max_examples=500)
@given(text=PROSE)
def test_text_that_was_joined_again_has_the_same_tokens(kind, text):
    tokenizer = built(text, kind)
    ids = tokenizer.encode(text).tolist()

    assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids


@settings(deadline=None, max_examples=200)
@given(text=PROSE)
def test_text_with_unknown_words_that_was_joined_again_has_the_same_tokens(text):
    tokenizer = built("it 's a , . 中 “ ” ' (\n", "words")
    ids = tokenizer.encode(text).tolist()

    assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids


def test_a_quotation_left_open_ends_with_its_line():
    tokenizer = build_tokenizer(['He said "no\n"Yes" is more.\n'], "word")

    text = tokenizer.decode(tokenizer.encode('He said "no\n"Yes" is more.\n'))

    assert text == 'He said "no\n"Yes" is more.\n'


def test_words_between_white_space_are_joined_by_one_space():
    tokenizer = build_tokenizer(["the cat , 's  mat\nn't .\n"], "word", "whitespace")

    text = tokenizer.decode(tokenizer.encode("the cat , 's  mat\n n't .\n"))

    assert text == "the cat , 's mat\nn't .\n"


def test_text_is_the_same_joined_at_once_or_as_it_comes():
    for kind in KINDS:
        tokenizer = built(SENTENCES, kind)
        ids = tokenizer.encode(SENTENCES).tolist()
        detokenizer = tokenizer.detokenizer()

        assert "".join(map(detokenizer.add, ids)) + detokenizer.end() == tokenizer.decode(ids)


def test_bytes_are_held_back_until_a_character_is_whole():
    detokenizer = build_tokenizer([], "byte").detokenizer()

    written = [detokenizer.add(byte) for byte in "aé你🙂".encode()]

    assert written == ["a", "", "é", "", "", "你", "", "", "", "🙂"]
    assert detokenizer.end() == ""


def test_a_character_broken_off_at_the_end_is_replaced():
    detokenizer = build_tokenizer([], "byte").detokenizer()

    assert [detokenizer.add(byte) for byte in "é".encode()[:1]] == [""]
    assert detokenizer.end() == "\ufffd"
    assert detokenizer.end() == ""


@pytest.mark.parametrize(
    "content",
    [b"\xffa", b"\xe4\xbdA", b"\x80\x80", b"\xed\xa0\x80", b"\xf0\x9f", b"\xe4\xbd\xe4\xbd\xa0"],
)
def test_invalid_bytes_are_replaced_as_python_replaces_them(content):
    assert build_tokenizer([], "byte").decode(content) == content.decode("utf-8", "replace")


@UNHURRIED
@given(st.lists(st.binary(max_size=3) | st.text(max_size=2).map(str.encode)).map(b"".join))
def test_any_bytes_are_joined_as_python_decodes_them(content):
    assert build_tokenizer([], "byte").decode(content) == content.decode("utf-8", "replace")


@pytest.mark.parametrize("level", ["char", "byte"])
def test_a_piece_that_ends_with_a_newline_is_complete(level):
    pieces = Pieces(level, nfc=True)

    assert [pieces.add(chunk) for chunk in ("a\n", "e", "\u0301\r", "\n")] == [
        "a\n", "", "", "e\u0301\r\n"
    ]  # fmt: skip


def test_a_count_that_no_character_reaches_is_refused():
    with pytest.raises(TextError, match=r"no character occurs data\.min_count = 3 times"):
        build_tokenizer(["aabb"], "char", min_count=3)


def test_an_empty_token_is_refused():
    with pytest.raises(CheckpointError, match="has an empty token"):
        Tokenizer([UNK, EOS, ""])


@pytest.mark.parametrize("nfc", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_read_back(kind, nfc):
    tokenizer = built("\n".join(TRICKY.values()), kind, min_count=2, nfc=nfc)

    again = Tokenizer.from_json(tokenizer.to_json())

    assert again.vocabulary == tokenizer.vocabulary
    assert (again.level, again.lowercase) == (tokenizer.level, tokenizer.lowercase)
    assert again.nfc == tokenizer.nfc == nfc
    assert tokenizer.level != "word" or again.splitter == tokenizer.splitter
    assert again.to_json() == tokenizer.to_json()
    assert again.encode(UNICODE).tolist() == tokenizer.encode(UNICODE).tolist()


def refused_or_sound(text: str) -> None:
    """A tokenizer.json is refused as damaged, or gives a tokenizer that can be used and saved."""
    tokenizer = None
    with contextlib.suppress(CheckpointError):
        tokenizer = Tokenizer.from_json(text)
    if tokenizer:
        ids = tokenizer.encode("".join(token for token in tokenizer.vocabulary if token != UNK))
        assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        saved = tokenizer.to_json().encode().decode()
        assert Tokenizer.from_json(saved).vocabulary == tokenizer.vocabulary


def places(tree: object, path: tuple = ()) -> list[tuple]:
    inside = tree.items() if isinstance(tree, dict) else ()
    inside = enumerate(tree) if isinstance(tree, list) else inside
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


def changed(tree: object, path: tuple, value: object) -> object:
    if not path:
        return value
    tree = copy.deepcopy(tree)
    at = tree
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return tree


HOSTILE = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_hostile_file_is_refused_or_harmless(kind, data):
    tree = json.loads(built("a b b'\n", kind, min_count=2).to_json())
    path = data.draw(st.sampled_from([place for place in places(tree) if len(place) < 5]))

    refused_or_sound(json.dumps(changed(tree, path, data.draw(HOSTILE))))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(place=st.integers(0, 10**6), content=st.text(max_size=3), gap=st.integers(0, 30))
def test_a_damaged_file_is_refused_or_harmless(kind, place, content, gap):
    text = built("a b b'\n", kind, min_count=2).to_json()
    place %= len(text)

    refused_or_sound(text[:place] + content + text[place + gap :])


@pytest.mark.parametrize(
    "vocab",
    [[0, 1], [7], [], "ab", 3, None, {"a": 0, "b": 0}, {"a": 1}, {"a": 0, "b": "1"}, {"a": 0.0},
     {"a": False}, {"ab": 0}],
)  # fmt: skip
def test_a_vocabulary_that_is_none_is_refused(vocab):
    tree = json.loads(built("ab", "characters").to_json())
    tree["model"]["vocab"] = vocab

    with pytest.raises(CheckpointError, match="tokenizer"):
        Tokenizer.from_json(json.dumps(tree))


def test_a_word_that_is_no_unicode_is_refused():
    tree = json.loads(built("a\n", "words").to_json())
    tree["model"]["vocab"]["\ud800"] = 3

    with pytest.raises(CheckpointError, match="tokenizer"):
        Tokenizer.from_json(json.dumps(tree))


def test_bytes_in_another_order_or_number_are_refused():
    tree = json.loads(build_tokenizer([], "byte").to_json())
    shuffled = list(tree["model"]["vocab"])
    random.Random(1).shuffle(shuffled)

    for symbols in (shuffled, sorted(shuffled)[:100]):
        tree["model"]["vocab"] = {symbol: index for index, symbol in enumerate(symbols)}
        with pytest.raises(CheckpointError, match="tokenizer"):
            Tokenizer.from_json(json.dumps(tree))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "type"), "WordPiece"),
        (("model", "unk_token"), "a"),
        (("added_tokens",), [{"id": 0, "content": "b", "special": True}]),
        (("truncation",), {"max_length": 1}),
        (("normalizer",), {"type": "NFC"}),
        (("pre_tokenizer",), {"type": "Whitespace"}),
        (("post_processor",), {"type": "ByteLevel"}),
    ],
)
def test_a_file_that_gives_other_ids_in_the_library_is_refused(path, value):
    tree = json.loads(built("a b\n", "words").to_json())

    with pytest.raises(CheckpointError, match=re.escape("tokenizer.json")):
        Tokenizer.from_json(json.dumps(changed(tree, path, value)))


def test_a_vocabulary_without_the_specials_or_with_a_double_is_refused():
    with pytest.raises(CheckpointError, match="lacks <EOS>"):
        Tokenizer([UNK, "a"])
    with pytest.raises(CheckpointError, match="lacks <UNK>"):
        Tokenizer(["\n", "a"], "char")
    with pytest.raises(CheckpointError, match="twice"):
        Tokenizer([UNK, EOS, "a", "a"])


def test_ids_are_64_bit_numbers():
    for kind in KINDS:
        tokenizer = built(TINY, kind)

        assert tokenizer.encode(TINY).dtype == tokenizer.encode("").dtype == np.int64


@given(st.text("ae\u0301\u0308\u1100\u1161\u11a8\u09c7\u09be\u4e00 \r\n", max_size=60), st.data())
def test_nfc_composes_across_pieces_of_characters(text, data):
    places = data.draw(st.lists(st.integers(0, 60), max_size=6))
    pieces = Pieces("char", nfc=True)

    whole = [*map(pieces.add, cut(text, places)), pieces.end()]

    normalized = [unicodedata.normalize("NFC", piece) for piece in whole]
    assert "".join(normalized) == unicodedata.normalize("NFC", text)


def test_nfc_does_not_hold_back_text_without_white_space():
    pieces = Pieces("char", nfc=True)

    assert len(pieces.add("ACGT" * 1000)) == 3999
    assert len(pieces.add("\u4e00" * 1000)) == 1000
