"""How the gradient of one prediction shrinks or grows on its way back through time.

Works on a model and ids; knows neither text nor settings.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain import device
from lmtrain.cells import Cell
from lmtrain.errors import TextError
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State

# Rows of text that are differentiated at once.
_ROWS = 64


@dataclass(frozen=True)
class Quartiles:
    """The quartiles of a norm over positions, for each lag from 0, each (K + 1,)."""

    lower: NDArray[np.float64]
    median: NDArray[np.float64]
    upper: NDArray[np.float64]


@dataclass(frozen=True)
class LagNorms:
    """Norms of the gradients of single predictions at one part of the state of one layer.

    Args:
        layer: counted from 1.
        part: the part's name in `Cell.state_names`.
        norms: ‖∂L⟨t⟩/∂a⟨t−k⟩‖, a position t in each row and a lag k in each column, (N, K + 1).
    """

    layer: int
    part: str
    norms: NDArray[np.float64]

    @property
    def absolute(self) -> Quartiles:
        """The quartiles of the norms."""
        return _quartiles(self.norms)

    @property
    def relative(self) -> Quartiles:
        """The quartiles of the norms over those at lag 0, positions without any left out."""
        at_zero = self.norms[:, :1]
        is_there = at_zero[:, 0] > 0
        # A gradient may be infinite at lag 0 already.
        with np.errstate(invalid="ignore", over="ignore"):
            return _quartiles(self.norms[is_there] / at_zero[is_there])

    @property
    def half_lag(self) -> int | None:
        """The first lag from which on the median is below half of lag 0; None if there is none."""
        is_below = self.relative.median < 0.5
        return int(np.flatnonzero(~is_below)[-1]) + 1 if is_below[-1] else None


def gradient_norms(
    model: LanguageModel, ids: NDArray[np.integer], lags: int = 100, *, positions: int = 512
) -> list[LagNorms]:
    """Norms of ∂L⟨t⟩/∂a⟨t−k⟩, and of ∂L⟨t⟩/∂c⟨t−k⟩, for each layer and k from 0 to `lags`.

    L⟨t⟩ = −log P of the token after t alone. The derivative is total: through all later steps and
    all layers above. Positions t are spread evenly over the text; the state that a row begins with
    comes from as many tokens before it.

    Args:
        model: the model; nothing is dropped.
        ids: the text, (N,).
        lags: K, the most steps back, 1 or more.
        positions: how many predictions are differentiated, if the text has as many.

    Returns:
        Layer by layer, the parts of each in the order of its cell.

    Raises:
        TextError: the text is too short for one position.
    """
    least = 2 * lags + 2
    if len(ids) < least:
        fitting = (len(ids) - 2) // 2
        raise TextError(
            f"text too short: {len(ids):,} tokens",
            f"--lags {lags} needs at least {least:,}",
            f"try: --lags {fitting}" if fitting > 0 else "try: a longer text",
        )
    was_training = model.training
    model.eval()
    norms = torch.cat(
        [_norms(model, rows, lags) for rows in _windows(ids, lags, positions)], dim=-1
    )
    model.train(was_training)
    names = [
        (layer, part)
        for layer, cell in enumerate(_cells(model), start=1)
        for part in cell.state_names
    ]
    return [
        LagNorms(layer, part, found.T.cpu().numpy())
        for (layer, part), found in zip(names, norms, strict=True)
    ]


def _quartiles(norms: NDArray[np.float64]) -> Quartiles:
    if not len(norms):
        norms = np.full((1, norms.shape[1]), np.nan)
    # A gradient that exploded to infinity has no number between it and another.
    with np.errstate(invalid="ignore"):
        return Quartiles(*np.quantile(norms, (0.25, 0.5, 0.75), axis=0))


def _windows(ids: NDArray[np.integer], lags: int, positions: int) -> Iterator[Tensor]:
    """Rows of text side by side, (2K + 2, B): K tokens of context, steps t − K to t, the target."""
    length = 2 * lags + 2
    starts = np.unique(np.linspace(0, len(ids) - length, positions).astype(np.int64))
    for first in range(0, len(starts), _ROWS):
        rows = [ids[start : start + length] for start in starts[first : first + _ROWS]]
        yield torch.from_numpy(np.stack(rows, axis=1).astype(np.int64))


def _norms(model: LanguageModel, window: Tensor, lags: int) -> Tensor:
    """Norms for a window, (P, K + 1, B), P the parts of all layers."""
    window = window.to(device.of(model))
    context, inputs, target = window.split([lags, lags + 1, 1])
    with torch.no_grad():
        _, state = model.hidden(context)
    hidden, nodes = _unrolled(model, inputs, state)
    # Rows are independent: the gradient of their sum holds that of each.
    loss = -model.head.log_probs(hidden.unsqueeze(0), target).sum()
    gradients = torch.autograd.grad(loss, nodes, materialize_grads=True)
    # Squares of small numbers vanish in single precision.
    norms = torch.stack([gradient.double().norm(dim=-1) for gradient in gradients])
    by_lag: Tensor = norms.unflatten(0, (-1, lags + 1)).flip(1)
    return by_lag


def _unrolled(model: LanguageModel, tokens: Tensor, state: State) -> tuple[Tensor, list[Tensor]]:
    """The last hidden state (B, H), and the state of every step as nodes of autograd's graph.

    The nodes stand in the order of layers, of the parts of a state and of steps.
    """
    recurrent, nodes = model.encoder.recurrent, list[Tensor]()
    inputs: Sequence[Tensor] = model.encoder.embedding(tokens).unbind()
    for layer, (cell, parts) in enumerate(zip(_cells(model), state, strict=True)):
        states = []
        for x in inputs:
            parts = cell(x, parts)
            states.append(parts)
        nodes += _by_part(states)
        hidden = [each[0] for each in states]
        if recurrent.is_residual and layer and hidden[0].shape == inputs[0].shape:
            hidden = [after + before for after, before in zip(hidden, inputs, strict=True)]
        inputs = hidden
    return inputs[-1], nodes


def _by_part(states: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """The states of some steps, part by part."""
    return [tensor for part in zip(*states, strict=True) for tensor in part]


def _cells(model: LanguageModel) -> list[Cell]:
    return [cell for cell in model.encoder.recurrent.cells if isinstance(cell, Cell)]
