"""Cells of a user's own, in a Python file that runs only when the user names it."""

import hashlib
import runpy
import sys
import traceback
from pathlib import Path
from types import ModuleType

from lmtrain.cells.base import cell_class, cell_names
from lmtrain.errors import ConfigError


def load_file(path: Path) -> list[str]:
    """Runs a Python file and returns the names of the cells that it registers.

    A file that is run again registers its cells anew.

    Raises:
        ConfigError: the file is missing, raises, or registers no cell.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", "--cells needs a Python file")
    before = {name: cell_class(name) for name in cell_names()}
    # Objects are pickled by the module of their class: it has a name of its own, and is kept.
    name = f"lmtrain_cells_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    try:
        contents = runpy.run_path(str(path), run_name=name)
    except (Exception, SystemExit) as error:
        raise ConfigError(_explained(error, path)) from error
    module = ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    registered = [each for each in cell_names() if before.get(each) is not cell_class(each)]
    if not registered:
        raise ConfigError(
            f"{path} registers no cell", "a cell class in it needs: @lmtrain.cells.register(NAME)"
        )
    return registered


def _explained(error: BaseException, path: Path) -> str:
    """The file, the line and the first line of what went wrong."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    place = f"{path}, line {lines[-1]}" if lines else str(path)
    reason = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{place}: {': '.join([type(error).__name__, *reason.splitlines()[:1]])}"
