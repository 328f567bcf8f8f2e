"""What a cell is: parameter shapes, one step in time, and the registry of names.

T steps, B rows, I input_size, H hidden_size, G gates. Every gate g has a row block in each
parameter: W_gx in `weight_input` (G·H, I), W_ga in `weight_recurrent` (G·H, H) and b_g in `bias`
(G·H), in the order of `gates`. Knows one step, nothing about time.
"""

import abc
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError
from torch import Tensor, nn

from lmtrain.errors import ConfigError
from lmtrain.schema import CELLS, canonical

CellState = tuple[Tensor, ...]
Weights = Mapping[str, Tensor]

_CELLS: dict[str, type["Cell"]] = {}


class Cell(nn.Module, abc.ABC):
    """A recurrent cell given by its equation alone; autograd differentiates it.

    A cell of one's own names its gates and its state and writes `step`:

    Args:
        input_size: I, numbers in one input, at least 1.
        hidden_size: H, numbers in each part of the state, at least 1.

    Raises:
        ConfigError: a size that is no integer of at least 1.

    Example:
        >>> class Leaky(Cell):
        ...     gates = ("candidate", "forget")
        ...     state_names = ("hidden",)
        ...     def step(self, x, state):
        ...         (a,) = state
        ...         candidate = torch.tanh(self.affine("candidate", x, a))
        ...         forget = torch.sigmoid(self.affine("forget", x, a))
        ...         return (forget * a + (1 - forget) * candidate,)
        >>> Leaky(input_size=3, hidden_size=5).weight_input.shape
        torch.Size([10, 3])
    """

    gates: ClassVar[tuple[str, ...]]
    """The gates, in the order of their row blocks."""
    state_names: ClassVar[tuple[str, ...]]
    """The parts of the state; the first is the output."""
    options: ClassVar[tuple[str, ...]] = ()
    """The names of further constructor arguments."""
    is_differentiated: ClassVar[bool] = False
    """Whether the backward is given by hand for what `step` computes."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            check_argument(name, size, PositiveInt)
        self.input_size = input_size
        self.hidden_size = hidden_size
        rows = len(self.gates) * hidden_size
        self.weight_input = nn.Parameter(torch.empty(rows, input_size))
        self.weight_recurrent = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias = nn.Parameter(torch.empty(rows))

    def forward(self, x: Tensor, state: CellState) -> CellState:
        """As `step`."""
        return self.step(x, state)

    @abc.abstractmethod
    def step(self, x: Tensor, state: CellState) -> CellState:
        """The state at t from the input x (B, I) and the state at t−1, each part (B, H)."""

    def affine(self, gate: str, x: Tensor, recurrent: Tensor) -> Tensor:
        """A gate's pre-activation, W_gx x + W_ga a + b_g, (B, H)."""
        rows = self.rows(gate)
        from_input = x @ self.weight_input[rows].T
        from_state = recurrent @ self.weight_recurrent[rows].T
        return from_input + from_state + self.bias[rows]

    def rows(self, gate: str) -> slice:
        """The row block of a gate in each parameter."""
        index = self.gates.index(gate)
        return slice(index * self.hidden_size, (index + 1) * self.hidden_size)

    def meets_state(self, name: str) -> bool:
        """Whether the parameter of that name is a matrix that the state is multiplied with."""
        return name != "weight_input" and self.get_parameter(name).dim() == 2

    def zero_state(self, batch_size: int) -> CellState:
        """The state before the first step, zeros, each part (B, H)."""
        return tuple(self.bias.new_zeros(batch_size, self.hidden_size) for _ in self.state_names)

    def initialize(
        self, generator: torch.Generator, init_scale: float | None, forget_bias: float
    ) -> None:
        """Draws the first weights.

        Args:
            generator: the source of chance.
            init_scale: every weight and bias uniform in ± this; None for orthogonal recurrent
                matrices, Glorot-uniform input matrices and zero biases.
            forget_bias: added to the forget gate's bias.

        Source: orthogonal: Saxe et al. 2014; Glorot & Bengio 2010; forget bias: Gers et al. 2000.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if init_scale is not None:
                    parameter.uniform_(-init_scale, init_scale, generator=generator)
                elif parameter.dim() < 2:
                    parameter.zero_()
                else:
                    _initialize_blocks(name, parameter, self.hidden_size, generator)
            if "forget" in self.gates:
                self.bias[self.rows("forget")] += forget_bias


def _initialize_blocks(
    name: str, parameter: Tensor, hidden_size: int, generator: torch.Generator
) -> None:
    for block in parameter.split(hidden_size):
        if block.shape == (hidden_size, hidden_size) and name != "weight_input":
            nn.init.orthogonal_(block, generator=generator)
        else:
            nn.init.xavier_uniform_(block, generator=generator)


class DifferentiatedCell(Cell):
    """A cell that also gives its backward by hand, for the engines that run it fast.

    The pre-activations `z` (B, G·H) hold W_gx x + b_g already when a step begins. With the whole
    sequence done, `local_gradients` gives all factors of the chain rule that need no gradient from
    later steps, for all time steps at once; `backward_step` then has the recurrent products left.

    A subclass that changes `step` and not `forward_step` is differentiated by autograd.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        classes = cls.__mro__

        def depth(name: str) -> int:
            return next(i for i, each in enumerate(classes) if name in vars(each))

        step = min(depth("step"), depth("forward"), depth("affine"))
        cls.is_differentiated = depth("forward_step") <= step

    @abc.abstractmethod
    def forward_step(self, z: Tensor, state: CellState, weights: Weights) -> CellState:
        """The state at t; `z` (B, G·H) is turned into the gates' activations in place."""

    @abc.abstractmethod
    def local_gradients(
        self, activations: Tensor, previous: CellState, current: CellState
    ) -> tuple[Tensor, ...]:
        """Factors for `backward_step`, each (T, B, ·); the first is new memory, (T, B, G·H).

        Args:
            activations: the gates, (T, B, G·H).
            previous: the state before each step, each part (T, B, H).
            current: the state after each step, each part (T, B, H).
        """

    @abc.abstractmethod
    def backward_step(
        self, grad_state: CellState, local: tuple[Tensor, ...], weights: Weights
    ) -> CellState:
        """The gradient of the state at t−1 from that at t; `local[0]` becomes dz in place."""

    @staticmethod
    def recurrent_gradients(
        dz: Tensor, activations: Tensor, previous: CellState, weights: Weights
    ) -> dict[str, Tensor]:
        """Gradients of all parameters that meet the state, each one product over all steps.

        Args:
            dz: gradients at the pre-activations, (T, B, G·H).
            activations: the gates, (T, B, G·H).
            previous: the state before each step, each part (T, B, H).
            weights: the parameters that meet the state, by name.
        """
        return {"weight_recurrent": product_over_time(dz, previous[0])}


def product_over_time(dz: Tensor, recurrent: Tensor) -> Tensor:
    """Σ_t dzᵀ a over all steps and rows, in dz's precision: (T, B, R) and (T, B, H) give (R, H)."""
    return dz.flatten(0, 1).T @ recurrent.flatten(0, 1).to(dz.dtype)


def check_argument(name: str, value: Any, kind: Any) -> None:
    """Refuses an argument that is not of its annotated type.

    Args:
        name: of the argument.
        value: what was given.
        kind: the annotation: a type, Literal or Annotated.

    Raises:
        ConfigError: the value is of another type, or outside the Literal or the range.
    """
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{name} {value!r}: {reason[0].lower()}{reason[1:]}") from None


def register(name: str) -> Callable[[type[Cell]], type[Cell]]:
    """Makes a cell class known by a name, so that `model.cell` can choose it.

    A class that is defined again, as when its file is run again, takes the place of the old one.

    Raises:
        ConfigError: another class has this name, or it is read as that of another.
    """
    if (known := canonical(name, CELLS)) != name:
        raise ConfigError(f"the cell name {name!r} is read as {known!r}, which is taken")

    def add(cell: type[Cell]) -> type[Cell]:
        known = _CELLS.setdefault(name, cell)
        if (known.__module__, known.__qualname__) != (cell.__module__, cell.__qualname__):
            raise ConfigError(
                f"the cell name {name!r} is taken by {known.__qualname__} of {known.__module__}"
            )
        _CELLS[name] = cell
        return cell

    return add


def cell_names() -> list[str]:
    """The names of all registered cells."""
    return list(_CELLS)


def split_name(name: str) -> tuple[Path | None, str]:
    """The file and the registered name in FILE:NAME; None for a name without a file.

    Example:
        >>> split_name("lstm")
        (None, 'lstm')
    """
    file, colon, registered = name.rpartition(":")
    return (Path(file) if colon else None), registered


def cell_class(name: str) -> type[Cell]:
    """The class registered as `name`, or as the name in FILE:NAME; no file is run.

    Raises:
        ConfigError: no such cell.
    """
    file, registered = split_name(name)
    if registered in _CELLS:
        return _CELLS[registered]
    if file is not None:
        raise ConfigError(
            f"the cell {registered} is Python code in {file}, which is only run when you name it",
            f"try: --cells {file}",
        )
    raise ConfigError(f"no cell {name!r}", f"cells: {', '.join(_CELLS)}")


def create(name: str, input_size: int, hidden_size: int, options: Mapping[str, Any]) -> Cell:
    """A new cell of the class registered as `name`, its weights not yet drawn.

    Args:
        name: a registered name, or FILE:NAME.
        input_size: I.
        hidden_size: H.
        options: further arguments by name.

    Raises:
        ConfigError: no such cell, a size below 1, or an option that the class does not have, that
            it needs, or that is not of its annotated type.
    """
    kind = cell_class(name)
    if unknown := [option for option in options if option not in kind.options]:
        raise ConfigError(
            f"the cell {name} has no option {', '.join(unknown)}",
            f"its options: {', '.join(kind.options) or 'none'}",
        )
    try:
        inspect.signature(kind).bind(input_size, hidden_size, **options)
    except TypeError as error:
        raise ConfigError(f"the cell {name}: {error}") from None
    hints = get_type_hints(kind.__init__)
    for option, value in options.items():
        if option in hints:
            check_argument(option, value, hints[option])
    return kind(input_size, hidden_size, **options)
