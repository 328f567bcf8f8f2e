"""Sources of text: files, globs, .gz, standard input, named corpora, the Python manuals.

A `Text` is read in chunks in bounded memory; a pipe is copied to a file first. Carriage returns,
alone or before a newline, become newlines; a byte order mark is dropped; each of several files ends
with a newline.
"""

import codecs
import contextlib
import functools
import glob
import gzip
import hashlib
import importlib.resources
import tomllib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from lmtrain import files, untrusted
from lmtrain.data import pipes, python_docs
from lmtrain.errors import ConfigError, TextError, UnreadableError

_CHUNK_BYTES = 1 << 18
PYTHON_DOCS = "python-docs"


@dataclass(frozen=True)
class Source:
    """A file of UTF-8 text, compressed by gzip if its name ends in .gz.

    Args:
        path: its path.
        name: its name in messages.
    """

    path: Path
    name: str

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the text in chunks, with the newline as the only line end.

        Raises:
            TextError: missing, empty, binary or broken.
        """
        with self._opened() as stream:
            yield from self._checked(_newlines(self._pieces(stream)))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        if self.path.is_dir():
            raise TextError(f"{self.name} is a folder", f"try: '{self.name}/*.txt'")
        open_file = gzip.open if self.path.suffix == ".gz" else open
        try:
            with open_file(self.path, "rb") as stream:
                yield cast("BinaryIO", stream)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TextError(f"{self.name} is not whole gzip data: {error}") from None
        except OSError as error:
            raise TextError(f"cannot read {self.name}: {error.strerror or error}") from None

    def _pieces(self, stream: BinaryIO) -> Iterator[bytes]:
        begun, found = False, False
        while raw := stream.read(_CHUNK_BYTES):
            if not begun:
                if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise TextError(
                        f"{self.name} is UTF-16 text, not UTF-8",
                        f"try: iconv -f utf-16 -t utf-8 {self.name}",
                    )
                raw = raw.removeprefix(codecs.BOM_UTF8)
                begun = True
            found = found or bool(raw)
            yield raw
        if not found:
            raise TextError(f"{self.name} is empty")

    def _checked(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        lines = 1
        for chunk in chunks:
            if (at := chunk.find(b"\0")) >= 0:
                hint = "try: --task classify or --task frames, for vectors"
                raise TextError(
                    f"{self.name} is binary: line {lines + chunk.count(10, 0, at)} has a NUL byte",
                    *([hint] if self.name.endswith(".npz") else []),
                )
            yield chunk
            lines += chunk.count(b"\n")

    def require_utf8(self) -> None:
        """Checks that the file is UTF-8.

        Raises:
            TextError: it is not; the message names the first invalid byte.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset, line, last = 0, 1, b""
        with self._opened() as stream:
            while True:
                raw = stream.read(_CHUNK_BYTES)
                pending = len(decoder.getstate()[0])
                try:
                    decoder.decode(raw, final=not raw)
                except UnicodeDecodeError as error:
                    # Below 0 if the character started in the previous chunk.
                    at = error.start - pending
                    line += _line_ends(raw[: max(at, 0)], last)
                    where = (
                        f"{self.name} is not UTF-8: line {line}, byte offset {offset + at:,}, "
                        f"byte 0x{error.object[error.start]:02x}"
                    )
                    if not raw:
                        where += ": it ends in the middle of a character"
                        raise TextError(where) from None
                    raise TextError(where, f"try: iconv -f latin1 -t utf-8 {self.name}") from None
                if not raw:
                    return
                offset += len(raw)
                line += _line_ends(raw, last)
                last = raw[-1:]


@dataclass(frozen=True)
class Text:
    """The concatenated text of sources.

    Args:
        sources: the sources.
    """

    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        """The names of the sources, shortened."""
        more = f" and {len(self.sources) - 1} more" if len(self.sources) > 1 else ""
        return self.sources[0].name + more

    def chunks(self) -> Iterator[str]:
        """The text in chunks.

        Raises:
            TextError: a source cannot be read as text.
        """
        return self._decoded(self._bytes())

    def checked_chunks(self) -> Iterator[str]:
        """The text in chunks; checks at the end that it has the hash of `fingerprint`.

        Raises:
            TextError: a source cannot be read as text, or changed.
        """
        expected, digest = self.fingerprint, hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            for raw in self._bytes():
                digest.update(raw)
                yield raw

        yield from self._decoded(hashed())
        if digest.hexdigest() != expected:
            raise self._changed()

    def lines(self) -> Iterator[str]:
        """The lines of the text, without their newlines.

        Raises:
            TextError: a source cannot be read as text.
        """
        pieces: list[str] = []
        for chunk in self.chunks():
            first, *others = chunk.split("\n")
            pieces.append(first)
            for line in others:
                yield "".join(pieces)
                pieces = [line]
        if any(pieces):
            yield "".join(pieces)

    def _bytes(self) -> Iterator[bytes]:
        for source in self.sources:
            last = b"\n"
            for raw in source.chunks():
                yield raw
                last = raw[-1:] or last
            if last != b"\n" and len(self.sources) > 1:
                yield b"\n"

    def _decoded(self, chunks: Iterable[bytes]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for raw in chunks:
                if chunk := decoder.decode(raw):
                    yield chunk
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            for source in self.sources:
                source.require_utf8()
            raise self._changed() from None

    def _changed(self) -> TextError:
        return TextError(f"{self.name} changed while it was read")

    @property
    def characters(self) -> int:
        """Number of characters, including newlines."""
        return self._measured[0]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the text in UTF-8."""
        return self._measured[1]

    @functools.cached_property
    def _measured(self) -> tuple[int, str]:
        characters, digest = 0, hashlib.sha256()
        for raw in self._bytes():
            digest.update(raw)
            # Each byte of UTF-8 starts a character, except 0x80 to 0xbf.
            characters += int(np.count_nonzero(np.frombuffer(raw, np.int8) >= -64))
        return characters, digest.hexdigest()


def _line_ends(raw: bytes, last: bytes) -> int:
    """Number of line ends in a piece of text, given the byte before it."""
    is_one = last == b"\r" and raw.startswith(b"\n")
    return raw.count(b"\n") + raw.count(b"\r") - raw.count(b"\r\n") - is_one


def _newlines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    held = b""
    for chunk in chunks:
        text = held + chunk
        held = b"\r" if text.endswith(b"\r") else b""
        if text := text.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n"):
            yield text
    if held:
        yield b"\n"


def catalogue() -> dict[str, dict[str, Any]]:
    """The public corpora that can be fetched, by name."""
    text = (importlib.resources.files("lmtrain.corpora") / "corpora.toml").read_text("utf-8")
    return tomllib.loads(text)


def corpus_folder(name: str) -> Path:
    """The folder of the fetched corpus `name`."""
    return files.cache_folder() / "corpora" / name


def fetched_file(name: str, part: str) -> Path | None:
    """The file of the part train, valid or test of a fetched corpus; None if it has none.

    Raises:
        TextError: the corpus was not fetched.
    """
    entry = catalogue()[name]
    if part not in entry.get("members", entry.get("files", {})):
        return None
    path = corpus_folder(name) / f"{part}.txt"
    if not path.exists():
        raise TextError(
            f"the corpus {name} is not on this machine", f"try: lmtrain corpora fetch {name}"
        )
    return path


def named(name: str) -> bool:
    """Whether `name` is the name of a corpus."""
    return name == PYTHON_DOCS or name in catalogue()


def open_text(paths: Sequence[str], parts: Sequence[str] = ("train",)) -> Text:
    """The concatenated text of files, globs, standard input and named corpora.

    Args:
        paths: paths, globs, `-`, or names of corpora.
        parts: parts of a corpus in order of preference; if empty, names of corpora are not
            recognized.

    Raises:
        TextError: nothing is there.
        ConfigError: a path that no file can have.
    """
    sources = tuple(source for path in paths for source in _sources(path, parts))
    if not sources:
        wanted = " ".join([*parts[:1], "text"])
        raise TextError(f"no {wanted}: {', '.join(paths) or 'nothing was given'}")
    return Text(sources)


def numbered_lines(paths: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """Each line of files, globs and `-`, with the name of its file and its number, from 1.

    Raises:
        TextError: nothing is there, or it cannot be read as text.
    """
    for source in open_text(paths, parts=()).sources:
        for number, line in enumerate(Text((source,)).lines(), start=1):
            yield source.name, number, line


def fingerprint(texts: Iterable[str]) -> str:
    """SHA-256 over texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


def _sources(name: str, parts: Sequence[str]) -> list[Source]:
    if name == "-":
        return [_piped(pipes.STANDARD_INPUT, "standard input")]
    if "\0" in name or not name:
        raise ConfigError(f"no file can be called {name!a}")
    try:
        is_there = untrusted.exists(Path(name))
    except UnreadableError as error:
        raise TextError(str(error)) from None
    if is_there:
        return [_file(name)]
    if parts and name == PYTHON_DOCS:
        return [_python_docs()]
    if parts and name in catalogue():
        found = [(part, path) for part in parts if (path := fetched_file(name, part))]
        return [Source(path, f"{name} ({part})") for part, path in found[:1]]
    # Path.glob takes no absolute patterns.
    if matches := sorted(glob.glob(name, recursive=True)):  # noqa: PTH207
        return [_file(path) for path in matches]
    known = f"named corpora: {', '.join([PYTHON_DOCS, *catalogue()])}"
    raise TextError(f"no text file {name}", *([known] if parts else []))


@functools.cache
def _python_docs() -> Source:
    # Cached: a sweep opens its text for every trial, and collecting the manuals takes seconds.
    sentences = (sentence.encode() for sentence in python_docs.sentences())
    return Source(files.spool(sentences), PYTHON_DOCS)


def _file(name: str) -> Source:
    path = Path(name)
    return _piped(name, name) if path.is_fifo() else Source(path, name)


def _piped(pipe: str | int, name: str) -> Source:
    # A pipe can be read once, and a `Text` is read twice.
    return Source(files.spool(pipes.pieces(pipe, name)), name)
