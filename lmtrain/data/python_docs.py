"""The default corpus: the Python manuals that come with every Python installation.

The language reference of `pydoc_data.topics` and the docstrings of the standard library, read with
`ast` and never imported or executed, one sentence a line: about 300,000 words of real English with
no download and no licence question.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z])")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def sentences() -> Iterator[str]:
    """The sentences of the manuals, each with a newline, in a fixed order.

    Distinct paragraphs are sorted by their hash, so that the end of the text, which is used for
    validation, covers the same topics as the rest.
    """
    unique = {" ".join(paragraph.split()): None for paragraph in _paragraphs() if _prose(paragraph)}
    for paragraph in sorted(unique, key=_hash):
        yield "".join(f"{sentence}\n" for sentence in _SENTENCE_END.split(paragraph))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _paragraphs() -> Iterator[str]:
    for text in _documents():
        yield from re.split(r"\n\s*\n", text)


def _prose(paragraph: str) -> bool:
    """Whether a paragraph is prose: mostly words, not a table or a listing."""
    words = paragraph.split()
    plain = sum(word.strip(".,;:()\"'`*").isalpha() for word in words)
    return len(words) >= 4 and plain >= 0.7 * len(words) and ">>>" not in paragraph


def _documents() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(path.relative_to(library).parts):
            yield from _strings(path)


def _strings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        # Templates and files for other versions of Python are skipped.
        return
    if path.name == "topics.py":
        yield from _topics(tree)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            # A docstring may contain surrogates, which UTF-8 cannot encode.
            yield (ast.get_docstring(node) or "").encode("utf-8", "replace").decode()


def _topics(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value
