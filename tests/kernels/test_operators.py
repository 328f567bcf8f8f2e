"""The PyTorch operators pass opcheck: schemas, fake tensors, autograd, tracing."""

import pytest
import torch
from every_cell import each_cell
from numerics import assert_same
from scans import randn
from torch.library import opcheck

from lmtrain import device
from lmtrain.cells import create
from lmtrain.errors import ConfigError
from lmtrain.kernels import cross_entropy, operator, plain
from lmtrain.kernels.variant import VARIANTS, index_of

DTYPES = [torch.float32, torch.bfloat16]
STEPS, ROWS, INPUTS, UNITS = 4, 3, 5, 7


def arguments(name, options, dtype, *, reverse=False, requires_grad=True, lengths=None):
    cell = create(name, INPUTS, UNITS, options)
    cell.initialize(device.generator(3), 0.5, 0.5)
    weights = dict(cell.named_parameters())
    state = torch.stack([randn(ROWS, UNITS, seed=2 + i) for i in range(len(cell.state_names))])
    tensors = [randn(STEPS, ROWS, INPUTS).to(dtype), state, weights["weight_input"].to(dtype)]
    tensors += [weights["bias"], weights["weight_recurrent"]]
    if "weight_peephole" in weights:
        tensors.append(weights["weight_peephole"])
    inputs, state, *rest = [tensor.detach().requires_grad_(requires_grad) for tensor in tensors]
    peephole = rest[3] if len(rest) > 3 else None
    return (inputs, state, *rest[:3], peephole, lengths, index_of(cell), reverse)


@each_cell
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_the_scan_passes_opcheck(name, options, dtype):
    is_bf16 = dtype == torch.bfloat16
    lengths = torch.tensor([3, 1, 4]) if is_bf16 else None
    opcheck(
        operator._scan.operator, arguments(name, options, dtype, reverse=is_bf16, lengths=lengths)
    )


@pytest.mark.slow
@each_cell
@pytest.mark.parametrize("needs_inputs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_backward_of_the_scan_passes_opcheck(name, options, needs_inputs, dtype):
    lengths = torch.tensor([3, 1, 4]) if needs_inputs else None
    forward = arguments(name, options, dtype, requires_grad=False, lengths=lengths)
    inputs, _, weight_input, _, recurrent, peephole, lengths, variant, reverse = forward
    hidden, last, activations, history = operator._forward(*forward)
    backward = (torch.ones_like(hidden), last, inputs, activations, history)

    opcheck(
        operator._scan_backward.operator,
        (*backward, weight_input, recurrent, peephole, lengths, variant, reverse, needs_inputs),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_bytes", [100, 1 << 25], ids=["slices", "rows"])
def test_the_loss_passes_opcheck(dtype, max_bytes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_MAX_CHUNK_BYTES", max_bytes)
    hidden, weight, bias = (
        randn(STEPS, ROWS, INPUTS).to(dtype),
        randn(11, INPUTS),
        randn(11),
    )
    targets = torch.randint(0, 11, (STEPS, ROWS), generator=device.generator(1))
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]

    opcheck(cross_entropy._loss.operator, (*leaves, targets, 0.5))
    with torch.no_grad():
        opcheck(cross_entropy._log_likelihood.operator, (*leaves, targets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sampled_loss_passes_opcheck(dtype):
    shapes = [(7, INPUTS), (11, INPUTS), (11,), (7, INPUTS), (7,)]
    operands = [randn(*shape) for shape in shapes]
    leaves = [
        (operand.to(dtype) if operand.dim() == 2 else operand).requires_grad_()
        for operand in operands
    ]

    opcheck(cross_entropy._sampled_loss.operator, (*leaves, torch.eye(7, 11) > 0, 0.5))


@each_cell
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 1, 4])], ids=["whole", "lengths"])
def test_without_kernels_the_operator_equals_the_plain_engine(name, options, reverse, lengths):
    cell = create(name, INPUTS, UNITS, options).double()
    cell.initialize(device.generator(3), 0.5, 0.5)
    inputs = randn(STEPS, ROWS, INPUTS).double().requires_grad_()
    state = tuple(
        randn(ROWS, UNITS, seed=2 + i).double().requires_grad_()
        for i in range(len(cell.state_names))
    )

    results = []
    for hidden, last in (
        operator.scan(cell, inputs, state, lengths, reverse=reverse),
        plain.scan(cell, inputs, state, lengths, reverse=reverse),
    ):
        outputs = [hidden, *last]
        upstream = [randn(*out.shape, seed=20 + i).double() for i, out in enumerate(outputs)]
        leaves = [inputs, *state, *cell.parameters()]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])

    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("index", range(len(VARIANTS)))
def test_a_variant_describes_its_cell(index):
    variant = VARIANTS[index]
    options = dict(zip(variant.cell.options, variant.options, strict=True))
    cell = create(variant.name, 2, 3, options)

    assert index_of(cell) == index
    assert type(variant.instance(3)) is type(cell)
    shape = variant.peephole_shape(3)
    assert shape == (cell.weight_peephole.shape if shape else None)


def test_a_subclass_has_no_kernel():
    cell = type("Subclass", (VARIANTS[0].cell,), {})(2, 3)

    with pytest.raises(ConfigError, match="the cell Subclass has no kernel"):
        operator.scan(cell, randn(2, 1, 2), cell.zero_state(1), None, reverse=False)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_second_derivatives_are_refused(factor):
    weight = randn(11, INPUTS).requires_grad_()
    targets = torch.zeros(STEPS, ROWS, dtype=torch.long)
    scale = torch.tensor(factor, requires_grad=True)
    loss = cross_entropy.cross_entropy(randn(STEPS, ROWS, INPUTS), weight, randn(11), targets, 1.0)
    (gradient,) = torch.autograd.grad(scale * loss, weight, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
