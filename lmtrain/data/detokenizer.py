"""From token ids back to text, one after the other, as generation draws them.

Words are spaced as prose is written, bytes are held back until a character is whole.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

Level = Literal["word", "char", "byte"]
Splitter = Literal["whitespace", "words"]


class Detokenizer:
    """Turns ids into text as they come, words spaced as prose is written.

    Args:
        vocabulary: the tokens in the order of their ids.
        level: what a token is.
        splitter: how words were found, at word level.
        eos_id: the id that ends a line, at word level.
    """

    _NO_SPACE_BEFORE: ClassVar = frozenset(".,;:!?)]}%…’”»、。！？）」』")
    _NO_SPACE_AFTER: ClassVar = frozenset("([{$#@“‘«（「『")
    _NO_SPACE_AROUND: ClassVar = frozenset("/-–—_")
    _PAIRED: ClassVar = frozenset("\"'`*")

    def __init__(
        self, vocabulary: Sequence[str], level: Level, splitter: Splitter, eos_id: int | None
    ) -> None:
        self._vocabulary = vocabulary
        self._level = level
        self._splitter = splitter
        self._line_end = None if eos_id is None else vocabulary[eos_id]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._glued = True
        self._open: set[str] = set()

    def add(self, index: int) -> str:
        """The text to write for the next id; at byte level, once a character is whole."""
        token = self._vocabulary[index]
        if self._level == "char":
            return token if len(token) == 1 else "\ufffd"
        if self._level == "byte":
            return self._decoder.decode(bytes([index]))
        return self._spaced(token)

    def follow(self, words: Iterable[str], *, is_spaced: bool) -> None:
        """Makes the next word go on from a text that was not written here.

        Args:
            words: those of the text.
            is_spaced: whether the text ends with white space.
        """
        for word in words:
            self._spaced(word)
        self._glued |= is_spaced

    def end(self) -> str:
        """What is left to write: at byte level, the replacement for a broken character."""
        return self._decoder.decode(b"", final=True)

    def _spaced(self, token: str) -> str:
        """A word with the space before it, if there is one."""
        if token == self._line_end:
            self._glued = True
            self._open.clear()
            return "\n"
        if self._splitter == "whitespace":
            space, self._glued = ("" if self._glued else " "), False
            return space + token
        return self._prose(token)

    def _prose(self, token: str) -> str:
        closes = token in self._open
        clitic = len(token) > 1 and token[0] in "'’"
        before = self._glued or closes or clitic or token in self._NO_SPACE_BEFORE
        before = before or token in self._NO_SPACE_AROUND
        opens = token in self._PAIRED and not closes
        self._open ^= {token} if token in self._PAIRED else set()
        self._glued = opens or token in self._NO_SPACE_AFTER or token in self._NO_SPACE_AROUND
        return token if before else " " + token
