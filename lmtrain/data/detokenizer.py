"""Converts token ids to text incrementally, as they are sampled.

Words get the spaces of prose in their script; bytes are held back until a character is complete.
"""

import codecs
import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from lmtrain.data.characters import HAN, MARK, PUNCTUATION, in_class

Level = Literal["word", "char", "byte"]
Splitter = Literal["whitespace", "words"]

# Space on both sides, after, before, or none; for other characters by their Unicode category.
_SPACED, _AFTER, _BEFORE, _NONE = (True, True), (False, True), (True, False), (False, False)
_ASCII = dict.fromkeys(".,;:!?)]}%", _AFTER) | dict.fromkeys("([{$#@", _BEFORE)
_OTHERS = (
    dict.fromkeys("¿¡£¥₹", _BEFORE)
    | dict.fromkeys("§¶†‡•‣※", _SPACED)
    # Within words (Catalan, hyphens) or between all words (Tibetan, Ethiopic).
    | dict.fromkeys("/-·་༌፡", _NONE)
)
_CATEGORIES = {"Ps": _BEFORE, "Pi": _BEFORE, "Pe": _AFTER, "Pf": _AFTER, "Po": _AFTER, "Pd": _NONE}
_PAIRED = frozenset("\"'`*")
_CLOSERS = {"„": "“", "‚": "‘"}
_APOSTROPHES = "'’"
_SIGN = re.compile(f"[{in_class(PUNCTUATION)}]")
_MARK = re.compile(f"[{in_class(MARK)}\u200d]")
_HAN = re.compile(f"[{in_class(HAN)}]")


class Detokenizer:
    """Converts ids to text one by one, with the spaces of prose between words.

    Args:
        vocabulary: the tokens by id.
        level: the token unit.
        splitter: how words were found, at word level.
        eos_id: the id that ends a line, at word level.
    """

    def __init__(
        self, vocabulary: Sequence[str], level: Level, splitter: Splitter, eos_id: int | None
    ) -> None:
        self._vocabulary = vocabulary
        self._level = level
        self._splitter = splitter
        self._line_end = None if eos_id is None else vocabulary[eos_id]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # The last token of the line, whether the next one follows without a space, and the closing
        # marks of open quotations.
        self._last = ""
        self._glued = True
        self._open: set[str] = set()

    def add(self, index: int) -> str:
        """The text of the next id; at byte level, once a character is complete."""
        token = self._vocabulary[index]
        if self._level == "char":
            # <UNK> is shown as the replacement character.
            return token if len(token) == 1 else "\ufffd"
        if self._level == "byte":
            return self._decoder.decode(bytes([index]))
        return self._spaced(token)

    def follow(self, words: Iterable[str], *, is_spaced: bool) -> None:
        """Makes the next word continue a text that was written elsewhere.

        Args:
            words: the words of the text.
            is_spaced: whether the text ends with white space.
        """
        for word in words:
            self._spaced(word)
        if is_spaced:
            self._last, self._glued = "", True

    def end(self) -> str:
        """The rest: at byte level, the replacement of an incomplete character."""
        return self._decoder.decode(b"", final=True)

    def _spaced(self, token: str) -> str:
        """A word, with a space before it if prose has one."""
        if token == self._line_end:
            self._last, self._glued = "", True
            self._open.clear()
            return "\n"
        if self._splitter == "whitespace":
            space, self._glued = ("" if self._glued else " "), False
            return space + token
        return self._prose(token)

    def _prose(self, token: str) -> str:
        before, after = _sides(token)
        if token in self._open or token in _PAIRED:
            closes = token in self._open
            before, after = not closes, closes
            self._open ^= {token}
        if token in _CLOSERS:
            self._open.add(_CLOSERS[token])
        is_spaced = before and not self._glued and not _joins(self._last, token)
        # A combining mark must not attach to the previous token.
        is_spaced = is_spaced or bool(self._last and _MARK.match(token))
        self._last, self._glued = token, not after
        return f" {token}" if is_spaced else token


@functools.lru_cache(maxsize=10_000)
def _sides(token: str) -> tuple[bool, bool]:
    """Whether a token has spaces before and after it, as far as its neighbours allow."""
    sign = token[0]
    if len(token) > 1 and sign in _APOSTROPHES:
        return _AFTER
    if token == "<UNK>" or not _SIGN.match(sign):
        return _SPACED
    if sign in _OTHERS:
        return _OTHERS[sign]
    if sign.isascii():
        return _ASCII.get(sign, _SPACED)
    # Full-width and CJK punctuation includes its space.
    if "\u3000" < sign < "\u3100" or "\ufe10" <= sign <= "\uff65":
        return _NONE
    return _CATEGORIES.get(unicodedata.category(sign), _SPACED)


def _joins(last: str, token: str) -> bool:
    """Whether a quotation mark or bracket is next to a letter of a script without spaces."""
    if not last or last in _APOSTROPHES or token in _APOSTROPHES:
        return False
    if _HAN.match(token):
        return unicodedata.category(last[0]) in ("Pe", "Pf")
    return bool(_HAN.match(last[-1])) and unicodedata.category(token[0]) in ("Ps", "Pi")
