"""User-defined cells in a Python file, which runs only if the user passes its path."""

import hashlib
import os
import runpy
import sys
import traceback
from pathlib import Path
from types import ModuleType

from lmtrain.cells.base import cell_class, cell_names
from lmtrain.errors import ConfigError, RunInterruptedError


def load_file(path: Path) -> list[str]:
    """Runs a Python file; the names of the cells that it registers.

    A file that is run again registers its cells again.

    Raises:
        ConfigError: the file is missing, raises, or registers no cell.
        RunInterruptedError: a signal ended the command.
    """
    # os.path.isfile is False for a name that is too long; Path.is_file raises an error.
    if not os.path.isfile(path):  # noqa: PTH113
        raise ConfigError(f"there is no file {path}", "--cells needs a Python file")
    before = {name: cell_class(name) for name in cell_names()}
    # pickle finds a class by its module: each file gets its own module, kept in sys.modules.
    name = f"lmtrain_cells_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    try:
        contents = runpy.run_path(str(path), run_name=name)
    except RunInterruptedError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(_message(error, path)) from error
    module = ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    registered = [each for each in cell_names() if before.get(each) is not cell_class(each)]
    if not registered:
        raise ConfigError(
            f"{path} registers no cell", "a cell class in it needs: @lmtrain.cells.register(NAME)"
        )
    return registered


def _message(error: BaseException, path: Path) -> str:
    """File, line and first line of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    location = f"{path}, line {lines[-1]}" if lines else str(path)
    reason = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{location}: {': '.join([type(error).__name__, *reason.splitlines()[:1]])}"
