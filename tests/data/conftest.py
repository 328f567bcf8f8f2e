import pytest

from lmtrain import files
from lmtrain.data import corpus

CATALOGUE = {
    "three-parts": {"files": {"train": {}, "valid": {}, "test": {}}},
    "one-part": {"files": {"train": {}}},
    "fractions": {"members": {"train": "x"}, "fractions": {"valid": 0.25, "test": 0.5}},
}


@pytest.fixture
def write(tmp_path):
    """Writes a file and gives its path, for open_text."""

    def written(content: bytes | str, name: str = "my.txt") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return written


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """A cache in which three corpora lie as they do once fetched."""
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "catalogue", lambda: CATALOGUE)
    for name, entry in CATALOGUE.items():
        for part in entry.get("members", entry.get("files")):
            files.write(corpus.corpus_folder(name) / f"{part}.txt", f"{name} {part}\n".encode() * 9)
