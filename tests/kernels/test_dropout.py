"""The native kernel of dropout against the definition of its masks."""

import pytest
import torch
from torch.library import opcheck

from lmtrain import device
from lmtrain.errors import ConfigError
from lmtrain.kernels import dropout as module
from lmtrain.kernels.dropout import dropout
from lmtrain.kernels.native import library

if library.unavailable_reason():
    reason = f"no native kernels: {library.unavailable_reason()}"
    pytest.skip(reason, allow_module_level=True)

INSTRUCTION_SETS = library.INSTRUCTION_SETS[: library.instruction_set() + 1]
DTYPES = [torch.float32, torch.bfloat16] if library.has_bf16() else [torch.float32]


def mix(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = x ^ (x >> shift)
        # The product of 64 bits would overflow: the halves of x are multiplied on their own.
        x = ((x & 0xFFFF) * factor + (((x >> 16) * factor & 0xFFFF) << 16)) & 0xFFFFFFFF
    return x ^ (x >> 16)


def kept(size, p, seed):
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    hashes = mix((mix((torch.arange(size) + low) & 0xFFFFFFFF) + high) & 0xFFFFFFFF)
    return hashes >= round(p * (1 << 32))


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=device.generator(3)).to(dtype)


def random_seeds(count):
    return torch.empty(count, dtype=torch.int64).random_(
        -(1 << 63), None, generator=device.generator(5)
    )


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("size", "mask_size"), [(1, 1), (35, 7), (4000, 500), (100_003, 100_003), (100_000, 50_000)]
)
def test_the_kernel_equals_its_definition(
    instruction_set, dtype, threads, size, mask_size, monkeypatch
):
    monkeypatch.setenv("LMTRAIN_INSTRUCTION_SET", instruction_set)
    if dtype == torch.bfloat16 and not library.has_bf16():
        pytest.skip(f"no bf16 with {instruction_set}")
    torch.set_num_threads(threads)
    inputs = numbers(size, dtype=dtype)
    factor = (1 << 32) / ((1 << 32) - round(0.3 * (1 << 32)))

    for seed in (0x123456789ABCDEF0, -(1 << 63) + 5):
        outputs = library.dropout(inputs, mask_size, 0.3, seed)

        mask = kept(mask_size, 0.3, seed).repeat(size // mask_size)
        assert torch.equal(outputs, torch.where(mask, factor * inputs.float(), 0).to(dtype))


@pytest.mark.parametrize("p", [0.1, 0.35, 0.5, 0.9])
def test_masks_of_random_seeds_are_independent(p):
    ones = torch.ones(1 << 20)
    masks = [library.dropout(ones, len(ones), p, int(seed)) > 0 for seed in random_seeds(6)]
    # Mean 0 and variance 1: a mean of 2^20 independent products has a standard deviation of 2^-10.
    signs = (torch.stack(masks).float() - (1 - p)) / (p * (1 - p)) ** 0.5

    assert signs.mean(1).abs().max() < 5 * 2**-10
    for lag in (0, 1, 2, 3, 4, 16, 512, 640, 1000, 2048):
        products = signs[:, lag:] @ signs[:, : len(ones) - lag].T / len(ones)
        expected = torch.eye(len(masks)) * (lag == 0)
        assert (products - expected).abs().max() < 6 * 2**-10


@pytest.mark.parametrize("is_locked", [False, True])
def test_first_and_second_derivatives_have_the_mask_of_the_outputs(is_locked):
    inputs = numbers(5, 3, 70).transpose(1, 2).requires_grad_()
    upstream = numbers(5, 70, 3).requires_grad_()

    outputs = dropout(inputs, 0.4, device.generator(1), is_locked=is_locked)
    (gradient,) = torch.autograd.grad(outputs, inputs, upstream, create_graph=True)
    (second,) = torch.autograd.grad(gradient, upstream, inputs)

    mask = outputs != 0
    assert is_locked == bool((mask == mask[0]).all())
    assert 0.5 < float(mask.float().mean()) < 0.7
    assert torch.allclose(gradient, upstream * mask / 0.6)
    assert torch.equal(second, outputs)


def test_without_gradients_the_mask_is_the_same():
    inputs = numbers(40, 50)
    outputs = dropout(inputs, 0.4, device.generator(1))

    with torch.no_grad():
        assert torch.equal(dropout(inputs, 0.4, device.generator(1)), outputs)


@pytest.mark.parametrize(("p", "share"), [(0.0, 0.0), (1 - 2**-20, 1.0)])
def test_the_smallest_and_the_largest_probability(p, share):
    outputs = library.dropout(torch.ones(4096), 4096, p, 7)

    assert float((outputs == 0).float().mean()) == share


@pytest.mark.parametrize(
    ("inputs", "mask_size"),
    [
        (torch.ones(4, dtype=torch.float16), 4),
        (torch.ones(4, dtype=torch.int32), 4),
        (torch.ones(4, device="meta"), 4),
        (torch.ones(4, 4).T[:2], 8),
        (torch.ones(4), 0),
    ],
    ids=["fp16", "int32", "meta", "strided", "no-mask"],
)
def test_other_tensors_and_sizes_are_refused(inputs, mask_size):
    with pytest.raises(ConfigError):
        library.dropout(inputs, mask_size, 0.5, 1)


@pytest.mark.parametrize("is_locked", [False, True])
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_the_operator_passes_opcheck(is_locked, kernels, monkeypatch):
    monkeypatch.setenv("LMTRAIN_KERNELS", kernels)
    inputs = numbers(5, 3, 4).transpose(1, 2).requires_grad_()

    opcheck(module._seeded.operator, (inputs, is_locked, 0.4, -(1 << 63)))
