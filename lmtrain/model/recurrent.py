"""Layers of cells, in one or both directions, with dropout between them and a state to carry.

Not only for language models: all hidden states and the last state come back, rows may have lengths,
and a second direction serves taggers and classifiers.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lmtrain.cells import Cell, CellState
from lmtrain.kernels.scan import scan
from lmtrain.model.dropout import Dropout


class State(tuple[CellState, ...]):
    """The state of all layers: for each layer and direction the parts its cell declares, (B, H)."""

    __slots__ = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> "State":
        """The state with `change` applied to every part."""
        return State(tuple(change(part) for part in parts) for parts in self)

    def detach(self) -> "State":
        """The same numbers, cut off from the graph: backpropagation through time ends here."""
        return self.map(Tensor.detach)


class Recurrent(nn.Module):
    """A stack of recurrent layers; layer l's a⟨t⟩ is layer l + 1's x⟨t⟩.

    Args:
        make_cell: a new cell for an input size.
        input_size: I, numbers in one input.
        num_layers: L, layers.
        dropout: probability of dropping a number between layers.
        generator: the source of the dropout's chance.
        is_bidirectional: whether each layer also runs from T to 1, with weights of its own; the
            hidden states of both directions stand side by side.

    Shapes: inputs (T, B, I) give hidden states (T, B, D·H), D = 2 if bidirectional, else 1.

    Example:
        >>> from lmtrain.cells import GRU
        >>> layers = Recurrent(lambda size: GRU(size, 8), 4, 2, 0.0, torch.Generator())
        >>> hidden, state = layers(torch.zeros(5, 3, 4))
        >>> hidden.shape, len(state)
        (torch.Size([5, 3, 8]), 2)
    """

    def __init__(
        self,
        make_cell: Callable[[int], Cell],
        input_size: int,
        num_layers: int,
        dropout: float,
        generator: torch.Generator,
        *,
        is_bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.directions = 2 if is_bidirectional else 1
        self.cells = nn.ModuleList()
        for _ in range(num_layers):
            layer = [make_cell(input_size) for _ in range(self.directions)]
            self.cells.extend(layer)
            input_size = self.directions * layer[0].hidden_size
        self.dropout = Dropout(dropout, generator)

    def zero_state(self, batch_size: int) -> State:
        """The state before the first step."""
        return State(cell.zero_state(batch_size) for cell in self._cells())

    def _cells(self) -> Iterable[Cell]:
        return (cell for cell in self.cells if isinstance(cell, Cell))

    def forward(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Hidden states of the last layer and the state of all.

        Args:
            inputs: (T, B, I).
            state: the state before the first step; None for zeros.
            lengths: steps of each row, (B,), 1 to T; None for T.
        """
        hidden = inputs
        state = state or self.zero_state(inputs.shape[1])
        last: list[CellState] = []
        cells = list(self._cells())
        for first in range(0, len(cells), self.directions):
            if first:
                hidden = self.dropout(hidden)
            outputs = []
            for direction in range(self.directions):
                output, after = scan(
                    cells[first + direction],
                    hidden,
                    state[first + direction],
                    lengths,
                    reverse=direction == 1,
                )
                outputs.append(output)
                last.append(after)
            hidden = torch.cat(outputs, dim=-1) if self.directions == 2 else outputs[0]
        return hidden, State(last)
