"""Whether Triton kernels are available. Triton is only imported where they run."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from lmtrain.kernels.native import library

# Fused multiply-add: faster, and not less accurate.
COMPILE_OPTIONS = {"enable_fp_fusion": True}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable_reason() -> str | None:
    """Why Triton kernels are not available; None if they are."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def supports(tensor: Tensor) -> bool:
    """Whether kernels run on the device and the dtype of a tensor."""
    has_device = tensor.is_cuda or (library.requested_kernels() == "triton" and is_interpreted())
    return has_device and tensor.dtype in _DTYPES and unavailable_reason() is None


@functools.cache
def shared_memory_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a program can use on a GPU."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


@functools.cache
def module(name: str) -> ModuleType:
    """A module of this package, imported on first use."""
    return importlib.import_module(f"lmtrain.kernels.triton.{name}")
