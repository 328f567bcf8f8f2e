"""Writes the ranges of Unicode in lmtrain/data/characters.py anew, from the `regex` package.

    python scripts/unicode_classes.py && ruff format lmtrain/data/characters.py

That package knows a newer Unicode than Python. Code points that are not assigned yet go with their
neighbours, which makes the ranges fewer; most later ones will be of their neighbours' kind.
"""

import re
import textwrap
from pathlib import Path

import regex

from lmtrain import files

PLACE = Path(__file__).parent.parent / "lmtrain/data/characters.py"
CLASSES = {
    # White space that a control character or a format character makes is named.
    "SPACE": r"[\p{Z}\t-\r\x85\u200b\ufeff]",
    # The underscore belongs to the names of programs, geresh and gershayim to Hebrew words.
    "PUNCTUATION": r"[\p{P}\p{S}--[_\u05f3\u05f4]]",
    # Also the tones of emoji's skin, and the tags of their flags.
    "MARK": r"[\p{M}\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]",
    "HAN": r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}--[\p{P}\p{S}]]",
}
UNASSIGNED = regex.compile(r"\p{Cn}")


def ranges(pattern: str) -> str:
    """The code points of a class, such as `9-d 20 85`."""
    member = regex.compile(pattern, regex.VERSION1)
    found: list[list[int]] = []
    is_new = True
    for code in range(0x110000):
        if member.match(chr(code)):
            if is_new:
                found.append([code, code])
            found[-1][1] = code
            is_new = False
        elif not UNASSIGNED.match(chr(code)):
            is_new = True
    return " ".join(f"{a:x}" if a == b else f"{a:x}-{b:x}" for a, b in found)


def main() -> None:
    """Replaces the value of each class in the module."""
    text = PLACE.read_text("utf-8")
    for name, pattern in CLASSES.items():
        before, value, after = re.split(rf"(?m)(^{name} = _ranges\()[^)]*", text)
        lines = textwrap.wrap(ranges(pattern), 92, break_on_hyphens=False)
        quoted = [f'    "{line} "\n' for line in lines[:-1]] + [f'    "{lines[-1]}"\n']
        text = f"{before}{value}\n{''.join(quoted)}{after}"
    files.write(PLACE, text.encode())


if __name__ == "__main__":
    main()
