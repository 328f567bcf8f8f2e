"""The memory layout of a batch in a scan: padded to T steps, or packed without padding.

As in torch's PackedSequence, packed rows are sorted by decreasing length and stored step by step: a
step has one line for each row that has not ended. A row that runs backward starts at its own end.

T steps, B rows, G gates, I input_size, H hidden_size, N lines (the sum of the lengths). A history
is the initial state and the state after each step: (T + 1, B, H) padded, (B + N, H) packed.
"""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.errors import ConfigError
from lmtrain.kernels.products import matmul


class Layout(Protocol):
    """Interface of the layouts."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a kernel that depend on the layout."""
        ...

    def linear(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Products of inputs (T, B, I) and a weight (G·H, I), in a tensor of shape (T, B, G·H)."""
        ...

    def view(self, buffer: Tensor) -> Tensor:
        """The part that a kernel uses of a tensor (T, B, ·) or of a history (T + 1, B, ·)."""
        ...

    def initialize(self, history: Tensor, initial: Tensor) -> Tensor:
        """Copies the initial state (B, H) into a history; `view` of it."""
        ...

    def final(self, history: Tensor) -> Tensor:
        """The final state of each row, (B, H), from a `view` of a history."""
        ...

    def previous(self, history: Tensor) -> Tensor:
        """The state before each step, from a `view` of a history."""
        ...

    def pack(self, padded: Tensor) -> Tensor:
        """A padded tensor (T, B, ·) in this layout."""
        ...

    def pad(self, lines: Tensor) -> Tensor:
        """The padded tensor (T, B, ·) of a tensor in this layout; padding is 0."""
        ...

    def sort(self, rows: Tensor) -> Tensor:
        """A copy of rows (B, H) in the order of the layout."""
        ...

    def unsort(self, rows: Tensor) -> Tensor:
        """Rows (B, H) from the order of the layout in their original order."""
        ...


class Padded(Layout):
    """All rows have T steps in memory; kernels skip the padding of rows with lengths.

    Args:
        steps: T.
        lengths: steps of each row, (B,); None for T.
        reverse: whether time runs from T to 1.
    """

    def __init__(self, steps: int, lengths: Tensor | None, *, reverse: bool) -> None:
        self._steps, self._lengths, self._reverse = steps, lengths, reverse

    @property
    def options(self) -> dict[str, Any]:
        """The direction and, where rows have them, the lengths."""
        options: dict[str, Any] = {"reverse": self._reverse}
        if self._lengths is not None:
            options["lengths"] = self._lengths.to(torch.int32)
        return options

    def linear(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """One matrix product."""
        return matmul(inputs, weight.T)

    def view(self, buffer: Tensor) -> Tensor:
        """The whole tensor."""
        return buffer

    def initialize(self, history: Tensor, initial: Tensor) -> Tensor:
        """The initial state is at index 0, or at T if time runs backward."""
        history[self._steps if self._reverse else 0] = initial
        return history

    def final(self, history: Tensor) -> Tensor:
        """The state at the other end: kernels copy the state of a row that has ended."""
        return history[0 if self._reverse else self._steps].clone()

    def previous(self, history: Tensor) -> Tensor:
        """All states but the final one, (T, B, H)."""
        return history[1:] if self._reverse else history[:-1]

    def pack(self, padded: Tensor) -> Tensor:
        """The same tensor, contiguous."""
        return padded.contiguous()

    def pad(self, lines: Tensor) -> Tensor:
        """The same tensor: kernels write 0 to padding."""
        return lines

    def sort(self, rows: Tensor) -> Tensor:
        """The rows are not sorted."""
        return rows.clone(memory_format=torch.contiguous_format)

    def unsort(self, rows: Tensor) -> Tensor:
        """The rows as they are."""
        return rows


class Packed(Layout):
    """Rows of different lengths without padding.

    Args:
        lengths: steps of each row, (B,), on the CPU.
        steps: T of the padded rows.
        reverse: whether time runs from T to 1.

    Raises:
        ConfigError: a length below 1 or above T.

    Example:
        >>> layout = Packed(torch.tensor([1, 2]), steps=2, reverse=False)
        >>> layout.pack(torch.tensor([[[1], [2]], [[0], [3]]])).flatten().tolist()
        [2, 1, 3]
    """

    def __init__(self, lengths: Tensor, steps: int, *, reverse: bool) -> None:
        sizes = lengths.numpy()
        if sizes.min() < 1 or sizes.max() > steps:
            raise ConfigError(
                f"scan: lengths {sizes.min()} to {sizes.max()} are not in 1 to {steps}"
            )
        order = np.argsort(-sizes, kind="stable")
        sorted_sizes, scan_steps = sizes[order], np.arange(sizes.max())
        # Of each line: its step in the order of the scan, and its row in the sorted order.
        step, row = np.nonzero(scan_steps[:, None] < sorted_sizes)
        offsets = np.searchsorted(step, np.append(scan_steps, sizes.max()))
        time = sorted_sizes[row] - 1 - step if reverse else step
        self._steps, self._rows = steps, len(sizes)
        # The first line of each step, then N.
        self._offsets = _tensor(offsets)
        self._order = _tensor(order)
        self._ranks = _tensor(np.argsort(order))
        # The index t·B + b of each line in a padded tensor.
        self._lines = _tensor(time * len(sizes) + order[row])
        # In a history: the state before each line, and the final state of each row.
        self._previous = _tensor(np.where(step > 0, len(sizes) + offsets[step - 1], 0) + row)
        self._final = _tensor(len(sizes) + offsets[sizes - 1] + np.argsort(order))

    @property
    def options(self) -> dict[str, Any]:
        """The first line of each step; the lines are in the order of the scan, never reversed."""
        return {"reverse": False, "offsets": self._offsets}

    def linear(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """One matrix product of all lines."""
        products = inputs.new_empty(*inputs.shape[:2], len(weight))
        matmul(self.pack(inputs), weight.T, out=self._view_cleared(products))
        return products

    def view(self, buffer: Tensor) -> Tensor:
        """The first N lines, or B + N of a history."""
        extra = (len(buffer) - self._steps) * self._rows
        return buffer.flatten(0, 1)[: extra + len(self._lines)]

    def initialize(self, history: Tensor, initial: Tensor) -> Tensor:
        """The initial state is in the first B lines."""
        view = self._view_cleared(history)
        view[: self._rows] = initial[self._order]
        return view

    def final(self, history: Tensor) -> Tensor:
        """The state after each row's last line."""
        return history[self._final]

    def previous(self, history: Tensor) -> Tensor:
        """The state before each line, (N, H)."""
        return history[self._previous]

    def _view_cleared(self, buffer: Tensor) -> Tensor:
        """`view`, with the unused rest set to 0: operators must not return undefined memory."""
        lines = self.view(buffer)
        buffer.flatten(0, 1)[len(lines) :] = 0
        return lines

    def pack(self, padded: Tensor) -> Tensor:
        """All lines, (N, ·)."""
        return padded.flatten(0, 1).index_select(0, self._lines)

    def pad(self, lines: Tensor) -> Tensor:
        """The lines at their steps and rows."""
        padded = lines.new_zeros(self._steps * self._rows, lines.shape[1])
        padded.index_copy_(0, self._lines, lines)
        return padded.view(self._steps, self._rows, -1)

    def sort(self, rows: Tensor) -> Tensor:
        """The longest row first."""
        return rows[self._order]

    def unsort(self, rows: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return rows[self._ranks]


def _tensor(array: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int64))
