"""Every registered cell with each value of its options, for tests of all cells."""

import pytest

from lmtrain.cells import cell_names

OPTIONS = {
    "rnn": [{"activation": value} for value in ("tanh", "relu")],
    "lstm": [{"cell_output": value} for value in ("tanh", "linear")],
    "peephole-lstm": [
        {"cell_output": output, "peephole": form}
        for output in ("tanh", "linear")
        for form in ("full", "diagonal")
    ],
}
CELLS = [(name, options) for name in cell_names() for options in OPTIONS.get(name, [{}])]
each_cell = pytest.mark.parametrize(("name", "options"), CELLS, ids=str)
