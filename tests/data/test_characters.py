import re
import unicodedata

import pytest

from lmtrain.data.characters import HAN, MARK, PUNCTUATION, SPACE, in_class

NAMED_SPACE = "\t\n\v\f\r\u0085\u200b\ufeff"
EMOJI_PARTS = [*range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080)]
WRITTEN_WITHOUT_SPACES = ("CJK UNIFIED IDEOGRAPH", "HIRAGANA LETTER", "KATAKANA LETTER")


def is_space(character: str) -> bool:
    return unicodedata.category(character)[0] == "Z" or character in NAMED_SPACE


def is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS" and character not in "_\u05f3\u05f4"


def is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M" or ord(character) in EMOJI_PARTS


@pytest.mark.parametrize(
    ("ranges", "is_member"),
    [(SPACE, is_space), (PUNCTUATION, is_punctuation), (MARK, is_mark)],
    ids=["space", "punctuation", "mark"],
)
def test_a_class_has_the_code_points_that_unicode_gives_it(ranges, is_member):
    member = re.compile(f"[{in_class(ranges)}]")
    assigned = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Co")]

    assert [c for c in assigned if bool(member.match(c)) != is_member(c)] == []


def test_letters_without_spaces_are_those_of_chinese_and_japanese():
    member = re.compile(f"[{in_class(HAN)}]")

    for code in range(0x110000):
        name = unicodedata.name(chr(code), "")
        if name.startswith(WRITTEN_WITHOUT_SPACES):
            assert member.match(chr(code)), name
        elif name.startswith(("LATIN", "HANGUL", "THAI", "ARABIC", "IDEOGRAPHIC FULL STOP")):
            assert not member.match(chr(code)), name


def test_a_class_ends_where_it_is_told_to():
    bmp = re.compile(f"[{in_class(PUNCTUATION, 0xFFFF)}]")

    assert bmp.match("\u3002")
    assert not bmp.match("🙂")
    assert all(ord(c) <= 0xFFFF for c in in_class(MARK, 0xFFFF))
