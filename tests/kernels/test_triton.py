"""The Triton scans, interpreted on the processor, against the float64 reference: every cell."""

import pytest
import torch
from every_cell import each_cell
from torch import Tensor

from lmtrain import device
from lmtrain.cells import Cell, create
from lmtrain.kernels import operator, reference
from lmtrain.kernels.scan import engine, scan
from lmtrain.kernels.triton import scan as triton

if triton.absence():
    pytest.skip(f"no Triton kernels: {triton.absence()}", allow_module_level=True)

# H, B, T
SIZES = [(1, 1, 1), (7, 3, 4), (17, 2, 3), (33, 9, 2)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    # conftest.py has set TRITON_INTERPRET before Triton was imported.
    monkeypatch.setenv("LMTRAIN_KERNELS", "triton")


def chance(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=device.generator(seed))


def results(run, cell: Cell, inputs: Tensor, state: list[Tensor], reverse: bool) -> list[Tensor]:
    """Outputs, last state, and every gradient with upstream gradients into all of them."""
    inputs = inputs.clone().requires_grad_()
    state = [part.clone().requires_grad_() for part in state]
    hidden, last = run(cell, inputs, tuple(state), reverse)
    outputs = [hidden, *last]
    upstream = [chance(*out.shape, seed=20 + i).to(out.dtype) for i, out in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, [inputs, *state, *cell.parameters()], upstream)
    return [tensor.detach().double() for tensor in (*outputs, *gradients)]


def by_triton(cell, inputs, state, reverse):
    name = operator.kernel(cell, inputs)
    assert name is not None
    return operator.scan(name, cell, inputs, state, reverse=reverse)


def by_reference(cell, inputs, state, reverse):
    return reference.scan(cell, inputs, state, None, reverse=reverse)


# The interpreter cuts off what bf16 has no room for, where a GPU rounds: twice the error.
@each_cell
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 1.5e-3)],
    ids=["fp32", "bf16", "fp16"],
)
def test_outputs_and_gradients_are_the_reference(name, options, size, reverse, kind, tolerance):
    hidden_size, rows, steps = size
    cell = create(name, 5, hidden_size, options)
    cell.initialize(device.generator(3), 0.5 / hidden_size**0.5, 0.5)
    inputs = chance(steps, rows, 5, seed=1).to(kind)
    state = [chance(rows, hidden_size, seed=2 + part) for part in range(len(cell.state_names))]

    found = results(by_triton, cell, inputs, state, reverse)
    expected = results(
        by_reference, cell.double(), inputs.double(), [s.double() for s in state], reverse
    )

    if kind != torch.float32 and options.get("activation") == "relu":
        # The slope of relu jumps at 0, and rounding takes some sums across: no gradients.
        found, expected = found[:2], expected[:2]
    largest = max(truth.norm() for truth in expected)
    for actual, truth in zip(found, expected, strict=True):
        # The gradients of a single unit are sums of a few numbers that may cancel each other.
        scale = largest if hidden_size == 1 else truth.norm()
        assert (actual - truth).norm() <= tolerance * scale


def test_the_door_chooses_triton(monkeypatch):
    cell = create("lstm", 3, 7, {})
    cell.initialize(device.generator(3), 0.2, 0.5)
    inputs = torch.ones(4, 2, 3)
    assert engine(cell) == "triton"
    ours, _ = scan(cell, inputs)
    monkeypatch.setenv("LMTRAIN_KERNELS", "torch")
    assert engine(cell) == "plain"
    theirs, _ = scan(cell, inputs)
    assert (ours - theirs).abs().max() < 1e-6
