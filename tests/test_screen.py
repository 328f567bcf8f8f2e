import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.screen import note, one_line, printable

ANY_TEXT = st.text(st.characters())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("over\rwritten\b", "over\\rwritten\\x08"),
        ("\0\x7f\x85", "\\x00\\x7f\\x85"),
        ("right\u202eleft\u2066", "right\\u202eleft\\u2066"),
        ("\ufeffmark", "\\ufeffmark"),
        ("lone \ud800", "lone \\ud800"),
        ("private \ue000", "private \\ue000"),
        ("é 你好 🙂 नमस्ते", "é 你好 🙂 नमस्ते"),
        ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown


@settings(deadline=None)
@given(ANY_TEXT)
def test_no_control_character_remains(text):
    remaining = {c for c in printable(text) if unicodedata.category(c) in ("Cc", "Cf", "Cs")}

    assert remaining <= {"\n", "\t", "\u200c", "\u200d"}


@settings(deadline=None)
@given(ANY_TEXT)
def test_printable_text_is_valid_utf8_and_unchanged_by_escaping_again(text):
    shown = printable(text)

    assert shown.encode().decode() == printable(shown)


@settings(deadline=None)
@given(ANY_TEXT)
def test_one_line_has_no_newline(text):
    assert "\n" not in one_line(text)


def test_one_line_marks_inner_newlines_and_strips_outer_ones():
    assert one_line("\n\na\nb\x1b\n") == "a ⏎ b\\x1b"


def test_a_note_goes_to_standard_error(capsys):
    note("a note")

    assert capsys.readouterr() == ("", "a note\n")
