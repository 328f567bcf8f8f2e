"""Whether Triton's kernels run here. Triton itself is imported only where they do."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from lmtrain.kernels.native import library

# Products and sums may be one operation: as exact, and faster.
OPTIONS = {"enable_fp_fusion": True}

_KINDS = (torch.float32, torch.bfloat16, torch.float16)


def absence() -> str | None:
    """Why there are no Triton kernels here; None where there are."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs its kernels on the processor, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs(tensor: Tensor) -> bool:
    """Whether kernels run where this tensor is, and on numbers of its kind."""
    is_there = tensor.is_cuda or (library.choice() == "triton" and is_interpreted())
    return is_there and tensor.dtype in _KINDS and absence() is None


@functools.cache
def shared_bytes(place: torch.device) -> int:
    """Bytes of shared memory that a program may take on a GPU."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(place.index)["max_shared_mem"])


@functools.cache
def module(name: str) -> ModuleType:
    """A module of kernels."""
    return importlib.import_module(f"lmtrain.kernels.triton.{name}")
