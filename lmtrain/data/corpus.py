"""Where text comes from: files, globs, .gz, standard input, named corpora, the Python manuals.

A `Text` is read in chunks, as often as needed, in bounded memory; a pipe goes to a file first.
Carriage returns before a newline and a byte order mark are dropped; only a newline ends a line;
each file ends with one. Knows characters, never tokens.
"""

import codecs
import functools
import glob
import gzip
import importlib.resources
import tomllib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from lmtrain import files, untrusted
from lmtrain.data import pipes, python_docs
from lmtrain.errors import ConfigError, TextError, UnreadableError

_CHUNK_BYTES = 1 << 18
PYTHON_DOCS = "python-docs"
VALID_FRACTION = 0.1


class Source(Protocol):
    """Something that holds text."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    def chunks(self) -> Iterator[str]:
        """The text in pieces."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A file of UTF-8 text, compressed by gzip where its name ends in .gz.

    Args:
        path: where it lies.
        name: what messages call it.
    """

    path: Path
    name: str

    def chunks(self) -> Iterator[str]:
        """The text of the file in pieces, each line ended by a newline alone.

        Raises:
            TextError: missing, empty, binary, not UTF-8 or broken.
        """
        try:
            with self._open() as stream:
                yield from _newlines(self._decoded(stream))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TextError(f"{self.name} is not whole gzip data: {error}") from None
        except OSError as error:
            raise TextError(f"cannot read {self.name}: {error.strerror or error}") from None

    def _open(self) -> BinaryIO:
        if self.path.is_dir():
            raise TextError(f"{self.name} is a folder", f"try: '{self.name}/*.txt'")
        if self.path.suffix == ".gz":
            return gzip.open(self.path, "rb")  # type: ignore[return-value]
        return self.path.open("rb")

    def _decoded(self, stream: BinaryIO) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        begun, found, lines = False, False, 1
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
            if (at := raw.find(b"\0")) >= 0:
                raise TextError(
                    f"{self.name} is binary: line {lines + raw.count(10, 0, at)} has a NUL byte"
                )
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(raw)
            except UnicodeDecodeError as error:
                raise self._broken(stream, raw, error, lines, pending) from None
            lines += raw.count(b"\n")
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            position = stream.tell() - len(error.object)
            raise TextError(
                f"{self.name} is not UTF-8: line {lines}, byte offset {position:,}, "
                f"byte 0x{error.object[0]:02x}: it ends in the middle of a character"
            ) from None
        if not found:
            raise TextError(f"{self.name} is empty")

    def _broken(
        self, stream: BinaryIO, raw: bytes, error: UnicodeDecodeError, lines: int, pending: int
    ) -> TextError:
        at = error.start - pending
        line = lines + raw.count(b"\n", 0, max(at, 0))
        position = stream.tell() - len(raw) + at
        return TextError(
            f"{self.name} is not UTF-8: line {line}, byte offset {position:,}, "
            f"byte 0x{error.object[error.start]:02x}",
            f"try: iconv -f latin1 -t utf-8 {self.name}",
        )


@dataclass(frozen=True)
class PythonDocs:
    """The manuals of the running Python, as `python_docs` writes them down."""

    name: str = PYTHON_DOCS

    def chunks(self) -> Iterator[str]:
        """The text, one sentence a line."""
        yield from _python_docs()


@functools.cache
def _python_docs() -> tuple[str, ...]:
    # A text is read more than once, and these few megabytes take seconds to collect.
    return tuple(python_docs.sentences())


@dataclass(frozen=True)
class Text:
    """A stretch of the text of some sources, one after the other.

    Args:
        sources: where the text comes from.
        start: first character, counted over all sources.
        stop: the character before which it ends; None for the end of the last source.
    """

    sources: tuple[Source, ...]
    start: int = 0
    stop: int | None = None
    _known: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The names of the sources, shortened."""
        more = f" and {len(self.sources) - 1} more" if len(self.sources) > 1 else ""
        return self.sources[0].name + more

    def chunks(self) -> Iterator[str]:
        """The text in pieces.

        Raises:
            TextError: a source cannot be read as text.
        """
        position = 0
        for chunk in self._all_chunks():
            stop = len(chunk) if self.stop is None else min(len(chunk), self.stop - position)
            piece = chunk[max(0, self.start - position) : max(0, stop)]
            if piece:
                yield piece
            position += len(chunk)
            if self.stop is not None and position >= self.stop:
                return

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

    def _all_chunks(self) -> Iterator[str]:
        for source in self.sources:
            last = "\n"
            for chunk in source.chunks():
                yield chunk
                last = chunk[-1:] or last
            if last != "\n" and len(self.sources) > 1:
                yield "\n"

    @property
    def characters(self) -> int:
        """Characters, newlines included."""
        return int(self._measured()["characters"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the text in UTF-8."""
        return str(self._measured()["sha256"])

    def _measured(self) -> dict[str, Any]:
        if not self._known:
            counted = [0]
            self._known["sha256"] = files.sha256(self._counted(counted))
            self._known["characters"] = counted[0]
        return self._known

    def _counted(self, counted: list[int]) -> Iterator[bytes]:
        for chunk in self.chunks():
            counted[0] += len(chunk)
            yield chunk.encode()

    def split(self, fractions: Sequence[float], *, at_line_ends: bool) -> "list[Text]":
        """This text cut into consecutive parts: the first, and one for each fraction after it.

        Args:
            fractions: shares of the characters for the parts after the first.
            at_line_ends: whether a cut moves on to the end of its line (or else of its word).

        Raises:
            TextError: a part would be empty.
        """
        total = self.characters
        cuts = [0]
        for index in range(len(fractions)):
            # Exact: in floats, 0.2 + 0.1 is more than 0.3.
            share = sum(Fraction(str(fraction)) for fraction in fractions[index:])
            target = int(total * (1 - share))
            cuts.append(self._line_end(target) if at_line_ends else target)
        bounds = zip(cuts, [*cuts[1:], total], strict=True)
        parts = [replace(self, start=a, stop=b, _known={}) for a, b in bounds]
        if any(part.start >= (part.stop or 0) for part in parts):
            raise TextError(
                f"{self.name} is too short to be split: {total:,} characters",
                "give validation text of its own: --valid FILE",
            )
        return parts

    def _line_end(self, target: int) -> int:
        position, best = 0, None
        for chunk in self.chunks():
            begin = max(0, target - position)
            if begin < len(chunk):
                end = chunk.find("\n", begin)
                # A newline at the very end would leave nothing behind it.
                if 0 <= position + end < self.characters - 1 and end >= 0:
                    return position + end + 1
                if best is None and (end := chunk.find(" ", begin)) >= 0:
                    best = position + end + 1
            position += len(chunk)
        return best or position


def _newlines(chunks: Iterable[str]) -> Iterator[str]:
    held = ""
    for chunk in chunks:
        text = held + chunk
        held = "\r" if text.endswith("\r") else ""
        if text := text.removesuffix("\r").replace("\r\n", "\n"):
            yield text
    if held:
        yield held


def catalogue() -> dict[str, dict[str, Any]]:
    """The public corpora that can be fetched, by name."""
    text = (importlib.resources.files("lmtrain.corpora") / "corpora.toml").read_text("utf-8")
    return tomllib.loads(text)


def corpus_folder(name: str) -> Path:
    """Where the fetched corpus `name` lies."""
    return files.cache_folder() / "corpora" / name


def fetched_file(name: str, part: str) -> Path | None:
    """The file with the part train, valid or test of a fetched corpus, if the corpus has one.

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
    """Whether `name` is the name of a corpus that lmtrain knows."""
    return name == PYTHON_DOCS or name in catalogue()


def open_text(places: Sequence[str], parts: Sequence[str] = ("train",)) -> Text:
    """The text of files, globs, standard input and named corpora, one after the other.

    Args:
        places: paths, globs, `-`, or names of corpora.
        parts: which part of a fetched corpus is meant: the first of these that it has.

    Raises:
        TextError: nothing is there.
        ConfigError: a path that no file can have.
    """
    sources = tuple(source for place in places for source in _sources(place, parts))
    if not sources:
        raise TextError(f"no {parts[0]} text: {', '.join(places) or 'nothing was given'}")
    return Text(sources)


def _sources(place: str, parts: Sequence[str]) -> list[Source]:
    if place == "-":
        return [_piped(pipes.STANDARD_INPUT, "standard input")]
    if "\0" in place or not place:
        raise ConfigError(f"no file can be called {place!a}")
    try:
        is_there = untrusted.is_there(Path(place))
    except UnreadableError as error:
        raise TextError(str(error)) from None
    if is_there:
        return [_file(place)]
    if place == PYTHON_DOCS:
        return [PythonDocs()]
    if place in catalogue():
        found = [(part, path) for part in parts if (path := fetched_file(place, part))]
        return [FileSource(path, f"{place} ({part})") for part, path in found[:1]]
    # Path.glob takes no absolute patterns.
    if matches := sorted(glob.glob(place, recursive=True)):  # noqa: PTH207
        return [_file(path) for path in matches]
    known = ", ".join([PYTHON_DOCS, *catalogue()])
    raise TextError(f"no text file {place}", f"named corpora: {known}")


def _file(place: str) -> FileSource:
    path = Path(place)
    return _piped(place, place) if path.is_fifo() else FileSource(path, place)


def _piped(pipe: str | int, name: str) -> FileSource:
    # A pipe gives its text once; a `Text` is read more often.
    return FileSource(files.spool(pipes.pieces(pipe, name)), name)


def open_parts(
    train: Sequence[str],
    valid: Sequence[str],
    test: Sequence[str],
    *,
    valid_fraction: float | None,
    test_fraction: float | None,
    at_line_ends: bool,
) -> Mapping[str, Text]:
    """Training, validation and test text; what is not given is cut from the training text's tail.

    Args:
        train: places of the training text.
        valid: places of the validation text; may be empty.
        test: places of the test text; may be empty.
        valid_fraction: share cut off for validation if `valid` is empty; None for what is
            customary for the corpus, else `VALID_FRACTION`.
        test_fraction: the same for testing, else none.
        at_line_ends: whether cuts are moved to line ends.

    Raises:
        TextError: text is missing, unreadable, empty, or too short to be split.
    """
    text = open_text(train)
    given = {"valid": list(valid), "test": list(test)}
    wanted = {"valid": valid_fraction, "test": test_fraction}
    customary = {"valid": VALID_FRACTION, "test": 0.0}
    if len(train) == 1 and train[0] in catalogue() and not Path(train[0]).exists():
        # A public corpus brings its customary division along.
        entry = catalogue()[train[0]]
        for part in ("valid", "test"):
            if not given[part] and fetched_file(train[0], part):
                given[part] = [train[0]]
        customary |= entry.get("fractions", {})
    fractions = {
        part: customary[part] if share is None else share for part, share in wanted.items()
    }
    cut = [part for part in given if not given[part] and fractions[part] > 0]
    pieces = text.split([fractions[part] for part in cut], at_line_ends=at_line_ends)
    parts = {"train": pieces[0], **dict(zip(cut, pieces[1:], strict=True))}
    for part, places in given.items():
        if places:
            parts[part] = open_text(places, (part,))
    for opened in parts.values():
        if not opened.characters:
            raise TextError(f"{opened.name} is empty")
    return parts
