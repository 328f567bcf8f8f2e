"""The native kernel of dropout against the same hash in torch."""

import pytest
import torch

from lmtrain import device
from lmtrain.kernels.dropout import dropout
from lmtrain.kernels.native import library

SETS = library.INSTRUCTION_SETS[: library.instruction_set() + 1]
SEED = 0x123456789ABCDEF0


def mix(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        # A product of 64 bits would overflow: the upper half of x is multiplied on its own.
        x = x ^ (x >> shift)
        x = ((x & 0xFFFF) * factor + (((x >> 16) * factor & 0xFFFF) << 16)) & 0xFFFFFFFF
    return x ^ (x >> 16)


def kept(size, p, seed):
    """Whether each element is kept, by the definition of the hash."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    hashes = mix((mix((torch.arange(size) + low) & 0xFFFFFFFF) + high) & 0xFFFFFFFF)
    return hashes >= round(p * (1 << 32))


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=device.generator(3)).to(dtype)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("size", "mask_size"), [(1, 1), (35, 7), (4000, 500), (99_000, 33_000)])
def test_the_kernel_equals_its_definition(
    instruction_set, dtype, threads, size, mask_size, monkeypatch
):
    monkeypatch.setenv("LMTRAIN_INSTRUCTION_SET", instruction_set)
    if dtype == torch.bfloat16 and not library.has_bf16():
        pytest.skip("no bf16")
    torch.set_num_threads(threads)
    inputs = numbers(size, dtype=dtype)

    outputs = library.dropout(inputs, mask_size, 0.3, SEED)

    mask = kept(mask_size, 0.3, SEED).repeat(size // mask_size)
    factor = (1 << 32) / ((1 << 32) - round(0.3 * (1 << 32)))
    assert torch.equal(outputs, torch.where(mask, factor * inputs.float(), 0).to(dtype))


def test_masks_of_different_seeds_are_independent():
    ones = torch.ones(1 << 20)
    seeds = [*range(4), *(seed << 32 for seed in range(1, 4)), 1 << 62]

    masks = torch.stack([library.dropout(ones, len(ones), 0.5, seed) for seed in seeds]) - 1

    # The standard deviation of a mean of 2^20 signs is 2^-10.
    assert (torch.cov(masks) - torch.eye(len(seeds))).abs().max() < 5 * 2**-10
    assert masks.mean(1).abs().max() < 5 * 2**-10
    for lag in (1, 2, 4, 16, 512, 2048):
        assert (masks[:, lag:] * masks[:, :-lag]).mean(1).abs().max() < 5 * 2**-10


@pytest.mark.parametrize("is_locked", [False, True])
def test_the_gradient_has_the_same_mask(is_locked):
    inputs = numbers(5, 3, 70).transpose(1, 2).requires_grad_()

    outputs = dropout(inputs, 0.4, device.generator(1), is_locked=is_locked)
    (gradient,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)

    assert torch.allclose(outputs, gradient * inputs)
    assert is_locked == bool((gradient == gradient[0]).all())
    assert set(gradient.unique().tolist()) == {0, torch.tensor(1 / 0.6).item()}


def test_masks_of_torch_have_the_same_shape_and_scale(monkeypatch):
    monkeypatch.setenv("LMTRAIN_KERNELS", "torch")
    inputs = torch.ones(4, 3, 500)

    outputs = dropout(inputs, 0.25, device.generator(1), is_locked=True)

    assert (outputs == outputs[0]).all()
    assert set(outputs.unique().tolist()) == {0, torch.tensor(1 / 0.75).item()}
    assert abs(float(outputs.mean()) - 1) < 0.1
