"""Calls the scans of the compiled library with checked pointers."""

import ctypes
import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lmtrain.errors import ConfigError, MachineError
from lmtrain.kernels.native import library
from lmtrain.kernels.variant import Variant


def scan(
    variant: Variant,
    *,
    gates: Tensor,
    recurrent: Tensor,
    peephole: Tensor | None,
    bias: Tensor | None = None,
    history: Sequence[Tensor],
    reverse: bool,
    offsets: Tensor | None = None,
    hidden: Tensor | None = None,
    grad_hidden: Tensor | None = None,
    dz: Tensor | None = None,
    grad_bias: Tensor | None = None,
    grad_state: Iterable[Tensor] = (),
) -> None:
    """Runs one scan over time: forward if `hidden` is given, else backward.

    T steps, B rows, H hidden_size, G gates. With `offsets` rows are packed (`kernels.layout`):
    (T, B, ·) below is (N, ·), and (T + 1, B, ·) is (B + N, ·).

    Args:
        variant: the cell and its options.
        gates: input products without bias, (T, B, G·H), bf16 or fp32; the forward overwrites them
            with the activations. `hidden`, `grad_hidden` and `dz` have the same dtype.
        recurrent: (G·H, H), fp32.
        peephole: (3H, H) or (3H), fp32; None for a cell without peepholes.
        bias: (G·H), fp32; forward only.
        history: each part of the state, (T + 1, B, H), fp32; the forward reads the initial state
            and writes the others.
        reverse: whether time runs from T to 1; False with `offsets`.
        offsets: the first line of each step, then N, (T + 1), int64; None if all rows have T
            steps.
        hidden: output of the forward: hidden states, (T, B, H).
        grad_hidden: gradients of the hidden states, (T, B, H).
        dz: output of the backward: gradients at the pre-activations, (T, B, G·H).
        grad_bias: (G·H), fp32; the backward adds the sum of `dz` over time and rows.
        grad_state: gradient of each part of the final state, (B, H), fp32; the backward
            overwrites it with the gradient of the initial state.

    Raises:
        ConfigError: a tensor that is not as described, or not contiguous; nothing was run.
        MachineError: out of memory, or a library of another version.
    """
    units, dtype = recurrent.shape[1], gates.dtype
    width = variant.num_gates * units
    lines: tuple[int, ...]
    states: tuple[int, ...]
    if offsets is None:
        steps, rows, _ = gates.shape
        lines, states = (steps, rows), (steps + 1, rows)
    else:
        steps, rows = len(offsets) - 1, len(history[0]) - len(gates)
        lines, states = (int(offsets[-1]),), (rows + int(offsets[-1]),)
    peephole_shape = variant.peephole_shape(units)
    if (peephole is None) != (peephole_shape is None):
        raise ConfigError(f"the kernel of {variant.name} and the weights disagree about peepholes")
    if (bias is None) != (hidden is None):
        raise ConfigError("a bias is needed in the forward, and in the forward only")
    hidden_shape = (*lines, units)
    arguments = library.ScanArguments(
        *(steps, rows, units, int(reverse), int(variant.is_tanh)),
        library.pointer(offsets, (steps + 1,), torch.int64),
        library.pointer(gates, (*lines, width), dtype),
        library.pointer(recurrent, (width, units)),
        library.pointer(peephole, peephole_shape or ()),
        library.pointer(bias, (width,)),
        _pair(history, (*states, units)),
        library.pointer(hidden, hidden_shape, dtype),
        library.pointer(grad_hidden, hidden_shape, dtype),
        library.pointer(dz, (*lines, width), dtype),
        library.pointer(grad_bias, (width,)),
        _pair(grad_state, (rows, units)),
    )
    is_bf16, is_backward = dtype == torch.bfloat16, hidden is None
    if library.loaded().lmtrain_scan(
        *(ctypes.byref(arguments), _index(variant)),
        *(is_bf16, is_backward, library.instruction_set(), library.thread_pool()),
    ):
        raise MachineError("out of memory for the packed recurrent weights")


def _pair(tensors: Iterable[Tensor], shape: tuple[int, ...]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * 2)(*(library.pointer(tensor, shape) for tensor in tensors))


@functools.cache
def _index(variant: Variant) -> int:
    """Index of a variant in table.h.

    Raises:
        MachineError: the library was compiled without it.
    """
    compiled = library.num_gates()
    key = variant.name, variant.peephole
    if compiled.get(key) != variant.num_gates:
        raise MachineError(f"no kernel of {variant.name}: {library.OTHER_VERSION}")
    return [*compiled].index(key)
