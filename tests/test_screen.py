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
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text) == shown


@settings(deadline=None)
@given(ANY_TEXT)
def test_no_control_character_passes(text):
    left = {c for c in printable(text) if unicodedata.category(c) in ("Cc", "Cf", "Cs")}

    assert left <= {"\n", "\t", "\u200c", "\u200d"}


@settings(deadline=None)
@given(ANY_TEXT)
def test_what_is_shown_can_be_written_as_utf8_and_is_shown_the_same_again(text):
    shown = printable(text)

    assert shown.encode().decode() == printable(shown)


@settings(deadline=None)
@given(ANY_TEXT)
def test_one_line_has_no_newline(text):
    assert "\n" not in one_line(text)


def test_newlines_between_lines_are_shown_and_those_around_are_not():
    assert one_line("\n\na\nb\x1b\n") == "a ⏎ b\\x1b"


def test_a_note_goes_to_standard_error(capsys):
    note("a note")

    assert capsys.readouterr() == ("", "a note\n")
