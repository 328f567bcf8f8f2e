"""A vocabulary from a file: one word a line, in the order of the ids."""

from lmtrain import screen
from lmtrain.data.corpus import numbered_lines
from lmtrain.data.detokenizer import Splitter
from lmtrain.data.tokenizer import EOS, UNK, Tokenizer, split_words
from lmtrain.errors import TextError

_WHITE_SPACE = " \t\r\f\v"
_SPELLINGS = {"<unk>": UNK, "<eos>": EOS, "</s>": EOS}


def named(word: str) -> str:
    """The word, or `<UNK>` or `<EOS>` where it is another program's name of one of them."""
    return _SPELLINGS.get(word, word)


def read_vocabulary(place: str) -> list[str]:
    """The words of a file, with `<UNK>` and `<EOS>` in front of them if they are missing.

    White space around words and empty lines are left out. `<unk>` is read as `<UNK>`, `</s>` and
    `<eos>` as `<EOS>`.

    Args:
        place: the file; `-` for standard input.

    Raises:
        TextError: it cannot be read, has no word, has one twice, or two words in a line.
    """
    lines: dict[str, int] = {}
    for name, number, line in numbered_lines([place]):
        word = named(line.strip(_WHITE_SPACE))
        if any(space in word for space in _WHITE_SPACE):
            raise TextError(
                f"{name}, line {number}: {screen.shorten(line)!r} is more than one word",
                "a vocabulary has one word a line, without counts",
            )
        if word in lines:
            raise TextError(
                f"{name}, line {number}: {screen.shorten(word)!r} is in line {lines[word]} too"
            )
        if word:
            lines[word] = number
    if lines.keys() <= {UNK, EOS}:
        raise TextError(f"{place} has no word")
    return [*(each for each in (UNK, EOS) if each not in lines), *lines]


def tokenizer_of(
    place: str, splitter: Splitter, *, lowercase: bool, nfc: bool = False
) -> Tokenizer:
    """The tokenizer with the vocabulary of a file; says which words the splitter never finds.

    Args:
        place: the file.
        splitter: how words are found.
        lowercase: whether words are put in lower case first.
        nfc: whether text is brought to Unicode's form NFC first.

    Raises:
        TextError: see `read_vocabulary`.
    """
    words = read_vocabulary(place)
    # A clitic such as 's is only found after a word.
    absent = [
        word
        for word in words
        if word not in (UNK, EOS)
        and word not in split_words(f"a{word} {word}", splitter, lowercase=lowercase, nfc=nfc)
    ]
    if absent:
        cut = f"data.splitter = {splitter}{' and data.lowercase = true' if lowercase else ''}"
        shown = screen.shorten(absent[0])
        screen.note(f"{place}: {len(absent):,} words, such as {shown}, never occur with {cut}")
    return Tokenizer(words, "word", splitter, lowercase=lowercase, nfc=nfc)
