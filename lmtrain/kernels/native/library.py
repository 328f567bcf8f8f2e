"""Binding of the compiled library: finds it, loads it, and calls it with checked pointers.

Without it (no compiler when lmtrain was installed, or `LMTRAIN_KERNELS=torch`) the plain engine is
used; `unavailable_reason` says why.
"""

import ctypes
import functools
import os
import re
import time
from pathlib import Path

import torch
from torch import Tensor

from lmtrain.errors import ConfigError, MachineError

INSTRUCTION_SETS = ("portable", "AVX2", "AVX512", "AVX512-BF16", "AMX-BF16")
"""The instruction sets that the kernels are compiled for; each includes those before it."""

OTHER_VERSION = "the compiled library is of another version; reinstall: pip install -e ."

_KERNELS_VARIABLE = "LMTRAIN_KERNELS"
_INSTRUCTION_SET_VARIABLE = "LMTRAIN_INSTRUCTION_SET"


class ScanArguments(ctypes.Structure):
    """The structure of this name in native.cpp, which says what each field is."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("steps", "rows", "units", "reverse")),
        ("is_tanh", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("gates", "recurrent", "peephole", "bias")),
        ("history", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("hidden", "grad_hidden", "dz", "grad_bias")),
        ("grad_state", ctypes.c_void_p * 2),
    )


class _CrossEntropyArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "vocab_size")),
        *(
            (name, ctypes.c_void_p)
            for name in ("logits", "bias", "targets", "losses", "log_sums", "grad_bias")
        ),
        ("scale", ctypes.c_float),
    )


class _ProductArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "depth")),
        *((f"is_{operand}_bf16", ctypes.c_int64) for operand in ("left", "right", "out")),
        ("is_set_fixed", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("left", "right")),
        *((name, ctypes.c_int64 * 2) for name in ("left_strides", "right_strides")),
        ("out", ctypes.c_void_p),
    )


class _DropoutArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "mask_size", "seed", "dropped")),
        *((name, ctypes.c_void_p) for name in ("inputs", "outputs")),
        ("factor", ctypes.c_float),
    )


class _ThreadPool(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int),
        ("parallel", ctypes.c_void_p),
        ("num_threads", ctypes.c_void_p),
    )


# By their names in native.cpp.
_STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "ScanArguments": ScanArguments,
    "CrossEntropyArguments": _CrossEntropyArguments,
    "ProductArguments": _ProductArguments,
    "DropoutArguments": _DropoutArguments,
    "ThreadPool": _ThreadPool,
}

# A library without one of these is of another version.
_FUNCTIONS = (
    *("lmtrain_instruction_set", "lmtrain_is_amd"),
    *("lmtrain_scan", "lmtrain_cross_entropy", "lmtrain_product"),
    *("lmtrain_dropout", "lmtrain_multiply_adds"),
)


def unavailable_reason() -> str | None:
    """Why native kernels are not available; None if they are.

    Raises:
        ConfigError: LMTRAIN_KERNELS has an unknown value.
    """
    if requested_kernels() != "native":
        return f"{_KERNELS_VARIABLE}={requested_kernels()}"
    library = _library()
    return library if isinstance(library, str) else None


def requested_kernels() -> str:
    """The kernels for CPU tensors, from the environment variable LMTRAIN_KERNELS.

    native: C++; torch: no kernels; triton: Triton's interpreter, for tests.

    Raises:
        ConfigError: LMTRAIN_KERNELS has an unknown value.
    """
    chosen = os.environ.get(_KERNELS_VARIABLE, "native")
    if chosen not in ("native", "torch", "triton"):
        raise ConfigError(f"{_KERNELS_VARIABLE}={chosen} is none of native, torch, triton")
    return chosen


def instruction_set() -> int:
    """Index into INSTRUCTION_SETS of the best one of this CPU, or of LMTRAIN_INSTRUCTION_SET.

    Raises:
        ConfigError: this CPU does not have the instruction set in LMTRAIN_INSTRUCTION_SET.
    """
    available = INSTRUCTION_SETS[: _best_instruction_set() + 1]
    chosen = os.environ.get(_INSTRUCTION_SET_VARIABLE, available[-1])
    if chosen not in available:
        raise ConfigError(f"{_INSTRUCTION_SET_VARIABLE}={chosen} is none of {', '.join(available)}")
    return INSTRUCTION_SETS.index(chosen)


@functools.cache
def _best_instruction_set() -> int:
    return int(loaded().lmtrain_instruction_set())


def is_amd() -> bool:
    """Whether this is an AMD processor and the kernels are available."""
    return unavailable_reason() is None and _is_amd()


@functools.cache
def _is_amd() -> bool:
    return bool(loaded().lmtrain_is_amd())


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively and the kernels are available."""
    if unavailable_reason() is not None:
        return False
    return instruction_set() >= INSTRUCTION_SETS.index("AVX512-BF16")


def cross_entropy(
    logits: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    losses: Tensor | None = None,
    log_sums: Tensor | None = None,
    grad_bias: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Softmax cross-entropy of rows of logits; with `grad_bias`, gradients overwrite the logits.

    Args:
        logits: z, (N, V), bf16 or fp32, without the bias.
        bias: b, (V), fp32.
        targets: (N), int64, below V; below 0 for no loss. For a slice of the vocabulary they count
            from its first token and may be outside the slice.
        losses: output, (N), fp32; None for a slice.
        log_sums: for a slice, (N), fp32: log Σ_v e^(z_v + b_v). Without `grad_bias` an output, over
            the slice; with it an input, over the whole vocabulary, infinite for no loss.
        grad_bias: (V), fp32, added to; None for no gradient.
        scale: factor of the gradients.

    Raises:
        ConfigError: a tensor that is not as described, or not contiguous; nothing was run.
        MachineError: out of memory.
    """
    rows, vocab_size = logits.shape
    arguments = _CrossEntropyArguments(
        *(rows, vocab_size),
        pointer(logits, (rows, vocab_size), logits.dtype),
        pointer(bias, (vocab_size,)),
        pointer(targets, (rows,), torch.int64),
        pointer(losses, (rows,)),
        pointer(log_sums, (rows,)),
        pointer(grad_bias, (vocab_size,)),
        scale,
    )
    is_bf16 = logits.dtype == torch.bfloat16
    if loaded().lmtrain_cross_entropy(
        ctypes.byref(arguments), is_bf16, instruction_set(), thread_pool()
    ):
        raise MachineError("out of memory for the softmax")


def multiplies_bf16() -> bool:
    """Whether there are native products of bf16 matrices: with AMX."""
    return unavailable_reason() is None and INSTRUCTION_SETS[instruction_set()] == "AMX-BF16"


def dropout(inputs: Tensor, mask_size: int, p: float, seed: int) -> Tensor:
    """Dropout of the inputs: 0 with probability p, otherwise the input times 1 / (1 − p).

    Args:
        inputs: bf16 or fp32, contiguous.
        mask_size: elements of the mask, at least 1 and at most 2^32; the mask is repeated.
        p: dropout probability, at least 0 and below 1, rounded to 32 bits.
        seed: a random number of 64 bits. Masks of consecutive seeds are shifted, not independent.

    Raises:
        ConfigError: a tensor or a size that is not as described; nothing was run.
    """
    if inputs.numel() and not 1 <= mask_size <= 1 << 32:
        raise ConfigError(f"dropout: a mask of {mask_size} elements is not supported")
    is_bf16 = inputs.dtype == torch.bfloat16
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    outputs = torch.empty_like(inputs)
    dropped = min(round(p * (1 << 32)), (1 << 32) - 1)  # of the values of 32 bits
    arguments = _DropoutArguments(
        *(inputs.numel(), mask_size, seed, dropped),
        *(pointer(tensor, inputs.shape, dtype) for tensor in (inputs, outputs)),
        (1 << 32) / ((1 << 32) - dropped),
    )
    loaded().lmtrain_dropout(ctypes.byref(arguments), is_bf16, instruction_set(), thread_pool())
    return outputs


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """The product (M, N) of matrices (M, K) and (K, N) on the CPU, summed in fp32.

    Denormals count as 0.

    Args:
        left: (M, K), fp32, or with AMX bf16 and contiguous in one direction.
        right: (K, N), fp32; with a bf16 `left` bf16 or rounded to it, contiguous in one direction.
        out: the result, contiguous, fp32 or of the dtype of `left`; None for a new tensor of that
            dtype.

    Raises:
        ConfigError: a tensor that is not as described; nothing was run.
        MachineError: out of memory.
    """
    (rows, depth), columns = left.shape, right.shape[1]
    result = left.new_empty(rows, columns) if out is None else out
    is_bf16, *others = (each.dtype == torch.bfloat16 for each in (left, right, result))
    if (is_bf16 and not multiplies_bf16()) or (any(others) and not is_bf16):
        dtypes = f"{left.dtype}, {right.dtype} and {result.dtype}"
        raise ConfigError(f"native products do not support {dtypes} on this processor")
    arguments = _ProductArguments(
        *(rows, columns, depth, is_bf16, *others, _INSTRUCTION_SET_VARIABLE in os.environ),
        *(_matrix_pointer(left, (rows, depth)), _matrix_pointer(right, (depth, columns))),
        *((ctypes.c_int64 * 2)(*matrix.stride()) for matrix in (left, right)),
        pointer(result, (rows, columns), torch.bfloat16 if others[1] else torch.float32),
    )
    if is_bf16 and not all(1 in matrix.stride() for matrix in (left, right)):
        strides = f"{left.stride()} and {right.stride()}"
        raise ConfigError(f"a native bf16 product needs contiguous lines, not strides {strides}")
    if loaded().lmtrain_product(ctypes.byref(arguments), instruction_set(), thread_pool()):
        raise MachineError("out of memory for a product")
    return result


def multiply_add_rate() -> float:
    """FLOP/s of independent fp32 multiply-adds in registers on all threads, the best of five.

    No product is faster. Takes about half a second.
    """
    run, chosen, pool = loaded().lmtrain_multiply_adds, instruction_set(), thread_pool()
    rounds = 1 << 22
    rates: list[float] = []
    for _ in range(5):
        begin = time.perf_counter()
        count = run(rounds, chosen, pool)
        rates.append(count / (time.perf_counter() - begin))
    return max(rates)


def pointer(
    tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> int | None:
    """The data pointer of a tensor; None for None.

    Raises:
        ConfigError: another shape, dtype or device, or not contiguous.
    """
    if tensor is None:
        return None
    has_dtype = tensor.dtype == dtype and tensor.dtype != torch.float64 and tensor.is_cpu
    if tensor.shape != shape or not has_dtype or not tensor.is_contiguous():
        actual = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ConfigError(f"a native kernel needs {shape} {dtype}, contiguous; this is {actual}")
    return tensor.data_ptr()


def _matrix_pointer(tensor: Tensor, shape: tuple[int, ...]) -> int:
    """The data pointer of a bf16 or fp32 matrix with any strides.

    Raises:
        ConfigError: another shape, dtype or device.
    """
    has_dtype = tensor.dtype in (torch.bfloat16, torch.float32)
    if tensor.shape != shape or not has_dtype or not tensor.is_cpu:
        actual = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ConfigError(f"a native product needs {shape}, bf16 or fp32, on the CPU, not {actual}")
    return tensor.data_ptr()


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled library, or the reason why it is not available."""
    path = next(Path(__file__).parent.glob("compiled*.so"), None)
    if path is None:
        return "they were not compiled: there was no C++ compiler, or it failed"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        # It was compiled for another machine, or is damaged.
        return f"the compiled library cannot be loaded ({error}); reinstall: pip install -e ."
    layout = {name: number for name, number in _numbers(library).items() if "/" not in name}
    if layout != _expected_layout() or not all(hasattr(library, each) for each in _FUNCTIONS):
        return OTHER_VERSION
    library.lmtrain_scan.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 4, _ThreadPool]
    library.lmtrain_dropout.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 2, _ThreadPool]
    library.lmtrain_product.argtypes = [ctypes.c_void_p, ctypes.c_int, _ThreadPool]
    library.lmtrain_multiply_adds.argtypes = [ctypes.c_int64, ctypes.c_int, _ThreadPool]
    library.lmtrain_multiply_adds.restype = ctypes.c_int64
    library.lmtrain_cross_entropy.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 2, _ThreadPool]
    return library


def _numbers(library: ctypes.CDLL) -> dict[str, int]:
    """Numbers by name: sizes and offsets of structures, and gates of cells as `lstm/none`."""
    if not hasattr(library, "lmtrain_abi"):
        return {}
    library.lmtrain_abi.restype = ctypes.c_char_p
    words = library.lmtrain_abi().decode().split()
    return {name: int(number) for name, _, number in (word.partition("=") for word in words)}


def _expected_layout() -> dict[str, int]:
    """Sizes and offsets of the structures in this module."""
    sizes = {name: ctypes.sizeof(structure) for name, structure in _STRUCTURES.items()}
    offsets = {
        f"{name}.{field}": getattr(structure, field).offset
        for name, structure in _STRUCTURES.items()
        for field, *_ in structure._fields_
    }
    return sizes | offsets


@functools.cache
def num_gates() -> dict[tuple[str, str], int]:
    """The number of gates of each compiled cell, by name and peephole, in the order of table.h."""
    gates = ((name.split("/"), number) for name, number in _numbers(loaded()).items())
    return {(name[0], name[1]): number for name, number in gates if len(name) == 2}


def loaded() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        MachineError: it is not available.
    """
    library = _library()
    if isinstance(library, str):
        raise MachineError(f"no native kernels: {library}")
    return library


def thread_pool() -> _ThreadPool:
    """The threads of torch, for a call of the library."""
    return _ThreadPool(torch.get_num_threads(), *_openmp())


@functools.cache
def _openmp() -> tuple[int | None, int | None]:
    """Addresses of GOMP_parallel and omp_get_num_threads in the OpenMP runtime of torch.

    Its threads spin while they wait for work; a second pool of threads would compete with them.
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
