"""The variants of cells that have kernels: one table for C++, Triton and the operators of torch."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from lmtrain.cells import GRU, LSTM, RNN, Cell, DifferentiatedCell, PeepholeLSTM, SimpleGRU

Peephole = Literal["none", "full", "diagonal"]


@dataclass(frozen=True)
class Variant:
    """A cell with the values of its options, as kernels see it.

    Args:
        name: what the cell is registered as, and its kernels are found by.
        cell: the class.
        options: the values of the class's options, in their order.
        peephole: the form of `weight_peephole`.
        is_other_form: whether the nonlinearity is the second of the two that a kernel has: relu for
            tanh in the RNN, the identity for tanh(c) in the LSTM.
    """

    name: str
    cell: type[DifferentiatedCell]
    options: tuple[str, ...] = ()
    peephole: Peephole = "none"
    is_other_form: bool = False

    @property
    def gates(self) -> int:
        """G."""
        return len(self.cell.gates)

    @property
    def parts(self) -> int:
        """Parts of the state."""
        return len(self.cell.state_names)

    def instance(self, hidden_size: int) -> DifferentiatedCell:
        """A cell of this variant for the functions that take its weights beside it."""
        return _instance(self, hidden_size)

    def peephole_shape(self, hidden_size: int) -> tuple[int, ...] | None:
        """The shape of `weight_peephole`; None where there is none."""
        shapes = {"full": (3 * hidden_size, hidden_size), "diagonal": (3 * hidden_size,)}
        return shapes.get(self.peephole)


@functools.cache
def _instance(variant: Variant, hidden_size: int) -> DifferentiatedCell:
    with torch.device("meta"):
        return variant.cell(1, hidden_size, *variant.options)


# Exported programs hold an index into this table: new variants are added at its end.
VARIANTS = (
    Variant("rnn", RNN, ("tanh",)),
    Variant("rnn", RNN, ("relu",), is_other_form=True),
    Variant("simple-gru", SimpleGRU),
    Variant("gru", GRU),
    Variant("lstm", LSTM, ("tanh",)),
    Variant("lstm", LSTM, ("linear",), is_other_form=True),
    Variant("peephole-lstm", PeepholeLSTM, ("tanh", "full"), "full"),
    Variant("peephole-lstm", PeepholeLSTM, ("linear", "full"), "full", is_other_form=True),
    Variant("peephole-lstm", PeepholeLSTM, ("tanh", "diagonal"), "diagonal"),
    Variant("peephole-lstm", PeepholeLSTM, ("linear", "diagonal"), "diagonal", is_other_form=True),
)

_INDICES: dict[type[Cell], dict[tuple[str, ...], int]] = {}
for _index, _variant in enumerate(VARIANTS):
    _INDICES.setdefault(_variant.cell, {})[_variant.options] = _index


def index_of(cell: Cell) -> int | None:
    """The index in VARIANTS of what a cell is; None for another cell, a subclass included."""
    indices = _INDICES.get(type(cell))
    if indices is None:
        return None
    return indices.get(tuple([getattr(cell, option) for option in cell.options]))
