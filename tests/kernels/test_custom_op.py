"""Functions with gradients of their own: in ordinary and in traced programs."""

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from lmtrain.kernels.custom_op import CustomOp


def doubled(inputs: torch.Tensor, times: float) -> torch.Tensor:
    return inputs * 2 * times


def fake(inputs: torch.Tensor, times: float) -> torch.Tensor:
    return torch.empty_like(inputs)


def setup_context(ctx, inputs, output):
    _, ctx.times = inputs


@once_differentiable
def backward(ctx, grad):
    # Not the true gradient, to tell it from that of autograd.
    return grad * 10 * ctx.times, None


double = CustomOp("double_of_a_test", doubled, fake)
double.differentiate(setup_context, backward)


class Module(torch.nn.Module):
    def forward(self, inputs):
        return double(inputs, 3.0)


class Calls(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


def test_an_ordinary_program_calls_the_function_and_not_the_operator():
    inputs = torch.ones(2, requires_grad=True)
    with Calls() as calls:
        outputs = double(inputs, 3.0)
        outputs.sum().backward()
    with torch.no_grad():
        without_gradient = double(inputs, 3.0)

    assert outputs.tolist() == without_gradient.tolist() == [6, 6]
    assert inputs.grad.tolist() == [30, 30]
    assert not without_gradient.requires_grad
    assert calls.names
    assert not any("double_of_a_test" in name for name in calls.names)


def test_an_exported_program_contains_the_operator():
    program = torch.export.export(Module(), (torch.ones(2),))

    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.lmtrain.double_of_a_test.default]


def test_the_gradient_of_a_compiled_program_is_that_of_the_function():
    inputs = torch.ones(2, requires_grad=True)
    torch.compile(Module(), backend="aot_eager", fullgraph=True)(inputs).sum().backward()

    assert inputs.grad.tolist() == [30, 30]
