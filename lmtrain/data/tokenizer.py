"""Tokenizers for words, characters and bytes, and the vocabulary of a text.

A tokenizer is saved as a `tokenizer.json` that the `tokenizers` library reads and that gives the
same ids there. Words are found by one regular expression that lists the ranges of its character
classes, so that Python and that library agree.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.characters import MARK, PUNCTUATION, SPACE, in_class
from lmtrain.data.detokenizer import Detokenizer, Level, Splitter
from lmtrain.data.runs import RunNumbers
from lmtrain.errors import CheckpointError, TextError

UNK = "<UNK>"
EOS = "<EOS>"
# Not counted as words; <unk> is the spelling of the Penn Treebank.
_SPECIAL = frozenset({UNK, EOS, "<unk>"})
# Tokens that the vocabulary of each level must have.
_SPECIALS: dict[Level, set[str]] = {"word": {UNK, EOS}, "char": {UNK}, "byte": set()}

_SPACE = in_class(SPACE)
_IS_SPACE = re.compile(f"[{_SPACE}]")
_JOINER = "\u200d"
_BMP, _LAST = 0xFFFF, 0x10FFFF
_BEYOND_BMP = re.compile("[\U00010000-\U0010ffff]")
_RUN_BEYOND_BMP = re.compile(rf"(?<![^{_SPACE}])([^{_SPACE}]*[\U00010000-\U0010ffff][^{_SPACE}]*)")


def _pattern(splitter: Splitter, last: int = _LAST) -> str:
    """The regular expression of a word in text with code points up to `last`."""
    if splitter == "whitespace":
        return rf"[^{_SPACE}]+"
    punctuation, mark = in_class(PUNCTUATION, last), in_class(MARK, last)
    letter = f"[^{_SPACE}{punctuation}]"
    # 's and 't are separate tokens; the apostrophe of O'Neill and the dot of os.path are not.
    clitic = rf"['’](?:s|S|t|T|re|RE|ve|VE|ll|LL|d|D|m|M)(?!{letter})"
    # An emoji includes its marks and those that a zero-width joiner connects to it.
    sign = rf"[{punctuation}][{mark}]*"
    flag = "[\U0001f1e6-\U0001f1ff]{2}|" if last > _BMP else ""
    return (
        rf"[0-9]+(?:[.,][0-9]+)+(?!{letter})"
        rf"|{letter}+(?:(?:\.|(?!{clitic})['’]){letter}+)*"
        rf"|{EOS}|{UNK}"
        rf"|(?=['’])(?:(?<={letter})|(?<={UNK})){clitic}"
        rf"|{flag}{sign}(?:{_JOINER}{sign})*"
    )


@functools.cache
def _compiled(splitter: Splitter, last: int) -> re.Pattern[str]:
    """The regular expression of a word or line end."""
    return re.compile(_pattern(splitter, last) + r"|\n")


_ANY_CHARACTER = r"[\s\S]"
# Longer runs without white space are split, so that memory is bounded.
_LONGEST_RUN = 4096
_OVERLONG = re.compile(rf"(?<![^{_SPACE}])[^{_SPACE}]{{{_LONGEST_RUN + 1},}}")


class Tokenizer:
    r"""A vocabulary and the rules for splitting text.

    Args:
        vocabulary: the tokens by id.
        level: the token unit.
        splitter: how words are found, at word level.
        lowercase: whether text is converted to lower case.
        nfc: whether text is normalized to Unicode NFC.

    Raises:
        CheckpointError: a duplicate token, `<UNK>` or at word level `<EOS>` missing, or at
            character level a token of several characters.

    Example:
        >>> tokenizer = build_tokenizer(["a cat sat\n"], level="word")
        >>> tokenizer.encode("a dog sat").tolist()
        [2, 0, 4]
        >>> tokenizer.decode([2, 3, 1])
        'a cat\n'
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        level: Level = "word",
        splitter: Splitter = "words",
        *,
        lowercase: bool = False,
        nfc: bool = False,
    ) -> None:
        self.vocabulary = list(vocabulary)
        self.level = level
        self.splitter = splitter
        self.lowercase = lowercase
        self.nfc = nfc
        self._ids = {token: index for index, token in enumerate(self.vocabulary)}
        if len(self._ids) != len(self.vocabulary):
            raise CheckpointError("tokenizer: the vocabulary has a token twice")
        if "" in self._ids:
            raise CheckpointError("tokenizer: the vocabulary has an empty token")
        if missing := _SPECIALS[level] - self._ids.keys():
            raise CheckpointError(
                f"tokenizer: the vocabulary lacks {' and '.join(sorted(missing))}"
            )
        longer = [token for token in self.vocabulary if len(token) != 1 and token != UNK]
        if level == "char" and longer:
            raise CheckpointError(f"tokenizer: {longer[0]!a} is not one character")
        self._word_ids = _WordIds(self._ids, self.unk_id or 0)

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary, including special ones."""
        return len(self.vocabulary)

    @property
    def unk_id(self) -> int | None:
        """The id of `<UNK>`; None at byte level, which has no unknown tokens."""
        return self._ids[UNK] if self.level != "byte" else None

    @property
    def eos_id(self) -> int | None:
        """The id of `<EOS>`; None except at word level."""
        return self._ids[EOS] if self.level == "word" else None

    @property
    def start_id(self) -> int | None:
        """The input before the first token of a text: `<EOS>`, or the newline; None for none."""
        return self.line_end_id

    @property
    def line_end_id(self) -> int | None:
        """The id of the token that ends a line: `<EOS>` or the newline; None for none."""
        if self.level == "word":
            return self.eos_id
        return self._ids.get("\n") if self.level == "char" else ord("\n")

    def encode(self, text: str) -> NDArray[np.int64]:
        r"""The ids of a text, (N,); `\n`, `\r\n` and `\r` end a line, at word level with `<EOS>`.

        Raises:
            TextError: at byte level, a text that is not valid Unicode.
        """
        if self.level == "word":
            return self.word_ids(self.words(text))
        if self.level == "char":
            return self.character_ids[self.codes(text)]
        try:
            content = _normalized(text, nfc=self.nfc).encode("utf-8")
        except UnicodeEncodeError:
            raise TextError("the text is not valid UTF-8") from None
        return np.frombuffer(content, np.uint8).astype(np.int64)

    def encoder(self) -> Callable[[str], NDArray[Any]]:
        """A function that encodes the pieces of a long text as `encode` does, words faster.

        It remembers runs of words, which takes memory as long as it exists.
        """
        if self.level != "word":
            return self.encode
        return _run_encoder(self._word_ids, self.splitter, lowercase=self.lowercase, nfc=self.nfc)

    def codes(self, text: str) -> NDArray[np.uint32]:
        """The code points of a text, (N,): indices of `character_ids`."""
        return _codes(_normalized(text, nfc=self.nfc))

    @functools.cached_property
    def character_ids(self) -> NDArray[np.int64]:
        """The id of every Unicode code point, at character level."""
        ids = np.full(0x110000, self.unk_id, np.int64)
        for token, index in self._ids.items():
            if token != UNK:
                ids[ord(token)] = index
        return ids

    def unknown_characters(self, texts: Iterable[str]) -> dict[str, int]:
        """The characters of texts that are `<UNK>` at character level, with their counts."""
        if self.level != "char":
            return {}
        codes = self.codes("".join(texts))
        return character_counts(codes[self.character_ids[codes] == self.unk_id])

    def word_ids(self, words: Collection[str]) -> NDArray[np.int64]:
        """The ids of words, (N,)."""
        return np.fromiter(map(self._word_ids.__getitem__, words), np.int64, len(words))

    def words(self, text: str) -> list[str]:
        """The words of a text that does not start or end within a word."""
        return split_words(text, self.splitter, lowercase=self.lowercase, nfc=self.nfc)

    def unknown(self, text: str) -> list[str]:
        """The distinct words or characters of a text that are `<UNK>`."""
        if self.unk_id is None:
            return []
        tokens = self.words(text) if self.level == "word" else _normalized(text, nfc=self.nfc)
        return [token for token in dict.fromkeys(tokens) if token not in self._ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; words get the spaces of prose."""
        detokenizer = self.detokenizer()
        return "".join(detokenizer.add(index) for index in ids) + detokenizer.end()

    def detokenizer(self, before: str = "") -> Detokenizer:
        """A detokenizer for ids that follow the text `before`."""
        detokenizer = Detokenizer(self.vocabulary, self.level, self.splitter, self.eos_id)
        if self.level == "word":
            detokenizer.follow(self.words(before), is_spaced=before[-1:].isspace())
        return detokenizer

    def to_json(self) -> str:
        """The content of `tokenizer.json`, in the format of the `tokenizers` library."""
        return json.dumps(self._tree(), ensure_ascii=False, indent=1)

    def _tree(self) -> dict[str, Any]:
        tokens = self.vocabulary
        if self.level == "byte":
            tokens = [_BYTE_SYMBOLS[byte] for byte in range(256)]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            **_pipeline(self.level, self.splitter, lowercase=self.lowercase, nfc=self.nfc),
            "model": {
                "type": "WordLevel",
                "vocab": {token: index for index, token in enumerate(tokens)},
                "unk_token": UNK,
            },
        }

    @staticmethod
    def from_json(text: str) -> "Tokenizer":
        """The tokenizer of a `tokenizer.json` that lmtrain wrote.

        Raises:
            CheckpointError: another file, or ids that are not 0, 1, 2 and so on.
        """
        try:
            tree = json.loads(text)
            ids = dict(tree["model"]["vocab"].items())
            vocabulary = sorted(ids, key=ids.__getitem__)
            numbered = all(type(index) is int for index in ids.values())
            "".join(vocabulary).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"tokenizer.json is damaged: {error!a}") from None
        if not vocabulary or not numbered or sorted(ids.values()) != list(range(len(ids))):
            raise CheckpointError("tokenizer.json is damaged: ids are not 0, 1, 2 and so on")
        for level, splitter, options in _KINDS:
            pipeline = _pipeline(level, splitter, **options)
            if pipeline == {part: tree.get(part) for part in pipeline}:
                if level == "byte":
                    vocabulary = [chr(byte) for byte in range(256)]
                tokenizer = Tokenizer(vocabulary, level, splitter, **options)
                if tokenizer._tree() == tree:
                    return tokenizer
        raise CheckpointError("tokenizer.json has splitting rules that lmtrain does not support")


class _FirstAppearance(dict[str, int]):
    """Numbers words in the order of their first occurrence."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


class _WordIds(dict[str, int]):
    """The id of each word, and of `<UNK>` for all other words."""

    def __init__(self, ids: dict[str, int], unk_id: int) -> None:
        super().__init__(ids)
        self._unk_id = unk_id

    def __missing__(self, word: str) -> int:
        return self._unk_id


def build_tokenizer(
    chunks: Iterable[str],
    level: Level,
    splitter: Splitter = "words",
    *,
    vocab_size: int = 10_000,
    min_count: int = 1,
    lowercase: bool = False,
    nfc: bool = False,
) -> Tokenizer:
    r"""Builds the tokenizer of a text: its most frequent words, its characters, or the 256 bytes.

    Words are sorted by decreasing count, then by first occurrence, so that the vocabulary is a pure
    function of the text. Characters are sorted by code point, after `<UNK>`.

    Args:
        chunks: the text in pieces that may end anywhere.
        level: the token unit.
        splitter: how words are found.
        vocab_size: maximum number of words, including `<UNK>` and `<EOS>`; characters and bytes
            are not limited.
        min_count: minimum count of a word or character.
        lowercase: whether text is converted to lower case.
        nfc: whether text is normalized to Unicode NFC.

    Example:
        >>> build_tokenizer(["b a b\n"], level="word").vocabulary
        ['<UNK>', '<EOS>', 'b', 'a']
    """
    if level == "byte":
        return Tokenizer([chr(byte) for byte in range(256)], "byte", nfc=nfc)
    numbering = Numbering(level, splitter, lowercase=lowercase, nfc=nfc)
    pieces, encode = Pieces(level, nfc=nfc), numbering.encoder()
    for chunk in chunks:
        numbering.count(encode(pieces.add(chunk)))
    numbering.count(encode(pieces.end()))
    return numbering.tokenizer(vocab_size, min_count)


class Numbering:
    """Numbers and counts the tokens of a text whose vocabulary is not known yet.

    Words are numbered by first occurrence, characters by code point.

    Args:
        level: the token unit, word or char.
        splitter: how words are found.
        lowercase: whether text is converted to lower case.
        nfc: whether text is normalized to Unicode NFC.
    """

    def __init__(self, level: Level, splitter: Splitter, *, lowercase: bool, nfc: bool) -> None:
        self._level = level
        self._splitter = splitter
        self._lowercase = lowercase
        self._nfc = nfc
        self._numbers = _FirstAppearance()
        self._counts = np.zeros(0, np.int64)

    def encoder(self) -> Callable[[str], NDArray[np.unsignedinteger]]:
        """A function that numbers the tokens of pieces of a text, which do not end within a word.

        It remembers runs of words, which takes memory as long as it exists.
        """
        if self._level == "char":
            return lambda text: _codes(_normalized(text, nfc=self._nfc))
        return _run_encoder(self._numbers, self._splitter, lowercase=self._lowercase, nfc=self._nfc)

    def count(self, numbers: NDArray[np.unsignedinteger]) -> None:
        """Counts tokens of training text."""
        missing = int(numbers.max(initial=0)) + 1 - len(self._counts)
        if missing > 0:
            # Room for as many again, so that few blocks need more.
            self._counts = np.pad(self._counts, (0, missing + len(self._counts)))
        np.add.at(self._counts, numbers, 1)

    def tokenizer(self, vocab_size: int, min_count: int) -> Tokenizer:
        """The tokenizer of the counted text, see `build_tokenizer`.

        Raises:
            TextError: no character is frequent enough.
        """
        frequent = np.flatnonzero(self._counts >= min_count)
        if self._level == "char" and self._counts.any() and not len(frequent):
            raise TextError(
                f"no character occurs data.min_count = {min_count:,} times in the training data",
                "try: a smaller data.min_count",
            )
        if self._level == "char":
            known = [chr(code) for code in frequent]
            return Tokenizer([UNK, *known], "char", nfc=self._nfc)
        words = list(self._numbers)
        by_count = frequent[np.argsort(-self._counts[frequent], kind="stable")]
        most = (words[number] for number in by_count if words[number] not in _SPECIAL)
        known = list(itertools.islice(most, vocab_size - 2))
        return Tokenizer(
            [UNK, EOS, *known], "word", self._splitter, lowercase=self._lowercase, nfc=self._nfc
        )

    def ids(self, tokenizer: Tokenizer) -> NDArray[np.int64]:
        """The token id of each number."""
        if self._level == "char":
            return tokenizer.character_ids
        return tokenizer.word_ids(self._numbers)


class Pieces:
    """Joins pieces of text that end anywhere into pieces that do not end within a token.

    At word level, text is held back after the last white space; for NFC, from the last character
    that does not compose with one before it. The last line of words gets a newline if it has none.

    Args:
        level: the token unit.
        nfc: whether text is normalized to Unicode NFC.
    """

    def __init__(self, level: Level, *, nfc: bool = False) -> None:
        self._level = level
        self._nfc = nfc
        self._rest = ""
        self._last = "\n"

    def add(self, chunk: str) -> str:
        """The text that is complete after another chunk."""
        self._last = chunk[-1:] or self._last
        text = self._rest + chunk
        # A newline after a carriage return belongs to the same line end.
        cut = len(text) - text.endswith("\r")
        if self._level == "word":
            longest = cut - cut % _LONGEST_RUN
            while cut and not _IS_SPACE.match(text, cut - 1):
                cut -= 1
            cut = cut or longest
        elif self._nfc:
            while cut and _may_compose(text[cut - 1]):
                cut -= 1
            # The last character may compose with what follows, but not a newline.
            cut -= cut > 0 and text[cut - 1] != "\n"
            cut -= text.endswith("\r", 0, cut)
        self._rest = text[cut:]
        return text[:cut]

    def end(self) -> str:
        """The rest at the end of the text."""
        is_open = self._level == "word" and self._last not in "\r\n"
        return self._rest + "\n" if is_open else self._rest


def _may_compose(character: str) -> bool:
    """Whether NFC may compose a character with one before it: a mark, or a part of Hangul."""
    is_hangul = "\u1160" <= character <= "\u11ff"
    return is_hangul or unicodedata.category(character).startswith("M")


def split_words(
    text: str, splitter: Splitter, *, lowercase: bool = False, nfc: bool = False
) -> list[str]:
    r"""Splits a text into words, with `<EOS>` at the end of each line.

    White space of any script separates words. Punctuation marks and symbols are separate words; a
    run of letters is one word, also in scripts without spaces such as Chinese.

    Example:
        >>> split_words("Don't stop.\n", "words")
        ['Don', "'t", 'stop', '.', '<EOS>']
    """
    text = _prepared(text, lowercase=lowercase, nfc=nfc)
    return _find_words(text.replace("\n", f" {EOS} "), splitter)


def _run_encoder(
    numbers: Mapping[str, int], splitter: Splitter, *, lowercase: bool, nfc: bool
) -> Callable[[str], NDArray[np.uint32]]:
    """A function that gives the numbers of the words of the pieces of a long text."""

    def split(lines: str) -> list[str]:
        return _find_words(_prepared(lines, lowercase=lowercase, nfc=nfc), splitter)

    runs = RunNumbers(numbers, split, EOS)
    return lambda text: runs.encode(_normalized(text, nfc=False))


def _prepared(text: str, *, lowercase: bool, nfc: bool) -> str:
    """The text whose words are found: overlong runs are cut, then its characters are mapped."""
    # Before normalization and lower case, which can change the length.
    text = _normalized(_OVERLONG.sub(_cut, text), nfc=nfc)
    # Like the tokenizers library, without the special case of a final sigma.
    return text.replace("Σ", "σ").lower() if lowercase else text


def _find_words(text: str, splitter: Splitter) -> list[str]:
    """The words and line ends of a text."""
    find = _compiled(splitter, _BMP).findall
    if splitter == "whitespace" or text.isascii() or not _BEYOND_BMP.search(text):
        return find(text)
    # Classes beyond the Basic Multilingual Plane make regular expressions several times slower:
    # they are only used for runs with such characters.
    find_all = _compiled(splitter, _LAST).findall
    words = []
    for index, piece in enumerate(_RUN_BEYOND_BMP.split(text)):
        words += find_all(piece) if index % 2 else find(piece)
    return words


def _normalized(text: str, *, nfc: bool) -> str:
    """The text with the newline as the only line end, in NFC on request."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", text) if nfc else text


def _cut(run: re.Match[str]) -> str:
    text = run[0]
    return " ".join(text[i : i + _LONGEST_RUN] for i in range(0, len(text), _LONGEST_RUN))


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def character_counts(codes: NDArray[np.unsignedinteger]) -> dict[str, int]:
    """Characters by decreasing count from code points.

    Example:
        >>> character_counts(np.array([98, 97, 98]))
        {'b': 2, 'a': 1}
    """
    found, counts = np.unique(codes, return_counts=True)
    return {chr(found[i]): int(counts[i]) for i in np.argsort(-counts, kind="stable")}


def _byte_symbols() -> dict[int, str]:
    # The printable character that ByteLevel of the tokenizers library uses for each byte.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


_BYTE_SYMBOLS = _byte_symbols()
_OPTIONS = [{"nfc": nfc} for nfc in (False, True)]
_KINDS: list[tuple[Level, Splitter, dict[str, bool]]] = [
    *(
        ("word", splitter, {"lowercase": lowercase, **options})
        for splitter in ("words", "whitespace")
        for lowercase in (False, True)
        for options in _OPTIONS
    ),
    *(("char", "words", options) for options in _OPTIONS),
    *(("byte", "words", options) for options in _OPTIONS),
]


def _pipeline(
    level: Level, splitter: Splitter, *, lowercase: bool = False, nfc: bool = False
) -> dict[str, Any]:
    """The parts of a tokenizer.json that say how text is cut, and by which it is known again."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    line_ends = {
        "type": "Replace",
        "pattern": {"Regex": r"\r\n?|\n"},
        "content": f" {EOS} " if level == "word" else "\n",
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": _pattern(splitter) if level == "word" else _ANY_CHARACTER},
        "behavior": "Removed",
        "invert": True,
    }
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *([{"type": "NFC"}] if nfc else []),
                *([{"type": "Lowercase"}] if lowercase else []),
                line_ends,
            ],
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level, split]}
        if level == "byte"
        else split,
        "post_processor": None,
        "decoder": {"word": None, "char": {"type": "Fuse"}, "byte": byte_level}[level],
    }
