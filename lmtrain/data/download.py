"""Public corpora and data sets in the user's cache: downloads are resumed, hashes checked."""

import http.client
import importlib.resources
import sys
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from lmtrain import files
from lmtrain.data.corpus import catalogue, corpus_folder
from lmtrain.errors import ConfigError, MachineError

_TIMEOUT_SECONDS = 30
_MOST_UNPACKED_BYTES = 2_000_000_000


class _Item(NamedTuple):
    """A file to download.

    Args:
        name: what a mirror calls it.
        final: path of the complete file.
        url: where it is published.
        bytes: its size.
        sha256: its hash.
    """

    name: str
    final: Path
    url: str
    bytes: int
    sha256: str


def data_sets() -> dict[str, dict[str, Any]]:
    """The data sets of other tasks than language modelling that can be fetched, by name."""
    text = (importlib.resources.files("lmtrain.corpora") / "data_sets.toml").read_text("utf-8")
    return tomllib.loads(text)


def listing() -> list[dict[str, Any]]:
    """What is known of each public corpus and data set.

    That is name, about, licence, level, splitter, prepare, bytes, sha256, is_here, folder. A corpus
    has a level and perhaps a splitter; a data set has the names that `prepare_data.py` gives it.
    """
    rows = []
    for name, entry in {**catalogue(), **data_sets()}.items():
        items = _items(name, entry)
        parts = [corpus_folder(name) / f"{part}.txt" for part in entry.get("members", ())]
        rows.append(
            {
                "name": name,
                "about": entry["about"],
                "licence": entry["licence"],
                "level": entry.get("level"),
                "splitter": entry.get("splitter"),
                "prepare": entry.get("prepare", []),
                "bytes": sum(item.bytes for item in items),
                "sha256": {item.name: item.sha256 for item in items},
                "is_here": all(path.exists() for path in parts or [each.final for each in items]),
                "folder": str(corpus_folder(name)),
            }
        )
    return rows


def _items(name: str, entry: Mapping[str, Any]) -> list[_Item]:
    folder = corpus_folder(name)
    if "archive" in entry:
        file_name = _file_name(entry["archive"])
        return [_Item(file_name, folder / file_name, **entry["archive"])]
    if "prepare" in entry:
        return [_Item(each, folder / each, **item) for each, item in entry["files"].items()]
    return [
        _Item(_file_name(item), folder / f"{part}.txt", **item)
        for part, item in entry["files"].items()
    ]


def _file_name(item: Mapping[str, Any]) -> str:
    return str(item["url"]).rpartition("/")[2]


def fetch(name: str, mirror: str | None = None) -> list[Path]:
    """Downloads a corpus or a data set and returns its files.

    Args:
        name: a corpus or a data set.
        mirror: address of a folder with the same files; None for the original.

    Raises:
        ConfigError: no such corpus.
        MachineError: the network failed, or the hash is wrong.
    """
    entries = {**catalogue(), **data_sets()}
    if name not in entries:
        raise ConfigError(f"no corpus {name!r}", f"corpora: {', '.join(entries)}")
    entry, folder = entries[name], corpus_folder(name)
    with files.locked(folder / ".lock", f"the corpus folder {folder}", "wait for it to end"):
        for item in _items(name, entry):
            if not item.final.exists():
                url = f"{mirror.rstrip('/')}/{item.name}" if mirror else item.url
                _download(url, item.final, item.sha256)
        if "archive" in entry:
            archive = folder / _file_name(entry["archive"])
            return list(_unpack(archive, entry["members"], folder).values())
    return [item.final for item in _items(name, entry)]


def _download(url: str, final: Path, digest: str) -> None:
    partial = final.with_name(final.name + ".partial")
    try:
        _transfer(url, partial)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise MachineError(
            f"could not fetch {url}: {reason}",
            "the partial download is kept: run the same command again to resume it",
        ) from None
    found = files.sha256(files.file_chunks(partial))
    if found != digest:
        files.remove_file(partial)
        raise MachineError(
            f"{url} is not the file that was expected",
            f"SHA-256 {found}, expected {digest}",
        )
    files.publish_file(partial, final)


def _transfer(url: str, partial: Path) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            if have and response.status != http.HTTPStatus.PARTIAL_CONTENT:
                # The server sends the whole file again.
                files.remove_file(partial)
                have = 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            _keep(response, partial, have, total)
    except urllib.error.HTTPError as error:
        # Nothing is left to send: the hash decides whether what is here is whole.
        if not (have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
            raise


def _keep(response: BinaryIO, partial: Path, have: int, total: int | None) -> None:
    with (
        files.open_append(partial) as stream,
        tqdm(
            total=total, initial=have, unit="B", unit_scale=True, file=sys.stderr,
            desc=partial.name.removesuffix(".partial"),
        ) as bar,
    ):  # fmt: skip
        while chunk := _received(response):
            stream.write(chunk)
            have += len(chunk)
            bar.update(len(chunk))
    if total is not None and have < total:
        raise http.client.IncompleteRead(b"", total - have)


def _received(response: BinaryIO) -> bytes:
    """The next piece; a failing network is not taken for a failing disk.

    Raises:
        HTTPException: the connection broke.
    """
    try:
        return response.read(1 << 16)
    except OSError as error:
        raise http.client.HTTPException(error.strerror or str(error)) from None


def _unpack(archive: Path, members: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """The named members as PART.txt; nothing else of the archive is looked at.

    Raises:
        MachineError: the archive is not what it should be.
    """
    unpacked = {}
    try:
        with zipfile.ZipFile(archive) as opened:
            for part, member in members.items():
                final = folder / f"{part}.txt"
                if not final.exists():
                    if opened.getinfo(member).file_size > _MOST_UNPACKED_BYTES:
                        raise MachineError(f"{archive}: {member} is too large")
                    with opened.open(member) as source, files.open_atomic(final) as stream:
                        while chunk := source.read(1 << 20):
                            stream.write(chunk)
                unpacked[part] = final
    except (zipfile.BadZipFile, KeyError) as error:
        raise MachineError(f"{archive} is not the archive that was expected: {error}") from None
    return unpacked
