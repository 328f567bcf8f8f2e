import functools
import gzip
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain import files
from lmtrain.data import corpus
from lmtrain.data.corpus import Text, numbered_lines, open_text
from lmtrain.errors import ConfigError, TextError

CHUNK = 1 << 18


def joined(text: Text) -> str:
    return "".join(text.chunks())


@pytest.fixture
def read(write):
    """The text of a file with some content."""
    return lambda content, name="my.txt": joined(open_text([write(content, name)]))


@pytest.fixture
def refused(write):
    """The message with which a file with some content is refused."""

    def told(content: bytes, name: str = "my.txt") -> str:
        with pytest.raises(TextError) as caught:
            joined(open_text([write(content, name)]))
        assert caught.value.exit_code == 3
        return str(caught.value)

    return told


@pytest.fixture
def standard_input(tmp_path, monkeypatch):
    """Puts a file with what it is given in the place of standard input."""
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    before = os.dup(0)

    def put(content: bytes) -> None:
        path = tmp_path / "standard input"
        path.write_bytes(content)
        with path.open("rb") as stream:
            os.dup2(stream.fileno(), 0)

    yield put
    os.dup2(before, 0)
    os.close(before)


@settings(deadline=None)
@given(st.text(st.sampled_from("ab\r\n é🙂\u2028\x1c\f"), min_size=1), st.integers(1, 7))
def test_a_carriage_return_ends_a_line_alone_or_before_a_newline(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "newlines.txt"
    path.write_bytes(text.encode())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_CHUNK_BYTES", size)
        chunks = list(open_text([str(path)]).chunks())

    assert "".join(chunks) == re.sub("\r\n?", "\n", text)
    assert all(chunks)


def test_a_line_end_cut_across_chunks_is_one_line_end(read):
    before = "x" * (CHUNK - 1)

    assert read(f"{before}\r\ny\r") == f"{before}\ny\n"
    assert read(f"{before}\r\r\ny") == f"{before}\n\ny"


def test_lines_that_end_with_carriage_returns_are_lines_of_every_reader(write):
    text = open_text([write("a b\rc\r\rd")])

    assert list(text.lines()) == ["a b", "c", "", "d"]
    assert [each[1:] for each in numbered_lines([write("a\rb\r\nc", "2.txt")])] == [
        (1, "a"), (2, "b"), (3, "c"),
    ]  # fmt: skip
    assert text.fingerprint == open_text([write("a b\nc\n\nd", "3.txt")]).fingerprint


def test_a_character_cut_across_chunks_is_whole(read):
    for missing in (1, 2, 3):
        text = "x" * (CHUNK - missing) + "🙂é"

        assert read(text) == text


def test_a_byte_order_mark_is_dropped_at_the_start_alone(read):
    assert read("\ufeffa\ufeffb\n") == "a\ufeffb\n"


def test_files_are_joined_each_ended_by_a_newline(write):
    places = [write("a", "1.txt"), write("\ufeffb\n", "2.txt"), write("c\r\n", "3.txt")]

    assert joined(open_text(places)) == "a\nb\nc\n"
    assert joined(open_text(places[:1] * 2)) == "a\na\n"
    assert open_text(places).name == f"{places[0]} and 2 more"


def test_a_single_file_is_left_as_it_ends(read):
    assert read("a") == "a"


def test_compressed_text_is_read(read):
    text = "é 你好\r\n" * 100_000

    assert read(gzip.compress(text.encode()), "my.txt.gz") == text.replace("\r\n", "\n")
    assert read(gzip.compress(b"a") + gzip.compress(b"b"), "two.gz") == "ab"


def test_a_glob_takes_files_in_the_order_of_their_names(write, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt"):
        write(name, name)
    monkeypatch.chdir(tmp_path)

    assert joined(open_text(["*.txt"])) == "a.txt\nb.txt\n"
    assert joined(open_text([str(tmp_path / "*.txt")])) == "a.txt\nb.txt\n"
    assert joined(open_text(["**/*.txt"])) == "a.txt\nb.txt\ndeep/d.txt\n"


def test_a_file_with_the_signs_of_a_glob_is_itself(write, tmp_path):
    write("other", "a.txt")

    assert joined(open_text([write("itself", "[a].txt")])) == "itself"


def test_standard_input_can_be_read_more_than_once(standard_input):
    standard_input("é\r\n".encode())

    text = open_text(["-"])

    assert joined(text) == joined(text) == "é\n"
    assert text.name == "standard input"


def test_empty_standard_input_is_named(standard_input):
    standard_input(b"")

    with pytest.raises(TextError, match="standard input is empty"):
        joined(open_text(["-"]))


def test_a_pipe_with_a_name_can_be_read_more_than_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    written = "é\n" * 300_000
    writer = threading.Thread(target=pipe.write_text, args=(written,))
    writer.start()

    text = open_text([str(pipe)])
    writer.join()

    assert joined(text) == joined(text) == written
    assert text.name == str(pipe)


def test_a_signal_that_interrupts_no_read_is_obeyed_while_a_pipe_is_silent(tmp_path, monkeypatch):
    class ObeyedError(Exception):
        pass

    def obey(number, frame):
        obeyed.set()
        raise ObeyedError

    def write():
        with pipe.open("wb") as stream:
            stream.write(b"the beginning")
            stream.flush()
            # The other thread is given time to read this and to wait for more.
            time.sleep(0.2)
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
            was_silent.append(obeyed.wait(30))

    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    obeyed, was_silent = threading.Event(), []
    before = signal.signal(signal.SIGUSR2, obey)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(ObeyedError):
            open_text([str(pipe)])
    finally:
        writer.join()
        signal.signal(signal.SIGUSR2, before)

    assert was_silent == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_standard_input_leaves_nothing_behind_when_the_process_ends(tmp_path):
    code = "from lmtrain.data.corpus import open_text; print(list(open_text(['-']).chunks()))"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        input=b"a\n",
        capture_output=True,
        check=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )

    assert ended.stdout == b"['a\\n']\n"
    assert list(tmp_path.iterdir()) == []


def test_a_place_with_nothing_is_named():
    with pytest.raises(TextError, match=r"no text file no/such\.txt\n.*python-docs, tiny-shakesp"):
        open_text(["no/such.txt"])
    with pytest.raises(TextError, match="no train text: nothing was given"):
        open_text([])
    with pytest.raises(ConfigError, match=r"no file can be called 'a\\x00b'"):
        open_text(["a\0b"])


def test_the_python_manuals_are_collected_once(tmp_path, monkeypatch):
    collected = []
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(corpus, "_python_docs", functools.cache(corpus._python_docs.__wrapped__))
    monkeypatch.setattr(corpus.python_docs, "sentences", lambda: collected.append(1) or ["é\n"])

    texts = [open_text(["python-docs"]) for _ in range(2)]

    assert [joined(text) for text in texts] == ["é\n", "é\n"]
    assert texts[0].name == "python-docs"
    assert collected == [1]


def test_a_file_that_goes_away_is_named(write):
    place = write("a")
    text = open_text([place])
    pathlib.Path(place).unlink()

    with pytest.raises(TextError, match=r"cannot read .*my\.txt: No such file"):
        joined(text)


def test_a_folder_is_refused_with_the_glob_to_try(tmp_path):
    with pytest.raises(TextError, match=r"is a folder\n.*try: '.*/\*\.txt'"):
        joined(open_text([str(tmp_path)]))


@pytest.mark.parametrize("name", ["my.txt", "my.txt.gz"])
def test_an_empty_file_is_refused(refused, name):
    assert refused(b"", name).endswith(f"{name} is empty")


def test_an_empty_compressed_text_is_refused(refused):
    assert refused(gzip.compress(b""), "my.gz").endswith("my.gz is empty")


def test_a_byte_order_mark_alone_is_empty(refused):
    assert refused(b"\xef\xbb\xbf").endswith("my.txt is empty")


def test_one_empty_file_among_others_is_refused(write):
    with pytest.raises(TextError, match=r"2\.txt is empty"):
        joined(open_text([write("a", "1.txt"), write("", "2.txt")]))


@pytest.mark.parametrize(
    ("before", "line"), [(b"a\rb\r\n\r", 4), (b"x" * (CHUNK - 1) + b"\r\n\r\r", 4)]
)
def test_lines_are_counted_by_carriage_returns_too(refused, before, line):
    assert f"line {line} has a NUL byte" in refused(before + b"x\0\n")
    assert f"line {line}, byte offset {len(before) + 1:,}," in refused(before + b"x\xff\n")


@pytest.mark.parametrize("before", [b"a\nb\n", b"\n" * CHUNK + b"x" * 10])
def test_a_nul_byte_is_refused_with_its_line(refused, before):
    told = refused(before + b"x\0\n")

    assert told.endswith(f"my.txt is binary: line {before.count(10) + 1} has a NUL byte")


def test_vectors_are_refused_as_a_text_with_the_tasks_that_read_them(refused):
    assert "--task classify" in refused(b"PK\0\0", "my.npz")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_with_the_way_out(refused, encoding):
    mark = b"" if encoding == "utf-16" else "\ufeff".encode(encoding)
    told = refused(mark + "text\n".encode(encoding))

    assert "my.txt is UTF-16 text, not UTF-8\n" in told
    assert "try: iconv -f utf-16 -t utf-8" in told


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("before", "bad"),
    [
        (b"", b"\xff"),
        (b"a\nb\nc", b"\xe9 d\n"),
        ("é\r\n".encode() * 5, b"\x80"),
        (b"line\n" * 60_000 + b"abc", b"\xe9\n"),
        (b"\n" * (CHUNK - 1), b"\xe4\xbdA"),
        (b"\n" * (CHUNK - 2), b"\xe4\xbdA"),
        (b"\n" * (CHUNK - 3), b"\xf0\x9f\x99A"),
        (b"\n" * (CHUNK - 4), b"\xe4\xbdA"),
        (b"x" * CHUNK, b"\xff"),
        (b"ab\n" * CHUNK, b"\xe9\n\n"),
    ],
    ids=["first", "third line", "after carriage returns", "second chunk", "border after one",
         "border after two", "border of four", "border after three", "second chunk's first", "4th"],
)  # fmt: skip
def test_a_bad_byte_is_named_by_line_and_offset(refused, mark, compressed, before, bad):
    content = mark + before + bad + b"and more\n"
    told = refused(gzip.compress(content, 1) if compressed else content, f"my{'.gz' * compressed}")

    where = f"line {before.count(10) + 1}, byte offset {len(mark + before):,}, byte 0x{bad[0]:02x}"
    assert f" is not UTF-8: {where}\n" in told


@pytest.mark.parametrize("before", [b"a\nb\n", b"x" * (CHUNK - 4), b"x" * (CHUNK - 5) + b"\n"])
def test_a_character_broken_off_at_the_end_is_refused(refused, before):
    for bad in ("🙂".encode()[:n] for n in (1, 2, 3)):
        told = refused(before + b"a" + bad)

        where = f"line {before.count(10) + 1}, byte offset {len(before) + 1:,}, byte 0xf0"
        assert told.endswith(f"my.txt is not UTF-8: {where}: it ends in the middle of a character")


def test_latin_1_is_refused_with_the_way_out(refused):
    told = refused("naïve café\n".encode("latin-1"))

    assert "line 1, byte offset 2, byte 0xef\n" in told
    assert "try: iconv -f latin1 -t utf-8 " in told


@pytest.mark.parametrize("kept", [1, 5, 9, 40, -9, -1])
def test_truncated_gzip_is_refused(refused, kept):
    content = gzip.compress(os.urandom(500).hex().encode())

    assert "my.gz is not whole gzip data" in refused(content[:kept], "my.gz")


def test_damaged_gzip_is_refused(refused):
    content = bytearray(gzip.compress(b"abcdefgh" * 1000))
    content[-6] ^= 1

    assert "my.gz is not whole gzip data" in refused(bytes(content), "my.gz")
    assert "my.gz is not whole gzip data" in refused(b"plain text\n", "my.gz")


def test_characters_and_fingerprint_are_those_of_the_text(write, tmp_path):
    plain, marked = open_text([write("é\nb")]), open_text([write("\ufeffé\r\nb", "2.txt")])
    other = open_text([write("é\nc", "3.txt")])

    assert (plain.characters, marked.characters) == (3, 3)
    assert plain.fingerprint == marked.fingerprint == files.sha256(["é\nb".encode()])
    assert plain.fingerprint != other.fingerprint


def test_lines_have_no_newlines(write, monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK_BYTES", 3)

    assert list(open_text([write("ab\n\ncdefgh\n i")]).lines()) == ["ab", "", "cdefgh", " i"]
    assert list(open_text([write("ab\n\n")]).lines()) == ["ab", ""]


@pytest.mark.parametrize(("name", "part"), [("three-parts", "test"), ("one-part", "train")])
def test_of_several_parts_the_first_that_a_corpus_has_is_read(fetched, name, part):
    text = open_text([name], ("test", "valid", "train"))

    assert text.name == f"{name} ({part})"
    assert joined(text) == f"{name} {part}\n" * 9


def test_a_corpus_that_was_not_fetched_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path))

    with pytest.raises(TextError, match=r"ptb is not on this machine\n.*lmtrain corpora fetch ptb"):
        open_text(["ptb"])


def test_every_public_corpus_is_described():
    for name, entry in corpus.catalogue().items():
        downloads = [entry["archive"]] if "archive" in entry else list(entry["files"].values())

        assert corpus.named(name)
        assert entry["about"]
        assert entry["licence"]
        assert entry["level"] in ("word", "char", "byte")
        assert all(len(bytes.fromhex(item["sha256"])) == 32 for item in downloads)
        assert all(item["bytes"] > 0 and item["url"].startswith("http") for item in downloads)
    assert set(corpus.catalogue()) == {
        *("tiny-shakespeare", "ptb", "wikitext-2", "wikitext-103", "text8", "enwik8")
    }
