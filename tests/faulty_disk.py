"""Disks that fail, processes that die and power that is lost, in place of `lmtrain.disk`.

`Faults` makes one operation fail; `PowerLoss` records all of them and builds what a disk may hold
afterwards: what was not synced may be there, be gone, be torn or be zeros.
"""

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmtrain import disk

OPERATIONS = (
    "create", "open_to_append", "write", "truncate", "sync", "sync_folder", "rename",
    "make_folder", "remove_folder", "remove_file",
)  # fmt: skip
REAL: dict[str, Callable[..., Any]] = {name: getattr(disk, name) for name in OPERATIONS}
# Waiting for the disk of the test would prove nothing.
TAKEN: dict[str, Callable[..., Any]] = {
    **REAL,
    "sync": lambda descriptor: None,
    "sync_folder": lambda path: None,
}


class DiedError(BaseException):
    """The process ended here; nothing it would have done after this was done."""


class Faults:
    """Inside its block, the `at`-th operation on the disk, counted from 1, fails.

    Args:
        at: which one; 0 for none.
        failure: the number of an OSError, "short" for half a write, or "death", after which no
            operation works any more.
    """

    def __init__(self, at: int = 0, failure: int | str = errno.EIO) -> None:
        self.at = at
        self.failure = failure
        self.calls: list[str] = []
        self.failed: str | None = None

    def __enter__(self) -> "Faults":
        for name in OPERATIONS:
            setattr(disk, name, self._replaced(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in REAL.items():
            setattr(disk, name, real)

    def _replaced(self, name: str) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            self.calls.append(name)
            if self.failure == "death" and self.failed:
                raise DiedError
            if len(self.calls) != self.at:
                return TAKEN[name](*arguments)
            self.failed = name
            if self.failure == "death":
                raise DiedError
            if self.failure == "short":
                if name != "write":
                    return TAKEN[name](*arguments)
                descriptor, content = arguments
                return TAKEN[name](descriptor, content[: len(content) // 2])
            assert isinstance(self.failure, int)
            raise OSError(self.failure, os.strerror(self.failure))

        return operation


Contents = dict[str, bytes | None]
"""What a disk holds: bytes of files by path, None for folders."""


class _Node:
    """A file with what is written and what is durable of it, or a folder with its names.

    Changes of a folder are (name that goes, name that comes, what that then means); they are not
    durable until it is synced.
    """

    def __init__(self) -> None:
        self.written = b""
        self.durable = b""
        self.names: dict[str, _Node] | None = None
        self.changes: list[tuple[str | None, str | None, _Node]] = []

    def after(self, changes: list[tuple[str | None, str | None, "_Node"]]) -> dict[str, "_Node"]:
        names = dict(self.names or {})
        for old, new, node in changes:
            names.pop(old or "", None)
            if new is not None:
                names[new] = node
        return names


class PowerLoss:
    """Inside its block, records all operations below `root`; builds what a loss would leave.

    Args:
        root: an empty folder, durable itself.
        pretended: operations that only pretend to make something durable: a check of the model.

    Attributes:
        promised: what has been promised to be durable; the test writes it.
    """

    def __init__(self, root: Path, pretended: tuple[str, ...] = ()) -> None:
        self.root = root
        self.pretended = pretended
        self.promised = 0
        self._top = _Node()
        self._top.names = {}
        self._open: dict[int, _Node] = {}
        self._states: dict[tuple[tuple[str, bytes | None], ...], int] = {}
        self._chance = random.Random(1)

    def __enter__(self) -> "PowerLoss":
        for name in OPERATIONS:
            setattr(disk, name, self._recorded(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in REAL.items():
            setattr(disk, name, real)

    def states(self) -> Iterator[tuple[Contents, int]]:
        """Every different disk after a loss of power, with the most that was promised before it."""
        for state, promised in self._states.items():
            yield dict(state), promised

    def _recorded(self, name: str) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            # What is taken away is looked up before it is gone.
            node = self._find(arguments[0]) if name in ("remove_file", "remove_folder") else None
            result = None if name in self.pretended else TAKEN[name](*arguments)
            if name not in self.pretended:
                self._note(name, result, arguments, node)
            for state in self._possible():
                key = tuple(sorted(state.items()))
                self._states[key] = max(self._states.get(key, 0), self.promised)
            return result

        return operation

    def _find(self, path: Path) -> _Node:
        node = self._top
        for part in path.relative_to(self.root).parts:
            node = node.after(node.changes)[part]
        return node

    def _note(self, name: str, result: Any, arguments: Any, node: _Node | None) -> None:
        first = arguments[0]
        if name in ("write", "truncate"):
            self._open[first].written = Path(f"/proc/self/fd/{first}").read_bytes()
        elif name == "sync":
            self._open[first].durable = self._open[first].written
        elif name == "sync_folder":
            folder = self._find(first)
            folder.names, folder.changes = folder.after(folder.changes), []
        elif name == "rename":
            moved = self._find(first)
            assert first.parent == arguments[1].parent
            self._find(first.parent).changes.append((first.name, arguments[1].name, moved))
        elif node is not None:
            self._find(first.parent).changes.append((first.name, None, node))
        else:
            folder = self._find(first.parent)
            made = folder.after(folder.changes).get(first.name)
            if made is None:
                made = _Node()
                folder.changes.append((None, first.name, made))
            if name == "make_folder":
                made.names = {}
            else:
                self._open[result] = made

    def _possible(self) -> Iterator[Contents]:
        """Disks that may be found after a loss at this point."""
        for choice in ("all", "none", "but one", "one", "random", "random", "random"):
            for form in ("durable", "written", "torn", "zeros"):
                state: Contents = {}
                self._collect(self._top, "", choice, form, state)
                yield state

    def _collect(self, folder: _Node, path: str, choice: str, form: str, state: Contents) -> None:
        for name, node in folder.after(self._kept(folder.changes, choice)).items():
            place = f"{path}/{name}".lstrip("/")
            if node.names is not None:
                state[place] = None
                self._collect(node, place, choice, form, state)
            elif node.written == node.durable or form == "durable":
                state[place] = node.durable
            elif form == "written":
                state[place] = node.written
            elif form == "torn":
                state[place] = node.written[: (len(node.durable) + len(node.written)) // 2]
            else:
                lost = max(0, len(node.written) - len(node.durable))
                state[place] = node.written[: len(node.written) - lost] + bytes(lost)

    def _kept(self, changes: list[Any], choice: str) -> list[Any]:
        some = self._chance.randrange(len(changes)) if changes else 0
        return {
            "all": changes,
            "none": [],
            "but one": changes[:some] + changes[some + 1 :],
            "one": changes[some : some + 1],
            "random": [change for change in changes if self._chance.random() < 0.5],
        }[choice]
