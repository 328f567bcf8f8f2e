"""The scans of lmtrain's cells on CUDA, by one of two schedules.

Persistent: one launch for all steps, where the chip can keep the recurrent weights.
Alternating: the recurrent product of each step is cuBLAS's, all else of it one Triton kernel.
The GRU has two products a step, and so two of everything.

Precision follows the gates': operands of products and kept activations are bf16, fp16 or fp32;
sums, states and deltas fp32. With TRITON_INTERPRET=1 the same kernels run on the processor, slowly,
for tests; there programs run one after the other, so that each step is a launch of its own.

T steps, B rows, H hidden_size, G gates.

Source: both schedules: FlashRNN (Pöppel, Beck & Hochreiter 2024).
"""

import itertools
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lmtrain.kernels.triton import engine
from lmtrain.kernels.variant import Variant

# Numbers of a program of the alternating schedule.
_BLOCK = 256
# Of the persistent one: rows and units of a program, warps, bytes of a product's operand up to
# which two are read at once, and bytes up to which the compiler brings the sums of all warps
# together at once. Few rows come first: in every step a program reads the states of all its rows.
_ROWS, _UNITS = (16, 32), (8, 16, 32)
_WARPS = 8
_MOST_BYTES_AHEAD = 32 << 10
_MOST_BYTES_OF_SUMS = 64 << 10
# Chooses a schedule in place of the sizes, for tests and measurements.
_SWITCH = "LMTRAIN_SCHEDULE"


# The module with the functions of a cell, by its name.
_MODULES = {
    "rnn": "rnn", "simple-gru": "simple_gru", "gru": "gru", "lstm": "lstm", "peephole-lstm": "lstm"
}  # fmt: skip


def _is_two_phased(variant: Variant) -> bool:
    """Whether a step has two products: the GRU's candidate waits for s of all units."""
    return variant.name == "gru"


def scan(
    variant: Variant,
    *,
    gates: Tensor,
    recurrent: Tensor,
    peephole: Tensor | None,
    bias: Tensor | None = None,
    history: Iterable[Tensor],
    reverse: bool,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    grad_hidden: Tensor | None = None,
    dz: Tensor | None = None,
    grad_bias: Tensor | None = None,
    delta: Iterable[Tensor] = (),
) -> None:
    """One scan over time, as `kernels.native.library.scan`: forward where `hidden` is given.

    Beyond `lengths`, (B,) int32, states stand still, and hidden states and `dz` are 0.
    """
    layout = _layout(variant, gates, recurrent.shape[1])
    run: _Alternating | _Persistent
    if layout is None:
        run = _Alternating(variant, gates, recurrent, peephole, list(history), reverse, lengths)
    else:
        run = _Persistent(variant, gates, recurrent, peephole, list(history), reverse, lengths)
        run.layout = layout
    if hidden is not None and bias is not None:
        run.forward(bias, hidden)
    elif grad_hidden is not None and dz is not None and grad_bias is not None:
        run.backward(grad_hidden, dz, list(delta))
        grad_bias += dz.sum((0, 1), dtype=torch.float32)


def _layout(variant: Variant, gates: Tensor, units: int) -> tuple[int, int] | None:
    """Rows and units of a program of the persistent schedule; None for the alternating one."""
    chosen = os.environ.get(_SWITCH)
    if chosen == "alternating":
        return None
    if engine.is_interpreted():
        return (_ROWS[0], _UNITS[0]) if chosen == "persistent" else None
    cores = torch.cuda.get_device_properties(gates.device).multi_processor_count
    shared = engine.shared_bytes(gates.device)
    for own_rows, own_units in itertools.product(_ROWS, _UNITS):
        # All programs must run at once, or they would wait for ever.
        programs = -(-units // own_units) * -(-gates.shape[1] // own_rows)
        size = _bytes(variant, own_rows, own_units, units, gates.element_size())
        if programs <= cores and size <= shared:
            return own_rows, own_units
    return None


def _bytes(variant: Variant, rows: int, own_units: int, units: int, size: int) -> int:
    """What a program keeps in shared memory: weights, and operands or the sums of its warps."""
    width = _power(units)
    # Gates that a cell lacks are multiplied, too; full peepholes take as many matrices again.
    matrices = 3 if _is_two_phased(variant) else 8 if variant.peephole == "full" else 4
    operand = rows * width * size
    operands = 2 * operand if _reads_ahead(rows, width, size) else operand
    sums = _split(width) * rows * 4 * own_units * 4
    return matrices * own_units * width * size + max(operands, min(sums, _MOST_BYTES_OF_SUMS))


def _reads_ahead(rows: int, width: int, size: int) -> bool:
    """Whether two operands of products are read at once."""
    return rows * width * size <= _MOST_BYTES_AHEAD


def _split(width: int) -> int:
    """Parts of the units that the warps of a program multiply on their own."""
    return min(_WARPS, width // 16)


def _power(number: int) -> int:
    """The least power of two that a product takes, and that is not below a number."""
    return max(16, 1 << (number - 1).bit_length())


class _Scan:
    """The tensors of one scan."""

    def __init__(
        self,
        variant: Variant,
        gates: Tensor,
        recurrent: Tensor,
        peephole: Tensor | None,
        history: list[Tensor],
        reverse: bool,
        lengths: Tensor | None,
    ) -> None:
        self.variant = variant
        self.gates = gates
        self.history = history
        self.steps, self.rows, _ = gates.shape
        self.units = recurrent.shape[1]
        self.recurrent = recurrent.to(gates.dtype)
        # Kernels are given something for what they do not read.
        self.peephole = recurrent if peephole is None else peephole
        if variant.peephole == "full":
            self.peephole = self.peephole.to(gates.dtype)
        self.reverse = reverse
        self.has_lengths = lengths is not None
        self.lengths = recurrent if lengths is None else lengths
        self.page = engine.module(_MODULES[variant.name])

    def _times(self) -> list[tuple[int, int, int]]:
        """Each step in the order of time, with the places of the state before and after it."""
        order = range(self.steps - 1, -1, -1) if self.reverse else range(self.steps)
        return [(t, t + 1, t) if self.reverse else (t, t, t + 1) for t in order]


class _Alternating(_Scan):
    """A product and a launch for each step."""

    def _numbers(self, gates: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(self.rows, gates * self.units, dtype=kind, device=self.gates.device)

    def _launch(self, kernel: str, cell: str, *given: Tensor | int, **options: Any) -> None:
        blocks = -(-self.rows * self.units // _BLOCK)
        function = getattr(engine.module("steps"), kernel)
        function[(blocks,)](
            *given,
            self.rows,
            self.units,
            CELL=getattr(self.page, cell),
            BLOCK=_BLOCK,
            **options,
            **engine.OPTIONS,
        )

    def _options(self, count: int) -> dict[str, Any]:
        variant = self.variant
        return {
            "COUNT": count, "GATES": variant.gates, "PARTS": variant.parts,
            "PEEPHOLE": variant.peephole, "OTHER": variant.is_other_form,
            "LENGTHS": self.has_lengths,
        }  # fmt: skip

    def forward(self, bias: Tensor, hidden: Tensor) -> None:
        """Activations into the gates, states into the history, hidden states."""
        H, kind, variant = self.units, self.gates.dtype, self.variant
        begin = self._times()[0][1]
        operands = [states[begin].to(kind, copy=True) for states in self.history]
        s = self._numbers(1, kind) if _is_two_phased(variant) else operands[0]
        last_weights = self.recurrent[: H if _is_two_phased(variant) else variant.gates * H].T
        product = self._numbers(1 if _is_two_phased(variant) else variant.gates)
        gated = self._numbers(variant.gates - 1) if _is_two_phased(variant) else product
        seen = self._numbers(3) if variant.peephole == "full" else product
        options = self._options(1 if _is_two_phased(variant) else variant.gates)
        first, last = self.history[0], self.history[-1]
        for t, before, after in self._times():
            if variant.peephole == "full":
                _multiply(operands[1], self.peephole.T, seen)
            if _is_two_phased(variant):
                _multiply(operands[0], self.recurrent[H:].T, gated)
                self._launch("prepare", "prepare", self.gates[t], gated, bias, first[before], s)
            _multiply(s, last_weights, product)
            self._launch(
                "forward", "forward",
                *(self.gates[t], product, seen, bias, self.peephole),
                *(first[before], last[before], first[after], last[after], hidden[t]),
                *(operands[0], operands[-1], self.lengths, t),
                **options,
            )  # fmt: skip

    def backward(self, grad_hidden: Tensor, dz: Tensor, delta: list[Tensor]) -> None:
        """Gradients at the pre-activations; `delta` becomes the gradients of the first state."""
        H, variant = self.units, self.variant
        product = self._numbers(1).zero_()
        second = self._numbers(1).zero_() if variant.peephole == "full" else product
        options = self._options(2 if _is_two_phased(variant) else variant.gates)
        gated = H if _is_two_phased(variant) else 0
        first, last = self.history[0], self.history[-1]
        for t, before, after in reversed(self._times()):
            self._launch(
                "backward", "backward",
                *(self.gates[t], product, second, self.peephole),
                *(first[before], last[before], last[after]),
                *(grad_hidden[t], dz[t], delta[0], delta[-1], self.lengths, t),
                **options,
            )  # fmt: skip
            if _is_two_phased(variant):
                _multiply(dz[t][:, :H], self.recurrent[:H], product)
                self._launch(
                    *("finish", "finish"), self.gates[t], product, first[before], dz[t], delta[0]
                )
            _multiply(dz[t][:, gated:], self.recurrent[gated:], product)
            if variant.peephole == "full":
                _multiply(dz[t][:, H:], self.peephole, second)
        delta[0] += product
        if variant.peephole == "full":
            delta[1] += second


class _Persistent(_Scan):
    """One launch for all steps."""

    layout: tuple[int, int]

    def _launch(self, kernel: str, ticks: int, *tensors: Tensor, **constants: Any) -> None:
        """Runs so many steps, or halves of them, of a kernel."""
        rows, units = self.layout
        grid = (-(-self.units // units), -(-self.rows // rows))
        # What others write must not be read ahead of the step that takes it: a single stage.
        options: dict[str, Any] = {
            "num_warps": _WARPS, "num_stages": 1, "launch_cooperative_grid": True, **engine.OPTIONS
        }  # fmt: skip
        spans = [(0, ticks)]
        if engine.is_interpreted():
            options, spans = {}, [(tick, tick + 1) for tick in range(ticks)]
        name = "persistent_gru" if _is_two_phased(self.variant) else "persistent"
        for begin, end in spans:
            # A line of the cache each.
            counters = torch.zeros(32 * grid[1], dtype=torch.int32, device=self.gates.device)
            getattr(engine.module(name), kernel)[grid](
                *tensors, self.lengths, counters, begin, end, self.steps, self.rows, self.units,
                CELL=getattr(self.page, kernel), LENGTHS=self.has_lengths, REVERSE=self.reverse,
                PRECISION="ieee",
                ROWS=rows, UNITS=units, K=self.width, SPLIT=_split(self.width),
                **constants, **options,
            )  # fmt: skip

    @property
    def width(self) -> int:
        """Units, with padding, of what programs write for each other."""
        return _power(self.units)

    @property
    def reads_ahead(self) -> bool:
        """Whether two operands of products are read at once."""
        return _reads_ahead(self.layout[0], self.width, self.gates.element_size())

    def _operands(self, *shape: int) -> Tensor:
        """What programs write for each other, (..., rows, width), both padded with zeros."""
        rows = -(-self.rows // self.layout[0]) * self.layout[0]
        return self.gates.new_zeros(*shape[:-1], rows, shape[-1] * self.width)

    def _constants(self) -> dict[str, Any]:
        variant = self.variant
        return {
            "GATES": variant.gates, "PARTS": variant.parts, "PEEPHOLE": variant.peephole,
            "OTHER": variant.is_other_form, "AHEAD": self.reads_ahead,
        }  # fmt: skip

    def forward(self, bias: Tensor, hidden: Tensor) -> None:
        """Activations into the gates, states into the history, hidden states."""
        first, last = self.history[0], self.history[-1]
        begin = self.steps if self.reverse else 0
        operands, operands_second = self._operands(2, 1), self._operands(2, 1)
        operands[0, : self.rows, : self.units] = first[begin]
        if _is_two_phased(self.variant):
            self._launch(
                *("forward", 2 * self.steps),
                *(self.gates, self.recurrent, bias, first, hidden, *operands),
                PREPARE=self.page.prepare,
            )
        else:
            operands_second[0, : self.rows, : self.units] = last[begin]
            self._launch(
                *("forward", self.steps),
                *(self.gates, self.recurrent, bias, self.peephole, first, last, hidden),
                *(operands, operands_second),
                **self._constants(),
            )

    def backward(self, grad_hidden: Tensor, dz: Tensor, delta: list[Tensor]) -> None:
        """Gradients at the pre-activations; `delta` becomes the gradients of the first state."""
        first, last = self.history[0], self.history[-1]
        operands = self._operands(2, self.variant.gates)
        if _is_two_phased(self.variant):
            self._launch(
                *("backward", 2 * self.steps + 1),
                *(self.gates, self.recurrent, first, grad_hidden, dz, delta[0], operands),
                FINISH=self.page.finish,
                AHEAD=self.reads_ahead,
            )
        else:
            self._launch(
                *("backward", self.steps + 1),
                *(self.gates, self.recurrent, self.peephole, first, last),
                *(grad_hidden, dz, delta[0], delta[-1], operands),
                **self._constants(),
            )


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """The product of two matrices, in fp32 whatever they are."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)
