"""The cells with kernels, each with its options: one table for C++, Triton and the operators."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from lmtrain.cells import GRU, LSTM, RNN, Cell, DifferentiatedCell, PeepholeLSTM, SimpleGRU

Peephole = Literal["none", "full", "diagonal"]


@dataclass(frozen=True)
class Variant:
    """A cell class with one combination of its options, for which there is a kernel.

    Args:
        name: registered name of the cell, by which its kernels are found.
        cell: class of the cell.
        options: values of the class's options, in the order of `Cell.options`.
        peephole: form of `weight_peephole`.
        is_tanh: whether g in the RNN and h in the LSTM are tanh, rather than ReLU and the
            identity.
    """

    name: str
    cell: type[DifferentiatedCell]
    options: tuple[str, ...] = ()
    peephole: Peephole = "none"
    is_tanh: bool = True

    @property
    def num_gates(self) -> int:
        """G, number of gates."""
        return len(self.cell.gates)

    @property
    def num_parts(self) -> int:
        """Number of parts of the state."""
        return len(self.cell.state_names)

    def instance(self, hidden_size: int) -> DifferentiatedCell:
        """A cell without weights, for methods that take the weights as an argument."""
        return _instance(self, hidden_size)

    def peephole_shape(self, hidden_size: int) -> tuple[int, ...] | None:
        """Shape of `weight_peephole`; None if the cell has none."""
        shapes = {"full": (3 * hidden_size, hidden_size), "diagonal": (3 * hidden_size,)}
        return shapes.get(self.peephole)


@functools.cache
def _instance(variant: Variant, hidden_size: int) -> DifferentiatedCell:
    with torch.device("meta"):
        return variant.cell(1, hidden_size, *variant.options)


# Exported programs contain indices into this table: append new variants at the end.
VARIANTS = (
    Variant("rnn", RNN, ("tanh",)),
    Variant("rnn", RNN, ("relu",), is_tanh=False),
    Variant("simple-gru", SimpleGRU),
    Variant("gru", GRU),
    Variant("lstm", LSTM, ("tanh",)),
    Variant("lstm", LSTM, ("linear",), is_tanh=False),
    Variant("peephole-lstm", PeepholeLSTM, ("tanh", "full"), "full"),
    Variant("peephole-lstm", PeepholeLSTM, ("linear", "full"), "full", is_tanh=False),
    Variant("peephole-lstm", PeepholeLSTM, ("tanh", "diagonal"), "diagonal"),
    Variant("peephole-lstm", PeepholeLSTM, ("linear", "diagonal"), "diagonal", is_tanh=False),
)

_INDICES: dict[type[Cell], dict[tuple[str, ...], int]] = {}
for _index, _variant in enumerate(VARIANTS):
    _INDICES.setdefault(_variant.cell, {})[_variant.options] = _index


def index_of(cell: Cell) -> int | None:
    """Index of a cell's variant in VARIANTS; None if there is none, as for any subclass."""
    indices = _INDICES.get(type(cell))
    if indices is None:
        return None
    return indices.get(tuple([getattr(cell, option) for option in cell.options]))
