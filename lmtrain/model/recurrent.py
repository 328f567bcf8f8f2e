"""Recurrent layers in one or both directions, with dropout between them, and their state."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lmtrain.cells import Cell, CellState, Weights
from lmtrain.errors import CheckpointError
from lmtrain.kernels.dropout import dropout
from lmtrain.kernels.scan import scan
from lmtrain.model.dropout import Dropout


class State(tuple[CellState, ...]):
    """State of all layers: for each layer and direction, the parts of its cell's state, (B, H)."""

    __slots__ = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> "State":
        """The state with `change` applied to every part."""
        return State([tuple(change(part) for part in parts) for parts in self])

    def where(self, condition: Tensor, other: "State") -> "State":
        """This state if `condition`, a scalar, is true, else `other`, of the same shapes."""
        return State(
            [
                tuple(torch.where(condition, *pair) for pair in zip(*parts, strict=True))
                for parts in zip(self, other, strict=True)
            ]
        )

    def named(self) -> dict[str, Tensor]:
        """Every part of the state, named `LAYER/PART`."""
        return {
            f"{layer}/{part}": tensor
            for layer, parts in enumerate(self)
            for part, tensor in enumerate(parts)
        }

    def restored(self, tensors: Mapping[str, Tensor]) -> "State | None":
        """The state whose parts are in `tensors`, named as by `named`; None if `tensors` is empty.

        Raises:
            CheckpointError: a part is missing, or its shape or dtype is not that of this state.
        """
        if not tensors:
            return None
        for name, part in self.named().items():
            stored = tensors.get(name)
            if stored is None or stored.shape != part.shape or stored.dtype != part.dtype:
                raise CheckpointError(f"the carried state {name} does not fit the model")
        return State(
            [
                tuple(tensors[f"{i}/{j}"].to(part.device) for j, part in enumerate(parts))
                for i, parts in enumerate(self)
            ]
        )

    def detach(self) -> "State":
        """The state detached from the graph, which truncates backpropagation through time."""
        return self.map(Tensor.detach)


def _flattened_with_keys(state: State) -> tuple[list[tuple[pytree.KeyEntry, CellState]], None]:
    return [(pytree.SequenceKey(layer), parts) for layer, parts in enumerate(state)], None


# torch.export, torch.func and torch.utils.checkpoint traverse a state as a pytree.
pytree.register_pytree_node(
    State,
    lambda state: (list(state), None),
    lambda layers, _: State(layers),
    serialized_type_name="lmtrain.State",
    flatten_with_keys_fn=_flattened_with_keys,
)


class Recurrent(nn.Module):
    """A stack of recurrent layers; a⟨t⟩ of layer l is x⟨t⟩ of layer l + 1.

    Shapes: inputs (T, B, I) give hidden states (T, B, D·H), D = 2 if bidirectional, else 1.

    Args:
        make_cell: returns a new cell for an input size and a hidden size.
        input_size: I, features of one input.
        hidden_sizes: H of each layer.
        dropout: applied between layers.
        weight_dropout: dropout probability of the recurrent weights; one mask for all time steps
            and rows of a call.
        is_residual: whether a layer's input, before dropout, is added to its hidden states; from
            the second layer on, where both have the same size.
        is_bidirectional: whether each layer also runs from T to 1, with separate weights; the
            hidden states of both directions are concatenated, forward first.

    Source: weight dropout, as DropConnect: Wan et al. 2013; Merity, Keskar & Socher 2018; residual
    connections: He et al. 2016.

    Example:
        >>> from lmtrain.cells import GRU
        >>> from lmtrain.model.generator import ModelGenerator
        >>> layers = Recurrent(GRU, 4, [8, 8], Dropout(0.5, ModelGenerator(1)))
        >>> hidden, state = layers(torch.zeros(5, 3, 4))
        >>> hidden.shape, len(state)
        (torch.Size([5, 3, 8]), 2)
    """

    def __init__(
        self,
        make_cell: Callable[[int, int], Cell],
        input_size: int,
        hidden_sizes: Sequence[int],
        dropout: Dropout,
        *,
        weight_dropout: float = 0.0,
        is_residual: bool = False,
        is_bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.directions = 2 if is_bidirectional else 1
        self.cells = nn.ModuleList()
        for hidden_size in hidden_sizes:
            self.cells.extend(make_cell(input_size, hidden_size) for _ in range(self.directions))
            input_size = self.directions * hidden_size
        self.dropout = dropout
        self.weight_dropout = weight_dropout
        self.is_residual = is_residual

    def zero_state(self, batch_size: int) -> State:
        """A state of zeros for all layers."""
        return State([cell.zero_state(batch_size) for cell in self._cells()])

    @property
    def output_size(self) -> int:
        """D·H, features of a hidden state of the last layer, both directions together."""
        return self.directions * self._cells()[-1].hidden_size

    def _cells(self) -> list[Cell]:
        return [cell for cell in self.cells if isinstance(cell, Cell)]

    def forward(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Hidden states (T, B, D·H) of the last layer, and the final state of all layers.

        Args:
            inputs: (T, B, I).
            state: the initial state; None for zeros.
            lengths: steps of each row, (B,), 1 to T; None for T.
        """
        hidden = inputs
        state = state or self.zero_state(inputs.shape[1])
        final: list[CellState] = []
        cells = self._cells()
        for first in range(0, len(cells), self.directions):
            layer_input, inputs = hidden, self.dropout(hidden) if first else hidden
            outputs = []
            for direction in range(self.directions):
                cell = cells[first + direction]
                output, last = scan(
                    cell,
                    inputs,
                    state[first + direction],
                    lengths,
                    reverse=direction == 1,
                    weights=self._weights(cell),
                )
                outputs.append(output)
                final.append(last)
            hidden = torch.cat(outputs, dim=-1) if self.directions == 2 else outputs[0]
            if self.is_residual and first and hidden.shape == layer_input.shape:
                hidden = hidden + layer_input
        return hidden, State(final)

    def _weights(self, cell: Cell) -> Weights | None:
        """A cell's parameters after weight dropout; None where there is none."""
        if not self.training or self.weight_dropout == 0:
            return None
        generator = self.dropout.generator.on(cell.bias.device)
        return {
            name: dropout(weight, self.weight_dropout, generator)
            if cell.is_recurrent(name)
            else weight
            for name, weight in cell.named_parameters()
        }
