"""Reads a vocabulary from a file with one word per line, in the order of ids."""

from lmtrain import screen
from lmtrain.data.corpus import numbered_lines
from lmtrain.data.detokenizer import Splitter
from lmtrain.data.tokenizer import EOS, UNK, Tokenizer, split_words
from lmtrain.errors import TextError

_WHITE_SPACE = " \t\r\f\v"
_SPELLINGS = {"<unk>": UNK, "<eos>": EOS, "</s>": EOS}


def named(word: str) -> str:
    """The word, or `<UNK>` or `<EOS>` for other spellings of these."""
    return _SPELLINGS.get(word, word)


def read_vocabulary(path: str) -> list[str]:
    """The words of a file, preceded by `<UNK>` and `<EOS>` if it lacks them.

    White space around words and empty lines are ignored. `<unk>` is read as `<UNK>`, `</s>` and
    `<eos>` as `<EOS>`.

    Args:
        path: the file; `-` for standard input.

    Raises:
        TextError: the file cannot be read, has no words, a word twice, or two words on a line.
    """
    lines: dict[str, int] = {}
    for name, number, line in numbered_lines([path]):
        word = named(line.strip(_WHITE_SPACE))
        if any(space in word for space in _WHITE_SPACE):
            raise TextError(
                f"{name}, line {number}: {screen.shorten(line)!r} is more than one word",
                "a vocabulary has one word per line, without counts",
            )
        if word in lines:
            raise TextError(
                f"{name}, line {number}: {screen.shorten(word)!r} is also on line {lines[word]}"
            )
        if word:
            lines[word] = number
    if lines.keys() <= {UNK, EOS}:
        raise TextError(f"{path} has no words")
    return [*(each for each in (UNK, EOS) if each not in lines), *lines]


def tokenizer_of(path: str, splitter: Splitter, *, lowercase: bool, nfc: bool = False) -> Tokenizer:
    """The tokenizer with the vocabulary of a file; notes words that the splitter never produces.

    Args:
        path: the file.
        splitter: how words are found.
        lowercase: whether text is converted to lower case.
        nfc: whether text is normalized to Unicode NFC.

    Raises:
        TextError: see `read_vocabulary`.
    """
    words = read_vocabulary(path)
    # A clitic such as 's only occurs after a word.
    absent = [
        word
        for word in words
        if word not in (UNK, EOS)
        and word not in split_words(f"a{word} {word}", splitter, lowercase=lowercase, nfc=nfc)
    ]
    if absent:
        cut = f"data.splitter = {splitter}{' and data.lowercase = true' if lowercase else ''}"
        shown = screen.shorten(absent[0])
        screen.note(f"{path}: {len(absent):,} words, such as {shown}, never occur with {cut}")
    return Tokenizer(words, "word", splitter, lowercase=lowercase, nfc=nfc)
