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


def fail(error):
    def refuse(*arguments, **options):
        raise error

    return refuse


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def group_may_write():
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "note.txt"
    path.write_bytes(b"old")
    return path


def test_new_content_takes_the_place_of_the_old(old):
    files.write(old, b"new")

    assert old.read_bytes() == b"new"
    assert names(old.parent) == ["note.txt"]


def test_missing_folders_are_made(tmp_path):
    files.write(tmp_path / "a" / "b" / "note.txt", b"text")

    assert (tmp_path / "a" / "b" / "note.txt").read_bytes() == b"text"


def test_content_appears_only_once_the_block_has_ended(old):
    with files.writing(old) as stream:
        stream.write(b"new")
        stream.flush()
        during = old.read_bytes()

    assert during == b"old"
    assert old.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failure_while_writing_leaves_the_old_content_and_nothing_else(old, error):
    def interrupted():
        with files.writing(old) as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(error):
        interrupted()

    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["note.txt"]


@pytest.mark.parametrize("function", ["create", "write", "sync", "rename"])
def test_a_full_disk_leaves_the_old_content_and_is_named(old, monkeypatch, function):
    monkeypatch.setattr(disk, function, fail(NO_SPACE))

    with pytest.raises(MachineError, match=r"could not write .*note\.txt: No space left.*; \d+ MB"):
        files.write(old, b"new")

    monkeypatch.undo()
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["note.txt"]


def test_the_space_left_is_the_one_of_the_disk_that_is_full(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 34_567_890))
    monkeypatch.setattr(disk, "sync", fail(NO_SPACE))

    with pytest.raises(MachineError, match="; 34 MB free"):
        files.write(tmp_path / "missing" / "note.txt", b"new")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_write_that_the_disk_refuses_is_explained():
    def overflow():
        with files.explained(full, "write"), full.open("wb") as stream:
            stream.write(b"x" * 100_000)

    full = Path("/dev/full")

    with pytest.raises(MachineError, match="could not write /dev/full: No space left on device"):
        overflow()


def test_a_folder_in_place_of_a_file_is_explained(tmp_path):
    (tmp_path / "note.txt").mkdir()

    with pytest.raises(MachineError, match="Is a directory"):
        files.write(tmp_path / "note.txt", b"new")

    assert names(tmp_path) == ["note.txt"]


def test_a_file_in_place_of_a_folder_is_explained(old):
    with pytest.raises(MachineError, match="could not make the folder"):
        files.make_folder(old / "inside")
    with pytest.raises(MachineError, match="could not write"):
        files.write(old / "inside" / "note.txt", b"")


def test_files_and_folders_follow_the_umask(tmp_path, group_may_write):
    files.write(tmp_path / "note.txt", b"")
    files.publish_folder(tmp_path / "folder", {"inside.txt": b""})
    files.append_line(tmp_path / "log.jsonl", "{}")
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in [*tmp_path.iterdir(), tmp_path / "folder" / "inside.txt"]
    }

    assert modes == {"note.txt": 0o664, "folder": 0o775, "inside.txt": 0o664, "log.jsonl": 0o664}


def test_a_folder_appears_whole(tmp_path):
    files.publish_folder(tmp_path / "runs" / "step", {"a": b"1", "b": b"2"})

    assert names(tmp_path / "runs") == ["step"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs" / "step").iterdir()} == {
        "a": b"1",
        "b": b"2",
    }


def test_a_folder_that_fails_half_way_does_not_appear(tmp_path, monkeypatch):
    real, calls = disk.sync, []

    def fails_at_the_second(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise NO_SPACE
        real(descriptor)

    monkeypatch.setattr(disk, "sync", fails_at_the_second)

    with pytest.raises(MachineError, match="No space left"):
        files.publish_folder(tmp_path / "step", {"a": b"1", "b": b"2"})

    assert len(calls) == 2
    assert names(tmp_path) == []


def test_a_published_folder_is_never_changed(tmp_path):
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


def test_a_folder_is_removed_whole(tmp_path):
    files.publish_folder(tmp_path / "step", {"a": b"1"})

    files.remove_folder(tmp_path / "step")

    assert names(tmp_path) == []


def test_what_is_not_there_cannot_be_removed(tmp_path):
    with pytest.raises(MachineError, match=r"could not remove .*absent: No such file"):
        files.remove_folder(tmp_path / "absent")
    with pytest.raises(MachineError, match=r"could not remove .*absent: No such file"):
        files.remove_file(tmp_path / "absent")


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "rename", fail(KeyboardInterrupt))
    monkeypatch.setattr(files, "_clear", lambda path: None)
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "note.txt", b"half")
    with pytest.raises(KeyboardInterrupt):
        files.publish_folder(tmp_path / "step", {"a": b"1"})
    monkeypatch.undo()
    monkeypatch.setattr(files, "_clear", lambda path: None)
    files.publish_folder(tmp_path / "old", {"a": b"1"})
    files.remove_folder(tmp_path / "old")
    monkeypatch.undo()
    files.write(tmp_path / "kept.txt", b"1")
    (tmp_path / ".aside-link").symlink_to(tmp_path / "kept.txt")
    left = len(names(tmp_path))

    files.remove_leftovers(tmp_path)

    assert left == 5
    assert names(tmp_path) == ["kept.txt"]


def test_a_symbolic_link_among_the_leftovers_is_not_followed(tmp_path):
    files.write(tmp_path / "elsewhere" / "kept.txt", b"1")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".trash-1").symlink_to(tmp_path / "elsewhere")

    files.remove_leftovers(tmp_path / "here")

    assert names(tmp_path / "here") == []
    assert names(tmp_path / "elsewhere") == ["kept.txt"]


def test_lines_are_added_by_one_write_each(tmp_path, monkeypatch):
    written, real = [], os.write

    def write(descriptor, content):
        written.append(content)
        return real(descriptor, content)

    monkeypatch.setattr(os, "write", write)
    files.append_line(tmp_path / "log", "é 1")
    files.append_line(tmp_path / "log", "2")

    assert written == ["é 1\n".encode(), b"2\n"]
    assert (tmp_path / "log").read_bytes() == "é 1\n2\n".encode()


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing_of_itself(tmp_path, monkeypatch):
    files.append_line(tmp_path / "log", "before")
    monkeypatch.setattr(disk, "write", lambda descriptor, content: os.write(descriptor, b"ha"))

    with pytest.raises(MachineError, match=r"could not append to .*log: the disk is full"):
        files.append_line(tmp_path / "log", "half")

    assert (tmp_path / "log").read_text() == "before\n"


def test_a_line_that_the_disk_refuses_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", fail(NO_SPACE))

    with pytest.raises(MachineError, match=r"could not append to .*log: No space left.*MB free"):
        files.append_line(tmp_path / "log", "1")


def test_a_broken_append_keeps_what_has_come(tmp_path):
    def broken():
        with files.appending(tmp_path / "a" / "part") as stream:
            stream.write(b"one")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    with files.appending(tmp_path / "a" / "part") as stream:
        stream.write(b"two")

    assert (tmp_path / "a" / "part").read_bytes() == b"onetwo"


def test_a_finished_file_moves_to_its_name(tmp_path):
    files.write(tmp_path / "part", b"1")

    files.publish_file(tmp_path / "part", tmp_path / "final")

    assert names(tmp_path) == ["final"]
    with pytest.raises(MachineError, match=r"could not write .*final"):
        files.publish_file(tmp_path / "part", tmp_path / "final")


def test_a_pipe_is_spooled_to_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    pieces = [os.urandom(3_000_000), b"a"]

    first, second = files.spool(iter(pieces)), files.spool([b"other"])

    assert first.read_bytes() == b"".join(pieces)
    assert second.read_bytes() == b"other"
    assert len(names(tmp_path)) == 2


def test_a_scratch_file_can_be_read_again_and_is_never_seen(tmp_path):
    with files.scratch(tmp_path / "new") as stream:
        stream.write(b"written")
        stream.seek(2)

        assert stream.read(3) == b"itt"
        assert list((tmp_path / "new").iterdir()) == []


def test_a_scratch_file_on_a_full_disk_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "write", fail(NO_SPACE))

    with (
        pytest.raises(MachineError, match=r"could not write in .*No space left"),
        files.scratch(tmp_path) as stream,
    ):
        stream.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_held_names_its_holder(tmp_path):
    path = tmp_path / "run" / ".lock"

    with (
        files.locked(path, "the run r"),
        pytest.raises(RunBusyError) as caught,
        files.locked(path, "the run r"),
    ):
        pytest.fail("the lock was given twice")

    assert f"the run r is in use by another process (pid {os.getpid()})" in str(caught.value)
    assert "--out" in str(caught.value)
    assert caught.value.exit_code == 7


def test_a_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), files.locked(tmp_path / ".lock", "the run"):
        raise ZeroDivisionError

    with files.locked(tmp_path / ".lock", "the run"):
        holder = (tmp_path / ".lock").read_text()

    assert holder == str(os.getpid())


def test_a_file_system_without_locks_is_explained(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with (
        pytest.raises(MachineError, match=r"could not lock .*\.lock: Function not implemented"),
        files.locked(tmp_path / ".lock", "the run"),
    ):
        pytest.fail("nothing was locked")


def test_processes_of_the_same_number_do_not_meet():
    # As in containers that share a disk.
    code = (
        "import os; os.getpid = lambda: 1; from pathlib import Path; from lmtrain import files;"
        "print(files._aside(Path('tokens.npy')))"
    )
    chosen = [subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)]

    assert chosen[0] != chosen[1]


def test_a_lock_file_that_cannot_be_opened_is_explained(tmp_path):
    with pytest.raises(MachineError, match="could not lock"), files.locked(tmp_path, "the run"):
        pytest.fail("a folder was locked")


def test_sha256_is_that_of_the_pieces_joined(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")

    assert files.sha256([b"a", b"", b"bc"]).startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
    assert list(files.file_chunks(tmp_path / "a", 2)) == [b"ab", b"c"]


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
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


def test_without_a_usable_home_the_cache_is_temporary(tmp_path, monkeypatch):
    (tmp_path / "home").write_bytes(b"")
    monkeypatch.delenv("LMTRAIN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))

    assert files.cache_folder() == tmp_path / f"lmtrain-{os.getuid()}"


def test_a_named_cache_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "file" / "cache"))

    with pytest.raises(MachineError, match=r"could not make the folder .*cache"):
        files.cache_folder()
