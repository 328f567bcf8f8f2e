"""Simulated disk failures, killed processes and power losses, in place of `lmtrain.disk`.

`Faults` makes one operation fail. `PowerLoss` records all operations and builds the disk contents
that a power loss can leave: what was not synced may be complete, missing, torn or zeros.
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
# Without syncs, which would only take time here.
FAST: dict[str, Callable[..., Any]] = {
    **REAL,
    "sync": lambda descriptor: None,
    "sync_folder": lambda path: None,
}


class DiedError(BaseException):
    """The simulated process died at this operation."""


class Faults:
    """Makes one disk operation inside the block fail.

    Args:
        position: position of the operation, from 1; 0 for none.
        failure: an errno, "short" for half a write, or "death", after which every operation fails.
    """

    def __init__(self, position: int = 0, failure: int | str = errno.EIO) -> None:
        self.position = position
        self.failure = failure
        self.calls: list[str] = []
        self.failed: str | None = None

    def __enter__(self) -> "Faults":
        for name in OPERATIONS:
            setattr(disk, name, self._replacement(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in REAL.items():
            setattr(disk, name, real)

    def _replacement(self, name: str) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            self.calls.append(name)
            if self.failure == "death" and self.failed:
                raise DiedError
            if len(self.calls) != self.position:
                return FAST[name](*arguments)
            self.failed = name
            if self.failure == "death":
                raise DiedError
            if self.failure == "short":
                if name != "write":
                    return FAST[name](*arguments)
                descriptor, content = arguments
                return FAST[name](descriptor, content[: len(content) // 2])
            assert isinstance(self.failure, int)
            raise OSError(self.failure, os.strerror(self.failure))

        return operation


Contents = dict[str, bytes | None]
"""The content of a disk: bytes of each file by path, None for folders."""


class _Node:
    """A file with its written and its durable content, or a folder with its durable entries.

    Changes of a folder are (removed name, added name, node); they are durable once it is synced.
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
    """Records the disk operations inside the block and simulates a power loss after each of them.

    Args:
        root: an empty folder, which is durable itself.
        no_ops: operations that do nothing, to check that the simulation detects it.

    Attributes:
        saved_step: the last step that was saved durably; set by the test.
    """

    def __init__(self, root: Path, no_ops: tuple[str, ...] = ()) -> None:
        self.root = root
        self.no_ops = no_ops
        self.saved_step = 0
        self._top = _Node()
        self._top.names = {}
        self._open: dict[int, _Node] = {}
        self._states: dict[tuple[tuple[str, bytes | None], ...], int] = {}
        self._random = random.Random(1)

    def __enter__(self) -> "PowerLoss":
        for name in OPERATIONS:
            setattr(disk, name, self._recorded(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in REAL.items():
            setattr(disk, name, real)

    def states(self) -> Iterator[tuple[Contents, int]]:
        """Every distinct disk content after a power loss, and the last step saved before it."""
        for state, saved_step in self._states.items():
            yield dict(state), saved_step

    def _recorded(self, name: str) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            # Looked up before it is deleted.
            node = self._find(arguments[0]) if name in ("remove_file", "remove_folder") else None
            result = None if name in self.no_ops else FAST[name](*arguments)
            if name not in self.no_ops:
                self._apply(name, result, arguments, node)
            for state in self._possible():
                key = tuple(sorted(state.items()))
                self._states[key] = max(self._states.get(key, 0), self.saved_step)
            return result

        return operation

    def _find(self, path: Path) -> _Node:
        node = self._top
        for part in path.relative_to(self.root).parts:
            node = node.after(node.changes)[part]
        return node

    def _apply(self, name: str, result: Any, arguments: Any, node: _Node | None) -> None:
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
        """The disk contents that a power loss at this point can leave."""
        for choice in ("all", "none", "but one", "one", "random", "random", "random"):
            for form in ("durable", "written", "torn", "zeros"):
                state: Contents = {}
                self._collect(self._top, "", choice, form, state)
                yield state

    def _collect(self, folder: _Node, path: str, choice: str, form: str, state: Contents) -> None:
        for name, node in folder.after(self._durable_changes(folder.changes, choice)).items():
            entry = f"{path}/{name}".lstrip("/")
            if node.names is not None:
                state[entry] = None
                self._collect(node, entry, choice, form, state)
            elif node.written == node.durable or form == "durable":
                state[entry] = node.durable
            elif form == "written":
                state[entry] = node.written
            elif form == "torn":
                state[entry] = node.written[: (len(node.durable) + len(node.written)) // 2]
            else:
                num_lost = max(0, len(node.written) - len(node.durable))
                state[entry] = node.written[: len(node.written) - num_lost] + bytes(num_lost)

    def _durable_changes(self, changes: list[Any], choice: str) -> list[Any]:
        some = self._random.randrange(len(changes)) if changes else 0
        return {
            "all": changes,
            "none": [],
            "but one": changes[:some] + changes[some + 1 :],
            "one": changes[some : some + 1],
            "random": [change for change in changes if self._random.random() < 0.5],
        }[choice]
