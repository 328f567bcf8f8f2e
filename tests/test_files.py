import errno
import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from lmtrain import disk, files
from lmtrain.errors import MachineError, RunBusyError

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raises(error):
    def function(*arguments, **options):
        raise error

    return function


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def group_writable():
    umask = os.umask(0o002)
    yield
    os.umask(umask)


@pytest.fixture
def existing(tmp_path):
    path = tmp_path / "note.txt"
    path.write_bytes(b"old")
    return path


def test_write_replaces_a_file(existing):
    files.write(existing, b"new")

    assert existing.read_bytes() == b"new"
    assert names(existing.parent) == ["note.txt"]


def test_missing_folders_are_created(tmp_path):
    files.write(tmp_path / "a" / "b" / "note.txt", b"text")

    assert (tmp_path / "a" / "b" / "note.txt").read_bytes() == b"text"


def test_content_appears_when_the_block_ends(existing):
    with files.open_atomic(existing) as stream:
        stream.write(b"new")
        stream.flush()
        during = existing.read_bytes()

    assert during == b"old"
    assert existing.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_content_and_nothing_else(existing, error):
    def interrupted():
        with files.open_atomic(existing) as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(error):
        interrupted()

    assert existing.read_bytes() == b"old"
    assert names(existing.parent) == ["note.txt"]


@pytest.mark.parametrize("function", ["create", "write", "sync", "rename"])
def test_a_full_disk_is_an_error_and_leaves_the_old_content(existing, monkeypatch, function):
    monkeypatch.setattr(disk, function, raises(NO_SPACE))

    with pytest.raises(MachineError, match=r"could not write .*note\.txt: No space left.*; \d+ MB"):
        files.write(existing, b"new")

    monkeypatch.undo()
    assert existing.read_bytes() == b"old"
    assert names(existing.parent) == ["note.txt"]


def test_the_error_gives_the_free_space_of_the_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 34_567_890))
    monkeypatch.setattr(disk, "sync", raises(NO_SPACE))

    with pytest.raises(MachineError, match="; 34 MB free"):
        files.write(tmp_path / "missing" / "note.txt", b"new")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_write_error_becomes_a_machine_error():
    def overflow():
        with files.map_os_errors(full, "write"), full.open("wb") as stream:
            stream.write(b"x" * 100_000)

    full = Path("/dev/full")

    with pytest.raises(MachineError, match="could not write /dev/full: No space left on device"):
        overflow()


def test_a_folder_in_place_of_a_file_is_an_error(tmp_path):
    (tmp_path / "note.txt").mkdir()

    with pytest.raises(MachineError, match="Is a directory"):
        files.write(tmp_path / "note.txt", b"new")

    assert names(tmp_path) == ["note.txt"]


def test_a_file_in_place_of_a_folder_is_an_error(existing):
    with pytest.raises(MachineError, match="could not create the folder"):
        files.make_folder(existing / "inside")
    with pytest.raises(MachineError, match="could not write"):
        files.write(existing / "inside" / "note.txt", b"")


def test_files_and_folders_follow_the_umask(tmp_path, group_writable):
    files.write(tmp_path / "note.txt", b"")
    files.publish_folder(tmp_path / "folder", {"inside.txt": b""})
    files.append_line(tmp_path / "log.jsonl", "{}")
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in [*tmp_path.iterdir(), tmp_path / "folder" / "inside.txt"]
    }

    assert modes == {"note.txt": 0o664, "folder": 0o775, "inside.txt": 0o664, "log.jsonl": 0o664}


def test_a_published_folder_has_all_files(tmp_path):
    files.publish_folder(tmp_path / "runs" / "step", {"a": b"1", "b": b"2"})

    assert names(tmp_path / "runs") == ["step"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs" / "step").iterdir()} == {
        "a": b"1",
        "b": b"2",
    }


def test_a_folder_with_an_error_while_writing_does_not_appear(tmp_path, monkeypatch):
    real, calls = disk.sync, []

    def fail_second_call(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise NO_SPACE
        real(descriptor)

    monkeypatch.setattr(disk, "sync", fail_second_call)

    with pytest.raises(MachineError, match="No space left"):
        files.publish_folder(tmp_path / "step", {"a": b"1", "b": b"2"})

    assert len(calls) == 2
    assert names(tmp_path) == []


def test_a_published_folder_is_never_replaced(tmp_path):
    files.publish_folder(tmp_path / "step", {"a": b"1"})

    with pytest.raises(MachineError, match=r"could not write .*step"):
        files.publish_folder(tmp_path / "step", {"a": b"2"})

    assert names(tmp_path) == ["step"]
    assert (tmp_path / "step" / "a").read_bytes() == b"1"


def test_every_file_and_folder_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    real_sync, real_rename = os.fsync, disk.rename

    def sync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def rename(path, target):
        events.append("rename")
        return real_rename(path, target)

    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(disk, "rename", rename)
    files.publish_folder(tmp_path / "runs" / "step", {"a": b"1", "b": b"2"})

    step = tmp_path / "runs" / "step"
    a, b, folder, parent = (
        path.stat().st_ino for path in (step / "a", step / "b", step, step.parent)
    )
    assert events == [a, b, folder, "rename", parent]


def test_a_folder_is_deleted(tmp_path):
    files.publish_folder(tmp_path / "step", {"a": b"1"})

    files.remove_folder(tmp_path / "step")

    assert names(tmp_path) == []


def test_deleting_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(MachineError, match=r"could not remove .*absent: No such file"):
        files.remove_folder(tmp_path / "absent")
    with pytest.raises(MachineError, match=r"could not remove .*absent: No such file"):
        files.remove_file(tmp_path / "absent")


def test_only_leftovers_of_a_killed_process_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "rename", raises(KeyboardInterrupt))
    monkeypatch.setattr(files, "_delete", lambda path: None)
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "note.txt", b"half")
    with pytest.raises(KeyboardInterrupt):
        files.publish_folder(tmp_path / "step", {"a": b"1"})
    monkeypatch.undo()
    monkeypatch.setattr(files, "_delete", lambda path: None)
    files.publish_folder(tmp_path / "old", {"a": b"1"})
    files.remove_folder(tmp_path / "old")
    monkeypatch.undo()
    files.write(tmp_path / "kept.txt", b"1")
    (tmp_path / ".aside-link").symlink_to(tmp_path / "kept.txt")
    count = len(names(tmp_path))

    files.remove_leftovers(tmp_path)

    assert count == 5
    assert names(tmp_path) == ["kept.txt"]


def test_deleting_leftovers_does_not_follow_symbolic_links(tmp_path):
    files.write(tmp_path / "elsewhere" / "kept.txt", b"1")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".trash-1").symlink_to(tmp_path / "elsewhere")

    files.remove_leftovers(tmp_path / "here")

    assert names(tmp_path / "here") == []
    assert names(tmp_path / "elsewhere") == ["kept.txt"]


def test_each_line_is_appended_with_one_write(tmp_path, monkeypatch):
    written, real = [], os.write

    def write(descriptor, content):
        written.append(content)
        return real(descriptor, content)

    monkeypatch.setattr(os, "write", write)
    files.append_line(tmp_path / "log", "é 1")
    files.append_line(tmp_path / "log", "2")

    assert written == ["é 1\n".encode(), b"2\n"]
    assert (tmp_path / "log").read_bytes() == "é 1\n2\n".encode()


def test_a_line_that_does_not_fit_on_the_disk_is_not_written(tmp_path, monkeypatch):
    files.append_line(tmp_path / "log", "before")
    monkeypatch.setattr(disk, "write", lambda descriptor, content: os.write(descriptor, b"ha"))

    with pytest.raises(MachineError, match=r"could not append to .*log: the disk is full"):
        files.append_line(tmp_path / "log", "half")

    assert (tmp_path / "log").read_text() == "before\n"


def test_a_full_disk_when_appending_a_line_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", raises(NO_SPACE))

    with pytest.raises(MachineError, match=r"could not append to .*log: No space left.*MB free"):
        files.append_line(tmp_path / "log", "1")


def test_an_error_while_appending_keeps_what_was_written(tmp_path):
    def interrupted():
        with files.open_append(tmp_path / "a" / "part") as stream:
            stream.write(b"one")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    with files.open_append(tmp_path / "a" / "part") as stream:
        stream.write(b"two")

    assert (tmp_path / "a" / "part").read_bytes() == b"onetwo"


def test_a_file_is_published_under_its_final_name(tmp_path):
    files.write(tmp_path / "part", b"1")

    files.publish_file(tmp_path / "part", tmp_path / "final")

    assert names(tmp_path) == ["final"]
    with pytest.raises(MachineError, match=r"could not write .*final"):
        files.publish_file(tmp_path / "part", tmp_path / "final")


def test_each_pipe_is_spooled_to_its_own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    pieces = [os.urandom(3_000_000), b"a"]

    first, second = files.spool(iter(pieces)), files.spool([b"other"])

    assert first.read_bytes() == b"".join(pieces)
    assert second.read_bytes() == b"other"
    assert len(names(tmp_path)) == 2


def test_a_scratch_file_can_be_read_and_has_no_name(tmp_path):
    with files.open_scratch(tmp_path / "new") as stream:
        stream.write(b"written")
        stream.seek(2)

        assert stream.read(3) == b"itt"
        assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_when_writing_a_scratch_file_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "write", raises(NO_SPACE))

    with (
        pytest.raises(MachineError, match=r"could not write in .*No space left"),
        files.open_scratch(tmp_path) as stream,
    ):
        stream.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_held_lock_is_an_error_with_the_process_id(tmp_path):
    path = tmp_path / "run" / ".lock"

    with (
        files.locked(path, "the run r"),
        pytest.raises(RunBusyError) as caught,
        files.locked(path, "the run r"),
    ):
        pytest.fail("the lock was acquired twice")

    assert f"the run r is in use by another process (pid {os.getpid()})" in str(caught.value)
    assert "--out" in str(caught.value)
    assert caught.value.exit_code == 7


def test_a_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), files.locked(tmp_path / ".lock", "the run"):
        raise ZeroDivisionError

    with files.locked(tmp_path / ".lock", "the run"):
        pid = (tmp_path / ".lock").read_text()

    assert pid == str(os.getpid())


def test_a_file_system_without_locks_is_an_error(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with (
        pytest.raises(MachineError, match=r"could not lock .*\.lock: Function not implemented"),
        files.locked(tmp_path / ".lock", "the run"),
    ):
        pytest.fail("the lock was acquired")


def test_processes_with_the_same_id_have_different_temporary_files():
    # Containers that share a disk can have the same process ids.
    code = (
        "import os; os.getpid = lambda: 1; from pathlib import Path; from lmtrain import files;"
        "print(files._temporary_path(Path('tokens.npy')))"
    )
    paths = [subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)]

    assert paths[0] != paths[1]


def test_a_lock_file_that_cannot_be_opened_is_an_error(tmp_path):
    with pytest.raises(MachineError, match="could not lock"), files.locked(tmp_path, "the run"):
        pytest.fail("the lock was acquired")


def test_sha256_is_computed_over_all_chunks(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")

    assert files.sha256([b"a", b"", b"bc"]).startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
    assert list(files.file_chunks(tmp_path / "a", 2)) == [b"ab", b"c"]


def test_the_environment_determines_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    named = files.cache_folder()
    monkeypatch.delenv("LMTRAIN_CACHE")
    xdg = files.cache_folder()
    monkeypatch.delenv("XDG_CACHE_HOME")
    home = files.cache_folder()

    assert [named, xdg, home] == [
        tmp_path / "named",
        tmp_path / "xdg" / "lmtrain",
        tmp_path / "home" / ".cache" / "lmtrain",
    ]
    assert all(folder.is_dir() for folder in (named, xdg, home))


def test_without_a_usable_home_the_cache_is_in_the_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "home").write_bytes(b"")
    monkeypatch.delenv("LMTRAIN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))

    assert files.cache_folder() == tmp_path / f"lmtrain-{os.getuid()}"


def test_a_cache_folder_that_cannot_be_created_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "file" / "cache"))

    with pytest.raises(MachineError, match=r"could not create the folder .*cache"):
        files.cache_folder()
