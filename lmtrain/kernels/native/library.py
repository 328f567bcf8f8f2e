"""The compiled library: found, loaded, and called with pointers to what was checked.

Without it (no compiler when lmtrain was installed, or `LMTRAIN_KERNELS=torch`) the plain-torch
engine does the same work; `absence` says why.
"""

import ctypes
import functools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lmtrain.errors import ConfigError, MachineError
from lmtrain.kernels.variant import VARIANTS, Variant

LEVELS = ("portable", "AVX2", "AVX512", "AVX512-BF16", "AMX-BF16")
"""What the kernels are compiled for, from the most modest on."""

_SWITCH = "LMTRAIN_KERNELS"
_LEVEL_SWITCH = "LMTRAIN_LEVEL"


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("steps", "rows", "units", "reverse")),
        ("is_other_form", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("gates", "recurrent", "peephole", "bias")),
        ("history", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("hidden", "grad_hidden", "dz", "grad_bias")),
        ("delta", ctypes.c_void_p * 2),
    )


class _Loss(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "vocab")),
        *(
            (name, ctypes.c_void_p)
            for name in ("logits", "bias", "targets", "nats", "log_sums", "grad_bias")
        ),
        ("scale", ctypes.c_float),
    )


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("from", "to")),
    )


class _Threads(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int),
        ("parallel", ctypes.c_void_p),
        ("team_size", ctypes.c_void_p),
    )


# By their names in native.cpp.
_STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "Arguments": _Arguments, "Loss": _Loss, "Matrix": _Matrix, "Threads": _Threads
}  # fmt: skip


def absence() -> str | None:
    """Why there are no native kernels here; None where there are.

    Raises:
        ConfigError: LMTRAIN_KERNELS is none of its values.
    """
    if choice() != "native":
        return f"{_SWITCH}={choice()}"
    library = _library()
    return library if isinstance(library, str) else None


def choice() -> str:
    """What the environment's LMTRAIN_KERNELS asks for on the processor.

    native is C++, torch is no kernels, triton is Triton's interpreter, for tests.

    Raises:
        ConfigError: it is none of these.
    """
    chosen = os.environ.get(_SWITCH, "native")
    if chosen not in ("native", "torch", "triton"):
        raise ConfigError(f"{_SWITCH}={chosen} is none of native, torch, triton")
    return chosen


def level() -> int:
    """Index into LEVELS of what runs here; the environment's LMTRAIN_LEVEL lowers it.

    Raises:
        ConfigError: LMTRAIN_LEVEL is a level that this processor does not have.
    """
    best = _best_level()
    chosen = os.environ.get(_LEVEL_SWITCH)
    if chosen is None:
        return best
    if chosen not in LEVELS[: best + 1]:
        raise ConfigError(f"{_LEVEL_SWITCH}={chosen} is none of {', '.join(LEVELS[: best + 1])}")
    return LEVELS.index(chosen)


@functools.cache
def _best_level() -> int:
    return int(_loaded().lmtrain_level())


def has_bf16() -> bool:
    """Whether products of bf16 numbers are native here."""
    return absence() is None and level() >= LEVELS.index("AVX512-BF16")


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
    delta: Iterable[Tensor] = (),
) -> None:
    """One scan over time: forward where `hidden` is given, else backward.

    With `offsets` rows are packed: (T, B, ·) below is (N, ·), and (T + 1, B, ·) is (B + N, ·).

    Args:
        variant: what the cell is.
        gates: input products (T, B, G·H), without the bias, which the forward turns into
            activations; bf16 or fp32, as `hidden`, `grad_hidden` and `dz` then are.
        recurrent: (G·H, H), fp32.
        peephole: (3H, H) or (3H), fp32, or None.
        bias: (G·H), fp32; the forward's.
        history: each part of the state, (T + 1, B, H), fp32; the forward fills it.
        reverse: whether time runs from T to 1; never with `offsets`.
        offsets: the first line of each step, and N, (T + 1), int64; None where all rows have T
            steps.
        hidden: receives the hidden states, (T, B, H).
        grad_hidden: their gradient, (T, B, H).
        dz: receives the gradients at the pre-activations, (T, B, G·H).
        grad_bias: (G·H), fp32; the sum of `dz` over time and rows is added to it.
        delta: the gradients of each part of the last state, (B, H), fp32; become those of the
            first.

    Raises:
        ConfigError: a tensor that is not as described, or not contiguous; nothing was run.
        MachineError: no memory.
    """
    units, kind = recurrent.shape[1], gates.dtype
    width = variant.gates * units
    lines: tuple[int, ...]
    states: tuple[int, ...]
    if offsets is None:
        steps, rows, _ = gates.shape
        lines, states = (steps, rows), (steps + 1, rows)
    else:
        steps, rows = len(offsets) - 1, len(history[0]) - len(gates)
        lines, states = (int(offsets[-1]),), (rows + int(offsets[-1]),)
    seen = variant.peephole_shape(units)
    if (peephole is None) != (seen is None):
        raise ConfigError(f"the kernel of {variant.name} and the weights disagree about peepholes")
    if (bias is None) != (hidden is None):
        raise ConfigError("the forward, and it alone, takes a bias")
    outputs = (*lines, units)
    arguments = _Arguments(
        *(steps, rows, units, int(reverse), int(variant.is_other_form)),
        _pointer(offsets, (steps + 1,), torch.int64),
        _pointer(gates, (*lines, width), kind),
        _pointer(recurrent, (width, units)),
        _pointer(peephole, seen or ()),
        _pointer(bias, (width,)),
        _pair(history, (*states, units)),
        _pointer(hidden, outputs, kind),
        _pointer(grad_hidden, outputs, kind),
        _pointer(dz, (*lines, width), kind),
        _pointer(grad_bias, (width,)),
        _pair(delta, (rows, units)),
    )
    is_mixed, is_backward = kind == torch.bfloat16, hidden is None
    if _loaded().lmtrain_scan(
        *(ctypes.byref(arguments), _rows()[variant.name, variant.peephole]),
        *(is_mixed, is_backward, level(), _threads()),
    ):
        raise MachineError("no memory for the recurrent weights")


def cross_entropy(
    logits: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    nats: Tensor | None = None,
    log_sums: Tensor | None = None,
    grad_bias: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Softmax cross-entropy of rows of logits; with `grad_bias`, they become their gradients.

    Args:
        logits: (N, V), bf16 or fp32, without the bias.
        bias: (V), fp32.
        targets: (N), int64, below V; below 0 where there is no loss. For a slice of the
            vocabulary counted from its first token, and any number may stand there.
        nats: receives the losses, (N), fp32; None for a slice.
        log_sums: for a slice, (N), fp32: log Σ_v e^(z_v + b_v). Received without `grad_bias`,
            and given with it, for the whole vocabulary; infinite where there is no loss.
        grad_bias: (V), fp32, added to; None for no gradient.
        scale: of the gradients.

    Raises:
        ConfigError: a tensor that is not as described, or not contiguous; nothing was run.
        MachineError: no memory.
    """
    rows, vocab = logits.shape
    is_mixed = logits.dtype == torch.bfloat16
    loss = _Loss(
        *(rows, vocab),
        _pointer(logits, (rows, vocab), logits.dtype),
        _pointer(bias, (vocab,)),
        _pointer(targets, (rows,), torch.int64),
        _pointer(nats, (rows,)),
        _pointer(log_sums, (rows,)),
        _pointer(grad_bias, (vocab,)),
        scale,
    )
    if _loaded().lmtrain_cross_entropy(ctypes.byref(loss), is_mixed, level(), _threads()):
        raise MachineError("no memory for the softmax")


def transposed(matrix: Tensor) -> Tensor:
    """The transpose (M, N) of a matrix (N, M), written out if its numbers are bf16.

    Torch's bf16 products with an operand transposed in its strides alone take twice as long.
    """
    if matrix.dtype != torch.bfloat16 or matrix.device.type != "cpu" or not has_bf16():
        return matrix.T
    matrix = matrix.contiguous()
    result = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    given = _Matrix(*matrix.shape, matrix.data_ptr(), result.data_ptr())
    _loaded().lmtrain_transpose(ctypes.byref(given), _threads())
    return result


def _pointer(
    tensor: Tensor | None, shape: tuple[int, ...], kind: torch.dtype = torch.float32
) -> int | None:
    """Where the numbers of a tensor lie.

    Raises:
        ConfigError: they are not what the kernels take them for.
    """
    if tensor is None:
        return None
    is_kind = tensor.dtype == kind and tensor.dtype != torch.float64 and tensor.is_cpu
    if tensor.shape != shape or not is_kind or not tensor.is_contiguous():
        found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ConfigError(f"a native kernel wants {shape} {kind}, contiguous; this is {found}")
    return tensor.data_ptr()


def _pair(tensors: Iterable[Tensor], shape: tuple[int, ...]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * 2)(*(_pointer(tensor, shape) for tensor in tensors))


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled library, or why there is none."""
    path = next(Path(__file__).parent.glob("compiled*.so"), None)
    if path is None:
        return "lmtrain was installed without a C++ compiler"
    library = ctypes.CDLL(str(path))
    if _layout(library) != _expected_layout():
        return "the compiled library is not of this lmtrain; reinstall: pip install -e ."
    library.lmtrain_scan.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 4, _Threads]
    library.lmtrain_transpose.argtypes = [ctypes.c_void_p, _Threads]
    library.lmtrain_cross_entropy.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 2, _Threads]
    return library


def _layout(library: ctypes.CDLL) -> dict[str, int]:
    """Sizes, offsets and gates as the library was compiled with."""
    if not hasattr(library, "lmtrain_layout"):
        return {}
    library.lmtrain_layout.restype = ctypes.c_char_p
    words = library.lmtrain_layout().decode().split()
    return {name: int(number) for name, _, number in (word.partition("=") for word in words)}


def _expected_layout() -> dict[str, int]:
    """The same as Python has them."""
    sizes = {name: ctypes.sizeof(structure) for name, structure in _STRUCTURES.items()}
    offsets = {
        f"{name}.{field}": getattr(structure, field).offset
        for name, structure in _STRUCTURES.items()
        for field, *_ in structure._fields_
    }
    gates = {f"{variant.name}/{variant.peephole}": variant.gates for variant in VARIANTS}
    return sizes | offsets | gates


@functools.cache
def _rows() -> dict[tuple[str, str], int]:
    """The rows of table.h by the names and the peepholes of variants."""
    names = [name.split("/") for name in _layout(_loaded()) if "/" in name]
    return {(name, peephole): row for row, (name, peephole) in enumerate(names)}


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise MachineError(f"no native kernels: {library}")
    return library


def _threads() -> _Threads:
    return _Threads(torch.get_num_threads(), *_openmp())


@functools.cache
def _openmp() -> tuple[int | None, int | None]:
    """Addresses of GOMP_parallel and omp_get_num_threads in the OpenMP that torch has loaded.

    Its threads wait for work already; others beside them would fight them for the processor.
    """
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None, None
    for path in sorted(set(re.findall(r"/\S*/libgomp\S*\.so\S*", mapped))):
        openmp = ctypes.CDLL(path)
        if hasattr(openmp, "GOMP_parallel"):
            addresses = (
                ctypes.cast(function, ctypes.c_void_p).value
                for function in (openmp.GOMP_parallel, openmp.omp_get_num_threads)
            )
            return next(addresses), next(addresses)
    return None, None
