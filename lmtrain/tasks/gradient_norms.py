"""Gradient norms of single predictions with respect to the states of earlier time steps.

Works on a model and token ids; does not use text or settings.
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

# Number of predictions that are differentiated in one batch.
_ROWS = 64


@dataclass(frozen=True)
class Quartiles:
    """Quartiles over positions for each lag from 0 to K, each (K + 1,)."""

    lower: NDArray[np.float64]
    median: NDArray[np.float64]
    upper: NDArray[np.float64]


@dataclass(frozen=True)
class LagNorms:
    """Gradient norms of single predictions for one part of the state of one layer.

    Args:
        layer: counted from 1.
        part: the part's name in `Cell.state_names`.
        norms: ‖∂L⟨t⟩/∂a⟨t−k⟩‖, (N, K + 1): a row for each position t, a column for each lag k.
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
        """The quartiles of the norms relative to lag 0, without positions of norm 0."""
        at_zero = self.norms[:, :1]
        is_positive = at_zero[:, 0] > 0
        # A gradient may be infinite at lag 0 already.
        with np.errstate(invalid="ignore", over="ignore"):
            return _quartiles(self.norms[is_positive] / at_zero[is_positive])

    @property
    def half_lag(self) -> int | None:
        """The lag from which the median stays below half of lag 0; None if it does not."""
        is_below = self.relative.median < 0.5
        return int(np.flatnonzero(~is_below)[-1]) + 1 if is_below[-1] else None


def gradient_norms(
    model: LanguageModel, ids: NDArray[np.integer], lags: int = 100, *, positions: int = 512
) -> list[LagNorms]:
    """Norms of ∂L⟨t⟩/∂a⟨t−k⟩, and of ∂L⟨t⟩/∂c⟨t−k⟩, for each layer and k from 0 to `lags`.

    L⟨t⟩ = −log P of the single token after t. The derivative is total: through all later steps and
    all layers above. Positions t are spread evenly over the text; the initial state of each comes
    from the `lags` tokens before.

    Args:
        model: the model; dropout is off.
        ids: the text, (N,).
        lags: K, maximum number of steps back, 1 or more.
        positions: maximum number of predictions.

    Returns:
        One item for each part of the state of each layer, in order.

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
    # Interpolation with an infinite gradient gives NaN.
    with np.errstate(invalid="ignore"):
        return Quartiles(*np.quantile(norms, (0.25, 0.5, 0.75), axis=0))


def _windows(ids: NDArray[np.integer], lags: int, positions: int) -> Iterator[Tensor]:
    """Windows of text, (2K + 2, B): K tokens of context, steps t − K to t, and the target."""
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
    # Rows are independent: the gradient of the sum contains the gradient of each.
    loss = -model.head.log_probs(hidden.unsqueeze(0), target).sum()
    gradients = torch.autograd.grad(loss, nodes, materialize_grads=True)
    # Squares of small gradients underflow in single precision.
    norms = torch.stack([gradient.double().norm(dim=-1) for gradient in gradients])
    by_lag: Tensor = norms.unflatten(0, (-1, lags + 1)).flip(1)
    return by_lag


def _unrolled(model: LanguageModel, tokens: Tensor, state: State) -> tuple[Tensor, list[Tensor]]:
    """The last hidden state (B, H), and the states of all steps as nodes of the autograd graph.

    The nodes are ordered by layer, part of the state and step.
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
    """The states of steps, ordered by part."""
    return [tensor for part in zip(*states, strict=True) for tensor in part]


def _cells(model: LanguageModel) -> list[Cell]:
    return [cell for cell in model.encoder.recurrent.cells if isinstance(cell, Cell)]
