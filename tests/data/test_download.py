import hashlib
import io
import socket
import struct
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lmtrain import files
from lmtrain.data import corpus, download
from lmtrain.errors import ConfigError, MachineError, RunBusyError

CONTENT = b"".join(f"line {n} of the corpus\n".encode() for n in range(20_000))
HALF = 200_000


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


ARCHIVE = zipped({"folder/train.tokens": CONTENT, "folder/valid.tokens": b"v\n", "../evil": b"e"})


class Handler(BaseHTTPRequestHandler):
    """Serves one content, in the way that the server's `manner` says."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append((self.path, asked))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        content = server.content
        if server.manner == "missing":
            self.send_error(404)
        elif server.manner == "hangs up":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        elif asked and server.manner == "no ranges":
            self.answer(200, content)
        elif asked and start >= len(content):
            self.send_error(416)
        elif asked:
            self.answer(206, content[start:])
        else:
            self.answer(200, content)

    def answer(self, status, content):
        manner = self.server.manner
        whole = len(content)
        content = content[:HALF] if manner in ("breaks off", "resets") else content
        self.send_response(status)
        if manner != "no length":
            self.send_header("Content-Length", str(whole))
        self.end_headers()
        self.server.sent.append(len(content))
        self.wfile.write(content)
        if manner == "resets":
            self.wfile.flush()
            self.server.may_reset.wait(20)
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.manner, self.asked, self.sent = CONTENT, "", [], []
        self.may_reset = threading.Event()

    def handle_error(self, request, address):
        pass

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, server):
    """A catalogue of a plain and a zipped corpus; gives the folder of the cached corpora."""

    def item(name, content):
        digest = hashlib.sha256(content).hexdigest()
        return {"url": f"{server.address}/{name}", "bytes": len(content), "sha256": digest}

    about = {"about": "a corpus", "licence": "none", "level": "word"}
    entries = {
        "plain": {**about, "files": {"train": item("a/plain.txt", CONTENT)}},
        "zipped": {
            **about,
            "archive": item("zipped.zip", ARCHIVE),
            "members": {"train": "folder/train.tokens", "valid": "folder/valid.tokens"},
        },
        "wrong-members": {
            **about,
            "archive": item("zipped.zip", ARCHIVE),
            "members": {"train": "folder/absent"},
        },
        "no-zip": {**about, "archive": item("no.zip", CONTENT), "members": {"train": "x"}},
    }
    monkeypatch.setattr(corpus, "catalogue", lambda: entries)
    monkeypatch.setattr(download, "catalogue", lambda: entries)
    of_each_split = {f"{split}.seq.in": item(f"{split}/seq.in", CONTENT) for split in ("a", "b")}
    data_set = {"about": "a data set", "licence": "none", "prepare": ["x"], "files": of_each_split}
    monkeypatch.setattr(download, "data_sets", lambda: {"data-set": data_set})
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpora"


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_corpus_is_brought_whole(server, folder):
    paths = download.fetch("plain")

    assert paths == [folder / "plain" / "train.txt"]
    assert paths[0].read_bytes() == CONTENT
    assert names(folder / "plain") == ["train.txt"]
    assert server.asked == [("/a/plain.txt", None)]
    assert "".join(corpus.open_text(["plain"]).chunks()) == CONTENT.decode()


def test_files_of_a_data_set_keep_their_names(server, folder):
    paths = download.fetch("data-set")

    assert paths == [folder / "data-set" / "a.seq.in", folder / "data-set" / "b.seq.in"]
    assert all(path.read_bytes() == CONTENT for path in paths)
    assert [path for path, _ in server.asked] == ["/a/seq.in", "/b/seq.in"]
    assert download.listing()[-1]["is_here"]


def test_a_mirror_has_each_file_of_a_data_set_under_its_own_name(server):
    download.fetch("data-set", mirror=f"{server.address}/mirror")

    assert [path for path, _ in server.asked] == ["/mirror/a.seq.in", "/mirror/b.seq.in"]


def test_a_corpus_that_is_here_is_not_fetched_again(server):
    download.fetch("plain")

    download.fetch("plain")

    assert len(server.asked) == 1


@pytest.mark.parametrize("manner", ["breaks off", "resets"])
def test_a_broken_download_goes_on_where_it_broke_off(server, folder, manner):
    server.manner = manner
    threading.Timer(0.5, server.may_reset.set).start()
    with pytest.raises(MachineError, match=rf"could not fetch {server.address}/a/plain\.txt: "):
        download.fetch("plain")
    here = (folder / "plain" / "train.txt.partial").stat().st_size
    server.manner = ""

    download.fetch("plain")

    assert 0 < here <= HALF
    assert server.asked[1:] == [("/a/plain.txt", f"bytes={here}-")]
    assert server.sent[1:] == [len(CONTENT) - here]
    assert (folder / "plain" / "train.txt").read_bytes() == CONTENT
    assert names(folder / "plain") == ["train.txt"]


@pytest.mark.parametrize("manner", ["breaks off", "hangs up"])
def test_a_broken_download_says_how_to_resume_it(server, manner):
    server.manner = manner

    with pytest.raises(MachineError, match="run the same command again to resume it") as caught:
        download.fetch("plain")

    assert caught.value.exit_code == 5


def test_a_server_without_ranges_sends_the_whole_file_again(server, folder):
    server.manner = "breaks off"
    with pytest.raises(MachineError):
        download.fetch("plain")
    server.manner = "no ranges"

    download.fetch("plain")

    assert server.asked[1][1] == f"bytes={HALF}-"
    assert server.sent[1] == len(CONTENT)
    assert (folder / "plain" / "train.txt").read_bytes() == CONTENT


def test_a_server_that_tells_no_length_is_believed_by_the_hash(server, folder):
    server.manner = "no length"

    download.fetch("plain")

    assert (folder / "plain" / "train.txt").read_bytes() == CONTENT


def test_a_download_that_lacks_nothing_but_its_name_is_finished(server, folder):
    files.write(folder / "plain" / "train.txt.partial", CONTENT)

    download.fetch("plain")

    assert server.sent == []
    assert names(folder / "plain") == ["train.txt"]


@pytest.mark.parametrize("begun", [b"", b"other" * 10, b"x" * (len(CONTENT) + 1)])
def test_a_wrong_hash_is_told_and_the_file_deleted(server, folder, begun):
    files.write(folder / "plain" / "train.txt.partial", begun)
    server.content = CONTENT if begun else CONTENT[:-1] + b"?"

    with pytest.raises(MachineError, match="is not the file that was expected") as caught:
        download.fetch("plain")

    assert f"expected {hashlib.sha256(CONTENT).hexdigest()}" in str(caught.value)
    assert names(folder / "plain") == []
    server.content = CONTENT
    assert download.fetch("plain")[0].read_bytes() == CONTENT


def test_a_missing_file_is_told(server, folder):
    server.manner = "missing"

    with pytest.raises(MachineError, match=rf"fetch {server.address}/a/plain\.txt: Not Found"):
        download.fetch("plain")

    assert names(folder / "plain") == []


def test_a_server_that_is_not_there_is_told():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{unused.getsockname()[1]}"

        with pytest.raises(MachineError, match=r"could not fetch .*refused"):
            download.fetch("plain", mirror)


@pytest.mark.parametrize("mirror", ["no-address", "gopher://x", "http://[", "http://a b/"])
def test_a_mirror_that_is_no_address_is_told(mirror):
    with pytest.raises(MachineError, match="could not fetch "):
        download.fetch("plain", mirror)


def test_a_mirror_has_the_files_under_their_names(server):
    download.fetch("plain", f"{server.address}/mirror/")

    assert server.asked == [("/mirror/plain.txt", None)]


def test_progress_goes_to_standard_error(capsys):
    download.fetch("plain")
    out, err = capsys.readouterr()

    assert out == ""
    assert "train.txt" in err
    assert "100%" in err


def test_progress_of_a_download_that_goes_on_counts_what_is_here(server, capsys):
    server.manner = "breaks off"
    with pytest.raises(MachineError):
        download.fetch("plain")
    server.manner = ""
    capsys.readouterr()

    download.fetch("plain")

    first, *_, last = [part for part in capsys.readouterr().err.split("\r") if part]
    assert f"{100 * HALF / len(CONTENT):.0f}%" in first
    assert "100%" in last


def test_the_named_members_of_an_archive_are_unpacked_and_no_others(server, folder):
    server.content = ARCHIVE

    paths = download.fetch("zipped")

    assert paths == [folder / "zipped" / "train.txt", folder / "zipped" / "valid.txt"]
    assert [path.read_bytes() for path in paths] == [CONTENT, b"v\n"]
    assert names(folder / "zipped") == ["train.txt", "valid.txt", "zipped.zip"]
    assert not list(folder.parent.rglob("*evil*"))


def test_a_member_that_is_gone_is_unpacked_again_without_a_download(server, folder):
    server.content = ARCHIVE
    download.fetch("zipped")[0].unlink()

    download.fetch("zipped")

    assert len(server.asked) == 1
    assert (folder / "zipped" / "train.txt").read_bytes() == CONTENT


@pytest.mark.parametrize(("name", "content"), [("wrong-members", ARCHIVE), ("no-zip", CONTENT)])
def test_an_archive_that_is_none_is_told(server, name, content):
    server.content = content

    with pytest.raises(MachineError, match="is not the archive that was expected"):
        download.fetch(name)


def test_a_member_too_large_is_refused(server, folder, monkeypatch):
    monkeypatch.setattr(download, "_MOST_UNPACKED_BYTES", len(CONTENT) - 1)
    server.content = ARCHIVE

    with pytest.raises(MachineError, match=r"zipped\.zip: folder/train\.tokens is too large"):
        download.fetch("zipped")

    assert names(folder / "zipped") == ["zipped.zip"]


def test_an_unknown_corpus_is_told_with_those_there_are():
    with pytest.raises(ConfigError, match=r"no corpus 'plane'\n.*corpora: plain, zipped"):
        download.fetch("plane")


def test_a_corpus_that_another_process_fetches_is_busy(folder):
    with (
        files.locked(folder / "plain" / ".lock", ""),
        pytest.raises(RunBusyError, match=r"the corpus folder .*plain is in use"),
    ):
        download.fetch("plain")


def test_the_listing_says_what_is_known_and_what_is_here(server, folder):
    download.fetch("plain")

    plain, zipped_corpus, *_ = download.listing()

    assert plain == {
        "name": "plain",
        "about": "a corpus",
        "licence": "none",
        "level": "word",
        "splitter": None,
        "prepare": [],
        "folder": str(folder / "plain"),
        "bytes": len(CONTENT),
        "sha256": {"plain.txt": hashlib.sha256(CONTENT).hexdigest()},
        "is_here": True,
    }
    assert zipped_corpus["is_here"] is False
    assert zipped_corpus["sha256"] == {"zipped.zip": hashlib.sha256(ARCHIVE).hexdigest()}
