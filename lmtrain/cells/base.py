"""The interface of a recurrent cell (parameter shapes, one time step) and the registry of cells.

T steps, B rows, I input_size, H hidden_size, G gates. Every gate g has a block of H rows in each
parameter: W_gx in `weight_input` (G·H, I), W_ga in `weight_recurrent` (G·H, H) and b_g in `bias`
(G·H), in the order of `gates`. The loop over time is in `lmtrain.kernels`.
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
from lmtrain.kernels.products import matmul
from lmtrain.schema import CELLS, canonical

CellState = tuple[Tensor, ...]
Weights = Mapping[str, Tensor]

_CELLS: dict[str, type["Cell"]] = {}


class Cell(nn.Module, abc.ABC):
    """A recurrent cell that autograd differentiates.

    A subclass declares `gates` and `state_names` and implements `step`, the cell's equation.

    Args:
        input_size: I, features of one input, at least 1.
        hidden_size: H, features of each part of the state, at least 1.

    Raises:
        ConfigError: a size that is not an integer of at least 1.

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
    """Names of the gates, in the order of their row blocks."""
    state_names: ClassVar[tuple[str, ...]]
    """Names of the parts of the state; the first part is the output."""
    options: ClassVar[tuple[str, ...]] = ()
    """Names of the constructor arguments after the two sizes, each also an attribute."""
    is_differentiated: ClassVar[bool] = False
    """Whether the class has a hand-derived backward of its `step`."""

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
        """Same as `step`."""
        return self.step(x, state)

    @abc.abstractmethod
    def step(self, x: Tensor, state: CellState) -> CellState:
        """State at t, from the input x (B, I) and the state at t−1; each part is (B, H)."""

    def affine(self, gate: str, x: Tensor, recurrent: Tensor) -> Tensor:
        """Pre-activation of a gate, W_gx x + W_ga a + b_g, (B, H).

        Args:
            gate: one of `gates`.
            x: the input, (B, I).
            recurrent: a, the operand of W_ga, (B, H).
        """
        rows = self.rows(gate)
        from_input = x @ self.weight_input[rows].T
        from_state = recurrent @ self.weight_recurrent[rows].T
        return from_input + from_state + self.bias[rows]

    def rows(self, gate: str) -> slice:
        """The rows of a gate in each parameter."""
        index = self.gates.index(gate)
        return slice(index * self.hidden_size, (index + 1) * self.hidden_size)

    def is_recurrent(self, name: str) -> bool:
        """Whether the parameter `name` is a matrix that multiplies the state."""
        return name != "weight_input" and self.get_parameter(name).dim() == 2

    def zero_state(self, batch_size: int) -> CellState:
        """A state of zeros, each part (B, H)."""
        return tuple(self.bias.new_zeros(batch_size, self.hidden_size) for _ in self.state_names)

    def initialize(
        self, generator: torch.Generator, init_scale: float | None, forget_bias: float
    ) -> None:
        """Initializes all parameters in place.

        Args:
            generator: random generator on the device of the parameters.
            init_scale: every weight and bias is uniform in ± init_scale; None for orthogonal
                recurrent matrices, Glorot-uniform input matrices, and zero biases and diagonal
                peepholes.
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
    """A cell with a hand-derived backward.

    `forward_step` receives the pre-activations `z` (B, G·H) with W_gx x + b_g already in them.
    After the forward loop, `local_gradients` computes every factor of the chain rule that does not
    depend on later steps, for all steps at once. `backward_step` computes the rest of one step:
    the products with the recurrent weights.

    A subclass that overrides `step` but not `forward_step` is differentiated by autograd.
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
        """State at t; overwrites `z` (B, G·H), the input's part, with the gates' activations.

        Args:
            z: W_gx x + b_g, (B, G·H).
            state: the state at t−1, each part (B, H).
            weights: the recurrent parameters by name.
        """

    @abc.abstractmethod
    def local_gradients(
        self, activations: Tensor, previous: CellState, current: CellState
    ) -> tuple[Tensor, ...]:
        """Factors for `backward_step`, each (T, B, ·); the first is a new tensor (T, B, G·H).

        Args:
            activations: activations of the gates, (T, B, G·H).
            previous: the state before each step, each part (T, B, H).
            current: the state after each step, each part (T, B, H).
        """

    @abc.abstractmethod
    def backward_step(
        self, grad_state: CellState, local: tuple[Tensor, ...], weights: Weights
    ) -> CellState:
        """Gradient of the state at t−1; overwrites `local[0]` (B, G·H) with dz.

        Args:
            grad_state: gradient of the state at t, each part (B, H).
            local: what `local_gradients` returned, at t, each (B, ·).
            weights: the recurrent parameters by name.
        """

    @staticmethod
    def recurrent_gradients(
        dz: Tensor, activations: Tensor, previous: CellState, weights: Weights
    ) -> dict[str, Tensor]:
        """Gradients of the recurrent parameters by name, each one product over all steps.

        Args:
            dz: gradients at the pre-activations, (T, B, G·H).
            activations: activations of the gates, (T, B, G·H).
            previous: the state before each step, each part (T, B, H).
            weights: the recurrent parameters by name.
        """
        return {"weight_recurrent": product_over_time(dz, previous[0])}


def product_over_time(dz: Tensor, recurrent: Tensor) -> Tensor:
    """Σ_t dz⟨t⟩ᵀ a⟨t−1⟩, (R, H), in the dtype of `recurrent`, from (T, B, R) and (T, B, H)."""
    return matmul(dz.flatten(0, 1).T, recurrent.flatten(0, 1), dtype=recurrent.dtype)


def check_argument(name: str, value: Any, annotation: Any) -> None:
    """Raises an error if the value of an argument does not match its annotation.

    Args:
        name: name of the argument.
        value: value of the argument.
        annotation: a type, Literal or Annotated.

    Raises:
        ConfigError: the value has another type, or is outside the Literal or the range.
    """
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{name} {value!r}: {reason[0].lower()}{reason[1:]}") from None


def register(name: str) -> Callable[[type[Cell]], type[Cell]]:
    """Class decorator that registers a cell under a name, for `model.cell`.

    A class that is defined again, for example in a file that is run again, replaces the old one.

    Raises:
        ConfigError: another class is registered under this name, or the name is read as that of a
            cell of lmtrain.
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
    """Names of all registered cells."""
    return list(_CELLS)


def split_name(name: str) -> tuple[Path | None, str]:
    """The file and the registered name in FILE:NAME; the file is None in a plain NAME.

    Example:
        >>> split_name("lstm")
        (None, 'lstm')
    """
    file, colon, registered = name.rpartition(":")
    return (Path(file) if colon else None), registered


def cell_class(name: str) -> type[Cell]:
    """The class registered as NAME, for `name` NAME or FILE:NAME; the file is not run.

    Raises:
        ConfigError: no cell is registered under this name.
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
    """A new cell of the class registered as `name`, with uninitialized parameters.

    Args:
        name: a registered name, or FILE:NAME.
        input_size: I, features of one input.
        hidden_size: H, features of each part of the state.
        options: further constructor arguments by name.

    Raises:
        ConfigError: an unknown cell, a size below 1, an unknown or a missing option, or an option
            that does not match its annotation.
    """
    cls = cell_class(name)
    if unknown := [option for option in options if option not in cls.options]:
        raise ConfigError(
            f"the cell {name} has no option {', '.join(unknown)}",
            f"its options: {', '.join(cls.options) or 'none'}",
        )
    try:
        inspect.signature(cls).bind(input_size, hidden_size, **options)
    except TypeError as error:
        raise ConfigError(f"the cell {name}: {error}") from None
    hints = get_type_hints(cls.__init__)
    for option, value in options.items():
        if option in hints:
            check_argument(option, value, hints[option])
    return cls(input_size, hidden_size, **options)
