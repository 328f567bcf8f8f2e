"""Every registered cell with each of its options, for tests that hold all of them to the same."""

import pytest

from lmtrain.cells import cell_names

OPTIONS = {
    "rnn": [{"activation": each} for each in ("tanh", "relu")],
    "lstm": [{"cell_output": each} for each in ("tanh", "linear")],
    "peephole-lstm": [
        {"cell_output": output, "peephole": form}
        for output in ("tanh", "linear")
        for form in ("full", "diagonal")
    ],
}
CELLS = [(name, options) for name in cell_names() for options in OPTIONS.get(name, [{}])]
each_cell = pytest.mark.parametrize(("name", "options"), CELLS, ids=str)
