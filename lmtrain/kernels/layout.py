"""How the rows and steps of a scan lie in memory for its kernels: side by side, or packed.

Packed, rows of different lengths have no padding: the longest row comes first, so that the rows
that have not ended at a step are the first ones, and a row that runs backward in time begins at its
own end. The lines of a step follow those of the step before.

T steps, B rows, H hidden_size, N lines: the sum of the lengths. A history holds the states before
and after each step: (T + 1, B, H) side by side, B + N lines packed.
"""

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.errors import ConfigError


class Layout(Protocol):
    """The interface of both layouts."""

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of a kernel that depend on the layout."""
        ...

    def linear(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Products of the inputs (T, B, I) with a weight (G·H, I), in memory for (T, B, G·H)."""
        ...

    def view(self, buffer: Tensor) -> Tensor:
        """What a kernel is given of memory for (T, B, ·) or of a history (T + 1, B, ·)."""
        ...

    def begin(self, history: Tensor, first: Tensor) -> Tensor:
        """What a kernel is given of a history, with the first states (B, H) in it."""
        ...

    def last(self, states: Tensor) -> Tensor:
        """The last state of each row, (B, H), of a history that a kernel was given."""
        ...

    def before(self, states: Tensor) -> Tensor:
        """The states before each step, of a history that a kernel was given."""
        ...

    def pack(self, padded: Tensor) -> Tensor:
        """What is (T, B, ·) as a kernel is given it."""
        ...

    def pad(self, lines: Tensor) -> Tensor:
        """What a kernel gave as (T, B, ·), 0 beyond the lengths."""
        ...

    def ordered(self, rows: Tensor) -> Tensor:
        """Rows (B, H), copied in the order of the layout."""
        ...

    def restored(self, rows: Tensor) -> Tensor:
        """Rows (B, H) in the order of the layout in their own order."""
        ...


class SideBySide(Layout):
    """Rows in columns, padded where they have lengths.

    Args:
        steps: T.
        lengths: steps of each row, (B,), for kernels that skip what is beyond; None for T.
        reverse: whether time runs from T to 1.
    """

    def __init__(self, steps: int, lengths: Tensor | None, *, reverse: bool) -> None:
        self._steps, self._lengths, self._reverse = steps, lengths, reverse

    @property
    def options(self) -> dict[str, Any]:
        """The direction, and the lengths where there are any."""
        options: dict[str, Any] = {"reverse": self._reverse}
        if self._lengths is not None:
            options["lengths"] = self._lengths.to(torch.int32)
        return options

    def linear(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """One product."""
        return F.linear(inputs, weight)

    def view(self, buffer: Tensor) -> Tensor:
        """All of it."""
        return buffer

    def begin(self, history: Tensor, first: Tensor) -> Tensor:
        """The first states are where time begins."""
        history[self._steps if self._reverse else 0] = first
        return history

    def last(self, states: Tensor) -> Tensor:
        """At the place where time ends; beyond its length a row's state stands still."""
        return states[0 if self._reverse else self._steps].clone()

    def before(self, states: Tensor) -> Tensor:
        """A step's neighbours in time, (T, B, H)."""
        return states[1:] if self._reverse else states[:-1]

    def pack(self, padded: Tensor) -> Tensor:
        """The same numbers."""
        return padded.contiguous()

    def pad(self, lines: Tensor) -> Tensor:
        """The same numbers: kernels leave 0 beyond the lengths."""
        return lines

    def ordered(self, rows: Tensor) -> Tensor:
        """The rows as they are."""
        return rows.clone(memory_format=torch.contiguous_format)

    def restored(self, rows: Tensor) -> Tensor:
        """The rows as they are."""
        return rows


class Packed(Layout):
    """Rows of different lengths without padding.

    Args:
        lengths: steps of each row, (B,), on the processor.
        steps: T, of the padded rows.
        reverse: whether time runs from T to 1.

    Raises:
        ConfigError: a length below 1 or above T.

    Example:
        >>> layout = Packed(torch.tensor([1, 2]), steps=2, reverse=False)
        >>> layout.pack(torch.tensor([[[1], [2]], [[0], [3]]])).flatten().tolist()
        [2, 1, 3]
    """

    def __init__(self, lengths: Tensor, steps: int, *, reverse: bool) -> None:
        own = lengths.numpy()
        if own.min() < 1 or own.max() > steps:
            raise ConfigError(f"scan: lengths {own.min()} to {own.max()} are not in 1 to {steps}")
        order = np.argsort(-own, kind="stable")
        longest_first, times = own[order], np.arange(own.max())
        step, row = np.nonzero(times[:, None] < longest_first)
        offsets = np.searchsorted(step, np.append(times, own.max()))
        time = longest_first[row] - 1 - step if reverse else step
        self._steps, self._rows = steps, len(own)
        self._offsets = _tensor(offsets)  # the first line of each step, and N
        self._order = _tensor(order)
        self._ranks = _tensor(np.argsort(order))
        self._lines = _tensor(time * len(own) + order[row])
        # Lines of the history: the first states, then the state after each line.
        self._before = _tensor(np.where(step > 0, len(own) + offsets[step - 1], 0) + row)
        self._last = _tensor(len(own) + offsets[own - 1] + np.argsort(order))

    @property
    def options(self) -> dict[str, Any]:
        """Where the steps begin; time runs forward, since the lines are in its order."""
        return {"reverse": False, "offsets": self._offsets}

    def linear(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """One product of the lines."""
        products = inputs.new_empty(*inputs.shape[:2], len(weight))
        torch.mm(self.pack(inputs), weight.T, out=self._cleared(products))
        return products

    def view(self, buffer: Tensor) -> Tensor:
        """The first lines, N or B + N of them."""
        extra = (len(buffer) - self._steps) * self._rows
        return buffer.flatten(0, 1)[: extra + len(self._lines)]

    def begin(self, history: Tensor, first: Tensor) -> Tensor:
        """The first states are the first B lines."""
        states = self._cleared(history)
        states[: self._rows] = first[self._order]
        return states

    def last(self, states: Tensor) -> Tensor:
        """The line after each row's last step."""
        return states[self._last]

    def before(self, states: Tensor) -> Tensor:
        """A line for each line, (N, H)."""
        return states[self._before]

    def _cleared(self, buffer: Tensor) -> Tensor:
        """The first lines, with 0 in the memory behind them: an operator's results are defined."""
        lines = self.view(buffer)
        buffer.flatten(0, 1)[len(lines) :] = 0
        return lines

    def pack(self, padded: Tensor) -> Tensor:
        """The lines, (N, ·)."""
        return padded.flatten(0, 1).index_select(0, self._lines)

    def pad(self, lines: Tensor) -> Tensor:
        """Each line at its time and row."""
        padded = lines.new_zeros(self._steps * self._rows, lines.shape[1])
        padded.index_copy_(0, self._lines, lines)
        return padded.view(self._steps, self._rows, -1)

    def ordered(self, rows: Tensor) -> Tensor:
        """The longest first."""
        return rows[self._order]

    def restored(self, rows: Tensor) -> Tensor:
        """The inverse of `ordered`."""
        return rows[self._ranks]


def _tensor(numbers: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, np.int64))
