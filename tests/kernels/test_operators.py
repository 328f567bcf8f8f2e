"""The operators of torch keep its rules: schemas, fake tensors, autograd, tracing."""

import pytest
import torch
from every_cell import each_cell
from numerics import assert_same
from torch.library import opcheck

from lmtrain import device
from lmtrain.cells import create
from lmtrain.errors import ConfigError
from lmtrain.kernels import cross_entropy, operator, plain
from lmtrain.kernels.variant import VARIANTS, index_of

KINDS = [torch.float32, torch.bfloat16]
STEPS, ROWS, INPUTS, UNITS = 4, 3, 5, 7


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=device.generator(seed))


def arguments(name, options, kind, *, reverse=False, requires_grad=True, lengths=None):
    cell = create(name, INPUTS, UNITS, options)
    cell.initialize(device.generator(3), 0.5, 0.5)
    weights = dict(cell.named_parameters())
    state = [drawn(ROWS, UNITS, seed=2 + i) for i in range(len(cell.state_names))]
    tensors = [drawn(STEPS, ROWS, INPUTS).to(kind), *state, weights["weight_input"].to(kind)]
    tensors += [weights["bias"], weights["weight_recurrent"]]
    if "weight_peephole" in weights:
        tensors.append(weights["weight_peephole"])
    tensors = [tensor.detach().requires_grad_(requires_grad) for tensor in tensors]
    inputs, state, rest = tensors[0], tensors[1 : 1 + len(state)], tensors[1 + len(state) :]
    peephole = rest[3] if len(rest) > 3 else None
    return (inputs, state, *rest[:3], peephole, lengths, index_of(cell), reverse)


@each_cell
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_scan_keeps_the_rules(name, options, kind):
    is_bf16 = kind == torch.bfloat16
    lengths = torch.tensor([3, 1, 4]) if is_bf16 else None
    opcheck(operator._scan, arguments(name, options, kind, reverse=is_bf16, lengths=lengths))


@each_cell
@pytest.mark.parametrize("needs_inputs", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_its_backward_keeps_the_rules(name, options, needs_inputs, kind):
    lengths = torch.tensor([3, 1, 4]) if needs_inputs else None
    given = arguments(name, options, kind, requires_grad=False, lengths=lengths)
    inputs, _, weight_input, _, recurrent, peephole, lengths, variant, reverse = given
    hidden, last, activations, history = operator._forward(*given)
    backward = (torch.ones_like(hidden), last, inputs, activations, history)

    opcheck(
        operator._scan_backward,
        (*backward, weight_input, recurrent, peephole, lengths, variant, reverse, needs_inputs),
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("most_bytes", [100, 1 << 25], ids=["slices", "rows"])
def test_the_loss_keeps_the_rules(kind, most_bytes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_MOST_BYTES", most_bytes)
    hidden, weight, bias = drawn(STEPS, ROWS, INPUTS).to(kind), drawn(11, INPUTS), drawn(11)
    targets = torch.randint(0, 11, (STEPS, ROWS), generator=device.generator(1))
    given = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]

    opcheck(cross_entropy._loss, (*given, targets, 0.5))
    with torch.no_grad():
        opcheck(cross_entropy._log_likelihood_operator, (*given, targets))


@each_cell
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 1, 4])], ids=["whole", "lengths"])
def test_without_kernels_the_operator_is_the_plain_engine(name, options, reverse, lengths):
    cell = create(name, INPUTS, UNITS, options).double()
    cell.initialize(device.generator(3), 0.5, 0.5)
    inputs = drawn(STEPS, ROWS, INPUTS).double().requires_grad_()
    state = tuple(
        drawn(ROWS, UNITS, seed=2 + i).double().requires_grad_()
        for i in range(len(cell.state_names))
    )

    results = []
    for hidden, last in (
        operator.scan(cell, inputs, state, lengths, reverse=reverse),
        plain.scan(cell, inputs, state, lengths, reverse=reverse),
    ):
        outputs = [hidden, *last]
        upstream = [drawn(*out.shape, seed=20 + i).double() for i, out in enumerate(outputs)]
        wanted = [inputs, *state, *cell.parameters()]
        results.append([*outputs, *torch.autograd.grad(outputs, wanted, upstream)])

    for ours, truth in zip(*results, strict=True):
        assert_same(ours, truth)


def test_every_variant_is_that_of_a_cell():
    for index, variant in enumerate(VARIANTS):
        cell = create(
            variant.name, 2, 3, dict(zip(variant.cell.options, variant.options, strict=True))
        )

        assert index_of(cell) == index
        assert type(variant.instance(3)) is type(cell)
        shape = variant.peephole_shape(3)
        assert shape == (cell.weight_peephole.shape if shape else None)


def test_a_subclass_has_no_kernel():
    own = type("Own", (VARIANTS[0].cell,), {})(2, 3)

    with pytest.raises(ConfigError, match="no kernel for Own"):
        operator.scan(own, drawn(2, 1, 2), own.zero_state(1), None, reverse=False)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_second_derivatives_are_refused(factor):
    weight = drawn(11, INPUTS).requires_grad_()
    targets = torch.zeros(STEPS, ROWS, dtype=torch.long)
    scale = torch.tensor(factor, requires_grad=True)
    loss = cross_entropy.cross_entropy(drawn(STEPS, ROWS, INPUTS), weight, drawn(11), targets, 1.0)
    (gradient,) = torch.autograd.grad(scale * loss, weight, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
