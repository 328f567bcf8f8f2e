"""The scan of each cell on CUDA, by one of two schedules.

Persistent: one launch for all steps, if the recurrent weights fit in the shared memory of the GPU.
Alternating: for each step a cuBLAS product and one Triton kernel; two of each for the GRU.

Operands of products and stored activations have the dtype of `gates`: bf16, fp16 or fp32.
Accumulation, states and their gradients are fp32. With TRITON_INTERPRET=1 the kernels run on the
CPU, for tests; programs then run sequentially, so each step is a separate launch.

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

# Alternating schedule: elements per program.
_BLOCK = 256
# Persistent schedule: rows and units per program, in order of preference (few rows first: in every
# step a program loads the operands of all its rows), and warps.
_ROWS, _UNITS = (16, 32), (8, 16, 32)
_WARPS = 8
# Most bytes of an operand with which two are loaded at once.
_MAX_PREFETCH_BYTES = 32 << 10
# Most bytes of shared memory that the compiler uses to reduce the partial sums of the warps.
_MAX_REDUCTION_BYTES = 64 << 10
# Environment variable that selects a schedule regardless of size, for tests and benchmarks.
_SCHEDULE_VARIABLE = "LMTRAIN_SCHEDULE"


# The module of a cell, by its name.
_MODULES = {
    "rnn": "rnn", "simple-gru": "simple_gru", "gru": "gru", "lstm": "lstm", "peephole-lstm": "lstm"
}  # fmt: skip


def _has_two_products(variant: Variant) -> bool:
    """Whether a step has two dependent products: the GRU's candidate needs s of all units."""
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
    grad_state: Iterable[Tensor] = (),
) -> None:
    """Runs one scan over time, forward or backward; see `kernels.native.scan.scan`.

    Takes lengths, (B,) int32, in place of `offsets`: in padding the state does not change, and
    hidden states and `dz` are 0.
    """
    chosen = program_shape(variant, gates, recurrent.shape[1])
    run: _Alternating | _Persistent
    if chosen is None:
        run = _Alternating(variant, gates, recurrent, peephole, list(history), reverse, lengths)
    else:
        run = _Persistent(variant, gates, recurrent, peephole, list(history), reverse, lengths)
        run.program_shape = chosen
    if hidden is not None and bias is not None:
        run.forward(bias, hidden)
    elif grad_hidden is not None and dz is not None and grad_bias is not None:
        run.backward(grad_hidden, dz, list(grad_state))
        grad_bias += dz.sum((0, 1), dtype=torch.float32)


def program_shape(variant: Variant, gates: Tensor, units: int) -> tuple[int, int] | None:
    """Rows and units per program of the persistent schedule; None for the alternating one."""
    chosen = os.environ.get(_SCHEDULE_VARIABLE)
    if chosen == "alternating":
        return None
    if engine.is_interpreted():
        return (_ROWS[0], _UNITS[0]) if chosen == "persistent" else None
    num_multiprocessors = torch.cuda.get_device_properties(gates.device).multi_processor_count
    available = engine.shared_memory_bytes(gates.device)
    for tile_rows, tile_units in itertools.product(_ROWS, _UNITS):
        # All programs must be resident at once: a grid barrier would deadlock otherwise.
        programs = -(-units // tile_units) * -(-gates.shape[1] // tile_rows)
        needed = _shared_memory_bytes(variant, tile_rows, tile_units, units, gates.element_size())
        if programs <= num_multiprocessors and needed <= available:
            return tile_rows, tile_units
    return None


def _shared_memory_bytes(
    variant: Variant, rows: int, tile_units: int, units: int, element_size: int
) -> int:
    """Bytes of shared memory of a program: weights, and operands or partial sums."""
    width = _padded_units(units)
    # Four gates, even if the cell has fewer; full peepholes double the number of matrices.
    matrices = 3 if _has_two_products(variant) else 8 if variant.peephole == "full" else 4
    operand = rows * width * element_size
    operands = 2 * operand if _can_prefetch(rows, width, element_size) else operand
    sums = _num_splits(width) * rows * 4 * tile_units * 4
    weights = matrices * tile_units * width * element_size
    return weights + max(operands, min(sums, _MAX_REDUCTION_BYTES))


def _can_prefetch(rows: int, width: int, element_size: int) -> bool:
    """Whether two operands are loaded before the first product."""
    return rows * width * element_size <= _MAX_PREFETCH_BYTES


def _num_splits(width: int) -> int:
    """Parts of the units that the warps of a program multiply separately."""
    return min(_WARPS, width // 16)


def _padded_units(units: int) -> int:
    """The next power of two, at least 16, the least depth of tl.dot."""
    return max(16, 1 << (units - 1).bit_length())


class _Scan:
    """The tensors and sizes of one scan."""

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
        # Any tensor will do as an argument that a kernel does not read.
        self.peephole = recurrent if peephole is None else peephole
        if variant.peephole == "full":
            self.peephole = self.peephole.to(gates.dtype)
        self.reverse = reverse
        self.has_lengths = lengths is not None
        self.lengths = recurrent if lengths is None else lengths
        self.functions = engine.module(_MODULES[variant.name])

    def _step_indices(self) -> list[tuple[int, int, int]]:
        """Of each step: its time, and the indices in the history of the states around it."""
        order = range(self.steps - 1, -1, -1) if self.reverse else range(self.steps)
        return [(t, t + 1, t) if self.reverse else (t, t, t + 1) for t in order]


class _Alternating(_Scan):
    """The alternating schedule: a product and a launch for each step."""

    def _empty(self, gates: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(self.rows, gates * self.units, dtype=dtype, device=self.gates.device)

    def _launch(self, kernel: str, *arguments: Tensor | int, **constants: Any) -> None:
        """Runs a kernel of `steps` with the function of the cell that has its name."""
        blocks = -(-self.rows * self.units // _BLOCK)
        function = getattr(engine.module("steps"), kernel)
        function[(blocks,)](
            *arguments,
            self.rows,
            self.units,
            CELL=getattr(self.functions, kernel),
            BLOCK=_BLOCK,
            **constants,
            **engine.COMPILE_OPTIONS,
        )

    def _constants(self, count: int) -> dict[str, Any]:
        variant = self.variant
        return {
            "COUNT": count, "GATES": variant.num_gates, "PARTS": variant.num_parts,
            "PEEPHOLE": variant.peephole, "TANH": variant.is_tanh,
            "LENGTHS": self.has_lengths,
        }  # fmt: skip

    def forward(self, bias: Tensor, hidden: Tensor) -> None:
        """Writes activations to the gates, states to the history, and hidden states."""
        H, dtype, variant = self.units, self.gates.dtype, self.variant
        has_two_products = _has_two_products(variant)
        initial = self._step_indices()[0][1]
        operands = [states[initial].to(dtype, copy=True) for states in self.history]
        s = self._empty(1, dtype) if has_two_products else operands[0]
        # The product of the first COUNT gates; in the GRU, of the candidate alone.
        count = 1 if has_two_products else variant.num_gates
        weights, product = self.recurrent[: count * H].T, self._empty(count)
        gate_product = self._empty(variant.num_gates - 1) if has_two_products else product
        peephole_product = self._empty(3) if variant.peephole == "full" else product
        constants = self._constants(count)
        first, second = self.history[0], self.history[-1]
        for t, before, after in self._step_indices():
            if variant.peephole == "full":
                _multiply(operands[1], self.peephole.T, peephole_product)
            if has_two_products:
                _multiply(operands[0], self.recurrent[H:].T, gate_product)
                self._launch("prepare", self.gates[t], gate_product, bias, first[before], s)
            _multiply(s, weights, product)
            self._launch(
                "forward",
                *(self.gates[t], product, peephole_product, bias, self.peephole),
                *(first[before], second[before], first[after], second[after], hidden[t]),
                *(operands[0], operands[-1], self.lengths, t),
                **constants,
            )

    def backward(self, grad_hidden: Tensor, dz: Tensor, grad_state: list[Tensor]) -> None:
        """Writes dz, and overwrites `grad_state` with the gradient of the initial state."""
        H, variant = self.units, self.variant
        has_two_products = _has_two_products(variant)
        product = self._empty(1).zero_()
        product_second = self._empty(1).zero_() if variant.peephole == "full" else product
        constants = self._constants(2 if has_two_products else variant.num_gates)
        # In the GRU the candidate has a separate product, ds.
        start = H if has_two_products else 0
        first, second = self.history[0], self.history[-1]
        for t, before, after in reversed(self._step_indices()):
            self._launch(
                "backward",
                *(self.gates[t], product, product_second, self.peephole),
                *(first[before], second[before], second[after]),
                *(grad_hidden[t], dz[t], grad_state[0], grad_state[-1], self.lengths, t),
                **constants,
            )
            if has_two_products:
                _multiply(dz[t][:, :H], self.recurrent[:H], product)
                self._launch("finish", self.gates[t], product, first[before], dz[t], grad_state[0])
            _multiply(dz[t][:, start:], self.recurrent[start:], product)
            if variant.peephole == "full":
                _multiply(dz[t][:, H:], self.peephole, product_second)
        grad_state[0] += product
        if variant.peephole == "full":
            grad_state[1] += product_second


class _Persistent(_Scan):
    """The persistent schedule: one launch for all steps."""

    program_shape: tuple[int, int]

    def _launch(self, kernel: str, count: int, *tensors: Tensor, **constants: Any) -> None:
        """Runs `count` steps, or half steps of the GRU, of a kernel."""
        rows, units = self.program_shape
        grid = (-(-self.units // units), -(-self.rows // rows))
        # A single stage: pipelined loads could read operands before the barrier of their step.
        options: dict[str, Any] = {
            "num_warps": _WARPS, "num_stages": 1, "launch_cooperative_grid": True,
            **engine.COMPILE_OPTIONS,
        }  # fmt: skip
        ranges = [(0, count)]
        if engine.is_interpreted():
            options, ranges = {}, [(step, step + 1) for step in range(count)]
        name = "persistent_gru" if _has_two_products(self.variant) else "persistent"
        for begin, end in ranges:
            # 128 bytes apart, so that no two counters share a cache line.
            counters = torch.zeros(32 * grid[1], dtype=torch.int32, device=self.gates.device)
            getattr(engine.module(name), kernel)[grid](
                *tensors, self.lengths, counters, begin, end, self.steps, self.rows, self.units,
                CELL=getattr(self.functions, kernel),
                LENGTHS=self.has_lengths, REVERSE=self.reverse,
                PRECISION="ieee",
                ROWS=rows, UNITS=units, K=self.width, SPLIT=_num_splits(self.width),
                **constants, **options,
            )  # fmt: skip

    @property
    def width(self) -> int:
        """K, units of an operand with padding."""
        return _padded_units(self.units)

    @property
    def can_prefetch(self) -> bool:
        """Whether two operands are loaded before the first product."""
        return _can_prefetch(self.program_shape[0], self.width, self.gates.element_size())

    def _operands(self, *shape: int) -> Tensor:
        """Operands, (..., R, ·K), R and K padded with zeros; the last of `shape` counts K."""
        rows = -(-self.rows // self.program_shape[0]) * self.program_shape[0]
        return self.gates.new_zeros(*shape[:-1], rows, shape[-1] * self.width)

    def _constants(self) -> dict[str, Any]:
        variant = self.variant
        return {
            "GATES": variant.num_gates, "PARTS": variant.num_parts, "PEEPHOLE": variant.peephole,
            "TANH": variant.is_tanh, "PREFETCH": self.can_prefetch,
        }  # fmt: skip

    def forward(self, bias: Tensor, hidden: Tensor) -> None:
        """Writes activations to the gates, states to the history, and hidden states."""
        first, second = self.history[0], self.history[-1]
        initial = self.steps if self.reverse else 0
        operands, operands_second = self._operands(2, 1), self._operands(2, 1)
        operands[0, : self.rows, : self.units] = first[initial]
        if _has_two_products(self.variant):
            self._launch(
                *("forward", 2 * self.steps),
                *(self.gates, self.recurrent, bias, first, hidden, *operands),
                PREPARE=self.functions.prepare,
            )
        else:
            operands_second[0, : self.rows, : self.units] = second[initial]
            self._launch(
                *("forward", self.steps),
                *(self.gates, self.recurrent, bias, self.peephole, first, second, hidden),
                *(operands, operands_second),
                **self._constants(),
            )

    def backward(self, grad_hidden: Tensor, dz: Tensor, grad_state: list[Tensor]) -> None:
        """Writes dz, and overwrites `grad_state` with the gradient of the initial state."""
        first, second = self.history[0], self.history[-1]
        operands = self._operands(2, self.variant.num_gates)
        if _has_two_products(self.variant):
            self._launch(
                *("backward", 2 * self.steps + 1),
                *(self.gates, self.recurrent, first, grad_hidden, dz, grad_state[0], operands),
                FINISH=self.functions.finish,
                PREFETCH=self.can_prefetch,
            )
        else:
            self._launch(
                *("backward", self.steps + 1),
                *(self.gates, self.recurrent, self.peephole, first, second),
                *(grad_hidden, dz, grad_state[0], grad_state[-1], operands),
                **self._constants(),
            )


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Writes the fp32 product of two matrices of any dtype to `out`."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)
