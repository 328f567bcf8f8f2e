"""From text to token ids and back: words, characters or bytes, and the vocabulary of a text.

A tokenizer is saved as a `tokenizer.json` that the `tokenizers` library reads and that gives the
same ids there. To make that exact, words are found by one regular expression that Python and that
library read alike: it names every character class it uses. Knows text, never files or models.
"""

import itertools
import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.detokenizer import Detokenizer, Level, Splitter
from lmtrain.errors import CheckpointError, TextError

UNK = "<UNK>"
EOS = "<EOS>"
# Never counted as words; the last is how the Penn Treebank writes the first.
_SPECIAL = frozenset({UNK, EOS, "<unk>"})

_SPACE = r" \t\n\r\f\v"
# Everything printed that is no letter, mark, digit or underscore, in the blocks prose uses.
_PUNCTUATION = r"!-/:-@\[-\^`{-~¡-©«-´¶-¹»-¿×÷‐-‧‰-⁞、-〿！-／：-＠［-｀｛-･"
_LETTER = f"[^{_SPACE}{_PUNCTUATION}]"
# 's and 't stand alone; the apostrophe of O'Neill and the point of os.path belong to their word.
_CLITIC = rf"['’](?:s|S|t|T|re|RE|ve|VE|ll|LL|d|D|m|M)(?!{_LETTER})"
_PATTERNS: dict[Splitter, str] = {
    "whitespace": rf"[^{_SPACE}]+",
    "words": (
        rf"{EOS}|{UNK}"
        rf"|(?<={_LETTER}){_CLITIC}"
        rf"|[0-9]+(?:[.,][0-9]+)+(?!{_LETTER})"
        rf"|{_LETTER}+(?:(?:\.|(?!{_CLITIC})['’]){_LETTER}+)*"
        rf"|[{_PUNCTUATION}]"
    ),
}
_ANY_CHARACTER = r"[\s\S]"
# A run without white space longer than this is cut, so that text is read in bounded memory.
_LONGEST_RUN = 4096
_OVERLONG = re.compile(rf"(?<![^{_SPACE}])[^{_SPACE}]{{{_LONGEST_RUN + 1},}}")


class Tokenizer:
    r"""A vocabulary with the way text is cut.

    Args:
        vocabulary: the tokens in the order of their ids.
        level: what a token is.
        splitter: how words are found, at word level.
        lowercase: whether words are put in lower case first.

    Raises:
        CheckpointError: a token stands twice, or the word level lacks `<UNK>` or `<EOS>`.

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
    ) -> None:
        self.vocabulary = list(vocabulary)
        self.level = level
        self.splitter = splitter
        self.lowercase = lowercase
        self._ids = {token: index for index, token in enumerate(self.vocabulary)}
        if len(self._ids) != len(self.vocabulary):
            raise CheckpointError("tokenizer: a token stands in the vocabulary twice")
        if level == "word" and not {UNK, EOS} <= self._ids.keys():
            raise CheckpointError(f"tokenizer: the vocabulary lacks {UNK} or {EOS}")
        self._word_ids = _WordIds(self._ids, self.unk_id or 0)
        if level == "char":
            self._table = _character_table(self.vocabulary, self.unk_id)

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, special ones included."""
        return len(self.vocabulary)

    @property
    def unk_id(self) -> int | None:
        """The id of `<UNK>`, or None where every token is known."""
        return self._ids.get(UNK) if self.level != "byte" else None

    @property
    def eos_id(self) -> int | None:
        """The id of `<EOS>`, at word level."""
        return self._ids[EOS] if self.level == "word" else None

    @property
    def start_id(self) -> int | None:
        """What stands before the first token of a text: `<EOS>`, or the newline if it is known."""
        return self.line_end_id

    @property
    def line_end_id(self) -> int | None:
        """The token that ends a line: `<EOS>`, the newline, or None where there is none."""
        if self.level == "word":
            return self.eos_id
        return self._ids.get("\n") if self.level == "char" else ord("\n")

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids of a text, (N,); at word level every newline is `<EOS>`.

        Raises:
            TextError: at character level, a character outside the vocabulary.
        """
        if self.level == "word":
            return self._encode_words(text)
        return self._encode_characters(text) if self.level == "char" else self._encode_bytes(text)

    def word_ids(self, words: Collection[str]) -> NDArray[np.int64]:
        """The ids of words, (N,)."""
        return np.fromiter(map(self._word_ids.__getitem__, words), np.int64, len(words))

    def words(self, text: str) -> list[str]:
        """The words of a text that holds no part of a word."""
        return split_words(text, self.splitter, lowercase=self.lowercase)

    def unknown(self, text: str) -> list[str]:
        """The words or characters of a text that are `<UNK>`, each once."""
        if self.unk_id is None:
            return []
        tokens = self.words(text) if self.level == "word" else text
        return [token for token in dict.fromkeys(tokens) if token not in self._ids]

    def _encode_words(self, text: str) -> NDArray[np.int64]:
        return self.word_ids(self.words(text))

    def _encode_characters(self, text: str) -> NDArray[np.int64]:
        codes = _codes(text)
        ids: NDArray[np.int64] = self._table[codes]
        if ids.size and ids.min() < 0:
            unknown = chr(codes[int(np.argmin(ids))])
            raise TextError(
                f"character {unknown!r} is not in the vocabulary of {self.vocab_size} characters",
                "train on text that has it, with --set data.min_count=2 to make room for <UNK>, "
                "or with --level byte",
            )
        return ids

    def _encode_bytes(self, text: str) -> NDArray[np.int64]:
        try:
            return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64)
        except UnicodeEncodeError:
            raise TextError("the text is not valid UTF-8") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ids stand for; words are joined as prose is written."""
        detokenizer = self.detokenizer()
        return "".join(detokenizer.add(index) for index in ids) + detokenizer.end()

    def detokenizer(self, before: str = "") -> Detokenizer:
        """What turns ids into text one after the other, where the text `before` is written."""
        found = Detokenizer(self.vocabulary, self.level, self.splitter, self.eos_id)
        if self.level == "word":
            found.follow(self.words(before), is_spaced=before[-1:].isspace())
        return found

    def to_json(self) -> str:
        """The content of `tokenizer.json`, in the format of the `tokenizers` library."""
        tokens = self.vocabulary
        if self.level == "byte":
            tokens = [_BYTE_SYMBOLS[byte] for byte in range(256)]
        return json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                **_pipeline(self.level, self.splitter, lowercase=self.lowercase),
                "model": {
                    "type": "WordLevel",
                    "vocab": {token: index for index, token in enumerate(tokens)},
                    "unk_token": UNK,
                },
            },
            ensure_ascii=False,
            indent=1,
        )

    @staticmethod
    def from_json(text: str) -> "Tokenizer":
        """The tokenizer that a `tokenizer.json` of lmtrain holds.

        Raises:
            CheckpointError: not such a file, or ids that are not 0, 1, 2 and so on.
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
        for kind in _KINDS:
            if (found := _of_kind(kind, vocabulary)) and json.loads(found.to_json()) == tree:
                return found
        raise CheckpointError("tokenizer.json holds a way to cut text that lmtrain does not have")


def _of_kind(kind: tuple[Level, Splitter, bool], vocabulary: Sequence[str]) -> Tokenizer | None:
    level, splitter, lowercase = kind
    if level == "byte":
        vocabulary = [chr(byte) for byte in range(256)]
    if level == "char" and any(len(token) != 1 and token != UNK for token in vocabulary):
        return None
    if level == "word" and not {UNK, EOS} <= set(vocabulary):
        return None
    return Tokenizer(vocabulary, level, splitter, lowercase=lowercase)


class _FirstAppearance(dict[str, int]):
    """A number for each word, in the order of first appearance."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


class _WordIds(dict[str, int]):
    """The id of each word; of any other word, that of `<UNK>`."""

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
    has_unk: bool = False,
) -> Tokenizer:
    r"""The tokenizer of a text: its most frequent words, or its characters, or the 256 bytes.

    Words come by falling count, words of equal count by first appearance, so that the vocabulary
    is a pure function of the text. Characters come in the order of Unicode; with `min_count`
    above 1 rarer ones become `<UNK>`.

    Args:
        chunks: the text in pieces, cut anywhere.
        level: what a token is.
        splitter: how words are found.
        vocab_size: most words, `<UNK>` and `<EOS>` included; characters and bytes are not limited.
        min_count: least occurrences of a word or character.
        lowercase: whether words are put in lower case first.
        has_unk: whether characters have `<UNK>` for new ones even where none is rare.

    Example:
        >>> build_tokenizer(["b a b\n"], level="word").vocabulary
        ['<UNK>', '<EOS>', 'b', 'a']
    """
    if level == "byte":
        return Tokenizer([chr(byte) for byte in range(256)], "byte")
    numbering, pieces = Numbering(level, splitter, lowercase=lowercase), Pieces(level)
    for chunk in chunks:
        numbering.count(numbering.encode(pieces.add(chunk)))
    numbering.count(numbering.encode(pieces.end()))
    return numbering.tokenizer(vocab_size, min_count, has_unk=has_unk)


class Numbering:
    """Numbers for the tokens of a text whose vocabulary is not known yet, and their counts.

    Words are numbered by their first appearance, characters by Unicode.

    Args:
        level: what a token is: a word or a character.
        splitter: how words are found.
        lowercase: whether words are put in lower case first.
    """

    def __init__(self, level: Level, splitter: Splitter, *, lowercase: bool) -> None:
        self._level = level
        self._splitter = splitter
        self._lowercase = lowercase
        self._numbers = _FirstAppearance()
        self._counts = np.zeros(0, np.int64)

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        """The numbers of the tokens of a text that holds no part of a word, (N,)."""
        if self._level == "char":
            return _codes(text)
        words = split_words(text, self._splitter, lowercase=self._lowercase)
        return np.fromiter(map(self._numbers.__getitem__, words), np.uint32, len(words))

    def count(self, numbers: NDArray[np.unsignedinteger]) -> None:
        """Counts tokens of training text."""
        found = np.bincount(numbers, minlength=len(self._counts))
        found[: len(self._counts)] += self._counts
        self._counts = found

    def tokenizer(self, vocab_size: int, min_count: int, *, has_unk: bool = False) -> Tokenizer:
        """The tokenizer of what was counted, as `build_tokenizer` describes it."""
        frequent = np.flatnonzero(self._counts >= min_count)
        if self._level == "char":
            known = [chr(code) for code in frequent]
            return Tokenizer([*([UNK] if has_unk or min_count > 1 else []), *known], "char")
        words = list(self._numbers)
        by_count = frequent[np.argsort(-self._counts[frequent], kind="stable")]
        most = (words[number] for number in by_count if words[number] not in _SPECIAL)
        known = list(itertools.islice(most, vocab_size - 2))
        return Tokenizer([UNK, EOS, *known], "word", self._splitter, lowercase=self._lowercase)

    def ids(self, tokenizer: Tokenizer) -> NDArray[np.int64]:
        """The id of each number in a vocabulary; of characters, of those that were counted."""
        if self._level == "word":
            return tokenizer.word_ids(self._numbers)
        codes = np.flatnonzero(self._counts)
        ids = np.zeros(len(self._counts), np.int64)
        ids[codes] = tokenizer.encode("".join(map(chr, codes)))
        return ids


class Pieces:
    """Text that comes in pieces cut anywhere, put together so that none ends within a word.

    At the other levels than that of words a piece is left as it is. A last line of words gets its
    newline.

    Args:
        level: what a token is.
    """

    def __init__(self, level: Level) -> None:
        self._level = level
        self._rest = ""
        self._last = "\n"

    def add(self, chunk: str) -> str:
        """What is whole after one more chunk."""
        if self._level != "word" or not chunk:
            return chunk
        self._last = chunk[-1]
        text = self._rest + chunk
        cut = max(text.rfind(space) for space in " \n\t\r\f\v") + 1
        if not cut:
            cut = len(text) - len(text) % _LONGEST_RUN
        self._rest = text[cut:]
        return text[:cut]

    def end(self) -> str:
        """What is left at the end of the text."""
        return self._rest + "\n" if self._last != "\n" else ""


def split_words(text: str, splitter: Splitter, *, lowercase: bool = False) -> list[str]:
    r"""The words of a text, with `<EOS>` for every newline.

    Example:
        >>> split_words("Don't stop.\n", "words")
        ['Don', "'t", 'stop', '.', '<EOS>']
    """
    # Before the case is changed, since that can change the length.
    text = _OVERLONG.sub(_cut, text)
    if lowercase:
        # Character by character, as the tokenizers library does: a final sigma is no exception.
        text = text.replace("Σ", "σ").lower()
    return re.findall(_PATTERNS[splitter], text.replace("\n", f" {EOS} "))


def _cut(run: re.Match[str]) -> str:
    text = run[0]
    return " ".join(text[i : i + _LONGEST_RUN] for i in range(0, len(text), _LONGEST_RUN))


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _character_table(vocabulary: Sequence[str], unk_id: int | None) -> NDArray[np.int64]:
    table = np.full(0x110000, -1 if unk_id is None else unk_id, np.int64)
    for index, token in enumerate(vocabulary):
        if token != UNK:
            if len(token) != 1:
                raise CheckpointError(f"tokenizer: {token!a} is not one character")
            table[ord(token)] = index
    return table


def _byte_symbols() -> dict[int, str]:
    # The printable stand-in for each byte that the tokenizers library's ByteLevel uses.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


_BYTE_SYMBOLS = _byte_symbols()
_KINDS: list[tuple[Level, Splitter, bool]] = [
    *(("word", splitter, lower) for splitter in _PATTERNS for lower in (False, True)),
    ("char", "words", False),
    ("byte", "words", False),
]


def _pipeline(level: Level, splitter: Splitter, *, lowercase: bool) -> dict[str, Any]:
    """The parts of a tokenizer.json that say how text is cut, and by which it is known again."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    normalizer = None
    if level == "word":
        line_ends = {"type": "Replace", "pattern": {"String": "\n"}, "content": f" {EOS} "}
        normalizer = {
            "type": "Sequence",
            "normalizers": [*([{"type": "Lowercase"}] if lowercase else []), line_ends],
        }
    split = {
        "type": "Split",
        "pattern": {"Regex": _PATTERNS[splitter] if level == "word" else _ANY_CHARACTER},
        "behavior": "Removed",
        "invert": True,
    }
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level, split]}
        if level == "byte"
        else split,
        "post_processor": None,
        "decoder": {"word": None, "char": {"type": "Fuse"}, "byte": byte_level}[level],
    }
